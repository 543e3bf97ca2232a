"""Speed in the loss: how far each layer is pruned is learned, and the network's predicted time is what was asked for.

Pruning minimises the loss plus a price on the predicted seconds T of the whole network, over the thresholds theta_l below
which a layer's weights are removed:

    minimise  loss(theta_1, ..., theta_L)  +  price * T(d_1, ..., d_L),    d_l = share of |w| > theta_l in layer l

What removing weights does to the loss is read off its gradients. To second order, with the mean squared gradient F_l of
a layer's kept weights in place of the curvature (Theis, Korshunova, Tejani, Huszar, "Faster gaze prediction with dense
networks and Fisher pruning", 2018), the loss grows by F_l / 2 times the sum of w^2 removed. Densities are functions of the
weights, and where they are differentiable the minimum is

    F_l theta_l^2 / 2 = price * (dT/dd_l) / n_l

for every layer, of n_l weights: a weight stays if what it does for the loss is worth the seconds that it costs. Of blocks of
weights |w| is the norm of one, and n_l their number. F_l theta_l^2 is the same when a layer is scaled, as batch norm allows.
As the weights and their gradients change, the thresholds move with them. One F for each layer, since a weight's own is too
noisy after some tens of batches to choose among neighbours by.

The price is a multiplier that nobody has to choose. Whenever masks are taken, it is solved for, so that T is the time that
the ramp asks for at that step; so T does not overshoot or oscillate, as it would under a multiplier that is a step behind.

Related: Park et al., "Faster CNNs with Direct Sparse Convolutions and Guided Pruning" (ICLR 2017) stop at bounds of each
layer's density; SPDY (Frantar and Alistarh, ICML 2022) searches densities for a time, from tables, before the training;
STR (Kusupati et al., ICML 2020) learns thresholds under a weight decay on them, which knows no time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from sparseflax.conv.int8 import LANES
from sparseflax.cost.int8 import work_in
from sparseflax.cost.machine import Machine
from sparseflax.cost.model import Work, conv_seconds
from sparseflax.prune import blocks
from sparseflax.prune.guide import LEAST, Guidance
from sparseflax.prune.mask import Masks, all_kept, hold, keep_largest, kernels, map_masks
from sparseflax.prune.mask import masks as masks_of

GRID = 128  # densities per layer between which the worth of its weights is interpolated, evenly spaced in the logarithm
TINY = float(np.finfo(np.float32).tiny)
MEMORY = 0.98  # of the mean squared gradients: some 50 steps, in which the layers' ratios change little


class BudgetState(NamedTuple):
    """State of `budget`.

    Attributes:
      count: updates so far, int32.
      inner: the optimizer's state.
      fisher: {layer: running sum of its mean squared gradients}, float32, decaying by MEMORY.
      fraction: of the ramp when the masks were last taken, float32.
      price: of a second then, in loss, float32; 0 while the network is as fast as the ramp asks without pruning.
      seconds: predicted for the whole network with those masks, float32.
      masks: of the guide's layers.
    """

    count: jax.Array
    inner: Any
    fisher: dict[str, jax.Array]
    fraction: jax.Array
    price: jax.Array
    seconds: jax.Array
    masks: Masks


def budget(
    inner: optax.GradientTransformation,
    guide: Guidance,
    machine: Machine,
    ramp: optax.Schedule,
    *,
    seconds: float | None = None,
    every: int = 10,
    min_density: float = 0.01,
    keep_zeros: bool = False,
    block: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer `inner`, and the guide's layers pruned by magnitude until the network takes the guide's time:

        guide = prune.guided(shapes, machine, speedup=3)
        tx = prune.budget(optax.adam(1e-3), guide, machine, prune.ramp(100, 600))

    It takes the optimizer in, because it needs the gradients themselves, and decides last. Of the guide it takes the layers
    (those that it leaves dense stay dense), the useful ranges and the time; not the densities. At fraction f of the ramp the
    predicted time is T_1 + f (T - T_1), with T_1 that of the sparse kernels at density 1; at its end it is T, less what
    rounding to whole weights saves. No layer goes below the lower end of its useful range or below min_density, and at the
    end of the ramp none is above the upper end. After every `optax.apply_updates` the pruned weights are exactly zero, and
    masks only shrink. Momentum of pruned weights is as in `prune.magnitude`.

    Args:
      inner: the optimizer, with its weight decay.
      guide: with a performance model (`prune.guided`).
      machine: on which the network is to be fast; the guide's.
      ramp: schedule from 0 (dense) to 1 (the time asked for) over optimizer steps (`prune.ramp`).
      seconds: predicted time of the whole network to reach, of the guide's batch; the guide's own by default.
      every: steps between two takings of the masks; the last one is at the first step at which the ramp is full.
      min_density: no layer is pruned below it.
      keep_zeros: count weights that are zero at the start as pruned: for pruning a pruned network further.
      block: prune blocks of so many neighbouring input channels, by their norm: 4 for a guide for int8. Densities are then
        those of blocks.

    Raises:
      ValueError: for a guide without performance model, or for int8 with another block than 4, a time that is not positive and
        finite, or out of reach (saying the shortest, and which layers bound it), and in `init`, for a layer of the guide that
        has no kernel in the parameters.
    """
    if every < 1:
        raise ValueError(f"every must be at least 1 step, got {every}")
    if not 0 < min_density < 1:
        raise ValueError(f"min_density must be in (0, 1), got {min_density}")
    if unknown := [name for name, layer in guide.layers.items() if layer.shape is None]:
        raise ValueError(f"the guide has no performance model of layers {unknown}: make it with prune.guided")
    if guide.precision == "int8" and block != LANES:
        raise ValueError(f"the guide is for int8, whose words are blocks of {LANES} input channels, got block={block}: pass "
                         f"block={LANES}, or a guide for float32")
    inner = optax.with_extra_args_support(inner)
    names = [name for name, layer in guide.layers.items() if layer.density < 1]
    network = _Network.of(guide, names, machine, min_density, block) if names else None
    goal = guide.seconds if seconds is None else seconds
    if not 0 < goal < math.inf:
        raise ValueError(f"seconds must be positive and finite, or None for the guide's, got {goal}")
    if goal < (1 - 1e-4) * (network.fastest if network else guide.seconds):
        raise ValueError(_refusal(guide, network, names, goal))

    def init(params: Any) -> BudgetState:
        masks, zero = all_kept(params, names, keep_zeros=keep_zeros), jnp.zeros((), jnp.float32)
        state = BudgetState(jnp.int32(0), inner.init(params), dict.fromkeys(names, zero), zero, zero,
                            jnp.float32(guide.dense_seconds), masks)
        masks_of(state)  # raises where two methods prune the same layer
        return state

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, BudgetState]:
        count, gradients = jnp.asarray(optax.safe_increment(state.count)), updates
        updates, inner_state = inner.update(gradients, state.inner, params, **extra)
        if network is None:
            return updates, state._replace(count=count, inner=inner_state)
        slopes, kept_now = kernels(gradients), kernels(state.masks.tree)
        fisher = {name: MEMORY * old + jnp.mean(jnp.square(slopes[name].astype(jnp.float32)), where=kept_now[name])
                  for name, old in state.fisher.items()}
        fraction = jnp.asarray(ramp(count), jnp.float32)
        due = (fraction > state.fraction) & ((count % every == 0) | (fraction >= 1))

        def take(network: _Network) -> tuple[jax.Array, jax.Array, Masks]:
            def norms(_: str, mask: jax.Array, u: jax.Array, p: jax.Array) -> jax.Array:
                return blocks.norms(jnp.where(mask, (p + u).astype(jnp.float32), 0), block)

            scores = map_masks(norms, state.masks, updates, params, elsewhere=lambda u, p: optax.MaskedNode())
            by_layer, masks = kernels(scores), kernels(state.masks.tree)
            kept = jnp.stack([jnp.sum(blocks.kept(masks[name], block)) for name in names])
            # As if all gradients so far had counted alike at first.
            curvature = jnp.stack([fisher[name] for name in names]) * (1 - MEMORY) / (1 - MEMORY ** count.astype(jnp.float32))
            price, counts = network.solve([by_layer[name] for name in names], curvature, kept, fraction, goal)
            number = dict(zip(names, counts, strict=True))

            def shrink(layer: str, mask: jax.Array, score: jax.Array) -> jax.Array:
                best = keep_largest(score, number[layer], among=blocks.kept(mask, block))
                return mask & blocks.spread(best, mask.shape, block)

            taken = map_masks(shrink, state.masks, scores, elsewhere=lambda score: optax.MaskedNode())
            return price, network.seconds(counts / network.number), Masks(taken)

        price, predicted, masks = lax.cond(due, partial(take, network), lambda: (state.price, state.seconds, state.masks))
        last = jnp.where(due, fraction, state.fraction)
        return hold(masks, updates, params), BudgetState(count, inner_state, fisher, last, price, predicted, masks)

    return optax.GradientTransformationExtraArgs(init, update)


class _Network(NamedTuple):
    """The layers to prune, as arrays (layers,), and what surrounds them.

    Attributes:
      work: of the layers.
      machine: that runs them, as kernels of the guide's precision find it.
      number: of each layer's blocks, its weights where these are pruned one by one.
      floor, ceiling: densities between which each layer ends.
      scale: of the seconds predicted for the layers.
      rest: seconds of everything else.
    """

    work: Work
    machine: Machine
    number: np.ndarray
    floor: np.ndarray
    ceiling: np.ndarray
    scale: float
    rest: float

    @classmethod
    def of(cls, guide: Guidance, names: list[str], machine: Machine, min_density: float, block: int) -> _Network:
        layers = [guide.layers[name] for name in names]
        shapes = [layer.shape for layer in layers if layer.shape is not None]
        ceiling = np.array([layer.upper for layer in layers], np.float32)
        floor = np.minimum(np.array([max(layer.lower, min_density) for layer in layers], np.float32), ceiling)
        rest = guide.seconds - sum(layer.seconds for layer in layers)
        number = np.array([shape.weights / math.prod(shape.kernel_shape) * math.prod(blocks.grid(shape.kernel_shape, block))
                           for shape in shapes], np.float32)
        scale = guide.whole.scale if guide.whole else 1.0
        return cls(*work_in(guide.precision, shapes, machine), number, floor, ceiling, scale, rest)

    def seconds(self, density: Any) -> jax.Array:
        """Predicted for the whole network at these densities (layers,)."""
        return self.rest + self.scale * jnp.sum(conv_seconds(self.work, density, self.machine))

    @property
    def fastest(self) -> float:
        return float(self.seconds(self.floor))

    def solve(
        self, norms: list[jax.Array], curvature: jax.Array, kept: jax.Array, fraction: jax.Array, goal: float
    ) -> tuple[jax.Array, jax.Array]:
        """The price at which the network takes the time of this fraction of the ramp, and how many blocks each layer keeps.

        Args:
          norms: of the blocks of each layer, 0 where pruned.
          curvature: of the loss (layers,), their mean squared gradients; where no gradient ever came, the smallest number.
          kept: blocks (layers,) that the last masks keep.
          fraction: of the ramp.
          goal: seconds at its end.
        """
        slowest = self.seconds(np.ones_like(self.floor))
        target = slowest + fraction * (goal - slowest)
        top = jnp.minimum(kept / self.number, 1 + fraction * (self.ceiling - 1))
        bottom = jnp.minimum(self.floor, top)
        log_density = jnp.linspace(jnp.log(bottom), jnp.log(top), GRID, axis=1)  # (layers, GRID)
        density = jnp.exp(log_density)
        slope = jax.vmap(jax.grad(lambda d: self.seconds(d)), 1, 1)(density)
        curvature = jnp.maximum(curvature, TINY)[:, None]
        damage = jnp.stack([_slope_of_energy(w, d) for w, d in zip(norms, density, strict=True)])
        # Where the worth falls with the density, the densities between are never the best: skip them.
        worth = lax.cummax(jnp.log(damage) + jnp.log(curvature) - jnp.log(2 * slope), axis=1, reverse=True)

        def densities(log_price: jax.Array) -> jax.Array:
            """At which each layer's worth is the price, between bottom and top; a step function where the worth is flat."""
            interpolate = jax.vmap(lambda worths, logs: jnp.interp(-log_price, -worths, logs))
            return jnp.exp(interpolate(worth, log_density))

        low, high = _bisect(lambda price: self.seconds(densities(price)) <= target, jnp.min(worth) - 1, jnp.max(worth) + 1)
        slow, fast = densities(low), densities(high)
        _, part = _bisect(lambda x: self.seconds(slow + x * (fast - slow)) <= target, jnp.float32(0), jnp.float32(1))
        counts = jnp.floor((slow + part * (fast - slow)) * self.number + 1e-3).astype(jnp.int32)
        return jnp.exp(high), jnp.clip(counts, 1, kept)


def _slope_of_energy(norms: jax.Array, density: jax.Array) -> jax.Array:
    """d(sum of w^2 removed)/d(density), negated, of one layer at densities (GRID,): n theta^2."""
    energy = jnp.square(jnp.sort(norms.reshape(-1), descending=True))
    last = jnp.clip(jnp.floor(density * energy.size + 1e-3).astype(jnp.int32) - 1, 0, energy.size - 1)
    return jnp.maximum(energy[last] * energy.size, TINY)


def _bisect(holds: Callable[[jax.Array], jax.Array], low: jax.Array, high: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The interval around the smallest number in (low, high] at which a condition holds that is true at high."""

    def halve(_, bounds):
        low, high = bounds
        middle = low + (high - low) / 2
        good = holds(middle)
        return jnp.where(good, low, middle), jnp.where(good, middle, high)

    return lax.fori_loop(0, 40, halve, (low, high))


def _refusal(guide: Guidance, network: _Network | None, names: list[str], goal: float) -> str:
    """Why the time cannot be reached, with the shortest, and where it goes."""
    shortest, times = guide.seconds, {name: layer.seconds for name, layer in guide.layers.items()}
    if network is not None:
        shortest = network.fastest
        fast = network.scale * np.asarray(conv_seconds(network.work, network.floor, network.machine), float)
        times |= dict(zip(names, fast, strict=True))
    longest = sorted(times, key=lambda name: -times[name])[:5]
    shares = [f"{name} {times[name] / shortest:.0%} ({guide.layers[name].reason})" for name in longest]
    if guide.other_seconds > LEAST * shortest:
        shares.append(f"everything else {guide.other_seconds / shortest:.0%}")
    return (f"{goal * 1e6:.1f} us cannot be reached: the shortest is {shortest * 1e6:.1f} us, "
            f"{guide.dense_seconds / shortest:.2f}x as fast as dense, where the time goes to {', '.join(shares)}")
