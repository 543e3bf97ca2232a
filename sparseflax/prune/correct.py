"""Layers and batch norms whose outputs have the mean and the spread again that they had before pruning."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseflax.layers.shifted import shifted
from sparseflax.prune.watch import watched

Model = TypeVar("Model", bound=nnx.Module)
Statistics = Mapping[str, tuple[np.ndarray, np.ndarray]]
SPREAD = 2.0  # a channel is scaled by so much at most: what is left of one that lost nearly all is noise


def correct(model: Model, original: Model | Statistics, batches: Sequence[Any], layers: Iterable[str]) -> Model:
    """A copy of a pruned model with the outputs of its layers put right, channel by channel, first layer to last.

        kernel, or scale <- s kernel,   bias <- s (bias - mean) + mean of the original,   s = spread of the original / spread

    Zeros stay zeros. Each layer is corrected for inputs that come from corrected layers, within one run over the batches. A
    model that lost nothing stays as it is, whatever its batch norms' statistics are of: `prune.recalibrate` takes them anew.

    Args:
      model: pruned; stays as it is.
      original: what it was before, or its `statistics` over the same batches, where several are corrected by them.
      batches: inputs, of equal size and not small ones; a few hundred examples in all.
      layers: paths of nnx.Conv, nnx.Linear and nnx.BatchNorm, of those that have a bias: for others their norm makes up.

    Raises:
      ValueError: for a layer that never ran or has no bias, or no batches.

    Source:
      Nagel et al., "Data-free quantization" (2019), for the means; Frantar and Alistarh, "Optimal brain compression" (NeurIPS
      2022), for both.
    """
    copy: Any = shifted(model)
    copy.eval()
    names = list(layers)
    wanted = original if isinstance(original, Mapping) else statistics(original, batches, names)
    if missing := sorted(set(names) - wanted.keys()):
        raise ValueError(f"layers {missing} did not run: is there no batch, or does the model not call them?")
    chosen = _layers(copy, names)
    if lacking := sorted(name for name, layer in chosen.items() if layer.bias is None):
        raise ValueError(f"layers {lacking} have no bias to correct: name the batch norms that follow them instead")
    seen: dict[str, list[Any]] = defaultdict(list)

    def run(name: str, layer: Any, call: Any, *args: Any, **kwargs: Any) -> jax.Array:
        y = call(*args, **kwargs)
        seen[name].append(_moments(y))
        scale, mean, target = (part.reshape((1,) * (y.ndim - 1) + (-1,)) for part in _change(seen[name][-1:], wanted[name]))
        return ((y - mean) * scale + target).astype(y.dtype)

    with watched(chosen, run):
        for batch in batches:
            copy(batch)
    for name, layer in chosen.items():
        scale, mean, target = _change(seen[name], wanted[name])
        weights = getattr(layer, "scale" if isinstance(layer, nnx.BatchNorm) else "kernel")
        if weights is not None:
            shape = (1,) * (weights.ndim - 1) + (-1,)
            weights.set_value((weights[...] * scale.reshape(shape)).astype(weights.dtype))
        bias: Any = layer.bias
        bias.set_value(((bias[...] - mean) * scale + target).astype(bias.dtype))
    corrected = nnx.clone(model)
    corrected.eval()
    nnx.update(corrected, nnx.state(copy))
    return corrected


def statistics(model: nnx.Module, batches: Iterable[Any], layers: Iterable[str]) -> Statistics:
    """{layer: (mean, standard deviation)} of the channels of these layers' outputs, of those that ran.

    Args as `correct`.
    """
    return {name: _statistics(seen) for name, seen in _outputs(model, list(layers), batches).items()}


def _change(moments: Iterable[Any], wanted: tuple[np.ndarray, np.ndarray]) -> list[jax.Array]:
    """(scale, mean, target) of y -> (y - mean) scale + target, for outputs of these moments."""
    (mean, spread), (target, original) = _statistics(moments), wanted
    scale = np.clip(np.divide(original, spread, out=np.ones_like(spread), where=spread > 0), 1 / SPREAD, SPREAD)
    return [jnp.asarray(value, jnp.float32) for value in (scale, mean, target)]


def _outputs(model: Any, names: list[str], batches: Iterable[Any]) -> dict[str, list[Any]]:
    seen: dict[str, list[Any]] = defaultdict(list)
    model = shifted(model)

    def run(name: str, _: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
        y = call(*args, **kwargs)
        seen[name].append(_moments(y))
        return y

    with watched(_layers(model, names), run):
        for batch in batches:
            model(batch)
    return seen


def _layers(model: nnx.Module, names: Iterable[str]) -> dict[str, Any]:
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    return {name: modules[name] for name in names if name in modules}


@jax.jit
def _moments(y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of each channel."""
    axes = tuple(range(y.ndim - 1))
    return jnp.mean(y, axes), jnp.var(y, axes)


def _statistics(moments: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel over all that the moments were taken of."""
    means, variances = (np.stack([np.asarray(part, np.float64) for part in parts]) for parts in zip(*moments, strict=True))
    mean = means.mean(axis=0)
    return mean, np.sqrt((variances + means**2).mean(axis=0) - mean**2)
