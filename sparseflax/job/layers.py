"""The layers of a network, each pruned once for every density that is asked of it, and kept in the job's folder."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseflax.cost.atomic import write_atomically
from sparseflax.cost.progress import progress
from sparseflax.cost.shape import ConvShape
from sparseflax.files.safetensors import seal, unseal
from sparseflax.prune.guide import Guidance, constant
from sparseflax.prune.mask import kernels
from sparseflax.prune.obs import hessians, prune_layer
from sparseflax.prune.one_shot import one_shot

ROUNDS = 4, 3, 2, 1  # of optimal brain surgery: the first that is affordable
AFFORDABLE = 4e11  # flops of a layer's surgery: half a minute or so
GRAM = 1 << 29  # bytes of X^T X that are held at a time
ROWS = 32  # of X for each of its columns: neighbouring positions of an image tell little that is new


class Grams:
    """X^T X of a network's layers, from its pictures; as many as fit into GRAM bytes are kept for the next time."""

    def __init__(self, model: nnx.Module, batches: Callable[[], Iterable[Any]], examples: int):
        """Args as `hessians`, the batches anew each time, and how many examples they are in all."""
        self.model, self.batches, self.examples = model, batches, examples
        self.held = dict[str, np.ndarray]()

    def some(self, shapes: Mapping[str, ConvShape]) -> Iterator[dict[str, np.ndarray]]:
        """{layer: X^T X} of these layers, so many at a time."""
        for group in _groups({name: inputs(shape)**2 * shape.groups * 8 for name, shape in shapes.items()}):
            if missing := [name for name in group if name not in self.held]:
                positions = {name: -(-ROWS * inputs(shapes[name]) // self.examples) for name in missing}
                found = hessians(self.model, missing, self.batches(), positions)
            else:
                found = {}
            here = {name: self.held[name] if name in self.held else found[name] for name in group}
            if sum(gram.nbytes for gram in (*self.held.values(), *found.values())) <= GRAM:
                self.held |= found
            yield here


def prune_layers(model: nnx.Module, guides: Iterable[Guidance], grams: Grams, folder: Path, block: int = 1) -> None:
    """Prunes every layer of the guides to every density they have for it, where that is not in the folder yet.

    Args:
      model: the dense network.
      guides: say which layers, and how far.
      grams: of the network.
      folder: gets a file for each layer and density, whole or not at all.
      block: neighbouring input channels that are pruned together, for all of a folder the same.
    """
    wanted = {(name, density): layer.shape for guide in guides for name, layer in guide.layers.items()
              if (density := layer.density) < 1 and layer.shape is not None and not _file(folder, name, density).exists()}
    if not wanted:
        return
    folder.mkdir(parents=True, exist_ok=True)
    found = kernels(nnx.state(model, nnx.Param))
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    counts = {key: rounds(shape, key[1]) for key, shape in wanted.items()}
    with progress("pruning layers", len(wanted)) as advance:
        done = 0

        def write_layer(name: str, density: float, kernel: Any) -> None:
            nonlocal done
            write_atomically(_file(folder, name, density), seal("layer", {"kernel": np.asarray(kernel)}, {"layer": name}))
            done += 1
            advance(done, f"{name} to {density:.3f}")

        for some in grams.some({key[0]: shape for key, shape in wanted.items() if counts[key]}):
            for (name, density), count in counts.items():
                if count and name in some:
                    kernel = prune_layer(modules[name], found[name], some[name], density, count, block=block)
                    write_layer(name, density, kernel)
        for (name, density), count in counts.items():
            if not count:
                write_layer(name, density, by_magnitude(found[name], density, block))


def by_magnitude(kernel: Any, density: float, block: int = 1) -> Any:
    """The kernel with only the largest of its weights, or blocks."""
    return one_shot({"layer": {"kernel": kernel}}, constant({"layer": density}), block=block)["layer"]["kernel"]


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
    """Of one output of all layers."""
    return shape.layers * math.prod(shape.kernel_shape[:3])


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
