"""Weights from outside for the published networks: PyTorch state dicts and safetensors files, with their usual names.

    model = nnx.eval_shape(lambda: resnet50(rngs=nnx.Rngs(0)))      # without initial weights; others are replaced
    load_weights(model, "resnet50-0676ba61.pth")     # torchvision's; or a .safetensors file

Images are NCHW there and NHWC here: kernels of convolutions go from (oc, ic, kh, kw) to (kh, kw, ic, oc), those of fully
connected layers from (oc, ic) to (ic, oc), where they take a flattened image with its rows in our order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseflax.files import safetensors

# What Flax calls a layer's arrays, in PyTorch's words.
TORCH = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
COUNTS = "num_batches_tracked"  # in PyTorch's batch norms; not needed at inference
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # classifiers of GoogLeNet that are used in training only


def load_weights(model: nnx.Module, path: str | Path) -> None:
    """Puts a file's weights into a model of experiments.models, all of them or none.

    Args:
      model: changed in place; its layers are named as in the file: "layer1.0.conv1.weight" is layer1/0/conv1.
      path: .safetensors, or anything else for a state dict that `torch.load(weights_only=True)` reads, alone or as "state_dict"
        of a checkpoint.

    Raises:
      ImportError: PyTorch is not installed, and the file needs it.
      FileNotFoundError: no such file.
      ValueError: the file is damaged, or names or shapes are not those of the model; all of them are named.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        tensors = safetensors.parse(path.read_bytes())[0]
    else:
        tensors = _state_dict(path)
    try:
        put(model, tensors)
    except ValueError as error:
        raise ValueError(f"{path} does not fit the {type(model).__name__}: {error}") from None


def put(model: nnx.Module, tensors: Mapping[str, np.ndarray]) -> None:
    """Puts arrays with PyTorch's names, shapes and layouts into a model, all of them or none.

    Raises:
      ValueError: names or shapes are not those of the model, or an array is not of floats; all are named.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(COUNTS)
               and not name.startswith(AUXILIARY)}
    flat: list[tuple[Any, Any]] = list(nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nnx.BatchStat))))
    variables = {".".join([*map(str, keys[:-1]), TORCH[keys[-1]]]): variable for keys, variable in flat}
    wrong = [f"{name} is missing" for name in variables if name not in tensors]
    wrong += [f"{name} is superfluous" for name in tensors if name not in variables]
    arrays = {}
    for name, variable in variables.items():
        if name not in tensors:
            continue
        tensor, wanted = np.asarray(tensors[name]), _torch_shape(variable.shape)
        if tensor.shape != wanted:
            wrong.append(f"{name} has shape {tensor.shape}, wanted {wanted}")
        elif not jnp.issubdtype(tensor.dtype, jnp.floating):
            wrong.append(f"{name} is {tensor.dtype}, wanted float32")
        else:
            arrays[name] = tensor.astype(np.float32)
    if wrong:
        raise ValueError("; ".join(wrong))
    channels = {name: len(arrays[f"{source}.bias"]) for name, source in getattr(model, "flattened", {}).items()}
    nnx.update(model, nnx.from_flat_state([
        (keys, variable.replace(jnp.asarray(_ours(arrays[name], channels.get(name.removesuffix(".weight"))), jnp.float32)))
        for (keys, variable), name in zip(flat, variables, strict=True)]))


def _state_dict(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"reading {path} needs PyTorch: pip install torch, or convert it to safetensors") from error
    try:
        # Without code in it: what weights_only refuses could run anything.
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # UnpicklingError, RuntimeError, EOFError
        raise ValueError(f"{path} is no state dict that can be read without running code in it ({error})") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else {}
    wrong = [str(name) for name, tensor in found.items() if not isinstance(tensor, torch.Tensor)]
    if not found or wrong:
        raise ValueError(f"{path} is no state dict: wanted names and tensors, found {wrong[:5] or 'nothing of that'}")
    return {str(name): tensor.to(torch.float32).numpy() if tensor.is_floating_point() else tensor.numpy()
            for name, tensor in found.items()}


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:1:-1], *shape[:2]) if len(shape) == 4 else shape[::-1]


def _ours(tensor: np.ndarray, channels: int | None) -> np.ndarray:
    """A tensor in our layout; `channels` of the images that a fully connected layer takes flattened, or None."""
    if tensor.ndim == 4:
        return tensor.transpose(2, 3, 1, 0)
    if channels is not None and tensor.ndim == 2:
        oc, ic = tensor.shape
        return tensor.reshape(oc, channels, ic // channels).transpose(2, 1, 0).reshape(ic, oc)
    return tensor.T
