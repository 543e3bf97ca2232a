"""Nodes whose weights are constants as Flax's layers, which pruning and packing find."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseflax.layers.int8 import Scale
from sparseflax.onnx.graph import Node
from sparseflax.onnx.ops.image import transposed_kernel, transposed_window, window
from sparseflax.onnx.value import Unsupported, Value, last, value

ZEROS = nnx.initializers.zeros_init()
Constants = dict[str, np.ndarray]
Scales = Mapping[str, tuple[np.ndarray, int]]


class Layer(NamedTuple):
    """A layer of Flax and what it takes.

    Attributes:
      module: it.
      channels: it takes, or features.
      rank: of its input; None for any.
    """

    module: Any
    channels: int
    rank: int | None = None

    def __str__(self) -> str:
        return type(self.module).__name__


def call(module: Any, channels: int, rank: int | None, features: bool, x: Value) -> Value:
    """A layer's output.

    Args:
      module: takes its channels, or features, at the end.
      channels, rank: what it takes, as in `Layer`.
      features: whether it acts on ONNX's last axis, and not on axis 1.
      x: the input.
    """
    found = x.shape[-1] if features and x.rank else x.shape[1] if x.rank > 1 else None
    if found != channels or (rank is not None and rank != x.rank):
        dimensions = "" if rank in (None, x.rank) else f" in {rank} dimensions"
        raise Unsupported(f"its weights take {channels} {'features' if features else 'channels'}{dimensions}, its input "
                          f"has {found if rank in (None, x.rank) else f'shape {x.shape}'}")
    return value(module(x.plain())) if features else Value(module(x.channels_last()), last(x.rank))


def layer(node: Node, constants: Constants, image: int | None = None, scales: Scales = MappingProxyType({})) -> Layer | None:
    """The layer that a node is; None for one that is none, or whose weights are computed.

    Args:
      node: the node.
      constants: by name.
      image: channels of the images that were flattened in our order to become its input.
      scales: of constants that were dequantized, by name, and the axis that they are along.

    Raises:
      Unsupported: it can be no layer.
    """
    make = LAYERS.get(node.op)
    given = [constants.get(name) for name in node.inputs[1:]]
    if make is None or not given or any(name and array is None for name, array in zip(node.inputs[1:], given, strict=True)):
        return None
    if unusable := [array.dtype for array in given if array is not None and array.dtype.kind != "f"]:
        raise Unsupported(f"its weights are {unusable[0]}, wanted floating point")
    found, weights = make(node, given, image), given[0]
    if found is None or weights is None or not isinstance(found.module, nnx.Conv | nnx.Linear):
        return found
    if node.inputs[1] in scales:
        scale, axis = scales[node.inputs[1]]
        oc, along = found.module.kernel.shape[-1], 0 if node.op == "Conv" or node.attributes.get("transB", 0) else 1
        if scale.size == 1 or (scale.shape == (oc,) and axis % weights.ndim == along):
            own = np.broadcast_to(scale.reshape(-1), (oc,)).astype(np.float32)
            setattr(found.module, "kernel_scale", Scale(jnp.asarray(own)))  # noqa: B010
    return found


def with_bias(module: Any, features: bool, added: np.ndarray) -> bool:
    """Gives a layer what is added to each of its channels, or features, as its bias; whether it is that, and it has none yet.

    Args:
      module: it; it is changed.
      features: whether they are on ONNX's last axis, and not on axis 1.
      added: the constant.
    """
    module = getattr(module, "layer", module)  # of one that rounds its input
    if not isinstance(module, nnx.Conv | nnx.ConvTranspose | nnx.Linear) or module.bias is not None or added.dtype.kind != "f":
        return False
    *kernel, oc = module.kernel.shape
    # A matrix may be multiplied by a single vector: more dimensions than that has would add one to the output.
    wanted = (oc,) if features else (1, oc, *[1] * (len(kernel) - 1))
    if not 0 < added.ndim <= len(wanted) or (*wanted[:len(wanted) - added.ndim], *added.shape) != wanted:
        return False
    module.bias, module.use_bias = nnx.Param(jax.device_put(np.ascontiguousarray(added.reshape(oc), np.float32))), True
    return True


def _conv(node: Node, given: list[Any], _: Any) -> Layer:
    kernel, bias = _kernel(node, given)
    oc, icg, *size = kernel.shape
    settings = dict(node.attributes)
    groups, named = settings.pop("group", 1), settings.pop("kernel_shape", size)
    if groups < 1 or oc % groups:
        raise Unsupported(f"group={groups} with a kernel of shape {kernel.shape}, wanted a divisor of its {oc} output channels")
    if tuple(named) != tuple(size):
        raise Unsupported(f"its kernel_shape is {tuple(named)}, its kernel {kernel.shape}")
    at = window(size, **settings)
    weights = {"kernel": kernel.transpose(*range(2, kernel.ndim), 1, 0), "bias": _vector(bias, oc)}
    made = _made(nnx.Conv, (icg * groups, oc, size, at.strides), weights, padding=at.padding, kernel_dilation=at.dilations,
                 feature_group_count=groups, use_bias=bias is not None, kernel_init=ZEROS)
    return Layer(made, icg * groups, kernel.ndim)


def _conv_transpose(node: Node, given: list[Any], _: Any) -> Layer | None:
    kernel, bias = _kernel(node, given)
    settings = dict(node.attributes)
    groups, named = settings.pop("group", 1), settings.pop("kernel_shape", kernel.shape[2:])
    ic, ocg, *size = kernel.shape
    if tuple(named) != tuple(size):
        raise Unsupported(f"its kernel_shape is {tuple(named)}, its kernel {kernel.shape}")
    if groups != 1 or settings.get("output_shape") or settings.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return None  # which Flax's layer does not have
    at, sides = transposed_window(size, None, **settings)
    weights = {"kernel": transposed_kernel(kernel, 1), "bias": _vector(bias, ocg)}
    made = _made(nnx.ConvTranspose, (ic, ocg, size, at.strides), weights, padding=sides, kernel_dilation=at.dilations,
                 use_bias=bias is not None, kernel_init=ZEROS)
    return Layer(made, ic, kernel.ndim)


def _gemm(node: Node, given: list[Any], image: int | None) -> Layer | None:
    kernel, bias = given[0], given[1] if len(given) > 1 else None
    if node.attributes.get("transA", 0):
        return None
    if kernel.ndim != 2:
        raise Unsupported(f"its weights have shape {kernel.shape}, wanted a matrix")
    kernel = np.float32(node.attributes.get("alpha", 1.0)) * (kernel.T if node.attributes.get("transB", 0) else kernel)
    if bias is not None and bias.ndim == 2 and len(bias) > 1:
        return None
    bias = None if bias is None else np.float32(node.attributes.get("beta", 1.0)) * bias
    return _linear(kernel, bias, image)._replace(rank=2)


def _matmul(node: Node, given: list[Any], image: int | None) -> Layer | None:
    return _linear(given[0], None, image) if given[0].ndim == 2 else None


def _linear(kernel: np.ndarray, bias: np.ndarray | None, image: int | None) -> Layer:
    """A fully connected layer (ic, oc); its rows put in our order where it takes flattened images."""
    if 0 in kernel.shape:
        raise Unsupported(f"its weights have shape {kernel.shape}, wanted no size of 0")
    if image is not None:
        if len(kernel) % image:
            raise Unsupported(f"its weights take {len(kernel)} features, its input has images of {image} channels")
        kernel = kernel.reshape(image, -1, kernel.shape[1]).swapaxes(0, 1).reshape(kernel.shape)
    weights = {"kernel": kernel, "bias": _vector(bias, kernel.shape[1])}
    return Layer(_made(nnx.Linear, kernel.shape, weights, use_bias=bias is not None, kernel_init=ZEROS), len(kernel))


def _norm(node: Node, given: list[Any], _: Any) -> Layer | None:
    if node.attributes.get("training_mode", 0) or not node.attributes.get("spatial", 1):
        return None
    scale, bias, mean, var = given
    if len({array.shape for array in given}) > 1 or scale.ndim != 1:
        raise Unsupported(f"its scale, B, mean and var have {scale.size}, {bias.size}, {mean.size} and {var.size} channels, "
                          "wanted the same")
    made = _made(nnx.BatchNorm, scale.shape, {"scale": scale, "bias": bias, "mean": mean, "var": var}, use_running_average=True,
                 epsilon=node.attributes.get("epsilon", 1e-5))
    return Layer(made, scale.size)


def _kernel(node: Node, given: list[Any]) -> tuple[np.ndarray, np.ndarray | None]:
    kernel, bias = given[0], given[1] if len(given) > 1 else None
    if kernel.ndim < 3 or 0 in kernel.shape:
        raise Unsupported(f"its kernel has shape {kernel.shape}, wanted 3 dimensions or more and no size of 0")
    return kernel, bias


def _vector(bias: np.ndarray | None, features: int) -> np.ndarray | None:
    """A bias as (features,)."""
    if bias is None:
        return None
    if bias.size not in (1, features) or bias.shape[-1:] not in ((), (1,), (features,)):
        raise Unsupported(f"its bias is {bias.dtype} of shape {bias.shape}, wanted float32 ({features},)")
    return np.broadcast_to(bias.reshape(-1), (features,))


def _made(kind: Any, sizes: Sequence[Any], weights: dict[str, np.ndarray | None], **settings: Any) -> Any:
    """A layer with these weights. What it would begin with is not made: that is a compilation for each shape."""
    made = nnx.eval_shape(lambda: kind(*sizes, rngs=nnx.Rngs(0), **settings))
    for name, array in weights.items():
        if array is not None:
            variable = nnx.BatchStat if name in ("mean", "var") else nnx.Param
            setattr(made, name, variable(jax.device_put(np.ascontiguousarray(array))))
    return made


LAYERS: dict[str, Callable[[Node, list[Any], int | None], Layer | None]] = {
    "BatchNormalization": _norm, "Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "MatMul": _matmul,
}
FEATURES = ("Gemm", "MatMul")  # that act on the last axis
