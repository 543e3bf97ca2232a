"""One-shot magnitude pruning: for networks that cannot be trained any longer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sparseflax.prune import blocks
from sparseflax.prune.guide import Guidance
from sparseflax.prune.mask import all_kept, apply_masks, keep_largest, kernels


def one_shot(params: Any, guide: Guidance, *, keep_zeros: bool = False, block: int = 1) -> Any:
    """The parameters with only the round(density * n) largest |w| of each of the guide's layers kept, or so many blocks.

        params = prune.one_shot(params, guide)
        state = prune.one_shot(nnx.state(model, nnx.Param), guide)     # nnx.update(model, state)

    The oldest method there is (Janowsky, "Pruning versus clipping in neural networks", 1989), on the densities of a guide.
    Recalibrate batch norms after it (`prune.recalibrate`); `prune.obs` does less damage where there are examples of the
    input. Fine-tune with `prune.fixed`, or prune further with `prune.magnitude(..., keep_zeros=True)`.

    Args:
      params: nnx.State or nested dict; stays as it is.
      guide: which layers, to which density.
      keep_zeros: of weights that are zero already none counts as kept, so that a pruned network is only pruned further.
      block: prune blocks of so many neighbouring input channels, by their norm: 4 for int8, see `keep_largest`.

    Raises:
      ValueError: for a layer of the guide that has no kernel in params.
    """
    wanted = guide.densities
    found = kernels(all_kept(params, wanted, keep_zeros=keep_zeros).tree)

    def kept(layer: str, among: jax.Array) -> jax.Array:
        kernel = kernels(params)[layer]
        whole = blocks.kept(among, block)
        count = jnp.minimum(round(wanted[layer] * whole.size), jnp.sum(whole))
        return keep_largest(kernel, count, among=among, block=block)

    return apply_masks(params, {layer: kept(layer, among) for layer, among in found.items()})
