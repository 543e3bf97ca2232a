"""How far to prune each layer, so that the network becomes as fast as asked at the least damage.

The paper's guidance (Park et al., "Faster CNNs with Direct Sparse Convolutions and Guided Pruning", ICLR 2017) excludes
layers without speedup potential, stops at the lower end of a layer's useful range of density, and gives a layer that
settles short of the upper end its dense weights back. Its densities came out of the training. Ours are solved for before
it, from the performance model and its gradient:

    minimise  sum_l 1 / (m_l d_l)   subject to   other + sum_l t_l(d_l) <= t_dense / speedup,   lower_l <= d_l <= 1

with m_l = kh kw ic / groups the inputs of an output, so that m d is how many of them a layer keeps. That is what a trained
layer seems to need: the sixteen 3x3 layers of the paper's ResNet-50, of 64 to 512 channels, kept 50 to 110 inputs each.
A pruned layer takes t = conv_seconds, one that is not takes dense_seconds. At the optimum every pruned layer saves the same
time per damage, its worth, at the margin:

    (dt/dd) / (1 / (m d^2)) = price

Where it was measured what pruning each layer does to the network's outputs (`prune.damage`), the sum is of that.

Where the useful ranges end before the network is fast enough, lower_l is min_density for all: the time saved below them is
little for the damage, but it was asked for.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from sparseflax.cost.int8 import int8_seconds, work_in
from sparseflax.cost.machine import Machine
from sparseflax.cost.model import Work, conv_seconds, dense_seconds, useful_range
from sparseflax.cost.shape import ConvShape
from sparseflax.network.plan import MARGIN
from sparseflax.prune.damage import Damage, Lost, assumed, known
from sparseflax.prune.guide import LEAST, Guidance, LayerGuide, Layers, named
from sparseflax.prune.whole import Whole

# Of the highest speedup, what best effort asks for: the last percents would cost nearly all weights that are left.
REACH = 0.97
GRID = 128  # densities per layer at which the performance model is evaluated, evenly spaced in the logarithm


def guided(
    shapes: Mapping[str, ConvShape],
    machine: Machine,
    *,
    speedup: float = 2.5,
    seconds: float | None = None,
    min_density: float = 0.01,
    exclude: Layers = (),
    whole: Whole | None = None,
    best_effort: bool = False,
    precision: Literal["float32", "int8"] = "float32",
    damage: Damage | None = None,
) -> Guidance:
    """The densities at which the network runs `speedup` times as fast as dense, at the least damage.

    One price gives every layer its density, and bisection finds the price. Then layers get their dense weights back, one at
    a time, where the others can make up for their time at less damage: those above their break-even density always do.

    Args:
      shapes: {layer: ConvShape} of all layers of the network (`conv_shapes`), with the batch it is to be fast at.
      machine: on which it is to be fast.
      speedup: wanted ratio of the time of the dense network and the predicted one, at least 1.
      seconds: wanted time of the whole network, in place of a speedup.
      min_density: no layer is pruned below it.
      exclude: layers to leave dense, whose time counts: names, patterns such as "*/shortcut", or a predicate of a name.
      whole: what the network takes, from `prune.measure`, which makes the speedup that of all of it; None goes by what is
        predicted of the layers alone.
      best_effort: where that is out of reach, take what can be reached, and say so in the guide's `shortfall`; then
        `speedup=math.inf` asks for as much as there is.
      precision: in which layers will run, but for those that take less time dense in float32. Densities for int8 are those of
        blocks of four input channels, which the method has to prune by (`block=4`).
      damage: what pruning each layer does to the outputs, from `prune.damage`; layers that it lacks stay dense. None takes
        1 / (m d) of every layer.

    Raises:
      ValueError: for a time that is not positive and finite, for a speedup below 1 or out of reach (saying the highest, and
        which layers bound it), for a min_density outside (0, 1), for excluded layers that do not exist.
    """
    if not (1 <= speedup < math.inf or best_effort and speedup == math.inf):
        most = "; for as much as there is, pass best_effort=True with it" if speedup == math.inf else ""
        raise ValueError(f"speedup must be at least 1 (the dense network) and finite, got {speedup}{most}")
    if precision not in ("float32", "int8"):
        raise ValueError(f"precision={precision!r}, wanted 'float32' or 'int8'")
    if not 0 < min_density < 1:
        raise ValueError(f"min_density must be in (0, 1), got {min_density}")
    if seconds is not None and not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be positive and finite, or None, got {seconds}")
    if whole is not None:
        whole.checked()
    if not shapes:
        raise ValueError("there is no layer to prune: the model has no 2-D convolution and no fully connected layer")

    names, here = list(shapes), machine
    work, machine = work_in(precision, shapes.values(), machine)
    # Of a stack each layer does its damage.
    lost = assumed(np.array([shape.weights / shape.oc / shape.layers**2 for shape in shapes.values()]))
    if damage is not None:
        lost = known([damage.get(name, ((0.5,), (1.0,))) for name in names])
    predicted = np.asarray(dense_seconds(work, machine), float)
    whole = whole or Whole(float(predicted.sum()), dense_scale=1.0)
    scale, total = whole.scale, whole.dense_seconds
    before = dense = whole.dense_factor(float(predicted.sum())) * predicted
    if precision == "int8":  # what is not pruned runs in eight bits, too
        rounded = [math.inf if shape.depthwise else int8_seconds(shape, 1.0, here) for shape in shapes.values()]
        dense = np.minimum(dense, scale * np.array(rounded))
    # `plan` knows of no scales: what it would not run sparse, by MARGIN, is not to be pruned.
    bearable = np.minimum(dense, scale * predicted / MARGIN)
    lower, upper = (np.asarray(bound, float) for bound in useful_range(work, machine))
    goal = seconds or total / speedup
    one = 1 - 1 / np.array([shape.weights for shape in shapes.values()])  # the density with a single zero

    excluded, dense_because = named(exclude, names), dict[int, str]()
    for floor in (np.clip(lower, min_density, one), np.minimum(min_density, one)):
        curves = _curves(work, lost, machine, scale, floor, one)
        least, fastest = _settle(0.0, curves)
        dense_because = {i: "excluded" for i, name in enumerate(names) if name in excluded}
        dense_because |= {i: "what pruning it would do was not measured" for i, name in enumerate(names)
                          if damage is not None and name not in damage and i not in dense_because}
        dense_because |= {i: f"no speedup potential, at best {dense[i] / fastest[i]:.2f}x" for i in range(len(names))
                          if i not in dense_because and fastest[i] >= bearable[i]}
        pruned = np.array([i not in dense_because for i in range(len(names))])
        best = np.where(pruned, fastest, dense)
        shortest = whole.seconds(best.sum())
        if goal >= shortest:
            break

    def reason(i: int, density: float) -> str:
        if i in dense_because:
            return f"dense: {dense_because[i]}"
        useful = f"useful from {lower[i]:.3f} to {upper[i]:.2f}"
        if lower[i] > one[i]:
            useful = "runs sparse, though fewer weights hardly save time"
        below = ", pruned further for the speedup asked for" if density < 0.999 * min(lower[i], one[i]) else ""
        end = "the lower end of it" if floor[i] == lower[i] else "min_density"
        stopped = f", stopped at {end}" if density < min(1.001 * floor[i], one[i]) else ""
        return useful + below + stopped

    shortfall = ""
    if goal < min(shortest, total):
        longest = sorted(range(len(names)), key=lambda i: -best[i])[:5]
        shares = [f"{names[i]} {best[i] / shortest:.0%} ({reason(i, float(least[i]))})" for i in longest]
        if (other := shortest - best.sum()) > LEAST * shortest:
            shares.append(f"everything else {other / shortest:.0%}")
        highest = f"{math.floor(100 * total / shortest) / 100:.2f}"
        asked = (f"a speedup of {speedup:g} cannot be reached: the highest is {highest}" if seconds is None else
                 f"{1e3 * seconds:.3g} ms cannot be reached: the least is {1e3 * shortest:.3g} ms, a speedup of {highest}")
        if not best_effort:
            raise ValueError(f"{asked}, where the time goes to {', '.join(shares)}")
        goal = min(shortest / REACH, total)
        wanted = f"{1e3 * seconds:.3g} ms" if seconds else "as much as there is" if speedup == math.inf else f"{speedup:g}x"
        given = f"{math.floor(100 * total / goal) / 100:.3g}x" if seconds is None else f"{1e3 * goal:.3g} ms"
        shortfall = f"asked for {wanted}, this machine allows {given}: {_where(shapes, best, shortest)}"

    unpruned = min(total, whole.seconds(float(dense.sum())))  # packed it may be faster, pruned or not
    if goal >= unpruned:
        density = np.ones(len(names))
        why = "no speedup asked for" if goal >= total else f"packed it is {total / unpruned:.3g}x faster unpruned"
        dense_because |= {i: why for i in np.flatnonzero(pruned)}
    else:
        density, given_back = _least_damage(curves, dense, bearable, lost, pruned, goal - whole.other(goal))
        dense_because |= given_back
    sparse, slope = (values[0] for values in _seconds_and_slope(work, jnp.asarray(density[None], jnp.float32), machine))
    times = np.where(density < 1, scale * np.asarray(sparse, float), dense)
    layers = {
        name: LayerGuide(
            density=float(density[i]),
            reason=reason(i, density[i]),
            lower=float(min(floor[i], density[i])),
            upper=float(upper[i]),
            shape=shapes[name],
            dense_seconds=float(before[i]),
            seconds=float(times[i]),
            slope=scale * float(slope[i]),
        )
        for i, name in enumerate(names)
    }
    total_seconds = whole.seconds(float(times.sum())) if (density < 1).any() else unpruned
    return Guidance(layers, whole, here, total_seconds, shortfall, precision)


def _where(shapes: Mapping[str, ConvShape], best: np.ndarray, shortest: float) -> str:
    """What takes most of a network's shortest time: "35 % of the time is in what is no layer"; depthwise layers are one."""
    parts = {"what is no layer": shortest - float(best.sum())}
    for (name, shape), seconds in zip(shapes.items(), best.tolist(), strict=True):
        kind = "depthwise layers" if shape.depthwise else name
        parts[kind] = parts.get(kind, 0.0) + seconds
    longest = sorted(parts, key=lambda name: -parts[name])[:3]
    shares = [f"{100 * parts[name] / shortest:.0f} % {'of the time is ' * (not i)}in {name}" for i, name in enumerate(longest)]
    return ", ".join(shares)


def _least_damage(
    curves: np.ndarray, dense: np.ndarray, bearable: np.ndarray, lost: Lost, pruned: np.ndarray, budget: float
) -> tuple[np.ndarray, dict[int, str]]:
    """Densities (layers,) at which all layers take `budget` seconds, and why some that could be pruned (bools) are not.

    A layer that would take more than its `bearable` seconds sparse stays dense.
    """
    best = np.where(pruned, _settle(0.0, curves)[1], dense)

    def solve(pruned: np.ndarray) -> tuple[float, np.ndarray, np.ndarray, np.ndarray]:
        density, seconds = np.ones(len(dense)), dense.copy()
        price, density[pruned], seconds[pruned] = _solve(curves[pruned], budget - dense[~pruned].sum())
        return price, density, seconds, lost(density)[0]

    given_back = {}
    price, density, seconds, damage = solve(pruned)
    may_leave = pruned.copy()
    while True:
        # Pruning a layer costs damage, at the price, and saves time. Each is asked once, the one that loses most by it first,
        # and leaves if the others can be fast enough without it at less damage, or if it saves too little to run sparse.
        needed, in_vain = dense - best > budget - best.sum(), seconds > bearable
        loss = np.where(in_vain, np.inf, price * damage - (dense - seconds))
        candidates = np.flatnonzero(may_leave & ~needed)
        if not len(candidates):
            return density, given_back
        i = int(candidates[np.lexsort((dense[candidates], loss[candidates]))[-1]])
        may_leave[i] = False
        without = pruned & (np.arange(len(dense)) != i)
        solution = solve(without)
        if in_vain[i] or solution[-1].sum() < damage.sum():
            saved = 1 - seconds[i] / dense[i]
            saving = f"would save only {saved:.0%}" if saved > 0 else "would be slower"
            given_back[i] = f"given back, {saving} at density {density[i]:.2f}"
            pruned, best[i] = without, dense[i]
            price, density, seconds, damage = solution


def _curves(work: Work, lost: Lost, machine: Machine, scale: float, floor: np.ndarray, top: np.ndarray) -> np.ndarray:
    """What each layer can choose from, (layers, 3, GRID): log density from floor to top (layers,), seconds, worth."""
    log_density = np.linspace(np.log(floor), np.log(top), GRID)
    density = jnp.asarray(np.exp(log_density), jnp.float32)
    seconds, slope = _seconds_and_slope(work, density, machine)
    worth = scale * np.asarray(slope, float) / lost(np.asarray(density, float))[1]
    # Where the time is not convex, the densities between are never the best: skip them.
    return np.stack([log_density, scale * np.asarray(seconds, float), np.maximum.accumulate(worth)]).transpose(2, 0, 1)


@functools.partial(jax.jit, static_argnames="machine")
def _seconds_and_slope(work: Work, density: jax.Array, machine: Machine) -> tuple[jax.Array, jax.Array]:
    """conv_seconds of each layer and its derivative at densities (number, layers)."""
    return jax.jvp(jax.vmap(lambda d: conv_seconds(work, d, machine)), (density,), (jnp.ones_like(density),))


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
    # In logarithms: the worth of a layer's last weights is many orders of magnitude above that of its first.
    worth = curves[:, 2][curves[:, 2] > 0]
    low, high = (math.log(worth.min()) - 1, math.log(worth.max())) if len(worth) else (-math.inf, -math.inf)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _settle(math.exp(middle), curves)[1].sum() <= budget else (low, middle)
    return math.exp(low), *_settle(math.exp(low), curves)
