"""Batch-norm statistics for a network whose weights have changed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np
from flax import nnx

Model = TypeVar("Model", bound=nnx.Module)


def recalibrate(model: Model, batches: Iterable[Any]) -> Model:
    """The model with the running statistics of its batch norms estimated anew, as over one large batch.

        mean = average of the batches' means,   var = average of (var + mean^2) - mean^2

    Pruned layers have other outputs than those whose statistics are stored, and without training nobody corrects them. A
    few hundred examples are enough. Every batch is normalised by its own statistics, as in training; all other layers
    run as in evaluation, without dropout.

    Args:
      model: an nnx module; stays as it is.
      batches: inputs of the model; equal sizes, since every batch counts the same, and not small ones.

    Returns:
      A copy in evaluation mode.

    Raises:
      ValueError: for a model without batch norm, or no batches.

    Source:
      Sun et al., "Hybrid 8-bit floating point training" (2019) for quantised networks; Frantar and Alistarh, "Optimal
      brain compression" (NeurIPS 2022) for pruned ones.
    """
    copy = nnx.clone(model)
    copy.eval()
    probe = nnx.clone(copy)
    if not _norms(copy):
        raise ValueError(f"found no nnx.BatchNorm in {type(model).__name__}: it has no statistics to recalibrate")
    for norm in _norms(probe):
        norm.use_running_average = False
        norm.momentum = 0.0  # the running statistics are those of the last batch

    @nnx.jit
    def run(probe: Any, batch: Any) -> None:
        probe(batch)

    seen: list[list[tuple[np.ndarray, np.ndarray]]] = []  # (mean, var) of each batch and norm
    for batch in batches:
        run(probe, batch)
        seen.append([(np.asarray(norm.mean[...], np.float64), np.asarray(norm.var[...], np.float64)) for norm in _norms(probe)])
    if not seen:
        raise ValueError("there are no batches to take statistics of: is the iterator exhausted?")
    for norm, statistics in zip(_norms(copy), zip(*seen, strict=True), strict=True):
        mean = np.mean([mean for mean, _ in statistics], axis=0)
        square = np.mean([var + mean**2 for mean, var in statistics], axis=0)
        norm.mean.set_value(jnp.asarray(mean, norm.mean.dtype))
        norm.var.set_value(jnp.asarray(square - mean**2, norm.var.dtype))
    return copy


def _norms(model: nnx.Module) -> list[Any]:
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, nnx.BatchNorm)]
