"""RigL: a network that is sparse from the start, whose pattern is rewired to where the gradient is large.

Evci, Gale, Menick, Castro, Elsen, "Rigging the lottery: making all tickets winners" (ICML 2020). Every few steps, in each
layer that keeps k weights, the share

    share(step) = drop / 2 * (1 + cos(pi * step / end))

of them, those of smallest |w|, is dropped, and as many of the others, those of largest |gradient|, are grown, from zero.

Differences: the layers and their constant densities come from a guide (theirs are uniform, or Erdos-Renyi by layer size).
At a step that rewires, the weights are trained too; theirs skips the update. The optimizer sees the gradients of all weights
at every step, so that a grown weight starts with moments of its own: theirs start from zero, with which Adam's first steps
would be several times too long. (Where the backward pass is dense, those gradients cost nothing.)
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sparseflax.prune import blocks
from sparseflax.prune.guide import Guidance
from sparseflax.prune.mask import Masks, all_kept, hold, keep_largest, map_masks
from sparseflax.prune.mask import masks as masks_of


class RigLState(NamedTuple):
    """count: updates so far, int32; inner: the optimizer's state; masks."""

    count: jax.Array
    inner: Any
    masks: Masks


def rigl(
    inner: optax.GradientTransformation,
    guide: Guidance,
    *,
    key: jax.Array | None = None,
    end: int,
    every: int = 100,
    drop: float = 0.3,
    block: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer `inner` on the guide's layers at constant density, rewired every few steps until `end`:

        tx = prune.rigl(optax.sgd(0.1, 0.9), guide, end=3000)

    It takes the optimizer in, because it needs the gradients beside the updates. After every `optax.apply_updates` the
    weights outside the masks are exactly zero.

    Args:
      inner: the optimizer.
      guide: which layers, at which density, from the first update on.
      key: draws the first masks at random, for a network that learns from scratch; without one they are the largest
        weights, for a network that has learned.
      end: optimizer steps after which the masks are fixed; the paper takes three quarters of the training.
      every: steps between two rewirings.
      drop: share of a layer's weights that the first rewiring exchanges, in (0, 1].
      block: keep, drop and grow blocks of so many neighbouring input channels, by their norms: 4 for int8, see `keep_largest`.

    Raises:
      ValueError: in `init`, for a layer of the guide that has no kernel in the parameters, or in which `inner` prunes already.
    """
    if every < 1 or end < 1:
        raise ValueError(f"every and end must be at least 1 step, got every={every}, end={end}")
    if not 0 < drop <= 1:
        raise ValueError(f"drop must be in (0, 1], got {drop}")
    inner, wanted = optax.with_extra_args_support(inner), guide.densities

    def kept(layer: str, p: jax.Array) -> tuple[int, int]:
        """How many weights, or blocks, a layer keeps, and of how many."""
        size = math.prod(blocks.grid(p.shape, block))
        return round(wanted[layer] * size), size

    def init(params: Any) -> RigLState:
        keys = dict(zip(sorted(wanted), jax.random.split(key, len(wanted)), strict=True)) if key is not None and wanted else {}

        def first(layer: str, mask: jax.Array, p: jax.Array) -> jax.Array:
            score = jax.random.uniform(keys[layer], p.shape) if keys else p
            return keep_largest(score, kept(layer, p)[0], block=block)

        masks = map_masks(first, all_kept(params, wanted), params, elsewhere=lambda p: optax.MaskedNode())
        state = RigLState(jnp.int32(0), inner.init(params), Masks(masks))
        masks_of(state)  # raises where two methods prune the same layer
        return state

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, RigLState]:
        gradients = updates
        updates, inner_state = inner.update(gradients, state.inner, params, **extra)
        count = jnp.asarray(optax.safe_increment(state.count))
        share = drop / 2 * (1 + jnp.cos(jnp.pi * count / end))

        def rewire() -> Masks:
            def exchange(layer: str, mask: jax.Array, u: jax.Array, p: jax.Array, g: jax.Array) -> jax.Array:
                count, size = kept(layer, p)
                swapped = jnp.minimum(jnp.floor(share * count).astype(jnp.int32), size - count)
                stay = keep_largest((p + u).astype(p.dtype), count - swapped, among=mask, block=block)
                return stay | keep_largest(g, swapped, among=~stay, block=block)

            tree = map_masks(exchange, state.masks, updates, params, gradients, elsewhere=lambda u, p, g: optax.MaskedNode())
            return Masks(tree)

        masks = lax.cond((count % every == 0) & (count < end), rewire, lambda: state.masks)
        # A weight that grows starts its life at zero, after this update: it is held by its old mask still.
        held = Masks(jax.tree.map(jnp.logical_and, state.masks.tree, masks.tree))
        return hold(held, updates, params), RigLState(count, inner_state, masks)

    return optax.GradientTransformationExtraArgs(init, update)
