"""The layers of a network, each pruned once for every density that is asked of it, and kept in the job's folder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseflax.cost.progress import progress
from sparseflax.cost.shape import ConvShape
from sparseflax.files.safetensors import seal, unseal, write
from sparseflax.prune.guide import Guidance, constant
from sparseflax.prune.mask import kernels
from sparseflax.prune.obs import hessians, prune_kernel
from sparseflax.prune.one_shot import one_shot

ROUNDS = 4, 3, 2, 1  # of optimal brain surgery: the first that is affordable
AFFORDABLE = 4e11  # flops of a layer's surgery: half a minute or so
GRAM = 1 << 29  # bytes of X^T X that are held at a time
ROWS = 32  # of X for each of its columns: neighbouring positions of an image tell little that is new


def prune_layers(model: nnx.Module, guides: Iterable[Guidance], batches: Callable[[], Iterable[Any]], examples: int,
                 folder: Path) -> None:
    """Prunes every layer of the guides to every density they have for it, where that is not in the folder yet.

    Args:
      model: the dense network.
      guides: say which layers, and how far.
      batches: inputs, each time anew.
      examples: in all of them.
      folder: gets a file for each layer and density, whole or not at all.
    """
    wanted = {(name, density): layer.shape for guide in guides for name, layer in guide.layers.items()
              if (density := layer.density) < 1 and not _file(folder, name, density).exists()}
    if not wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    found = kernels(nnx.state(model, nnx.Param))
    positions = {name: -(-ROWS * inputs(shape) // examples) for (name, _), shape in wanted.items() if shape is not None}
    sizes = {name: inputs(shape)**2 * shape.groups * 8 for (name, _), shape in wanted.items() if shape is not None}
    with progress("pruning layers", len(wanted)) as advance:
        done = 0
        for group in _groups(sizes):
            costs = {(name, density): rounds(shape, density) for (name, density), shape in wanted.items()
                     if name in group and shape is not None}
            grams = hessians(model, {name for (name, _), count in costs.items() if count}, batches(), positions)
            for (name, density), count in costs.items():
                if count:
                    kernel = prune_kernel(found[name], grams[name], density, rounds=count)
                else:
                    state = one_shot(nnx.state(model, nnx.Param), constant({name: density}))
                    kernel = kernels(state)[name]
                write(_file(folder, name, density), seal("layer", {"kernel": np.asarray(kernel)}, {"layer": name}))
                done += 1
                advance(done, f"{name} to {density:.3f}")


def assembled(model: nnx.Module, guide: Guidance, folder: Path) -> Any:
    """A copy of the network with the guide's layers as they were pruned to its densities.

    Raises:
      ValueError: a file is damaged, or of other layers.
    """
    copy: Any = nnx.clone(model)
    modules: dict[str, Any] = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(copy)}
    for name, density in guide.densities.items():
        file = _file(folder, name, density)
        try:
            tensors, metadata = unseal("layer", file.read_bytes())
            if metadata.get("layer") != name or tensors["kernel"].shape != modules[name].kernel.shape:
                raise ValueError(f"it holds {metadata.get('layer')!r}")
        except (KeyError, ValueError) as error:
            raise ValueError(f"{file} is no pruned layer {name!r}: {error}; delete it, and it is made again") from error
        modules[name].kernel.set_value(jnp.asarray(tensors["kernel"]))
    return copy


def rounds(shape: ConvShape, density: float) -> int:
    """In how many rounds of surgery the layer is pruned: 0 where none is affordable, and magnitude has to do."""
    return next((count for count in ROUNDS if surgery_flops(shape, density, count) <= AFFORDABLE), 0)


def surgery_flops(shape: ConvShape, density: float, count: int) -> float:
    """Of one layer: an inverse for each group, then in each round a Cholesky factor for each output, of what it keeps or loses,
    whichever is less, and what the scores of the next round take."""
    n, flops = inputs(shape), 0.0
    for part in range(1, count + 1):
        kept = n * density ** (part / count)
        small = min(kept, n - kept)
        flops += small**3 / 3 + (part < count) * (kept**3 / 3 if small == kept else small**2 * kept)
    return shape.groups * 2 * n**3 + shape.oc * flops


def inputs(shape: ConvShape) -> int:
    """Weights of one output."""
    return shape.weights // shape.oc


def _groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names, as many together as fit into GRAM bytes."""
    groups, held = [[]], 0
    for name, size in sizes.items():
        if held + size > GRAM and groups[-1]:
            groups, held = [*groups, []], 0
        groups[-1].append(name)
        held += size
    return groups


def _file(folder: Path, name: str, density: float) -> Path:
    digest = hashlib.sha256(f"{name} {density!r}".encode()).hexdigest()[:16]
    return folder / f"{digest}.safetensors"
