"""Gradual magnitude pruning: the smallest weights of each layer, a few more every few steps.

Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression" (2017):

    keep the k largest |w| of a layer's n weights, or blocks,   k = n - round(fraction(step) * (n - round(density * n)))

Differences: the layers and their densities come from a guide; a pruned weight is zero, not merely masked in the forward
pass, and never returns.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sparseflax.prune import blocks
from sparseflax.prune.guide import Guidance
from sparseflax.prune.mask import Masks, all_kept, hold, keep_largest, map_masks


class MagnitudeState(NamedTuple):
    """count: updates so far, int32; fraction: of the ramp when the masks were last taken, float32; masks."""

    count: jax.Array
    fraction: jax.Array
    masks: Masks


def magnitude(
    guide: Guidance, ramp: optax.Schedule, *, every: int = 10, keep_zeros: bool = False, block: int = 1
) -> optax.GradientTransformationExtraArgs:
    """Prune the guide's layers to its densities by magnitude. Must be the last transformation of a chain:

        tx = optax.chain(optax.adam(1e-3), prune.magnitude(guide, prune.ramp(100, 600)))

    After every `optax.apply_updates` the pruned weights are exactly zero, and masks only shrink. The masks are taken from
    the weights as they are after the update, and are fixed once the ramp is full.

    The forward pass knows no masks, so pruned weights still receive gradients, and moments in the optimizer before this
    one. Element by element that changes nothing. For an optimizer that mixes weights (a clipped global norm, trust
    ratios, orthogonalised updates) use `prune.wrap`, which hides those gradients from it.

    Args:
      guide: which layers, to which density (`prune.guided`, `prune.constant`).
      ramp: schedule from 0 (dense) to 1 (the guide's densities) over optimizer steps (`prune.ramp`).
      every: steps between two takings of the masks; the last one is at the first step at which the ramp is full.
      keep_zeros: count weights that are zero at the start as pruned: for pruning a pruned network further.
      block: prune blocks of so many neighbouring input channels, by their norm: 4 for int8, see `keep_largest`.

    Raises:
      ValueError: in `init`, for a layer of the guide that has no kernel in the parameters; in `update`, for a block below 1.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1 step, got {every}")
    wanted = guide.densities

    def init(params: Any) -> MagnitudeState:
        return MagnitudeState(jnp.int32(0), jnp.float32(0), all_kept(params, wanted, keep_zeros=keep_zeros))

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, MagnitudeState]:
        count = jnp.asarray(optax.safe_increment(state.count))
        fraction = jnp.asarray(ramp(count), jnp.float32)
        due = (fraction > state.fraction) & ((count % every == 0) | (fraction >= 1))

        def take() -> Masks:
            def shrink(layer: str, mask: jax.Array, u: jax.Array, p: jax.Array) -> jax.Array:
                among = blocks.kept(mask, block)
                goal = among.size - round(wanted[layer] * among.size)  # how many to prune in the end
                pruned = jnp.where(fraction >= 1, goal, jnp.round(fraction * goal).astype(jnp.int32))
                kept = jnp.minimum(among.size - pruned, jnp.sum(among))
                return keep_largest((p + u).astype(p.dtype), kept, among=mask, block=block)

            return Masks(map_masks(shrink, state.masks, updates, params, elsewhere=lambda u, p: optax.MaskedNode()))

        masks = lax.cond(due, take, lambda: state.masks)
        taken = jnp.where(due, fraction, state.fraction)
        return hold(masks, updates, params), MagnitudeState(count, taken, masks)

    return optax.GradientTransformationExtraArgs(init, update)
