"""Guided sparsity learning (GSL): the loop around a method that lets densities come out of the training.

Park et al., "Faster CNNs with Direct Sparse Convolutions and Guided Pruning" (ICLR 2017) prune the layers of a set S by any
method, and from time to time take layers out of S: for good, with their dense weights back, where pruning settles short of
a speedup; as they are where more pruning would gain nothing. Here a method (`lasso`, `surgery`) asks this loop at every
step. A pressure pushes on all layers at once, and where a layer gives way is the training's choice:

    pressure_l = pressure * strength_l,    strength_l = slope_l / mean slope,    slope = d(seconds)/d(density)
    pressure  <- pressure * clip(kept / wanted, 1 / (1 + rate), 1 + rate)

with kept the weights of all layers in the loop and wanted what the ramp says. A layer

    arrives  when it keeps target = max(density, lower) of its weights: it feels no pressure, and its mask is fixed;
    leaves   when it is above `upper` at a review, every `patience` steps and when the ramp is full: all its weights are
             back for good. The layers that stay make up for its time, in first order of the performance model:

        density_l <- max(lower_l, density_l * max(1/2, 1 - excess / sum_k slope_k density_k)),    k: density_k > lower_k

    is cut   to the target, largest weights kept, when the ramp is full and it has neither arrived nor left.

As layers arrive or leave, the pressure on the others rises until they follow the ramp. A `constant` guide (lower 0, upper
1, no slope) runs the same code: equal strengths, and no layer leaves. ESL and DNS of the paper are `lasso` and `surgery`
with a constant guide, GESL and GDNS the same with `guided`.

Differences: the paper has a fixed strength of pressure, and the densities are what comes out; it stops a layer at `lower`
only, which the guide's density replaces unless it is higher. Its code never had the loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from sparseflax.prune import blocks
from sparseflax.prune.guide import Guidance
from sparseflax.prune.mask import Masks, keep_largest, kernels


class LoopState(NamedTuple):
    """count: updates so far, int32; age: those of them that pruned, int32; pressure: float32; left: bool (layers,)."""

    count: jax.Array
    age: jax.Array
    pressure: jax.Array
    left: jax.Array


class Orders(NamedTuple):
    """What the loop tells a method at one step.

    Attributes:
      begun: the ramp is above 0, bool.
      full: the ramp is full, bool: layers that are still active are cut.
      active: which layers are pruned on, bool (layers,).
      leaves: which layers get their dense weights back at this step, bool (layers,).
      target: weights, or blocks, to keep, int32 (layers,).
      pressure: on each layer, float32 (layers,); 0 where it is not active.
    """

    begun: jax.Array
    full: jax.Array
    active: jax.Array
    leaves: jax.Array
    target: jax.Array
    pressure: jax.Array


@dataclass(frozen=True)
class Loop:
    """The loop over the layers that a guide prunes.

    Attributes:
      guide: which layers, how far, and their useful ranges.
      ramp: schedule from 0 (dense) to 1 (the guide's densities) over optimizer steps.
      patience: steps of pruning between reviews; None for the one review when the ramp is full.
      rate: by how much the pressure may change in a step; 0 for a fixed pressure.
      block: of neighbouring input channels that are pruned together; what is counted below are such blocks.

    Raises:
      ValueError: for a patience below 1 or a negative rate.
    """

    guide: Guidance
    ramp: optax.Schedule
    patience: int | None
    rate: float
    block: int = 1

    def __post_init__(self):
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1 step, or None for one review at the end, got {self.patience}")
        if self.rate < 0:
            raise ValueError(f"rate must be at least 0 (a fixed pressure), got {self.rate}")

    @property
    def order(self) -> dict[str, int]:
        """{layer: its index in the loop's arrays}."""
        return {name: i for i, name in enumerate(self.guide.densities)}

    def init(self) -> LoopState:
        return LoopState(jnp.int32(0), jnp.int32(0), jnp.float32(1), jnp.zeros(len(self.order), bool))

    def step(self, state: LoopState, masks: Masks) -> tuple[LoopState, Orders]:
        """The next state and what to do, from the masks as they were before this step."""
        count = jnp.asarray(optax.safe_increment(state.count))
        fraction = jnp.asarray(self.ramp(count), jnp.float32)
        begun, full = fraction > 0, fraction >= 1
        age = state.age + begun.astype(jnp.int32)

        leaf, layers = kernels(masks.tree), self._table()
        held = [blocks.kept(leaf[name], self.block) for name in self.order]
        size = np.array([mask.size for mask in held], np.int64)
        kept = jnp.stack([jnp.sum(mask) for mask in held]) if held else jnp.zeros(0, jnp.int32)
        above = kept.astype(jnp.float32) / np.maximum(size, 1).astype(np.float32) > layers["upper"]
        review = full if self.patience is None else full | (age % self.patience == 0)
        leaves = begun & review & above & ~state.left
        left = state.left | leaves

        target = self._targets(size, left)
        active = begun & ~left & (kept > target)
        wanted = _sum(size - fraction * (size.astype(np.float32) - target.astype(jnp.float32)), ~left)
        error = _sum(kept.astype(jnp.float32), ~left) / jnp.maximum(wanted, 1.0)
        change = jnp.clip(error, 1 / (1 + self.rate), 1 + self.rate)
        pressure = jnp.clip(state.pressure * jnp.where(begun & ~full, change, 1.0), 1e-6, 1e6)  # stays a number, always
        pressures = jnp.where(active, pressure * layers["strength"], 0.0)
        return LoopState(count, age, pressure, left), Orders(begun, full, active, leaves, target, pressures)

    def _targets(self, size: np.ndarray, left: jax.Array) -> jax.Array:
        """How many of its blocks each layer is to keep, once the others have made up for the layers that left."""
        layers = self._table()
        excess = _sum(layers["saves"], left)
        room = _sum(layers["slope"] * layers["density"], ~left & (layers["density"] > layers["lower"]))
        factor = jnp.maximum(0.5, 1 - excess / jnp.where(room > 0, room, jnp.inf))
        first = np.array([round(max(layer.density, layer.lower) * n) for layer, n in zip(self._layers(), size, strict=True)])
        more = jnp.round(jnp.maximum(layers["lower"], layers["density"] * factor) * size.astype(np.float32))
        return jnp.where(factor < 1, more.astype(jnp.int32), first.astype(np.int32))

    def _layers(self):
        return [self.guide.layers[name] for name in self.order]

    def _table(self) -> dict[str, np.ndarray]:
        """What the guide says, as float32 arrays (layers,); 0 where it knows no time."""
        columns = {
            "density": [layer.density for layer in self._layers()],
            "lower": [layer.lower for layer in self._layers()],
            "upper": [layer.upper for layer in self._layers()],
            "slope": [layer.slope for layer in self._layers()],
            "saves": [layer.dense_seconds - layer.seconds for layer in self._layers()],
            "strength": list(self.guide.strengths.values()),
        }
        return {name: np.nan_to_num(np.array(column, np.float32)) for name, column in columns.items()}


def settle(orders: Orders, i: int, norms: jax.Array, mask: jax.Array, kept: jax.Array, block: int = 1) -> jax.Array:
    """The next mask of layer i: what the method would keep while that is more than the target, then exactly the target.

    Args:
      orders: of this step.
      i: index of the layer.
      norms: of the layer's kept blocks, or what they would be if they were kept.
      mask: of the step before, of the kernel's shape.
      kept: the blocks that the method wants, bool, of the norms' shape.
      block: of how many neighbouring input channels.
    """
    active, target = orders.active[i], orders.target[i]
    arrives = active & (orders.full | (jnp.sum(kept) <= target))
    whole = lax.cond(arrives, lambda: keep_largest(norms, target),
                     lambda: jnp.where(active, kept, blocks.kept(mask, block)))
    return blocks.spread(whole, mask.shape, block) | orders.leaves[i]


def _sum(numbers, where: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(where, numbers, 0.0))
