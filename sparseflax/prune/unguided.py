"""How far to prune each layer when no performance model is asked: uniform, Erdos-Renyi-Kernel, or by one global threshold.

All three spread the same number of kept weights, density * n with n the weights of all layers that are not excluded:

    uniform            d_l = density
    erk                d_l = min(1, eps * sum(shape_l) / prod(shape_l)),   eps such that the kept weights add up
    global_magnitude   d_l = the share of layer l in the density * n largest |w| of the network

These are the allocations of published results; none of them knows what a weight costs. `guided` does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparseflax.prune.blocks import norms
from sparseflax.prune.guide import Guidance, LayerGuide, Layers, named
from sparseflax.prune.mask import kernels


def uniform(params: Any, density: float, *, exclude: Layers = ()) -> Guidance:
    """The same density for every layer.

    Args:
      params: nnx.State or nested dict of parameters; only shapes are read.
      density: kept / all, over all layers that are not excluded.
      exclude: layers to leave dense (published ones leave out the first, often the last too): names, patterns, or a predicate.

    Raises:
      ValueError: for a density outside (0, 1], excluded layers that do not exist, or if no layer is left.
    """
    layers = _layers(params, density, exclude)
    return _guidance(params, dict.fromkeys(layers, density), "uniform")


def erk(params: Any, density: float, *, exclude: Layers = ()) -> Guidance:
    """Erdos-Renyi-Kernel: large layers sparser than small ones, as their kept weights grow with the sum of their sizes.

    A layer that would get more weights than it has stays dense, and the others share what is left. Evci et al., "Rigging
    the Lottery: Making All Tickets Winners" (2020). Arguments and errors as in `uniform`.
    """
    layers = _layers(params, density, exclude)
    size = np.array([math.prod(kernel.shape) for kernel in layers.values()], float)
    extent = np.array([sum(kernel.shape) for kernel in layers.values()], float)
    full = np.zeros(len(layers), bool)
    while True:
        eps = (density * size.sum() - size[full].sum()) / max(extent[~full].sum(), 1.0)
        beyond = ~full & (eps * extent > size)
        if not beyond.any():
            break
        full |= beyond
    return _guidance(params, dict(zip(layers, np.where(full, 1.0, eps * extent / size).tolist(), strict=True)), "ERK")


def global_magnitude(params: Any, density: float, *, exclude: Layers = (), block: int = 1) -> Guidance:
    """The densities that one threshold on |w| over all layers would leave, with these weights. Take trained ones.

    A layer keeps at least one weight; or one block of `block` neighbouring input channels, whose norm the threshold is on then.
    Other arguments and errors as in `uniform`, but `params` must hold concrete arrays. Han et al., "Learning both Weights and
    Connections for Efficient Neural Networks" (2015) cut layer by layer; with one cut for all it is the usual baseline since.
    """
    layers = _layers(params, density, exclude)
    magnitudes = [np.asarray(norms(jnp.asarray(kernel, jnp.float32), block)).reshape(-1) for kernel in layers.values()]
    everything = np.concatenate(magnitudes)
    owner = np.repeat(np.arange(len(layers)), [m.size for m in magnitudes])
    largest = np.argsort(-everything, kind="stable")[: round(density * everything.size)]
    kept = np.maximum(np.bincount(owner[largest], minlength=len(layers)), 1)
    shares = {layer: int(k) / m.size for layer, k, m in zip(layers, kept, magnitudes, strict=True)}
    return _guidance(params, shares, "global magnitude")


def _layers(params: Any, density: float, exclude: Layers) -> dict[str, Any]:
    """The kernels to spread the density over."""
    known = kernels(params)
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}: it is kept / all, so 0.1 for a sparsity of 90 %")
    excluded = named(exclude, known)
    layers = {layer: kernel for layer, kernel in known.items() if layer not in excluded}
    if not layers:
        raise ValueError(f"there is no layer to prune: of the kernels {sorted(known)} all are excluded")
    return layers


def _guidance(params: Any, densities: Mapping[str, float], name: str) -> Guidance:
    return Guidance({
        layer: LayerGuide(densities[layer], name) if layer in densities else LayerGuide(1.0, "dense: excluded")
        for layer in kernels(params)
    })
