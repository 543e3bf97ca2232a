"""The pruning methods that are compared, under the names they are shown by: to add one, add a row to METHODS.

A method makes an optimizer out of a Task (a dense network, what is known of the machine, a requested speedup, the length of the
training) and a guide for it. A guide that knows nothing of speed gives the densities at which the performance model *predicts*
the requested speedup (`Task.matched`), so that all methods are asked for the same and accuracy tells them apart.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sparseflax import prune
from sparseflax.conv.int8 import LANES
from sparseflax.cost import model as cost
from sparseflax.cost.int8 import work_in
from sparseflax.cost.machine import Machine
from sparseflax.cost.model import conv_seconds
from sparseflax.cost.shape import ConvShape
from sparseflax.network.plan import MARGIN
from sparseflax.prune.allocate import REACH
from sparseflax.prune.damage import Damage

MIN_DENSITY = 0.01  # of a layer, for guided and unguided methods alike
L1 = 5e-3  # first strength of the lasso, per learning rate, for some hundred updates; it adapts, tenfold in 25
CALIBRATION = 512  # images that one-shot methods may look at
Precision = Literal["float32", "int8"]


class Speed:
    """What the performance model predicts of a network, layers running dense or sparse as `plan` would choose.

    Args:
      shapes: of its layers, at the batch it is to be fast at.
      machine: on which.
      whole: the network as it was measured; None goes by its layers alone.
      precision: of sparse layers, "float32" or "int8"; dense ones run in float32.
    """

    def __init__(self, shapes: Mapping[str, ConvShape], machine: Machine, whole: prune.Whole | None = None,
                 precision: Precision = "float32"):
        self._names, (work, machine) = list(shapes), work_in(precision, shapes.values(), machine)
        self._layers = np.asarray(cost.dense_seconds(work, machine), float)
        layers = float(self._layers.sum())
        self._whole = whole or prune.Whole(layers)
        self._dense_scale = self._whole.dense_factor(layers)
        self._weights = np.array([shape.weights for shape in shapes.values()], float)
        self._sparse = jax.jit(lambda density: conv_seconds(work, density, machine))

    def speedup(self, densities: Mapping[str, float]) -> float:
        """Time dense over predicted time at these densities {layer: kept / all}; other layers are dense."""
        density = np.maximum(self._vector(densities), 1 / self._weights)
        sparse = np.asarray(self._sparse(jnp.asarray(density, jnp.float32)), float)
        runs_sparse = (density < 1) & (MARGIN * sparse <= self._layers)  # as `plan` chooses
        layers = float(np.where(runs_sparse, self._whole.scale * sparse, self._dense_scale * self._layers).sum())
        return self._whole.dense_seconds / self._whole.seconds(layers)

    def density(self, densities: Mapping[str, float]) -> float:
        """Kept / all weights of the network at these densities of its layers."""
        return float(self._vector(densities) @ self._weights / self._weights.sum())

    def _vector(self, densities: Mapping[str, float]) -> np.ndarray:
        return np.array([densities.get(name, 1.0) for name in self._names])


@dataclass(frozen=True)
class Task:
    """What a method may know before it prunes.

    Attributes:
      model: the trained dense network; a one-shot method prunes it in place.
      images: training images (count, h, w, c), for methods that look at activations.
      shapes: of its layers.
      machine: on which it is to be fast.
      speedup: requested of the whole network.
      whole: the network as it was measured; None goes by what is predicted of its layers.
      rate: learning rate, a schedule over the updates.
      optimizer: that follows it; the method comes after it in the chain.
      steps: updates there will be.
      ramp_steps: of them, those in which the densities fall.
      every: updates between two takings of the masks.
      best_effort: whether a speedup out of reach is one that can be reached instead.
      block: neighbouring input channels that are pruned together.
      precision: that its sparse layers are to run in.
    """

    model: nnx.Module
    images: np.ndarray
    shapes: Mapping[str, ConvShape]
    machine: Machine
    speedup: float
    whole: prune.Whole | None
    rate: optax.Schedule
    optimizer: optax.GradientTransformation
    steps: int
    ramp_steps: int
    every: int
    best_effort: bool = False
    block: int = 1
    precision: Precision = "float32"

    @property
    def params(self) -> Any:
        return nnx.to_pure_dict(nnx.state(self.model, nnx.Param))

    @property
    def first(self) -> list[str]:
        """The network's first layer."""
        return list(self.shapes)[:1]

    @functools.cached_property
    def speed(self) -> Speed:
        """The performance model's predictions of this network."""
        return Speed(self.shapes, self.machine, self.whole, self.precision)

    @property
    def batches(self) -> list[np.ndarray]:
        """Some training images, to calibrate with."""
        count = min(CALIBRATION, len(self.images))
        return [self.images[i : i + CALIBRATION // 4] for i in range(0, count, CALIBRATION // 4)]

    @property
    def ramp(self) -> optax.Schedule:
        return prune.ramp(0, self.ramp_steps, total=self.steps)

    def guide(self, damage: Damage | None = None) -> prune.Guidance:
        """The performance model's. Raises ValueError for a speedup out of reach."""
        return prune.guided(self.shapes, self.machine, speedup=self.speedup, min_density=MIN_DENSITY, whole=self.whole,
                            best_effort=self.best_effort, precision=self.precision, damage=damage)

    def guide_by_damage(self) -> prune.Guidance:
        """The same, with what pruning each layer does to the outputs measured on the images."""
        return self.guide(prune.damage(self.model, self.batches[:1], self.shapes, block=self.block))

    def matched(self, allocate: Callable[[float], prune.Guidance]) -> prune.Guidance:
        """The guide without a performance model that is predicted to reach the requested speedup with the most weights.

        Args:
          allocate: the guide at a density of the whole network, faster the smaller it is.

        Raises:
          ValueError: for a speedup out of reach, saying the highest.
        """
        def reached(log_density: float) -> float:
            return self.speed.speedup(allocate(math.exp(log_density)).densities)

        low, high = math.log(MIN_DENSITY), 0.0
        wanted = self.speedup
        if (best := reached(low)) < wanted and self.best_effort:
            wanted = max(1.0, REACH * best)
        elif best < wanted:
            raise ValueError(f"a speedup of {self.speedup:g} cannot be reached: the highest is {best:.2f}, at a density of "
                             f"{MIN_DENSITY:g}")
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if reached(middle) >= wanted else (low, middle)
        found = allocate(math.exp(low))
        if wanted == self.speedup:
            return found
        return replace(found, shortfall=f"asked for {self.speedup:g}x, this machine allows {wanted:.3g}x of this method")

    def then(self, method: optax.GradientTransformation) -> optax.GradientTransformation:
        return optax.chain(self.optimizer, method)


Guide = Callable[[Task], prune.Guidance]
Prepare = Callable[[Task, prune.Guidance], optax.GradientTransformation | None]


class Method(NamedTuple):
    """A row of the comparison.

    Attributes:
      guide: which layers to prune, how far; raises ValueError where the requested speedup is out of reach.
      prepare: the optimizer to prune with, as that says, and train; None if the task's model was pruned and is not trained.
      twin: of a guided method, the name of the same method without the performance model's guide.
      trains: whether it does; a method that does not prepares no optimizer.
      block: neighbouring input channels that it prunes together, if no run asks for more.
      precision: that what it prunes is to run in; eight bits take blocks of four.
    """

    guide: Guide
    prepare: Prepare
    twin: str | None = None
    trains: bool = True
    block: int = 1
    precision: Precision = "float32"

    @property
    def guided(self) -> bool:
        """Whether the performance model says how far each layer is pruned."""
        return self.guide in (Task.guide, Task.guide_by_damage)


# The first layer stays dense, as it does where these allocations were published. The guide decides for itself.
def uniform(task: Task) -> prune.Guidance:
    return task.matched(lambda density: prune.uniform(task.params, density, exclude=task.first))


def erk(task: Task) -> prune.Guidance:
    return task.matched(lambda density: prune.erk(task.params, density, exclude=task.first))


def one_threshold(task: Task) -> prune.Guidance:
    params = task.params
    return task.matched(lambda density: prune.global_magnitude(params, density, exclude=task.first, block=task.block))


def _magnitude(task: Task, guide: prune.Guidance) -> optax.GradientTransformation:
    return task.then(prune.magnitude(guide, task.ramp, every=task.every, block=task.block))


def _lasso(task: Task, guide: prune.Guidance) -> optax.GradientTransformation:
    return task.then(prune.lasso(guide, lambda step: L1 * task.rate(step), task.ramp, block=task.block))


def _surgery(task: Task, guide: prune.Guidance) -> optax.GradientTransformation:
    return task.then(prune.surgery(guide, task.ramp, block=task.block))


def _soft_threshold(task: Task, guide: prune.Guidance) -> optax.GradientTransformation:
    return prune.soft_threshold(task.optimizer, guide, task.ramp, every=task.every, block=task.block)


def _rigl(task: Task, guide: prune.Guidance) -> optax.GradientTransformation:
    return prune.rigl(task.optimizer, guide, end=3 * task.steps // 4, every=task.every, block=task.block)


def _acdc(task: Task, guide: prune.Guidance) -> optax.GradientTransformation:
    # Four phases: compressed, decompressed, twice; then compressed for good.
    phase = max(1, task.ramp_steps // 4)
    return task.then(prune.acdc(guide, begin=0, end=task.ramp_steps, phase=phase, block=task.block))


def _budget(task: Task, guide: prune.Guidance) -> optax.GradientTransformation:
    return prune.budget(task.optimizer, guide, task.machine, task.ramp, every=task.every, block=task.block)


def _one_shot(task: Task, guide: prune.Guidance) -> None:
    nnx.update(task.model, prune.one_shot(nnx.state(task.model, nnx.Param), guide, block=task.block))
    nnx.update(task.model, nnx.state(prune.recalibrate(task.model, task.batches)))


def _obs(task: Task, guide: prune.Guidance) -> None:
    # Half of them give thousands of positions, and so rows, to every convolution.
    pruned = prune.obs(task.model, task.batches[:2], guide, block=task.block)
    nnx.update(task.model, nnx.state(prune.recalibrate(pruned, task.batches)))


def _obs_then_trained(task: Task, guide: prune.Guidance) -> optax.GradientTransformation:
    _obs(task, guide)
    return task.then(prune.fixed())


# Unguided methods get an allocation of their own kind: that of one l1 strength for all layers is that of one threshold, and
# the thresholds of DNS are multiples of a layer's mean weight, nearly uniform.
METHODS: dict[str, Method] = {
    "GMP, uniform": Method(uniform, _magnitude),
    "GMP, ERK": Method(erk, _magnitude),
    "GMP, global": Method(one_threshold, _magnitude),
    "GMP, guided": Method(Task.guide, _magnitude, twin="GMP, uniform"),
    "GMP, guided, int8": Method(Task.guide, _magnitude, block=LANES, precision="int8"),
    "ESL": Method(one_threshold, _lasso),
    "GESL": Method(Task.guide, _lasso, twin="ESL"),
    "DNS": Method(uniform, _surgery),
    "GDNS": Method(Task.guide, _surgery, twin="DNS"),
    "STR": Method(uniform, _soft_threshold),
    "STR, guided": Method(Task.guide, _soft_threshold, twin="STR"),
    "RigL, ERK": Method(erk, _rigl),
    "RigL, guided": Method(Task.guide, _rigl, twin="RigL, ERK"),
    "AC/DC, uniform": Method(uniform, _acdc),
    "AC/DC, guided": Method(Task.guide, _acdc, twin="AC/DC, uniform"),
    "one-shot": Method(uniform, _one_shot, trains=False),
    "OBS one-shot": Method(uniform, _obs, trains=False),
    "OBS one-shot, guided": Method(Task.guide, _obs, twin="OBS one-shot", trains=False),
    "OBS one-shot, guided, by damage": Method(Task.guide_by_damage, _obs, trains=False),
    "OBS one-shot, guided, blocks": Method(Task.guide, _obs, trains=False, block=LANES),
    "OBS one-shot, guided, int8": Method(Task.guide, _obs, trains=False, block=LANES, precision="int8"),
    "OBS, then trained": Method(uniform, _obs_then_trained),
    "OBS, then trained, guided": Method(Task.guide, _obs_then_trained, twin="OBS, then trained"),
    "speed in the loss": Method(Task.guide, _budget),
}
