"""Element-wise or group lasso: l1 on weights or norms of blocks, a proximal step after the optimizer's, until they are sparse.

Park et al., "Faster CNNs with Direct Sparse Convolutions and Guided Pruning" (ICLR 2017), ESL and GESL; the proximal step is
ISTA of Daubechies, Defrise and De Mol (2004). With w the weights after the optimizer's update:

    w <- sign(w) * max(|w| - tau_l, 0),    tau_l = strength(step) * pressure_l

and of blocks of weights, with |w| the norm of one, the group lasso (Yuan and Lin, 2006): w <- w / |w| * max(|w| - tau_l, 0).

Differences: the paper adds decay * sign(w) to the gradient and zeroes what falls below 1e-4; the proximal step gives exact
zeros by itself. The paper tries strengths until the densities suit; here pressure_l, which starts at 1, adapts until the
network follows the ramp to the guide's densities (gsl.py), and what is missing in the end is cut by magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparseflax.prune import blocks
from sparseflax.prune.gsl import Loop, LoopState, settle
from sparseflax.prune.guide import Guidance
from sparseflax.prune.mask import Masks, all_kept, hold, map_masks


class LassoState(NamedTuple):
    """loop: of GSL; masks; dense: the weights when pruning began, of layers that may get them back."""

    loop: LoopState
    masks: Masks
    dense: Any


def lasso(
    guide: Guidance,
    strength: float | Callable[[Any], Any],
    ramp: optax.Schedule,
    *,
    patience: int | None = None,
    rate: float = 0.1,
    block: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """Prune the guide's layers to its densities by an l1 penalty. Must be the last transformation of a chain:

        rate = optax.cosine_decay_schedule(1e-3, 1000)
        tx = optax.chain(optax.adam(rate), prune.lasso(guide, lambda step: 5e-4 * rate(step), prune.ramp(100, 600)))

    A weight is zero where |w| <= tau_l, and may return while its layer is pruned on: its gradients and its moments in the
    optimizer before this one live on, and it returns when an update is larger than tau_l. From the step at which its layer
    arrives at the guide's density (at the latest when the ramp is full: `gsl`) it is zero for good, and the kept weights are
    shrunk no further. A layer that leaves gets the weights back that it had when pruning began (up to the rounding of one
    addition); its moments stay.

    Wrapped by `prune.wrap`, which hides the gradients of zeros, a zero is final. Zeros of a network pruned before are
    weights like any other, and the first to be pruned again.

    Args:
      guide: which layers, to which density, with which strength relative to each other (`prune.guided`, `prune.constant`).
      strength: first tau of a layer of strength 1, in units of the weights per step: learning rate times l1 coefficient.
        A number, or a schedule called as optax calls a learning rate's. Too small costs a few steps, as the pressure
        grows tenfold in 25; too large prunes at once what the ramp would have spared.
      ramp: schedule from 0 (dense) to 1 (the guide's densities) over optimizer steps (`prune.ramp`).
      patience: steps of pruning between reviews, at which layers above their useful range leave; None: one, when the ramp is
        full. Less than most of the ramp also takes out layers that were only slow to give way, and the time of a layer
        that left is made up for in part at best: the speedup of the guide is then missed.
      rate: by how much the pressure may change in a step; 0 for the strength as it is given.
      block: prune blocks of so many neighbouring input channels, by their norm: 4 for int8. tau is then in units of such norms.

    Raises:
      ValueError: for a patience below 1 or a negative rate; in `init`, for a layer of the guide without a kernel.
    """
    loop = Loop(guide, ramp, patience, rate, block)
    order, may_leave = loop.order, {name for name, layer in guide.layers.items() if layer.upper < 1}

    def init(params: Any) -> LassoState:
        masks = all_kept(params, guide.densities)
        dense = map_masks(lambda layer, _, p: jnp.array(p) if layer in may_leave else optax.MaskedNode(), masks, params,
                          elsewhere=lambda p: optax.MaskedNode())
        return LassoState(loop.init(), masks, dense)

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, LassoState]:
        loop_state, orders = loop.step(state.loop, state.masks)
        tau = jnp.asarray(strength(state.loop.count) if callable(strength) else strength, jnp.float32) * orders.pressure

        def choose(layer: str, mask: jax.Array, u: jax.Array, p: jax.Array) -> jax.Array:
            size, i = blocks.norms((p + u).astype(p.dtype), block), order[layer]
            return settle(orders, i, size, mask, size > tau[i].astype(size.dtype), block)

        def shrink(layer: str, mask: jax.Array, u: jax.Array, p: jax.Array, dense: Any) -> jax.Array:
            w, i = p + u, order[layer]
            still = orders.active[i] & (jnp.sum(blocks.kept(mask, block)) > orders.target[i])
            t = jnp.where(still, tau[i], 0.0).astype(w.dtype)
            u = u - blocks.capped(w, t, block).astype(u.dtype)
            return u if layer not in may_leave else jnp.where(orders.leaves[i], dense - p, u)

        def remember(layer: str, mask: jax.Array, u: jax.Array, p: jax.Array, dense: Any) -> Any:
            return jnp.where(orders.begun, dense, (p + u).astype(p.dtype)) if layer in may_leave else dense

        masks = Masks(map_masks(choose, state.masks, updates, params, elsewhere=lambda u, p: optax.MaskedNode()))
        shrunk = map_masks(shrink, masks, updates, params, state.dense, elsewhere=lambda u, p, dense: u)
        dense = map_masks(remember, masks, updates, params, state.dense, elsewhere=lambda u, p, dense: dense)
        return hold(masks, shrunk, params), LassoState(loop_state, masks, dense)

    return optax.GradientTransformationExtraArgs(init, update)
