"""What pruning each layer of a job's network does to its outputs, as `prune.damage`, kept in the job's folder."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from sparseflax.cost.progress import progress
from sparseflax.cost.shape import ConvShape
from sparseflax.job.folder import write_json
from sparseflax.job.layers import AFFORDABLE, Grams, by_magnitude, surgery_flops
from sparseflax.prune.damage import DENSITIES, Damage, Reference
from sparseflax.prune.mask import kernels
from sparseflax.prune.obs import prune_layer


def damage_of(path: Path, measure: Callable[[], Mapping[str, list[float]]]) -> Damage:
    """{layer: (densities, damage)}, as measured when the file was made."""
    if not path.exists():
        write_json(path, measure())
    return {name: (DENSITIES, errors) for name, errors in json.loads(path.read_text()).items()}


def measured(model: nnx.Module, dense: nnx.Module, examples: Iterable[Any], shapes: Mapping[str, ConvShape],
             grams: Grams, block: int = 1) -> dict[str, list[float]]:
    """Of each layer, at DENSITIES; by magnitude where surgery is not affordable.

    Args:
      model: the network.
      dense: the same in the form in which it runs fastest, with its kernels at the same paths, though batch norms are in them.
      examples: batches of inputs.
      shapes: of the layers to measure.
      grams: of the network.
      block: neighbouring input channels that are pruned together.
    """
    found, modules = dict[str, list[float]](), {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    reference, own = Reference(dense, examples), kernels(nnx.state(dense, nnx.Param))
    operable = {name: shape for name, shape in shapes.items() if surgery_flops(shape, max(DENSITIES), 1) <= AFFORDABLE}
    with progress("pruning each layer alone", len(shapes)) as advance:

        def measure(name: str, pruned: Callable[[float], Any]) -> None:
            found[name] = [reference.error(name, pruned(density)) for density in DENSITIES]
            advance(len(found), f"{name} to {DENSITIES[-1]:g}  error {math.sqrt(found[name][-1]):.2g}")

        for some in grams.some(operable):
            for name, gram in some.items():
                measure(name, lambda d, name=name, gram=gram: prune_layer(modules[name], own[name], gram, d, rounds=1,
                                                                          block=block))
        for name in shapes.keys() - operable.keys():
            measure(name, functools.partial(by_magnitude, own[name], block=block))
    return found
