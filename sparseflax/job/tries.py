"""Networks pruned for some speedups, until one of them is fast enough and as good as it has to be."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax import nnx

from sparseflax.conv.int8 import LANES
from sparseflax.cost.atomic import write_atomically
from sparseflax.cost.machine import Machine
from sparseflax.cost.shape import ConvShape
from sparseflax.files.safetensors import seal, unseal
from sparseflax.job.afresh import afresh
from sparseflax.job.damage import damage_of, measured
from sparseflax.job.fidelity import Fidelity, Outputs, batches, compare, outputs
from sparseflax.job.folder import AIMED, DAMAGE, whole_of
from sparseflax.job.layers import Grams, assembled, inputs, prune_layers
from sparseflax.job.pictures import Pictures
from sparseflax.job.times import times
from sparseflax.job.train import finetune as train
from sparseflax.network.pack import pack_model
from sparseflax.network.plan import plan, rounded_as
from sparseflax.network.planned import Plan
from sparseflax.prune.aim import aimed
from sparseflax.prune.allocate import guided
from sparseflax.prune.correct import Statistics, correct, statistics
from sparseflax.prune.damage import Damage
from sparseflax.prune.guide import Guidance
from sparseflax.prune.measure import pruned
from sparseflax.prune.whole import Whole

STATISTICS = 64  # pictures in a batch by which outputs are corrected, of so many pixels at most:
STATISTICS_PIXELS = 1 << 19
ENOUGH = 1 << 21  # pixels of either in all, of at least LEAST pictures: a large one shows a layer many positions
LEAST = 32
LOOKED = 8  # pictures by which it is seen what pruning a layer does to the outputs, and as many more as a batch has
EXAMPLES = 256  # pictures by which ranges of eight bits are found
SEEN = 2  # positions for each input of a layer, without which its weights are not known to be superfluous
POINTS = 1.0  # lost, above which it is said what less speed would cost, where nothing else was asked for
CURVE = 5  # speeds on it
SLOWEST = 1.1  # of them
FINER = 2  # speeds more, each between the fastest network that keeps to the points and the next one

Score = Callable[[Callable[[Any], Any]], float]


@dataclass(frozen=True)
class Job:
    """What is known before anything is pruned.

    Attributes:
      model: the dense network.
      x: an input of the batch that it is to be fast at.
      seen, unseen: pictures to prune by, and to compare the outputs on.
      said: the dense network's outputs for the seen ones, if it is trained against them, and for the unseen ones.
      labels: of the unseen ones (n,), or None.
      score, original_score: the user's own measure, and the dense network's by it; or None.
      shapes, machine, whole: of a guide.
      grams: of the layers, from the seen pictures.
      minutes: of training.
      seconds: of measuring, before and after.
      out: the folder.
      rounded: the dense network's plan in eight bits, if the packed one is to run what is faster so; or None.
      damage: what pruning each layer does to the outputs, once that is known.
    """

    model: nnx.Module
    x: np.ndarray
    seen: Pictures
    unseen: Pictures
    said: tuple[Outputs | None, Outputs]
    labels: np.ndarray | None
    score: Score | None
    original_score: float | None
    shapes: dict[str, ConvShape]
    machine: Machine
    whole: Whole
    grams: Grams
    minutes: float
    seconds: float
    out: Path
    rounded: Plan | None = None
    damage: Damage | None = None

    @property
    def precision(self) -> Literal["float32", "int8"]:
        """Of what is pruned."""
        return "float32" if self.rounded is None else "int8"

    @property
    def block(self) -> int:
        """Neighbouring input channels that are pruned together."""
        return 1 if self.rounded is None else LANES

    @functools.cached_property
    def examples(self) -> list[np.ndarray]:
        """Batches of seen pictures, by which outputs are corrected."""
        h, w = self.x.shape[1:3]
        several = max(1, min(STATISTICS, STATISTICS_PIXELS // (h * w), len(self.seen)))
        return [x for x, _ in batches(enough(self.seen), several)]

    @functools.cached_property
    def statistics(self) -> Statistics:
        """Of the dense network's outputs, layer by layer."""
        return statistics(self.model, self.examples, _correctable(self.model))


class Tried(NamedTuple):
    """A network pruned for a speedup.

    Attributes:
      speedup: that it was pruned for.
      guide: by which.
      model: dense, with zeros.
      plan, packed: of it.
      said: outputs of the packed network for the unseen pictures.
      fidelity: of these.
    """

    speedup: float
    guide: Guidance
    model: nnx.Module
    plan: Plan
    packed: nnx.Module
    said: Outputs
    fidelity: Fidelity


def tries(job: Job, asked: float | None, points: float | None) -> list[Tried]:
    """The networks that were pruned: as asked, and where that costs too much or only points are asked for, at other speeds."""
    highest, tried = guide_for(job, math.inf), []
    if asked is not None:
        tried = _pruned(job, {asked: guide_for(job, asked)})
        if tried[0].fidelity.keeps_to(POINTS if points is None else points):
            return tried
    unpruned = job.whole.dense_seconds / job.whole.seconds(sum(layer.dense_seconds for layer in highest.layers.values()))
    most, least = min(highest.speedup, 1.5 * (asked or math.inf)), max(SLOWEST, unpruned)
    speeds = [round(float(speed), 2) for speed in np.geomspace(least, max(most, least), CURVE)]
    tried += _pruned(job, {speed: guide_for(job, speed) for speed in speeds if not any(speed == one.speedup for one in tried)})
    for _ in range(FINER):
        tried.sort(key=lambda one: one.speedup)
        number = tried.index(delivered(tried, asked, points))
        if points is None or not tried[number].fidelity.keeps_to(points) or number + 1 == len(tried):
            break
        speed = round(math.sqrt(tried[number].speedup * tried[number + 1].speedup), 2)
        tried += _pruned(job, {speed: guide_for(job, speed)})
    return sorted(tried, key=lambda one: one.speedup)


def look(job: Job) -> Job:
    """The job, with what pruning each layer does that may be pruned; kept in the folder."""
    def measure() -> dict[str, list[float]]:
        dense = pack_model(job.model, plan(job.model, job.x, job.machine).all_dense, job.x)
        shapes = {name: job.shapes[name] for name in guide_for(job, math.inf).densities}
        several = -(-LOOKED // len(job.examples[0]))
        return measured(job.model, dense, job.examples[:several], shapes, job.grams, job.block)

    return replace(job, damage=damage_of(job.out / DAMAGE, measure))


def aim(job: Job, asked: float, in_seconds: bool = False) -> Job:
    """The job, its network's measurement put right for this speedup; kept in the folder.

    Args:
      job: before.
      asked: over the dense network as it is measured then, in turn with the packed one;
      in_seconds: or as it was measured at first: where a time was asked for, the dense network's is no part of it.
    """
    def reached(guide: Guidance) -> float:
        network = pruned(job.model, guide.densities, job.block)
        planned = plan(network, job.x, job.machine)
        if job.rounded is not None:
            planned = rounded_as(planned, job.rounded)
        packed = pack_model(network, planned, job.x)
        taken = afresh(times, job.model, job.x, job.machine, [packed], job.seconds / 4)
        return (job.whole.dense_seconds if in_seconds else taken.faster_dense) / taken.packed[0]

    def guide(whole: Whole) -> Guidance:
        return guide_for(replace(job, whole=whole), asked)

    return replace(job, whole=whole_of(job.out / AIMED, lambda: aimed(job.whole, asked, guide, reached)))


def delivered(tried: list[Tried], asked: float | None, points: float | None) -> Tried:
    """The network that is delivered: as asked, or the fastest that keeps to the points, or the one that loses least."""
    if points is None:
        return next(one for one in tried if one.speedup == asked)
    good = [one for one in tried if one.fidelity.keeps_to(points) and one.speedup <= (asked or math.inf)]
    return max(good, key=lambda one: one.speedup) if good else min(tried, key=lambda one: one.fidelity.points)


def guide_for(job: Job, speedup: float) -> Guidance:
    def hardly_seen(name: str) -> bool:
        shape = job.shapes[name]
        rows = job.grams.examples * shape.n * shape.oh * shape.ow / len(job.x)
        return rows < SEEN * inputs(shape)

    return guided(job.shapes, job.machine, speedup=speedup, whole=job.whole, best_effort=True,
                  exclude=hardly_seen, precision=job.precision, damage=job.damage)


def enough(pictures: Pictures) -> Pictures:
    """Of the pictures as many as tell enough."""
    h, w = pictures.pixels.shape[1:3]
    return pictures[:max(LEAST, ENOUGH // (h * w))]


def to_round_by(pictures: Pictures) -> np.ndarray:
    """Inputs by which ranges of eight bits are found."""
    return pictures.inputs(slice(EXAMPLES))


def _pruned(job: Job, guides: Mapping[float, Guidance]) -> list[Tried]:
    """A network for each guide, as it was made before or made now."""
    layers = job.out / "layers"
    prune_layers(job.model, guides.values(), job.grams, layers, job.block)
    networks = []
    for speedup, guide in guides.items():
        file = job.out / "networks" / f"{speedup:.3f}.safetensors"
        if not file.exists():
            model = _corrected(job, assembled(job.model, guide, layers), guide)
            if job.minutes and job.said[0] is not None:
                model = train(model, job.seen, job.said[0], job.minutes, f"training at {speedup:.3g}x")
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, seal("weights", _arrays(model), {}))
        model = _with_arrays(job.model, unseal("weights", file.read_bytes())[0])
        chosen = plan(model, job.x, job.machine)
        if job.rounded is not None:  # what is left in a layer is rounded by what it sees now
            chosen = plan(model, job.x, job.machine, precision="auto", examples=to_round_by(job.seen))
        packed = pack_model(model, chosen, job.x)
        said = outputs(packed, job.unseen, len(job.x))
        fidelity = compare(said, job.said[1], job.labels)
        if job.score is not None:
            fidelity = fidelity._replace(score=job.score(call(packed)), original_score=job.original_score, doubt=0.0)
        networks.append(Tried(speedup, guide, model, chosen, packed, said, fidelity))
        print(f"pruned for {speedup:.3g}x: {fidelity.points:.2f} points of {fidelity.measure} lost, relative error "
              f"{fidelity.error:.3g}", flush=True)
    return networks


def call(network: nnx.Module) -> Callable[[Any], Any]:
    """Its call, jitted."""
    graph, state = nnx.split(network)
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    return lambda x: run(state, x)


def _corrected(job: Job, model: Any, guide: Guidance) -> Any:
    layers = [name for name, module in _correctable(job.model).items() if name in guide.densities or
              isinstance(module, nnx.BatchNorm)]
    return correct(model, job.statistics, job.examples, layers)


def _correctable(model: nnx.Module) -> dict[str, Any]:
    modules: dict[str, Any] = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    return {name: module for name, module in modules.items()
            if isinstance(module, (nnx.Conv, nnx.ConvTranspose, nnx.Linear, nnx.BatchNorm)) and module.bias is not None}


def _arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    return {"/".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def _with_arrays(model: nnx.Module, arrays: dict[str, np.ndarray]) -> Any:
    copy: Any = nnx.clone(model)
    nnx.update(copy, nnx.from_flat_state([(path, leaf.replace(jax.numpy.asarray(arrays["/".join(map(str, path))])))
                                          for path, leaf in nnx.to_flat_state(nnx.state(copy))]))
    return copy
