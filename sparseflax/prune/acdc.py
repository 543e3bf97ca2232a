"""AC/DC: compressed and decompressed phases in turn, and at the end compressed for good.

Peste, Iofinova, Vladu, Alistarh, "AC/DC: alternating compressed/decompressed training of deep neural networks" (NeurIPS
2021). An iterative hard thresholding:

    compressed, at its first step:    keep the round(density * n) largest |w| of each layer, train these only
    decompressed:                     train all weights; those that were removed go on from zero

Differences: the layers and their densities come from a guide (theirs are uniform, or global). They set momentum to zero when
decompressing. Ours is left to the optimizer, which sees the gradients of all weights: that of removed weights has followed
their gradients at zero. `prune.wrap` makes it die out instead.
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


class ACDCState(NamedTuple):
    """count: updates so far, int32; masks, all True while decompressed."""

    count: jax.Array
    masks: Masks


def acdc(guide: Guidance, *, begin: int, end: int, phase: int, block: int = 1) -> optax.GradientTransformationExtraArgs:
    """Prune the guide's layers to its densities, and give them back, in turn. Must be the last transformation of a chain:

        tx = optax.chain(optax.sgd(rate, 0.9), prune.acdc(guide, begin=100, end=500, phase=50))

    For `begin` steps the network is dense. Then phases of `phase` steps are compressed, decompressed, compressed, ...; from
    `end` on it is compressed with fixed masks. In compressed phases, after every `optax.apply_updates`, the pruned weights
    are exactly zero.

    Args:
      guide: which layers, to which density (`prune.guided`, `prune.constant`).
      begin: optimizer steps before the first compression.
      end: optimizer steps before the last one.
      phase: optimizer steps of a phase; the last one before `end` may be shorter.
      block: prune blocks of so many neighbouring input channels, by their norm: 4 for int8, see `keep_largest`.

    Raises:
      ValueError: for phases that do not fit, and in `init`, for a layer of the guide that has no kernel in the parameters.
    """
    if not 0 <= begin < end:
        raise ValueError(f"AC/DC needs 0 <= begin < end, got begin={begin}, end={end}")
    if not 1 <= phase <= end - begin:
        raise ValueError(f"phase must be from 1 to the {end - begin} steps between begin and end, got {phase}")
    wanted = guide.densities

    def init(params: Any) -> ACDCState:
        return ACDCState(jnp.int32(0), all_kept(params, wanted))

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, ACDCState]:
        step = state.count - begin
        starts = (step >= 0) & (step % phase == 0) & (state.count < end)
        odd = (step // phase) % 2 == 1
        opened = ((end - begin - 1) // phase) % 2 == 1  # the phase before the end is a decompressed one

        def compress() -> Masks:
            def largest(layer: str, _: jax.Array, u: jax.Array, p: jax.Array) -> jax.Array:
                count = round(wanted[layer] * math.prod(blocks.grid(p.shape, block)))
                return keep_largest((p + u).astype(p.dtype), count, block=block)

            return Masks(map_masks(largest, state.masks, updates, params, elsewhere=lambda u, p: optax.MaskedNode()))

        def decompress() -> Masks:
            return jax.tree.map(jnp.ones_like, state.masks)

        compresses = (starts & ~odd) | ((state.count == end) & opened)
        masks = lax.cond(compresses, compress, lambda: lax.cond(starts & odd, decompress, lambda: state.masks))
        count = jnp.asarray(optax.safe_increment(state.count))
        return hold(masks, updates, params), ACDCState(count, masks)

    return optax.GradientTransformationExtraArgs(init, update)
