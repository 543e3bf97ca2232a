"""Fixed masks: fine-tune a pruned network without moving its zeros."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import optax

from sparseflax.prune.mask import Masks, all_kept, hold, kernels


class FixedState(NamedTuple):
    """The masks, taken once."""

    masks: Masks


def fixed(layers: Iterable[str] | None = None) -> optax.GradientTransformationExtraArgs:
    """Hold the kernel weights at zero that are zero when training starts. Must be the last transformation of a chain:

        tx = optax.chain(optax.adam(1e-4), prune.fixed())

    Args:
      layers: whose kernels; all by default. Leave out layers that start at zero and are to learn.

    Raises:
      ValueError: in `init`, for a layer that has no kernel in the parameters.
    """
    named = None if layers is None else frozenset(layers)

    def init(params: Any) -> FixedState:
        return FixedState(all_kept(params, kernels(params) if named is None else named, keep_zeros=True))

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, FixedState]:
        return hold(state.masks, updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)
