"""Here is my network, here are some pictures: make it so many times as fast.

    read -> measure -> look -> aim -> prune layer by layer -> correct -> train, if asked -> pack -> measure -> report

Everything that takes long is kept in the job's folder, and not done again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx

from sparseflax.cost.atomic import write_atomically
from sparseflax.cost.cpu import client_threads
from sparseflax.files.store import save
from sparseflax.job import report
from sparseflax.job.afresh import afresh
from sparseflax.job.fidelity import compare, outputs
from sparseflax.job.folder import CONFIG, WHOLE, claim, keep, machine_of, measured_by, whole_of, write_json
from sparseflax.job.layers import Grams
from sparseflax.job.pictures import Pictures, read_labels, read_pictures
from sparseflax.job.places import places, with_weights
from sparseflax.job.times import times
from sparseflax.job.tries import Job, Score, aim, call, delivered, enough, guide_for, look, to_round_by, tries
from sparseflax.layers.shifted import shifted
from sparseflax.network.plan import plan
from sparseflax.network.shapes import conv_shapes
from sparseflax.prune.measure import measure

SURGERY = 1024  # pictures by which layers are pruned, at most: small late layers have few positions in each
PIXELS = 1 << 18  # in a batch of those
SECONDS = 15.0  # of measuring, before and after


def faster(network: str | PathLike[str], images: str | PathLike[str], *, speedup: float | None = None,
           milliseconds: float | None = None, points: float | None = None, labels: str | PathLike[str] | None = None,
           score: Score | None = None, precision: Literal["float32", "int8"] = "float32", finetune: float = 0.0,
           out: str | PathLike[str] | None = None, like: str | PathLike[str] | None = None, batch: int = 1,
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
      precision: "int8" runs in eight bits what is faster so, which loses something of its own, and prunes blocks of four input
        channels; ranges are those of the pictures.
      finetune: minutes of training against the original's outputs, for each network that is tried.
      out: the folder; None is the network's name and "-faster".
      like: the folder of an earlier job for a network of the same layers, such as this one before it was trained further: what
        they take and what pruning each of them loses is taken from there, and only the end is measured.
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
    if precision not in ("float32", "int8"):
        raise ValueError(f"precision={precision!r}, wanted 'float32' or 'int8'")
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
    if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).exists():
        raise ValueError(f"{folder} holds files, and none that says of which job: give another --out")
    settings = wishes | {
        "network": f"{path.name} {hashlib.sha256(content).hexdigest()[:16]}", "pictures": pictures.digest, "batch": batch,
        "labels": None if classes is None else hashlib.sha256(classes.tobytes()).hexdigest()[:16], "finetune": finetune,
        "precision": precision, "score": getattr(score, "__qualname__", None), "threads": client_threads(),
        "layers": hashlib.sha256(repr(sorted(shapes.items())).encode()).hexdigest()[:16],
        "like": None if like is None else str(like), "sparseflax": version("sparseflax")}
    measured = {} if like is None else measured_by(Path(like), settings)  # refused before the folder is made
    claim(folder, settings)
    keep(folder, measured)
    if (folder / "result.json").exists() and (folder / "report.html").exists():
        return json.loads((folder / "result.json").read_text())
    notes = [*pictures.notes, *([f"What its layers take and what pruning them loses was measured by the job in {like}."]
                                if measured else [])]
    for note in notes:
        print(note, flush=True)

    machine = machine_of(folder)
    seen, unseen = pictures.share()
    rounded = None
    if precision == "int8":
        print("finding the ranges of eight bits", flush=True)
        rounded = plan(model, x, machine, precision="int8", examples=to_round_by(seen))
    whole = whole_of(folder / WHOLE, lambda: afresh(measure, model, x, machine, seconds=seconds, rounded=rounded))
    dense = shifted(model)
    said = outputs(dense, seen, batch) if finetune else None, outputs(dense, unseen, batch)
    right = None if classes is None else classes[-len(unseen):]
    before = None if score is None else score(call(dense))
    grams = _grams(model, enough(seen)[:SURGERY])
    job = Job(model, x, seen, unseen, said, right, score, before, shapes, machine, whole, grams, finetune, seconds,
              folder, rounded)
    compare(said[1], said[1], job.labels)  # refuses labels of something else before anything is pruned
    job = look(job)
    asked = whole.dense_seconds / (1e-3 * milliseconds) if milliseconds else speedup
    if asked is not None:
        job = aim(job, asked, in_seconds=milliseconds is not None)
    tried = tries(job, asked, points)
    chosen = delivered(tried, asked, points)

    examples = None if rounded is None else to_round_by(enough(seen))  # for other engines' ranges
    taken = afresh(times, model, x, machine, [one.packed for one in tried], seconds, content, examples)
    save(folder / "network.safetensors", chosen.packed, chosen.plan)
    unwritten = _write_onnx(folder / "pruned.onnx", file, model, chosen.model)
    wishes |= {"finetune": finetune, "precision": precision}
    found = report.result(job, path.name, wishes, notes, chosen, tried, taken, unwritten, guide_for(job, math.inf))
    write_atomically(folder / "report.html", report.render(found))
    write_json(folder / "result.json", found)
    return found


def _grams(model: nnx.Module, pictures: Pictures) -> Grams:
    h, w = pictures.pixels.shape[1:3]
    several = max(1, PIXELS // (h * w))

    def batches() -> Iterator[np.ndarray]:
        for first in range(0, len(pictures), several):
            yield pictures.inputs(slice(first, first + several))

    return Grams(model, batches, len(pictures))


def _write_onnx(path: Path, file: Any, original: nnx.Module, model: nnx.Module) -> str:
    """Writes the pruned network as ONNX, whole or not at all; returns why it could not, or ""."""
    try:
        pruned = with_weights(file, places(file, original), model, original)
        write_atomically(path, pruned.SerializeToString())
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
