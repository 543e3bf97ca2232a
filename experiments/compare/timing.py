"""The second stage: every pruned network packed and timed, beside its dense form in the same run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from experiments import evaluate, train
from experiments.benchmark import results
from experiments.benchmark.results import Line
from experiments.benchmark.timing import Others
from experiments.compare import runs, training
from experiments.compare.runs import Run
from experiments.configs import Config
from experiments.methods import METHODS, Speed
from sparseflax.cost.cpu import client_threads
from sparseflax.job.afresh import afresh

BATCHES = 1, 16


def time_all(config: Config, wanted: Iterable[Run], out: Path) -> None:
    """Time the trained runs of one network that were not timed yet: a line each in results.jsonl.

    Raises:
      ValueError: weights are missing or damaged.
      AssertionError: a packed network computes something else than its dense form.
    """
    trained, done = runs.lines(out / runs.TRAINED), runs.lines(out / runs.RESULTS)
    todo = [run for run in wanted if run in trained and run not in done]
    for i, run in enumerate(todo):
        print(f"timing {run} ({i + 1} of {len(todo)})", flush=True)
        line = trained[run]
        measured = {} if "refused" in line else _time(replace(config, seed=run.seed), run, out)
        results.append(out / runs.RESULTS, line | measured | results.provenance(["flax", "jax", "jaxlib", "optax"]))


def _time(config: Config, run: Run, out: Path) -> Line:
    machine, whole = training.measure(config, out)
    data, folder = training.dataset(config), run.folder(out)
    model = training.pruned_network(config, folder)
    precision = METHODS[run.method].precision
    chosen = evaluate.planned(model, data, machine, precision)
    networks = evaluate.forms(model, chosen)
    sizes = {name: evaluate.save_weights(networks[name], folder / f"{name}.npz") for name in (evaluate.DENSE, evaluate.PACKED)}
    kept, weights = evaluate.count_weights(model)
    layers = [layer for layer in chosen.layers if layer.shape is not None]
    shapes = {layer.path: layer.shape for layer in layers if layer.shape is not None}
    speed = Speed(shapes, machine, whole, precision)
    accuracy = train.accuracy(networks[evaluate.PACKED], data.test_images, data.test_labels)
    with Others() as others:
        times = afresh(evaluate.time_batches, networks, data.test_images[:max(BATCHES)], BATCHES, config.timing_seconds)
    return {
        "packed_accuracy": accuracy, "test_images": config.test_images,
        "kept": kept, "weights": weights, "bytes": sizes, "times": times, "threads": client_threads(),
        "predicted": speed.speedup({layer.path: layer.density for layer in layers}),
        "load_of_others": others.load,
        "layers": [{"path": layer.path, "shape": str(layer.shape), "density": layer.density, "choice": layer.choice,
                    "useful": evaluate.useful(shapes[layer.path], machine, precision)} for layer in layers],
    }
