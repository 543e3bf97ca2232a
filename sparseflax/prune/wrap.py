"""An optimizer that does not see the gradients of pruned weights."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparseflax.prune.mask import map_masks, masks, nodes


class WrapState(NamedTuple):
    """The states of the optimizer and of the pruning method."""

    inner: Any
    method: Any


def wrap(
    inner: optax.GradientTransformation, method: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """The optimizer `inner`, then a pruning method, with the gradients of pruned weights set to zero before both:

        tx = prune.wrap(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)), prune.magnitude(guide, ramp))

    Their moments then die out at the optimizer's own rate, and norms and products over a layer are those of the pruned
    network. The first step after a change of masks is the first to see them.

    Raises:
      ValueError: in `init`, when `inner` holds a method over one of the layers already.
    """
    inner, method = optax.with_extra_args_support(inner), optax.with_extra_args_support(method)

    def init(params: Any) -> WrapState:
        state = WrapState(inner.init(params), method.init(params))
        masks(state)  # raises where two methods prune the same layer
        return state

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, WrapState]:
        for node in nodes(state.method):
            updates = map_masks(_hide, node, updates, elsewhere=lambda g: g)
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        updates, method_state = method.update(updates, state.method, params, **extra)
        return updates, WrapState(inner_state, method_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _hide(_: str, mask: jax.Array, gradient: jax.Array) -> jax.Array:
    return jnp.where(mask, gradient, jnp.zeros_like(gradient))
