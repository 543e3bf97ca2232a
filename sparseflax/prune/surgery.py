"""Dynamic network surgery: prune and splice. A pruned weight goes on learning in a shadow, and returns when it has grown.

Guo, Yao and Chen, "Dynamic Network Surgery for Efficient DNNs" (2016), the DNS of Park et al. (ICLR 2017), GDNS with their
guidance. The gradient g is taken at the masked weights, and moves all weights of the shadow W:

    W <- W + update(g(M * W))
    M <- 0 where |W| < 0.9 t_l,   1 where |W| > 1.1 t_l,   as it was between,    t_l = threshold * pressure_l * mean |W|

Differences: Guo et al. have t = mean + c * deviation of a layer with c by hand, and update the masks at random, more and more
rarely. Here pressure_l, which starts at 1, adapts until the network follows the ramp to the guide's densities (gsl.py), what
is missing in the end is cut by magnitude, and the masks are updated at every step until a layer arrives.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparseflax.prune import blocks
from sparseflax.prune.gsl import Loop, LoopState, settle
from sparseflax.prune.guide import Guidance
from sparseflax.prune.mask import Masks, all_kept, map_masks

BAND = 0.9, 1.1  # of the threshold: a kept weight goes below the first, a pruned one returns above the second


class SurgeryState(NamedTuple):
    """loop: of GSL; masks; shadow: the dense weights W of the guide's layers, in the parameters' dtype."""

    loop: LoopState
    masks: Masks
    shadow: Any


def surgery(
    guide: Guidance,
    ramp: optax.Schedule,
    *,
    threshold: float = 0.1,
    patience: int | None = None,
    rate: float = 0.1,
    block: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Prune the guide's layers to its densities by surgery. Must be the last transformation of a chain:

        tx = optax.chain(optax.adam(1e-3), prune.surgery(guide, prune.ramp(100, 600)))

    The parameters are M * W, with exact zeros; the shadow in the optimizer's state holds what they hide. What somebody
    else writes into a kept weight is taken over. The optimizer before this one has to see the gradients of pruned weights,
    and its moments for them are those of the shadow: do not use `prune.wrap`, with it nothing ever returns. Weight decay
    acts on the parameters, so not on pruned weights.

    From the step at which a layer arrives at the guide's density (at the latest when the ramp is full: `gsl`) its mask is
    fixed. A layer that leaves gets its weights from the shadow, as they are then. Zeros of a network pruned before are
    weights like any other, and the first to be pruned again.

    Args:
      guide: which layers, to which density, with which strength relative to each other (`prune.guided`, `prune.constant`).
      ramp: schedule from 0 (dense) to 1 (the guide's densities) over optimizer steps (`prune.ramp`).
      threshold: first t of a layer of strength 1, in units of its mean |W|.
      patience: steps of pruning between reviews, at which layers above their useful range leave; None: one, when the ramp is
        full. Less than most of the ramp also takes out layers that were only slow to give way, and the time of a layer
        that left is made up for in part at best: the speedup of the guide is then missed.
      rate: by how much the pressure may change in a step; 0 for the threshold as it is given.
      block: prune and splice blocks of so many neighbouring input channels: 4 for int8. |W| is then the norm of a block.

    Raises:
      ValueError: for a patience below 1 or a negative rate; in `init`, for a layer of the guide without a kernel.
    """
    loop = Loop(guide, ramp, patience, rate, block)
    order = loop.order

    def init(params: Any) -> SurgeryState:
        masks = all_kept(params, guide.densities)
        shadow = map_masks(lambda _, mask, p: jnp.array(p), masks, params, elsewhere=lambda p: optax.MaskedNode())
        return SurgeryState(loop.init(), masks, shadow)

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, SurgeryState]:
        loop_state, orders = loop.step(state.loop, state.masks)

        def learn(_: str, mask: jax.Array, u: jax.Array, p: jax.Array, w: jax.Array) -> jax.Array:
            return (jnp.where(mask, p, w) + u).astype(p.dtype)

        def choose(layer: str, mask: jax.Array, w: jax.Array) -> jax.Array:
            i, size = order[layer], blocks.norms(w, block)
            t = (threshold * orders.pressure[i] * jnp.mean(size, dtype=jnp.float32)).astype(size.dtype)
            low, high = (jnp.asarray(end, size.dtype) for end in BAND)
            return settle(orders, i, size, mask, size > t * jnp.where(blocks.kept(mask, block), low, high), block)

        def apply(_: str, old: jax.Array, u: jax.Array, p: jax.Array, w: jax.Array, new: jax.Array) -> jax.Array:
            wide = jnp.promote_types(u.dtype, p.dtype)
            kept = jnp.where(old, u.astype(wide), w.astype(wide))  # p is zero where a weight returns
            return jnp.where(new, kept, -p.astype(wide))

        shadow = map_masks(learn, state.masks, updates, params, state.shadow, elsewhere=lambda u, p, w: w)
        masks = Masks(map_masks(choose, state.masks, shadow, elsewhere=lambda w: w))
        applied = map_masks(apply, state.masks, updates, params, shadow, masks.tree, elsewhere=lambda u, p, w, m: u)
        return applied, SurgeryState(loop_state, masks, shadow)

    return optax.GradientTransformationExtraArgs(init, update)
