"""Here is my network, here are some pictures: make it so many times as fast.

    read -> measure -> prune layer by layer -> correct -> train, if asked -> pack -> measure -> report

Everything that takes long is kept in the job's folder, and not done again.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from sparseflax.cost.cpu import client_threads
from sparseflax.cost.machine import Machine
from sparseflax.cost.shape import ConvShape
from sparseflax.cost.timing import medians
from sparseflax.files.safetensors import seal, unseal, write
from sparseflax.files.store import save
from sparseflax.job import report
from sparseflax.job.engines import engines
from sparseflax.job.fidelity import Fidelity, Outputs, batches, compare, outputs
from sparseflax.job.folder import claim, machine_of, whole_of, write_json
from sparseflax.job.layers import Grams, assembled, inputs, prune_layers
from sparseflax.job.pictures import Pictures, read_labels, read_pictures
from sparseflax.job.places import places, with_weights
from sparseflax.job.train import finetune as train
from sparseflax.network.measure import program
from sparseflax.network.pack import pack_model
from sparseflax.network.plan import plan
from sparseflax.network.planned import Plan
from sparseflax.network.shapes import conv_shapes
from sparseflax.prune.allocate import guided
from sparseflax.prune.correct import Statistics, correct, statistics
from sparseflax.prune.guide import Guidance
from sparseflax.prune.measure import measure, pruned
from sparseflax.prune.whole import Whole

SURGERY = 1024  # pictures by which layers are pruned, at most: small late layers have few positions in each
PIXELS = 1 << 18  # in a batch of those
STATISTICS = 64  # pictures in a batch by which outputs are corrected, of so many pixels at most:
STATISTICS_PIXELS = 1 << 19
ENOUGH = 1 << 21  # pixels of either in all, of at least LEAST pictures: a large one shows a layer many positions
LEAST = 32
SEEN = 2  # positions for each input of a layer, without which its weights are not known to be superfluous
SECONDS = 15.0  # of measuring, before and after
BURST = 0.01  # seconds for which a network runs before it is another one's turn
POINTS = 1.0  # lost, above which it is said what less speed would cost, where nothing else was asked for
CURVE = 5  # speeds on it
SLOWEST = 1.1  # of them
FINER = 2  # speeds more, each between the fastest network that keeps to the points and the next one
MISSED = 0.1  # a measured speedup this far from the one asked for, relatively, is aimed at again
AIMS = 3  # times in all


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

    @functools.cached_property
    def examples(self) -> list[np.ndarray]:
        """Batches of seen pictures, by which outputs are corrected."""
        h, w = self.x.shape[1:3]
        several = max(1, min(STATISTICS, STATISTICS_PIXELS // (h * w), len(self.seen)))
        return [x for x, _ in batches(_enough(self.seen), several)]

    @functools.cached_property
    def statistics(self) -> Statistics:
        """Of the dense network's outputs, layer by layer."""
        return statistics(self.model, self.examples, _correctable(self.model))

    @functools.cached_property
    def dense(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Calls of the dense network, as it is and with its batch norms folded."""
        folded = pack_model(self.model, plan(self.model, self.x, self.machine).all_dense, self.x, fuse=False)
        return program(self.model, self.x), program(folded, self.x)


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


def faster(network: str | PathLike[str], images: str | PathLike[str], *, speedup: float | None = None,
           milliseconds: float | None = None, points: float | None = None, labels: str | PathLike[str] | None = None,
           score: Score | None = None, finetune: float = 0.0, out: str | PathLike[str] | None = None, batch: int = 1,
           size: tuple[int, int] | None = None, mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,),
           seconds: float = SECONDS) -> dict[str, Any]:
    """Prunes a network, without labels, so that it becomes faster on this machine; writes it and a report into a folder.

        sparseflax.faster("network.onnx", "pictures", speedup=2)

    The folder gets `network.safetensors` (`sparseflax.load`), `pruned.onnx` (the file with its weights replaced),
    `report.html` and `result.json`. Given again, the same call goes on where it stopped.

    Args:
      network: an ONNX file with one input, images of 1 or 3 channels.
      images: a folder of pictures of the kind that it will see, some hundreds; three quarters are pruned by, the outputs are
        compared on the others.
      speedup: wanted, over the dense network as JAX runs it here.
      milliseconds: wanted for one call, in place of a speedup.
      points: that may be lost at most: percent of the score or of the accuracy with labels, else of the same top answers,
        else of relative error where the network is no classifier. Then the fastest network is taken that keeps to it, of a few;
        where pictures are counted their standard error is added, so that few of them do not promise what they cannot tell.
      labels: a file of lines "picture,class", class a number from 0.
      score: how good a network is in percent, by a measure of your own, such as the boxes that it finds: a function of its
        call, which takes a batch of inputs (batch, h, w, c) and returns what the network does. Has a name that says which.
      finetune: minutes of training against the original's outputs, for each network that is tried.
      out: the folder; None is the network's name and "-faster".
      batch: images in a call.
      size: (h, w) of the pictures, where the network leaves it open; None takes that of most of them.
      mean, std: inputs are (pixel / 255 - mean) / std, one number or one for each channel.
      seconds: of measuring, before and after.

    Returns:
      What result.json holds.

    Raises:
      ImportError: onnx or pillow is not installed.
      OSError: a file or folder is not there.
      ValueError: nothing was asked for, or a file, the pictures, or the folder of another job will not do.
    """
    from sparseflax.onnx import load_onnx

    wishes = {"speedup": speedup, "milliseconds": milliseconds, "points": points}
    if wrong := {name: wish for name, wish in wishes.items() if wish is not None and not 0 < wish < math.inf}:
        raise ValueError(f"wanted positive finite numbers, got {wrong}")
    if speedup is not None and milliseconds is not None or all(wish is None for wish in wishes.values()):
        raise ValueError(f"speedup={speedup}, milliseconds={milliseconds}, points={points}: wanted one of the first two, or "
                         "points, or both")
    if speedup is not None and speedup < 1:
        raise ValueError(f"speedup={speedup}, wanted at least 1, the dense network's")
    if batch < 1 or not 0 <= finetune < math.inf:
        raise ValueError(f"batch={batch}, finetune={finetune}, wanted at least 1 image and no less than 0 minutes")
    path = Path(network)
    content = path.read_bytes()
    model, file = load_onnx(path), _proto(path)
    pictures = read_pictures(Path(images), _shape(file), size=size, mean=mean, std=std)
    x = pictures.inputs(np.arange(batch) % len(pictures))
    shapes = conv_shapes(model, x)
    if not any(shape.kh * shape.kw * shape.ih * shape.iw > 1 for shape in shapes.values()):
        raise ValueError(f"{path} has no 2-D convolution, which is what becomes faster: a fully connected layer alone is "
                         "packed by SparseDense.from_dense")
    classes = None if labels is None else read_labels(Path(labels), pictures.names)
    folder = Path(f"{path.stem}-faster") if out is None else Path(out)
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise ValueError(f"{folder} holds files, and none that says of which job: give another --out")
    claim(folder, wishes | {
        "network": f"{path.name} {hashlib.sha256(content).hexdigest()[:16]}", "pictures": pictures.digest, "batch": batch,
        "labels": None if classes is None else hashlib.sha256(classes.tobytes()).hexdigest()[:16], "finetune": finetune,
        "score": getattr(score, "__qualname__", None), "threads": client_threads(), "sparseflax": version("sparseflax")})
    if (folder / "result.json").exists() and (folder / "report.html").exists():
        return json.loads((folder / "result.json").read_text())
    for note in pictures.notes:
        print(note, flush=True)

    machine = machine_of(folder)
    whole = whole_of(folder / "whole.json", lambda: measure(model, x, machine, seconds=seconds))
    seen, unseen = pictures.share()
    said = outputs(model, seen, batch) if finetune else None, outputs(model, unseen, batch)
    right = None if classes is None else classes[-len(unseen):]
    before = None if score is None else score(_call(model))
    grams = _grams(model, _enough(seen)[:SURGERY])
    job = Job(model, x, seen, unseen, said, right, score, before, shapes, machine, whole, grams, finetune, seconds,
              folder)
    compare(said[1], said[1], job.labels)  # refuses labels of something else before anything is pruned
    asked = whole.dense_seconds / (1e-3 * milliseconds) if milliseconds else speedup
    tried = _tries(job, asked, points)
    chosen = _chosen(tried, asked, points)

    times = _times(job, tried, content)
    save(folder / "network.safetensors", chosen.packed, chosen.plan)
    unwritten = _write_onnx(folder / "pruned.onnx", file, model, chosen.model)
    found = report.result(job, path.name, wishes | {"finetune": finetune}, pictures.notes, chosen, tried, times, unwritten,
                          _guide(job, math.inf))
    write(folder / "report.html", report.render(found).encode())
    write_json(folder / "result.json", found)
    return found


def _tries(job: Job, asked: float | None, points: float | None) -> list[Tried]:
    """The networks that were pruned: as asked, and where that costs too much or only points are asked for, at other speeds."""
    highest, tried = _guide(job, math.inf), []
    if asked is not None:
        tried = _pruned(job, {asked: _guide(job, _aim(job, asked))})
        if tried[0].fidelity.keeps_to(POINTS if points is None else points):
            return tried
    unpruned = job.whole.dense_seconds / job.whole.seconds(sum(layer.dense_seconds for layer in highest.layers.values()))
    most, least = min(highest.speedup, 1.5 * (asked or math.inf)), max(SLOWEST, unpruned)
    speeds = [round(float(speed), 2) for speed in np.geomspace(least, max(most, least), CURVE)]
    tried += _pruned(job, {speed: _guide(job, speed) for speed in speeds if not any(speed == one.speedup for one in tried)})
    for _ in range(FINER):
        tried.sort(key=lambda one: one.speedup)
        number = tried.index(_chosen(tried, asked, points))
        if points is None or not tried[number].fidelity.keeps_to(points) or number + 1 == len(tried):
            break
        speed = round(math.sqrt(tried[number].speedup * tried[number + 1].speedup), 2)
        tried += _pruned(job, {speed: _guide(job, speed)})
    return sorted(tried, key=lambda one: one.speedup)


def _aim(job: Job, asked: float) -> float:
    """The speedup to ask the guide for, so that what is measured of such a network is what is asked; kept in the folder.

    Pruned by magnitude for the timing alone: how fast a network is, its densities say, and not which weights are left.
    """
    path = job.out / "aim.json"
    if path.exists():
        return json.loads(path.read_text())
    aim, reached = asked, dict[float, float]()
    for _ in range(AIMS):
        guide = _guide(job, aim)
        if not guide.densities:
            break
        network = pruned(job.model, guide.densities)
        packed = program(pack_model(network, plan(network, job.x, job.machine), job.x), job.x)
        *dense, seconds = medians([*job.dense, packed], job.seconds / 4, BURST)
        reached[aim] = min(dense) / seconds
        print(f"asked for {asked:.3g}x and aimed at {aim:.3g}x: measured {reached[aim]:.3g}x", flush=True)
        if 1 - MISSED <= reached[aim] / asked <= 1 + MISSED or guide.shortfall and reached[aim] < asked:
            break
        aim = max(1.0, aim * asked / reached[aim])
    aim = min(reached, key=lambda aim: abs(math.log(reached[aim] / asked)), default=asked)
    write_json(path, aim)
    return aim


def _chosen(tried: list[Tried], asked: float | None, points: float | None) -> Tried:
    """The network that is delivered: as asked, or the fastest that keeps to the points, or the one that loses least."""
    if points is None:
        return next(one for one in tried if one.speedup == asked)
    good = [one for one in tried if one.fidelity.keeps_to(points) and one.speedup <= (asked or math.inf)]
    return max(good, key=lambda one: one.speedup) if good else min(tried, key=lambda one: one.fidelity.points)


def _guide(job: Job, speedup: float) -> Guidance:
    def hardly_seen(name: str) -> bool:
        shape = job.shapes[name]
        rows = job.grams.examples * shape.n * shape.oh * shape.ow / len(job.x)
        return rows < SEEN * inputs(shape)

    return guided(job.shapes, job.machine, speedup=speedup, whole=job.whole, best_effort=True,
                  exclude=hardly_seen)


def _enough(pictures: Pictures) -> Pictures:
    """Of the pictures as many as tell enough."""
    h, w = pictures.pixels.shape[1:3]
    return pictures[:max(LEAST, ENOUGH // (h * w))]


def _grams(model: nnx.Module, pictures: Pictures) -> Grams:
    h, w = pictures.pixels.shape[1:3]
    several = max(1, PIXELS // (h * w))

    def batches() -> Iterator[np.ndarray]:
        for first in range(0, len(pictures), several):
            yield pictures.inputs(slice(first, first + several))

    return Grams(model, batches, len(pictures))


def _pruned(job: Job, guides: Mapping[float, Guidance]) -> list[Tried]:
    """A network for each guide, as it was made before or made now."""
    layers = job.out / "layers"
    prune_layers(job.model, guides.values(), job.grams, layers)
    networks = []
    for speedup, guide in guides.items():
        file = job.out / "networks" / f"{speedup:.3f}.safetensors"
        if not file.exists():
            model = _corrected(job, assembled(job.model, guide, layers), guide)
            if job.minutes and job.said[0] is not None:
                model = train(model, job.seen, job.said[0], job.minutes, f"training at {speedup:.3g}x")
            file.parent.mkdir(exist_ok=True)
            write(file, seal("weights", _arrays(model), {}))
        model = _with_arrays(job.model, unseal("weights", file.read_bytes())[0])
        chosen = plan(model, job.x, job.machine)
        packed = pack_model(model, chosen, job.x)
        said = outputs(packed, job.unseen, len(job.x))
        fidelity = compare(said, job.said[1], job.labels)
        if job.score is not None:
            fidelity = fidelity._replace(score=job.score(_call(packed)), original_score=job.original_score, doubt=0.0)
        networks.append(Tried(speedup, guide, model, chosen, packed, said, fidelity))
        print(f"pruned for {speedup:.3g}x: {fidelity.points:.2f} points of {fidelity.measure} lost, relative error "
              f"{fidelity.error:.3g}", flush=True)
    return networks


def _call(network: nnx.Module) -> Callable[[Any], Any]:
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
            if isinstance(module, (nnx.Conv, nnx.Linear, nnx.BatchNorm)) and module.bias is not None}


def _times(job: Job, tried: list[Tried], content: bytes) -> dict[str, Any]:
    """Median seconds of a call: of the network dense in both its forms, of each that was tried, of other engines."""
    nchw = np.ascontiguousarray(job.x.transpose(0, 3, 1, 2))
    others, failed = engines(content, nchw, client_threads())
    right = [np.asarray(array) for array in jax.tree.leaves(job.dense[0]())]
    for name, (run, output) in list(others.items()):
        run()
        wrong = max(_error(a, b) for a, b in zip(output(), right, strict=True))
        if not wrong < 1e-3:
            failed[name] = f"its outputs are off by {wrong:.1e} of the largest"
            del others[name]
    calls = [*job.dense, *(program(one.packed, job.x) for one in tried)]
    found = medians([*calls, *(run for run, _ in others.values())], job.seconds, BURST)
    return {"dense": found[0], "folded": found[1], "tried": found[2:2 + len(tried)], "failed": failed,
            "engines": dict(zip(others, found[2 + len(tried):], strict=True))}


def _error(y: np.ndarray, right: np.ndarray) -> float:
    """Largest difference over the largest output; images of the one are NCHW, of the other NHWC."""
    right = right.transpose(0, 3, 1, 2) if right.ndim == 4 and y.shape != right.shape else right
    return float(np.abs(y - right).max() / max(np.abs(right).max(), 1e-30)) if y.shape == right.shape else math.inf


def _write_onnx(path: Path, file: Any, original: nnx.Module, model: nnx.Module) -> str:
    """Writes the pruned network as ONNX, whole or not at all; returns why it could not, or ""."""
    try:
        pruned = with_weights(file, places(file, original), model, original)
        write(path, pruned.SerializeToString())
    except ValueError as error:
        return str(error)
    return ""


def _proto(path: Path) -> Any:
    import onnx

    return onnx.load(str(path))


def _shape(file: Any) -> tuple[int | None, ...]:
    """(h, w, c) of the input, or what else it has beside its batch; None for what is open."""
    constants = {tensor.name for tensor in file.graph.initializer}
    entry = next(entry for entry in file.graph.input if entry.name not in constants)
    sizes = [dim.dim_value or None for dim in entry.type.tensor_type.shape.dim][1:]
    return tuple(sizes[1:] + sizes[:1])


def _arrays(model: nnx.Module) -> dict[str, np.ndarray]:
    return {"/".join(map(str, path)): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def _with_arrays(model: nnx.Module, arrays: dict[str, np.ndarray]) -> Any:
    copy: Any = nnx.clone(model)
    nnx.update(copy, nnx.from_flat_state([(path, leaf.replace(jax.numpy.asarray(arrays["/".join(map(str, path))])))
                                          for path, leaf in nnx.to_flat_state(nnx.state(copy))]))
    return copy
