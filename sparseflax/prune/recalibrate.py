"""Batch-norm statistics for a network whose weights have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from sparseflax.layers.shifted import shifted

Model = TypeVar("Model", bound=nnx.Module | tuple[nn.Module, Any])
SEEN = "recalibrated"  # a collection of our own, for what the batches' statistics were


def recalibrate(model: Model, batches: Iterable[Any], **call: Any) -> Model:
    """The model with the running statistics of its batch norms estimated anew, as over one large batch.

        mean = average of the batches' means,   var = average of (var + mean^2) - mean^2

    Pruned layers have other outputs than those whose statistics are stored, and without training nobody corrects them. A
    few hundred examples are enough. Every batch is normalised by its own statistics, as in training; all other layers
    run as in evaluation, without dropout.

    Args:
      model: an nnx module, or a pair (Linen module, its variables); stays as it is.
      batches: inputs of the model; equal sizes, since every batch counts the same, and not small ones.
      **call: further keyword arguments of a Linen model's call, e.g. `train=False`.

    Returns:
      A copy in evaluation mode; of a pair, a pair with new variables.

    Raises:
      ValueError: for a model without batch norm, or no batches.

    Source:
      Sun et al., "Hybrid 8-bit floating point training" (2019) for quantised networks; Frantar and Alistarh, "Optimal
      brain compression" (NeurIPS 2022) for pruned ones.
    """
    if isinstance(model, tuple):
        return _linen(*model, batches, call)  # type: ignore[return-value]
    copy: Any = nnx.clone(model)
    copy.eval()
    probe = shifted(copy)
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
        mean, var = _pooled(statistics)
        norm.mean.set_value(jnp.asarray(mean, norm.mean.dtype))
        norm.var.set_value(jnp.asarray(var, norm.var.dtype))
    return copy


def _pooled(statistics: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """(mean, var) of one large batch from those of its parts, of equal size."""
    means, variances = map(np.stack, zip(*statistics, strict=True))
    mean = means.mean(axis=0)
    return mean, (variances + means**2).mean(axis=0) - mean**2


def _linen(module: nn.Module, variables: Any, batches: Iterable[Any], call: Any) -> tuple[nn.Module, Any]:
    def normalise(run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        norm: Any = context.module
        if context.method_name != "__call__" or not isinstance(norm, nn.BatchNorm):
            return run(*args, **kwargs)
        x = args[0] if args else kwargs["x"]
        axis = range(x.ndim)[norm.axis]
        others = tuple(a for a in range(x.ndim) if a != axis)
        mean, var = x.mean(others), x.var(others)
        norm.sow(SEEN, "statistics", (mean, var))
        at = tuple(slice(None) if a == axis else None for a in range(x.ndim))
        y = (x - mean[at]) * jax.lax.rsqrt(var[at] + norm.epsilon)
        y = y * norm.get_variable("params", "scale")[at] if norm.use_scale else y
        return y + norm.get_variable("params", "bias")[at] if norm.use_bias else y

    @jax.jit
    def run(variables: Any, batch: Any) -> Any:
        with nn.intercept_methods(normalise):
            return module.apply(variables, batch, mutable=[SEEN], **call)[1]

    variables = unfreeze(variables)
    seen: dict[Any, list[Any]] = {}
    for batch in batches:
        found: dict[Any, Any] = flatten_dict(run(variables, batch).get(SEEN, {}))
        for path, calls in found.items():
            seen.setdefault(path[:-1], []).extend(tuple(np.asarray(part, np.float64) for part in one) for one in calls)
        if not seen:
            raise ValueError(f"found no linen.BatchNorm in {type(module).__name__}: it has no statistics to recalibrate")
    if not seen:
        raise ValueError("there are no batches to take statistics of: is the iterator exhausted?")
    old: dict[Any, Any] = flatten_dict(variables["batch_stats"])
    for path, statistics in seen.items():
        for name, value in zip(("mean", "var"), _pooled(statistics), strict=True):
            old[*path, name] = jnp.asarray(value, old[*path, name].dtype)
    return module, {**variables, "batch_stats": unflatten_dict(old)}


def _norms(model: nnx.Module) -> list[Any]:
    return [module for _, module in nnx.iter_modules(model) if isinstance(module, nnx.BatchNorm)]
