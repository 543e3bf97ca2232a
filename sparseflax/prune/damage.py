"""What pruning a layer does to the outputs of its network, measured for each layer alone.

    D_l(d) = sum |f(x; W_l pruned to d) - f(x)|^2 / sum |f(x)|^2

over some examples x and all outputs f, W_l pruned in one round of optimal brain surgery (`prune.obs`) and all other layers as
they are. `prune.guided(..., damage=...)` minimises the sum over layers, which is the error of all of them together as far as
theirs are small and unrelated. It knows which layers the outputs hang on, as 1 / (m d), the damage that a guide assumes
otherwise, does not.

Related: Frantar and Alistarh, "SPDY: Accurate pruning with speedup guarantees" (ICML 2022), learn how the layers' own errors
count for the outputs by a search over whole networks; here each layer's is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.tree_util import tree_map_with_path

from sparseflax.layers.shifted import shifted
from sparseflax.prune.guide import constant
from sparseflax.prune.mask import kernels, layer_of
from sparseflax.prune.obs import obs

Damage = Mapping[str, tuple[Sequence[float], Sequence[float]]]  # {layer: (densities, damage at each)}
Lost = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]  # of densities (..., layers): damage, -d(damage)/d(density)

DENSITIES = 0.6, 0.3, 0.15, 0.08, 0.03
LEAST = 1e-6  # damage, a thousandth of the outputs: what is less is as good as none, however much less
LEAST_POWER = 1.0  # that of the damage assumed otherwise; with a lower one the damage is not convex in the density
DENSEST = 1 - 1e-9


def damage(model: Any, batches: Iterable[Any], layers: Iterable[str], *, densities: Sequence[float] = DENSITIES, block: int = 1,
           **call: Any) -> Damage:
    """What pruning each of the layers alone to each of the densities does to the model's outputs.

        damage = prune.damage(model, batches, shapes)
        guide = prune.guided(shapes, machine, speedup=2, whole=whole, damage=damage)

    Takes one call of the model for each layer, density and batch; some dozens of examples tell enough.

    Args:
      model: dense, an nnx module or a pair (Linen module, its variables).
      batches: inputs of the model.
      layers: paths of those to measure, such as `conv_shapes` has.
      densities: in (0, 1).
      block: prune blocks of so many neighbouring input channels.
      **call: further keyword arguments of a Linen model's call, e.g. `train=False`.

    Returns:
      {layer: (densities, damage at each)}.

    Raises:
      ValueError: for a density outside (0, 1), layers that `obs` does not prune, no batches.
    """
    if wrong := [density for density in densities if not 0 < density < 1]:
        raise ValueError(f"densities {wrong}, wanted numbers between 0 and 1")
    batches, names = list(batches), list(layers)
    reference = Reference(model, batches, **call)
    found: dict[str, list[float]] = {name: [] for name in names}
    for density in densities:
        pruned: Any = obs(model, batches, constant(dict.fromkeys(names, density)), rounds=1, block=block, **call)
        changed = kernels(pruned[1]["params"] if isinstance(pruned, tuple) else nnx.state(pruned, nnx.Param))
        for name in names:
            found[name].append(reference.error(name, changed[name]))
    return {name: (list(densities), errors) for name, errors in found.items()}


class Reference:
    """A network's outputs for some examples, with which its outputs are compared when one kernel is another."""

    def __init__(self, model: Any, batches: Iterable[Any], **call: Any):
        """Args as `damage`."""
        if isinstance(model, tuple):
            module, variables = model
            self._params = variables["params"]
            self._run = jax.jit(lambda params, x: module.apply({**variables, "params": params}, x, **call))
        else:
            copy = shifted(model)
            copy.eval()
            graph, self._params, rest = nnx.split(copy, nnx.Param, ...)
            self._run = jax.jit(lambda params, x: nnx.merge(graph, params, rest)(x))
        self._batches = list(batches)
        if not self._batches:
            raise ValueError("there is no batch, wanted some inputs of the model")
        self._outputs = [self._call(self._params, x) for x in self._batches]
        self._size = sum(float(np.square(y).sum()) for outputs in self._outputs for y in outputs)

    def error(self, name: str, kernel: Any) -> float:
        """Squared relative error of the outputs with this kernel in place of the layer's own; inf where they are no numbers."""
        params = tree_map_with_path(lambda path, p: kernel if layer_of(path) == name else p, self._params)
        wrong = sum(float(np.square(y - own).sum()) for x, outputs in zip(self._batches, self._outputs, strict=True)
                    for y, own in zip(self._call(params, x), outputs, strict=True))
        error = wrong / max(self._size, np.finfo(float).tiny)
        return error if np.isfinite(error) else math.inf

    def _call(self, params: Any, x: Any) -> list[np.ndarray]:
        return [np.asarray(y, np.float64) for y in jax.tree.leaves(self._run(params, x))]


def assumed(inputs: np.ndarray) -> Lost:
    """(1 / d - 1) / m, of layers whose outputs have so many inputs (layers,)."""
    return lambda density: ((1 / density - 1) / inputs, 1 / (inputs * density**2))


def known(measured: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Lost:
    """c (1 / d - 1)^p of each layer, the power that is nearest to its measurements, by least squares of the logarithms.

    A curve through all of them, by some dozens of pictures, has steep and flat parts for no reason, and whoever looks for the
    least damage finds the flat ones: on a text recogniser that was worse than to measure nothing.
    """
    factor, power = np.array([_power(*each) for each in measured]).T

    def lost(density: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        density = np.minimum(density, DENSEST)
        damage = np.exp(factor + power * np.log(1 / density - 1))
        return damage, damage * power / (density * (1 - density))

    return lost


def _power(densities: Sequence[float], damage: Sequence[float]) -> tuple[float, float]:
    """(log c, p), p at least LEAST_POWER; of densities that do no damage the lowest counts."""
    odds, logs = np.log(1 / np.asarray(densities, float) - 1), np.log(np.clip(damage, LEAST, 1 / LEAST))
    free = odds[logs <= math.log(LEAST)]
    odds, logs = (each[odds >= free.max(initial=-math.inf)] for each in (odds, logs))
    spread = odds - odds.mean()
    power = max(LEAST_POWER, float(spread @ logs / max(spread @ spread, 1e-9)))
    return float(logs.mean() - power * odds.mean()), power
