"""STR: every layer learns its own threshold, and all of them rise together until the weights asked for are left.

Kusupati, Ramanujan, Somani, Wortsman, Jain, Kakade, Farhadi, "Soft threshold weight reparameterization for learnable
sparsity" (ICML 2020). The network runs with

    w = sign(v) * max(|v| - g(s_l), 0)

of dense weights v and one learned s_l per layer; the gradients are those of this formula:

    dL/dv = dL/dw where w != 0, else 0        dL/ds_l = -g'(s_l) * sum over w != 0 of dL/dw * sign(v)

and of blocks of weights, with |v| the norm of one, e = v / |v| and r = g(s_l) / |v|:

    w = e * max(|v| - g(s_l), 0)              dL/dv = (1 - r) dL/dw + r e <e, dL/dw> where w != 0, else 0
                                              dL/ds_l = -g'(s_l) * sum over w != 0 of <e, dL/dw>

Differences: g = exp (the paper has the sigmoid, equal for small thresholds, and exp for recurrent networks). There a decay of
s_l, of a strength found by trial, makes all thresholds rise. Here all s_l rise by the same number, such that the weights kept
in all layers together follow a ramp to what the guide keeps of them: the guide says how many are left, the loss which layers
have them. So a time is not promised, see `prune.budget`. At the end of the ramp masks are fixed, and w goes on
without thresholds, as an ordinary weight. Thresholds learn by plain gradient descent, weights by the optimizer given.

The optimizer sees no gradient where w = 0, as in the paper: its momentum dies out there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from sparseflax.prune import blocks
from sparseflax.prune.guide import Guidance
from sparseflax.prune.mask import Masks, all_kept, hold, keep_largest, kernels, map_masks
from sparseflax.prune.mask import masks as masks_of


class SoftThresholdState(NamedTuple):
    """State of `soft_threshold`.

    Attributes:
      count: updates so far, int32.
      inner: the optimizer's state, over the dense weights.
      dense: the dense weights v of the guide's layers, a tree like the parameters.
      log_threshold: {layer: s_l}, float32; -inf once the masks are fixed.
      masks: where w != 0.
    """

    count: jax.Array
    inner: Any
    dense: Any
    log_threshold: dict[str, jax.Array]
    masks: Masks


def soft_threshold(
    inner: optax.GradientTransformation,
    guide: Guidance,
    ramp: optax.Schedule,
    *,
    rate: float = 0.1,
    every: int = 10,
    block: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer `inner` on weights under learned soft thresholds, until as many are left as the guide keeps in all:

        tx = prune.soft_threshold(optax.sgd(0.1, 0.9), guide, prune.ramp(100, 600))

    It takes the optimizer in, because that works on the dense weights. After every `optax.apply_updates` the weights below
    their thresholds are exactly zero; until the ramp is full they may return.

    Args:
      inner: the optimizer, with its weight decay.
      guide: which layers, and how many weights they keep together.
      ramp: schedule from 0 (dense) to 1 over optimizer steps (`prune.ramp`).
      rate: learning rate of the thresholds' logarithms.
      every: steps between two rises of the thresholds; the last one is at the first step at which the ramp is full.
      block: threshold blocks of so many neighbouring input channels, by their norm: 4 for int8. The guide says how many stay.

    Raises:
      ValueError: in `init`, for a layer of the guide that has no kernel in the parameters, or in which `inner` prunes already.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1 step, got {every}")
    inner, wanted = optax.with_extra_args_support(inner), guide.densities

    def init(params: Any) -> SoftThresholdState:
        masks = all_kept(params, wanted)
        dense = map_masks(lambda _, mask, p: jnp.array(p), masks, params, elsewhere=lambda p: optax.MaskedNode())
        start = {layer: jnp.float32(-jnp.inf) for layer in wanted}
        state = SoftThresholdState(jnp.int32(0), inner.init(params), dense, start, masks)
        masks_of(state)  # raises where two methods prune the same layer
        return state

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, SoftThresholdState]:
        count = jnp.asarray(optax.safe_increment(state.count))
        before, fraction = (jnp.asarray(ramp(step), jnp.float32) for step in (state.count, count))
        ended, ends = before >= 1, (before < 1) & (fraction >= 1)
        due = (fraction > before) & ((count % every == 0) | ends)

        def through(layer: str, mask: jax.Array, g: jax.Array, v: jax.Array) -> jax.Array:
            g = jnp.where(mask, g, jnp.zeros_like(g))
            if block == 1:
                return g
            e, size = blocks.directions(v, block), blocks.norms(v, block)
            r = jnp.where(size > 0, jnp.exp(state.log_threshold[layer]) / size, 0)
            along = blocks.spread(r * blocks.sums(e * g, block), v.shape, block) * e
            return ((1 - blocks.spread(r, v.shape, block)) * g + along).astype(g.dtype)

        dense = map_masks(lambda _, mask, v, p: v, state.masks, state.dense, params, elsewhere=lambda v, p: p)
        gradients = map_masks(through, state.masks, updates, dense, elsewhere=lambda g, v: g)
        steps, inner_state = inner.update(gradients, state.inner, dense, **extra)
        old, slope = kernels(dense), kernels(gradients)
        new = {layer: (old[layer] + u).astype(old[layer].dtype) for layer, u in kernels(steps).items() if layer in wanted}
        size = {layer: blocks.norms(v, block) for layer, v in new.items()}
        learned = {layer: s + rate * jnp.exp(s) * jnp.sum(slope[layer] * blocks.directions(old[layer], block))
                   for layer, s in state.log_threshold.items()}

        def rise() -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
            known = {layer: jnp.where(jnp.isfinite(s), s, 0) for layer, s in learned.items()}  # all start as one
            score = jnp.concatenate([(norm / jnp.exp(known[layer])).reshape(-1) for layer, norm in size.items()])
            kept = keep_largest(score, score.size - jnp.round(fraction * goal(size)).astype(jnp.int32))
            shift = jnp.log(jnp.max(score, where=~kept, initial=0))
            parts = jnp.split(kept, np.cumsum([norm.size for norm in size.values()])[:-1])
            alive = {layer: part.reshape(norm.shape) for (layer, norm), part in zip(size.items(), parts, strict=True)}
            return {layer: s + shift for layer, s in known.items()}, alive

        def stay() -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
            last = {layer: blocks.kept(mask, block) for layer, mask in kernels(state.masks.tree).items()}
            alive = {layer: norm > jnp.exp(learned[layer]) for layer, norm in size.items()}
            return learned, {layer: jnp.where(ended, last[layer], mask) for layer, mask in alive.items()}

        log_threshold, whole = lax.cond(due, rise, stay) if wanted else ({}, {})
        alive = {layer: blocks.spread(mask, new[layer].shape, block) for layer, mask in whole.items()}

        def shrunk(layer: str, v: jax.Array) -> jax.Array:
            rest = jnp.maximum(size[layer] - jnp.exp(log_threshold[layer]), 0)
            return jnp.where(alive[layer], blocks.directions(v, block) * blocks.spread(rest, v.shape, block), 0)

        soft = {layer: shrunk(layer, v) for layer, v in new.items()}
        log_threshold = {layer: jnp.where(ends, -jnp.inf, s) for layer, s in log_threshold.items()}
        shadow = {layer: jnp.where(ends, soft[layer], v) for layer, v in new.items()}

        masks = Masks(map_masks(lambda layer, _: alive[layer], state.masks, elsewhere=optax.MaskedNode))
        dense = map_masks(lambda layer, _: shadow[layer], state.masks, elsewhere=optax.MaskedNode)
        moves = map_masks(lambda layer, _, u, p: soft[layer] - p, state.masks, steps, params, elsewhere=lambda u, p: u)
        return hold(masks, moves, params), SoftThresholdState(count, inner_state, dense, log_threshold, masks)

    def goal(norms: Mapping[str, jax.Array]) -> int:
        """How many blocks to prune in the end."""
        return sum(norm.size - round(wanted[layer] * norm.size) for layer, norm in norms.items())

    return optax.GradientTransformationExtraArgs(init, update)
