"""Layer-wise optimal brain surgeon: prune without training, and let the kept weights make up for the lost ones.

Each output of a layer is a linear function X w of its inputs, X (positions, m) being the rows of im2col over some examples.
With H = X^T X + damping, pruning it to the set K of its weights at the least change of that output is

    minimise |X w_K - X w|^2   =>   w_K = w + [H_KK]^-1 H_K,lost w_lost

(Hassibi and Stork, "Second order derivatives for network pruning: optimal brain surgeon", NIPS 1992). Which weights to lose
is decided in rounds, by what losing one alone would cost after the others have made up for it,

    w_i^2 / [H_KK^-1]_ii

over the whole layer, with K the set that the round before left to that output.

Differences: OBC (Frantar and Alistarh, "Optimal brain compression", NeurIPS 2022) loses one weight at a time, SparseGPT
(2023) goes through the columns once, correcting those to the right; here a few rounds each solve for all weights. The
densities come from a guide. X is what the layer saw in the network before pruning.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.core import Tracer
from scipy import linalg
from threadpoolctl import threadpool_limits

from sparseflax.conv.window import each
from sparseflax.cost.cpu import client_threads
from sparseflax.layers.planes import blocks, images, is_transposed, plane, unplane
from sparseflax.layers.shifted import shifted
from sparseflax.prune.guide import Guidance
from sparseflax.prune.watch import watched

Model = TypeVar("Model", bound=nnx.Module | tuple[nn.Module, Any])
CHUNK = 16  # images whose im2col is held at a time
# What a transposed convolution is once its images have their border.
ORDINARY = SimpleNamespace(strides=1, padding="VALID", kernel_dilation=1, input_dilation=1, feature_group_count=1)


def obs(model: Model, batches: Iterable[Any], guide: Guidance, *, rounds: int = 4, damping: float = 0.01,
        block: int = 1, **call: Any) -> Model:
    """A copy of the model with the guide's layers pruned to its densities, by layer-wise optimal brain surgery.

        model = prune.recalibrate(prune.obs(model, batches, guide), batches)

    Exactly round(density * n) weights of a layer are kept, or blocks with as nearly as many. The time goes with (density *
    m)^3 per output; a few minutes for a layer of 512 channels.

    Args:
      model: an nnx module, or a pair (Linen module, its variables); stays as it is.
      batches: inputs of the model, a few hundred examples; for convolutions each gives as many rows as outputs it has.
      guide: which layers (Conv, ConvTranspose, and Linear or Dense), to which density.
      rounds: in which the density falls geometrically.
      damping: added to the diagonal of H, relative to its mean, so that it can be inverted.
      block: prune blocks of so many neighbouring input channels: 4 for int8. What losing one costs is taken to be the sum of
        what losing each of its weights alone would cost.
      **call: further keyword arguments of a Linen model's call, e.g. `train=False`.

    Returns:
      In evaluation mode; of a pair, a pair with new variables.

    Raises:
      ValueError: for a layer of the guide that does not exist, is of another class, or never ran; for no batches.
      TypeError: for a model that compiles its layers, whose inputs cannot be seen.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    if not damping > 0:
        raise ValueError(f"damping must be positive, got {damping}")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    if isinstance(model, tuple):
        return _linen(*model, batches, guide, rounds, damping, block, call)  # type: ignore[return-value]
    copy: Any = nnx.clone(model)
    copy.eval()
    found = hessians(copy, guide.densities, batches)
    layers: dict[str, Any] = {"/".join(map(str, path)): layer for path, layer in nnx.iter_modules(copy)}
    for name, density in guide.densities.items():
        kernel = layers[name].kernel
        kernel[...] = prune_layer(layers[name], kernel[...], found[name], density, rounds, damping, block)
    return copy


def _linen(module: nn.Module, variables: Any, batches: Iterable[Any], guide: Guidance, rounds: int, damping: float,
           block: int, call: Any) -> tuple[nn.Module, Any]:
    wanted = guide.densities
    found, layers = dict[str, np.ndarray](), dict[str, Any]()
    leaves: dict[str, Any] = flatten_dict(unfreeze(variables), sep="/")

    def observe(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layer: Any = context.module
        name = "/".join(layer.path)
        if name in wanted and context.method_name == "__call__" and isinstance(layer, (nn.Conv, nn.ConvTranspose, nn.Dense)):
            kernel: Any = layer.get_variable("params", "kernel")
            layers[name] = layer
            _note(found, name, layer, kernel.shape, args[0] if args else kwargs["inputs"])
        return run(*args, **kwargs)

    for batch in batches:
        with nn.intercept_methods(observe):
            module.apply(variables, batch, **call)
    if unseen := sorted(wanted.keys() - found.keys()):
        raise ValueError(f"no linen.Conv, ConvTranspose or Dense of the model ran at {unseen}, wanted the paths of the guide's "
                         "layers: is there no batch, or does the model not call them?")
    for name, density in wanted.items():
        key = f"params/{name}/kernel"
        leaves[key] = prune_layer(layers[name], leaves[key], found[name], density, rounds, damping, block)
    return module, unflatten_dict(leaves, sep="/")


def prune_layer(layer: Any, kernel: Any, hessian: np.ndarray, density: float, rounds: int = 4, damping: float = 0.01,
                block: int = 1) -> jax.Array:
    """A layer's kernel with round(density * n) of its weights, hessian (groups, m, m); as `obs` does."""
    if not is_transposed(layer):
        return prune_kernel(kernel, hessian, density, rounds, damping, block)
    # Where the ordinary convolution has no weight it has zeros, which are lost first.
    ordinary = plane(layer, np.asarray(kernel))
    share = round(density * kernel.size) / ordinary.size
    pruned = prune_kernel(ordinary, hessian, share, rounds, damping, block)
    return jnp.asarray(unplane(layer, np.asarray(pruned), kernel.shape))


def prune_kernel(kernel: Any, hessian: np.ndarray, density: float, rounds: int = 4, damping: float = 0.01,
                 block: int = 1) -> jax.Array:
    """A kernel (..., ic / groups, oc) with round(density * n) of its weights, hessian (groups, m, m); as `obs` does."""
    dense, groups = np.asarray(kernel, np.float64), len(hessian)
    rows = dense.reshape(-1, groups, dense.shape[-1] // groups).transpose(1, 2, 0)  # (groups, outputs, m)
    tap, channel = np.divmod(np.arange(rows.shape[-1]), dense.shape[-2])
    unit = tap * -(-dense.shape[-2] // block) + channel // block
    pruned = _prune(rows, hessian, round(density * dense.size), rounds, damping, unit)
    return jnp.asarray(pruned.transpose(2, 0, 1).reshape(dense.shape), kernel.dtype)


def _prune(rows: np.ndarray, hessians: np.ndarray, kept: int, rounds: int, damping: float,
           unit: np.ndarray | None = None) -> np.ndarray:
    """The rows (groups, outputs, m) with `kept` weights in all, and the others as they do best.

    Args:
      hessians: (groups, m, m).
      unit: (m,) ascending, which weights of a row are kept or lost together; None for each alone.
    """
    unit = np.arange(rows.shape[-1]) if unit is None else unit
    m = rows.shape[-1]
    diagonal = np.einsum("gii->gi", hessians).mean(axis=1)
    damped = hessians + (damping * np.where(diagonal > 0, diagonal, 1.0))[:, None, None] * np.eye(m)
    inverses = np.stack([_inverse(_factor(h)) for h in damped])
    weights, score = rows, rows**2 / np.einsum("gii->gi", inverses)[:, None]  # before any is pruned, the same for all outputs
    first = np.flatnonzero(np.diff(unit, prepend=-1))  # of each unit: what is pruned together
    # Thousands of small factors: a thread for each, and not all threads for one after the other.
    with threadpool_limits(1, "blas"), ThreadPoolExecutor(client_threads()) as pool:
        for part in range(1, rounds + 1):
            count = kept if part == rounds else round(rows.size * (kept / rows.size) ** (part / rounds))
            together = np.add.reduceat(score, first, axis=-1)
            order = np.argsort(-together, axis=None, kind="stable")
            sizes = np.broadcast_to(np.bincount(unit), together.shape).ravel()[order].cumsum()
            chosen = np.zeros(together.size, bool)
            chosen[order[:np.abs(np.concatenate([[0], sizes]) - count).argmin()]] = True
            mask, every = chosen.reshape(together.shape)[..., unit], list(np.ndindex(rows.shape[:2]))
            solved = pool.map(_solve, map(rows.__getitem__, every), map(mask.__getitem__, every),
                              (damped[group] for group, _ in every), (inverses[group] for group, _ in every),
                              itertools.repeat(part == rounds))
            weights, score = (np.reshape(part, rows.shape) for part in zip(*solved, strict=True))
    return weights


def _solve(row: np.ndarray, keep: np.ndarray, hessian: np.ndarray, inverse: np.ndarray,
           last: bool) -> tuple[np.ndarray, np.ndarray]:
    """The weights (m,) of an output that do best with those to keep, and unless it is the last time what losing each costs.

    By the smaller of two systems: that of the kept weights, or with L the lost ones and G the inverse of H,

        w_K - G_KL [G_LL]^-1 w_L,   [H_KK]^-1 = G_KK - G_KL [G_LL]^-1 G_LK
    """
    weights, score, lost = np.zeros_like(row), np.full(len(row), -1.0), np.flatnonzero(~keep)
    if 2 * len(lost) < len(row):
        factor, across = _factor(inverse[np.ix_(lost, lost)]), inverse[np.ix_(lost, keep)]
        weights[keep] = row[keep] - linalg.cho_solve((factor, True), row[lost], check_finite=False) @ across
        if not last:
            less = linalg.solve_triangular(factor, across, lower=True, check_finite=False)
            score[keep] = weights[keep] ** 2 / (np.diagonal(inverse)[keep] - np.square(less).sum(axis=0))
    elif keep.any():
        factor = _factor(hessian[np.ix_(keep, keep)])
        weights[keep] = linalg.cho_solve((factor, True), hessian[keep] @ row, check_finite=False)
        if not last:
            score[keep] = weights[keep] ** 2 / _inverse_diagonal(factor)
    return weights, score


def _factor(matrix: np.ndarray) -> np.ndarray:
    """L of L L^T, for a positive definite matrix."""
    return linalg.cholesky(matrix, lower=True, check_finite=False)


def _inverse(factor: np.ndarray) -> np.ndarray:
    """(L L^T)^-1."""
    return linalg.cho_solve((factor, True), np.eye(len(factor)), check_finite=False)


def _inverse_diagonal(factor: np.ndarray) -> np.ndarray:
    """The diagonal of (L L^T)^-1: the sums of squares of the columns of L^-1."""
    (triangle_inverse,) = linalg.get_lapack_funcs(("trtri",), (factor,))
    inverse, _ = triangle_inverse(factor, lower=1)
    return np.square(inverse).sum(axis=0)


def hessians(model: nnx.Module, names: Iterable[str], batches: Iterable[Any],
             positions: Mapping[str, int] | None = None) -> dict[str, np.ndarray]:
    """X^T X (groups, m, m) of the inputs of each layer, in float64, from running the model on all batches.

    Args:
      model: in evaluation mode; stays as it is.
      names: paths of layers.
      batches: inputs of the model.
      positions: {layer: of each image's outputs at most so many are looked at, drawn at random}; None looks at all.

    Raises:
      ValueError: for a layer that does not exist, is of another class, or never ran.
      TypeError: for a model that compiles its layers, whose inputs cannot be seen.
    """
    model, found, names = shifted(model), dict[str, np.ndarray](), list(names)
    modules: dict[str, Any] = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    if wrong := sorted(name for name in names if not isinstance(modules.get(name), (nnx.Conv, nnx.ConvTranspose, nnx.Linear))):
        raise ValueError(f"no nnx.Conv, ConvTranspose or Linear in the model at {wrong}, wanted the guide's layers")
    layers = {name: modules[name] for name in names}

    def observe(name: str, layer: Any, call: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        _note(found, name, layer, layer.kernel.shape, x, (positions or {}).get(name))
        return call(x, *args, **kwargs)

    with watched(layers, observe):
        for batch in batches:
            model(batch)  # type: ignore[operator]
    if unseen := sorted(layers.keys() - found.keys()):
        raise ValueError(f"layers {unseen} did not run: is there no batch, or does the model not call them?")
    return found


def _note(found: dict[str, np.ndarray], name: str, layer: Any, kernel: tuple[int, ...], x: Any,
          positions: int | None = None) -> None:
    """Adds X^T X of a layer's input x to what was found of it before."""
    if isinstance(x, Tracer):
        raise TypeError(f"layer {name!r} is called inside a compiled function: give a model that does not call jit")
    images = np.asarray(x).reshape(-1, *x.shape[-len(kernel) + 1 :])
    for first in range(0, len(images), CHUNK):
        new = _gram(layer, kernel, images[first : first + CHUNK], positions).astype(np.float64)
        found[name] = found[name] + new if name in found else new


def _gram(layer: Any, kernel: tuple[int, ...], x: np.ndarray, positions: int | None = None) -> np.ndarray:
    """X^T X (groups, m, m) of images (n, ..., ic), the rows of X in the order of the kernel's first axes."""
    if len(kernel) == 2:
        return (x.T @ x)[None]
    if is_transposed(layer):
        return _gram(ORDINARY, (*blocks(layer).window, *kernel[-2:]), np.asarray(images(layer, x)), positions)
    rank, groups = x.ndim - 2, layer.feature_group_count
    strides, dilation, spread = (each(value, rank) for value in (
        layer.strides, layer.kernel_dilation, layer.input_dilation))
    if any(step > 1 for step in spread):
        sparse = np.zeros((len(x), *((size - 1) * step + 1 for size, step in zip(x.shape[1:-1], spread, strict=True)),
                           x.shape[-1]), x.dtype)
        sparse[:, *(slice(None, None, step) for step in spread)] = x
        x = sparse
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=False)]
    padding, mode = layer.padding, "constant"
    if padding == "CAUSAL":
        pads = [(r - 1, 0) for r in reach]
    elif padding in ("CIRCULAR", "REFLECT"):
        pads, mode = [((r - 1) // 2, r // 2) for r in reach], {"CIRCULAR": "wrap", "REFLECT": "reflect"}[padding]
    elif isinstance(padding, str):
        pads = jax.lax.padtype_to_pads(x.shape[1:-1], reach, strides, padding)
    else:
        pads = [(p, p) if isinstance(p, int) else tuple(p) for p in each(padding, rank)]
    x = np.pad(x, [(0, 0), *pads, (0, 0)], mode=mode)  # type: ignore[call-overload]
    sizes = [(size - r) // step + 1 for size, r, step in zip(x.shape[1:-1], reach, strides, strict=True)]
    count = int(np.prod(sizes))
    few = positions is not None and positions < count
    chosen = np.random.default_rng(0).choice(count, positions, replace=False) if few else np.arange(count)
    corners = [at * step for at, step in zip(np.unravel_index(chosen, sizes), strides, strict=True)]
    taps = [x[:, *(at + t * d for at, t, d in zip(corners, tap, dilation, strict=True))] for tap in np.ndindex(kernel[:-2])]
    rows = np.stack(taps, 2).reshape(-1, len(taps), groups, x.shape[-1] // groups)  # (positions, taps, groups, ic)
    if groups == 1:
        flat = rows.reshape(len(rows), -1)
        return (flat.T @ flat)[None]
    rows = rows.transpose(2, 0, 1, 3).reshape(groups, len(rows), -1)
    return rows.transpose(0, 2, 1) @ rows

