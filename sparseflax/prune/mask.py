"""Which weights are kept: selection, exact counts, and how a mask holds a weight at zero.

A layer is named by its path in the parameters ("block1/conv2"); what is pruned in it is the leaf `kernel` below that
path. True = kept. Every pruning method carries its masks in a `Masks` node somewhere in its optax state: that node is all
that `masks`, `densities` and `wrap` look for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.tree_util import GetAttrKey, KeyPath, keystr, tree_leaves_with_path, tree_map_with_path

from sparseflax.prune import blocks


class Masks(NamedTuple):
    """A tree shaped like the parameters: a bool array where a method prunes, `optax.MaskedNode()` elsewhere."""

    tree: Any


def layer_of(path: KeyPath) -> str | None:
    """The layer whose kernel lies at this path of a parameter tree, None for any other leaf."""
    if path and isinstance(path[-1], GetAttrKey):  # nnx.State: the array is the .value of a Variable
        path = path[:-1]
    layer, _, leaf = keystr(path, simple=True, separator="/").rpartition("/")
    return layer if leaf == "kernel" else None


def kernels(params: Any) -> dict[str, jax.Array]:
    """Everything that can be pruned in a parameter tree (nnx.State or nested dict): {layer: kernel}."""
    named = ((layer_of(path), leaf) for path, leaf in tree_leaves_with_path(params))
    return {layer: leaf for layer, leaf in named if layer is not None}


@functools.partial(jax.jit, static_argnames="block")
def keep_largest(score: jax.Array, count: jax.Array | int, among: jax.Array | None = None, block: int = 1) -> jax.Array:
    """Mask of exactly the `count` largest |score|; of equal ones the first in memory order are kept.

    With blocks of b neighbouring input channels (same tap and output channel; the last of a tap may be smaller) these are the
    `count` blocks of the largest root of their sum of squares, as int8 kernels want them (b = 4).

    A bisection on the bit patterns (non-negative floats order like integers), then one on the position among ties: about
    50 counting passes instead of a sort, so `count` may be traced, and devices that share the array agree exactly.

    Args:
      score: float array of any shape. NaN ranks above everything: a broken weight is not hidden by pruning it.
      count: how many weights, or blocks, to keep, at most as many as are True in `among`, or hold a True.
      among: bool array like score; only where it is True may a weight be kept.
      block: b, for kernels (..., ic, oc).

    Raises:
      ValueError: for a block smaller than 1, or of a score with less than two dimensions.
    """
    if block != 1:
        possible = None if among is None else blocks.kept(among, block)
        best = keep_largest(blocks.norms(score if among is None else jnp.where(among, score, 0), block), count, possible)
        mask = blocks.spread(best, score.shape, block)
        return mask if among is None else mask & among
    top = 0x7F800001  # one above infinity, where all NaNs go
    key = jnp.minimum(lax.bitcast_convert_type(jnp.abs(score).astype(jnp.float32), jnp.int32), top).reshape(-1)
    if among is not None:
        key = jnp.where(among.reshape(-1), key, -1)
    position = lax.iota(jnp.int32, key.size)
    threshold = _largest(lambda t: jnp.sum(key >= t) >= count, -1, top + 1)
    free = count - jnp.sum(key > threshold)
    end = _largest(lambda i: jnp.sum((key == threshold) & (position < i)) <= free, 0, key.size + 1)
    return ((key > threshold) | ((key == threshold) & (position < end))).reshape(score.shape)


def _largest(holds: Callable[[jax.Array], jax.Array], low: int, high: int) -> jax.Array:
    """The largest integer in [low, high) for which a condition holds that is true at low and, once false, stays false."""

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) // 2
        good = holds(middle)
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    return lax.fori_loop(0, (high - low).bit_length(), halve, (jnp.int32(low), jnp.int32(high)))[0]


def all_kept(params: Any, layers: Iterable[str], *, keep_zeros: bool = False) -> Masks:
    """The first masks of a method over these layers: True everywhere, or with keep_zeros only where the weight is not zero.

    Raises:
      ValueError: for a layer that has no kernel in params.
    """
    known, layers = kernels(params), set(layers)
    if missing := sorted(layers - known.keys()):
        raise ValueError(f"no kernel in the parameters for layers {missing}; their kernels are {sorted(known)}")

    def first(path: KeyPath, p: jax.Array) -> Any:
        if layer_of(path) not in layers:
            return optax.MaskedNode()
        return p != 0 if keep_zeros else jnp.ones_like(p, dtype=bool)

    return Masks(tree_map_with_path(first, params))


def map_masks(f: Callable[..., Any], masks: Masks, *trees: Any, elsewhere: Callable[..., Any]) -> Any:
    """A tree of f(layer, mask, *leaves) for the kernels under a mask and elsewhere(*leaves) for all other leaves.

    Raises:
      ValueError: for parameters that are None, optax's default.
    """
    if any(tree is None for tree in trees):
        raise ValueError("pruning needs the parameters: call update(gradients, state, params)")

    def leaf(path: KeyPath, mask: Any, *leaves: Any) -> Any:
        return elsewhere(*leaves) if _untouched(mask) else f(layer_of(path), mask, *leaves)

    return tree_map_with_path(leaf, masks.tree, *trees, is_leaf=_untouched)


def _untouched(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def hold(masks: Masks, updates: Any, params: Any) -> Any:
    """The updates under which `optax.apply_updates` leaves pruned weights at exactly zero: where(mask, u, -p)."""


    def pin(_, mask: jax.Array, u: jax.Array, p: jax.Array) -> jax.Array:
        wide = jnp.promote_types(u.dtype, p.dtype)  # -p must not be rounded, or p + (-p) is not zero
        return jnp.where(mask, u.astype(wide), -p.astype(wide))

    return map_masks(pin, masks, updates, params, elsewhere=lambda u, p: u)


def nodes(state: Any) -> list[Masks]:
    """The masks of every pruning method in an optax state, as they lie there."""
    found = jax.tree.leaves(state, is_leaf=lambda node: isinstance(node, Masks))
    return [node for node in found if isinstance(node, Masks)]


def masks(state: Any) -> dict[str, jax.Array]:
    """The masks {layer: bool array} of every pruning method in an optax state (`opt_state` of nnx.Optimizer included).

    Raises:
      ValueError: when two methods prune the same layer.
    """
    found: dict[str, jax.Array] = {}
    for node in nodes(state):
        new = kernels(node.tree)
        if twice := sorted(found.keys() & new.keys()):
            raise ValueError(f"two pruning methods over the same layers: {twice}; give each layer to one method")
        found |= new
    return found


def densities(state: Any) -> dict[str, float]:
    """Kept / all of every pruned layer, from an optax state. Waits for the device: for reports, not for the step."""
    return {layer: int(np.count_nonzero(mask)) / mask.size for layer, mask in masks(state).items()}


def apply_masks(params: Any, masks: Mapping[str, jax.Array]) -> Any:
    """The parameters with exact zeros where a mask of `masks(state)` is False; layers without a mask as they are.

    Raises:
      ValueError: for a mask whose layer has no kernel in params, or whose shape is not that kernel's.
    """
    known = kernels(params)
    for layer, mask in masks.items():
        wanted = known[layer].shape if layer in known else None
        if mask.shape != wanted:
            raise ValueError(f"mask of layer {layer!r} has shape {mask.shape}, its kernel in the parameters {wanted}")

    def apply(path: KeyPath, p: jax.Array) -> jax.Array:
        layer = layer_of(path)
        mask = None if layer is None else masks.get(layer)
        return p if mask is None else jnp.where(mask, p, jnp.zeros_like(p))

    return tree_map_with_path(apply, params)
