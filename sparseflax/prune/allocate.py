"""How far to prune each layer, so that the network becomes as fast as asked at the least damage.

The paper's guidance (Park et al., "Faster CNNs with Direct Sparse Convolutions and Guided Pruning", ICLR 2017) excludes
layers without speedup potential, stops at the lower end of a layer's useful range of density, and gives a layer that
settles short of the upper end its dense weights back. Its densities came out of the training. Ours are solved for before
it, from the performance model and its gradient:

    minimise  sum_l 1 / (m_l d_l)   subject to   other + sum_l t_l(d_l) <= t_dense / speedup,   lower_l <= d_l <= 1

with m_l = kh kw ic / groups the inputs of an output, so that m d is how many of them a layer keeps. That is what a trained
layer seems to need: the sixteen 3x3 layers of the paper's ResNet-50, of 64 to 512 channels, kept 50 to 110 inputs each.
A pruned layer takes t = conv_seconds; one that is not takes dense_seconds, or conv_seconds at density 1 where that is less.
At the optimum every pruned layer saves the same time per damage, its worth, at the margin:

    (dt/dd) / (1 / (m d^2)) = price
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from sparseflax.cost import Work, conv_seconds, dense_seconds, useful_range
from sparseflax.machine import Machine
from sparseflax.prune.guide import Guidance, LayerGuide
from sparseflax.shapes import ConvShape

GRID = 128  # densities per layer at which the performance model is evaluated, evenly spaced in the logarithm


def guided(
    shapes: Mapping[str, ConvShape],
    machine: Machine,
    *,
    speedup: float = 2.5,
    min_density: float = 0.01,
    exclude: Collection[str] = (),
    other_seconds: float = 0.0,
    whole_seconds: float | None = None,
) -> Guidance:
    """The densities at which the network runs `speedup` times as fast as dense, at the least damage.

    One price gives every layer its density, and bisection finds the price. Then layers get their dense weights back, one at
    a time, where the others can make up for their time at less damage: those above their break-even density always do.

    Args:
      shapes: {layer: ConvShape} of all layers of the network (`conv_shapes`), with the batch it is to be fast at.
      machine: on which it is to be fast.
      speedup: wanted ratio of the time of the dense network and the predicted one, at least 1.
      min_density: no layer is pruned below it.
      exclude: layers to leave dense (often the first); their time counts.
      other_seconds: time of everything else in the network, which pruning does not change.
      whole_seconds: time of the dense network, if it was measured; None takes the predicted one.

    Raises:
      ValueError: for a time that is not positive, for a speedup below 1 or out of reach (saying the highest, and which layers
        bound it), for a min_density outside (0, 1), for excluded layers that do not exist.
    """
    if not 1 <= speedup < math.inf:
        raise ValueError(f"speedup must be at least 1 (the dense network) and finite, got {speedup}")
    if not 0 < min_density < 1:
        raise ValueError(f"min_density must be in (0, 1), got {min_density}")
    if whole_seconds is not None and not 0 < whole_seconds < math.inf:
        raise ValueError(f"whole_seconds must be positive and finite, or None to have it predicted, got {whole_seconds}")
    if missing := sorted(set(exclude) - shapes.keys()):
        raise ValueError(f"cannot exclude layers {missing}: the network has {list(shapes)}")
    if not shapes:
        raise ValueError("there is no layer to prune: the model has no 2-D convolution and no fully connected layer")

    names, work = list(shapes), Work.stack(shapes.values(), machine)
    inputs = np.array([shape.weights / shape.oc for shape in shapes.values()])
    dense = np.asarray(dense_seconds(work, machine), float)
    lower, upper = (np.asarray(bound, float) for bound in useful_range(work, machine))
    floor = np.clip(lower, min_density, 1.0)
    curves = _curves(work, inputs, machine, floor)
    least, fastest = _settle(0.0, curves)
    unpruned = np.minimum(dense, curves[:, 1, -1])

    dense_because: dict[int, str] = {}
    for i, name in enumerate(names):
        if name in exclude:
            dense_because[i] = "excluded"
        elif fastest[i] >= dense[i]:
            dense_because[i] = f"no speedup potential, at best {dense[i] / fastest[i]:.2f}x"
        elif speedup == 1:
            dense_because[i] = "no speedup asked for"

    def reason(i: int, density: float) -> str:
        if i in dense_because:
            return f"dense: {dense_because[i]}"
        if density == 1:
            return f"needs no zeros: the sparse kernel is {dense[i] / unpruned[i]:.2f}x as fast without any"
        end = "min_density" if min_density > lower[i] else "the lower end of its useful range"
        stopped = f", stopped at {end}" if density < 1.001 * floor[i] else ""
        return f"useful from {lower[i]:.3f} to {upper[i]:.2f}{stopped}"

    pruned = np.array([i not in dense_because for i in range(len(names))])
    best = np.where(pruned, fastest, unpruned)
    total, shortest = whole_seconds or other_seconds + dense.sum(), other_seconds + best.sum()
    if total / shortest < speedup:
        longest = sorted(range(len(names)), key=lambda i: -best[i])[:5]
        shares = [f"{names[i]} {best[i] / shortest:.0%} ({reason(i, float(least[i]))})" for i in longest]
        if other_seconds:
            shares.append(f"everything else {other_seconds / shortest:.0%}")
        raise ValueError(
            f"a speedup of {speedup:g} cannot be reached: the highest is {math.floor(100 * total / shortest) / 100:.2f}, "
            f"where the time goes to {', '.join(shares)}"
        )

    density, given_back = _least_damage(curves, unpruned, inputs, pruned, total / speedup - other_seconds)
    dense_because |= given_back
    at = jnp.asarray(density, jnp.float32)
    sparse, slope = jax.jvp(lambda d: conv_seconds(work, d, machine), (at,), (jnp.ones_like(at),))
    seconds = np.where(density < 1, np.asarray(sparse, float), unpruned)
    layers = {
        name: LayerGuide(
            density=float(density[i]),
            reason=reason(i, density[i]),
            lower=float(lower[i]),
            upper=float(upper[i]),
            shape=shapes[name],
            dense_seconds=float(dense[i]),
            seconds=float(seconds[i]),
            slope=float(slope[i]),
        )
        for i, name in enumerate(names)
    }
    return Guidance(layers, other_seconds, whole_seconds)


def _least_damage(
    curves: np.ndarray, unpruned: np.ndarray, inputs: np.ndarray, pruned: np.ndarray, budget: float
) -> tuple[np.ndarray, dict[int, str]]:
    """Densities (layers,) at which all layers take `budget` seconds, and why some that could be pruned (bools) are not."""
    best = np.where(pruned, _settle(0.0, curves)[1], unpruned)

    def solve(pruned: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        density, seconds = np.ones(len(unpruned)), unpruned.copy()
        price, density[pruned], seconds[pruned] = _solve(curves[pruned], budget - unpruned[~pruned].sum())
        return price, density, seconds, (1 / density - 1) / inputs

    given_back = {}
    price, density, seconds, damage = solve(pruned)
    may_leave = pruned.copy()
    while True:
        # Pruning a layer costs damage, at the price, and saves time. One that loses by it leaves, if the others can be fast
        # enough without it at less damage; above its break-even density it saves nothing, and always does.
        needed = unpruned - best > budget - best.sum()
        loss = np.where(may_leave & ~needed, price * damage - (unpruned - seconds), 0.0)
        i = int(loss.argmax())
        if loss[i] <= 1e-6 * budget:
            return density, given_back
        may_leave[i] = False
        without = pruned & (np.arange(len(unpruned)) != i)
        solution = solve(without)
        if solution[-1].sum() < damage.sum():
            saved = 1 - seconds[i] / unpruned[i]
            saving = f"would save only {saved:.0%}" if saved > 0 else "would be slower"
            given_back[i] = f"given back, {saving} at density {density[i]:.2f}"
            pruned, best[i] = without, unpruned[i]
            price, density, seconds, damage = solution


def _curves(work: Work, inputs: np.ndarray, machine: Machine, floor: np.ndarray) -> np.ndarray:
    """What each layer can choose from, (layers, 3, GRID): log density from floor (layers,) to 1, seconds, worth."""
    log_density = np.linspace(np.log(floor), 0.0, GRID)
    density = jnp.asarray(np.exp(log_density), jnp.float32)
    seconds, slope = jax.jvp(jax.vmap(lambda d: conv_seconds(work, d, machine)), (density,), (jnp.ones_like(density),))
    worth = np.asarray(slope, float) * np.asarray(density, float) ** 2 * inputs
    # Where the time is not convex, the densities between are never the best: skip them.
    return np.stack([log_density, np.asarray(seconds, float), np.maximum.accumulate(worth)]).transpose(2, 0, 1)


def _settle(price: float, curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The density (layers,) at which each layer's worth is the price, between its floor and 1, and the seconds there."""
    layer = np.arange(len(curves))
    worth = curves[:, 2]
    right = np.clip((worth <= price).sum(axis=1), 1, GRID - 1)
    low, high = worth[layer, right - 1], worth[layer, right]
    part = np.clip((price - low) / np.where(high > low, high - low, 1.0), 0.0, 1.0)
    log_density, seconds, _ = ((1 - part) * c[layer, right - 1] + part * c[layer, right] for c in curves.transpose(1, 0, 2))
    return np.exp(log_density), seconds


def _solve(curves: np.ndarray, budget: float) -> tuple[float, np.ndarray, np.ndarray]:
    """The highest price at which these layers take at most `budget` seconds together, their densities and seconds."""
    if not len(curves):
        return 0.0, np.empty(0), np.empty(0)
    low, high = 0.0, curves[:, 2].max()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _settle(middle, curves)[1].sum() <= budget else (low, middle)
    return low, *_settle(low, curves)
