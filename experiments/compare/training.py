"""The first stages: what the machine is, the dense networks, and every run's pruned weights in a folder."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

from experiments import checkpoint, train
from experiments import run as main_job
from experiments.benchmark import results
from experiments.benchmark.results import Line
from experiments.compare import runs
from experiments.compare.runs import Run
from experiments.configs import Config
from experiments.data import Data
from experiments.methods import METHODS
from sparseflax import prune
from sparseflax.cost.atomic import write_atomically
from sparseflax.cost.machine import Machine
from sparseflax.job.afresh import afresh
from sparseflax.job.folder import claim, machine_of, whole_of
from sparseflax.network.shapes import conv_shapes

REMEMBERED = 20  # runs whose compiled updates stay in memory, some 100 MB each, though no other run calls them


class Dense(NamedTuple):
    """A trained dense network to prune.

    Attributes:
      model: after `dense_steps` updates.
      accuracy: in [0, 1], of the reference: the same network after as many updates more as pruning gets, with its optimizer.
      seconds: of one CPU, that the reference took in all.
    """

    model: nnx.Module
    accuracy: float
    seconds: float


def measure(config: Config, out: Path) -> tuple[Machine, prune.Whole]:
    """This machine and what the network takes on it, as measured when first asked."""
    machine = machine_of(out)
    return machine, whole_of(out / f"{config.name}-whole.json", lambda: afresh(
        prune.measure, _network(config), dataset(config).test_images[:1], machine, seconds=config.timing_seconds))


def prune_all(config: Config, wanted: Iterable[Run], out: Path) -> None:
    """Make the runs of one network that are not done: a line each in trained.jsonl, and the weights in its folder.

    Raises:
      ValueError: the folder holds runs with other settings, or a damaged checkpoint.
      FloatingPointError: the dense training diverged. A pruning that diverges gets a line that says so.
    """
    done = runs.lines(out / runs.TRAINED)
    todo = [run for run in wanted if run not in done]
    for i, run in enumerate(todo):
        print(f"{run} ({i + 1} of {len(todo)})", flush=True)
        results.append(out / runs.TRAINED, _prune(replace(config, seed=run.seed, speedup=run.speedup), run, out))
        shutil.rmtree(run.folder(out) / "training", ignore_errors=True)
        if (i + 1) % REMEMBERED == 0:
            jax.clear_caches()


def pruned_network(config: Config, folder: Path) -> nnx.Module:
    """The network of a run, in evaluation mode.

    Raises:
      ValueError: its weights are not there, or damaged.
    """
    model = _network(config)
    weights = folder / "pruned"
    found = checkpoint.restore(weights, _state(model))
    if not found:
        raise ValueError(f"there are no weights in {weights}: delete the run's line in {runs.TRAINED} and train again")
    nnx.update(model, *found[1])
    model.eval()
    return model


@lru_cache(maxsize=1)
def dataset(config: Config) -> Data:
    """The data of a network and seed."""
    return config.data()


@lru_cache(maxsize=1)
def _dense(config: Config, out: Path) -> Dense:
    folder = runs.network_folder(out, config.name, config.seed)
    claim(folder, main_job.settings(config))
    model, path = _network(config), folder / "dense.json"
    title = f"{config.name}, seed {config.seed}, dense training"
    _, seconds = _fit(config, model, title, folder / "dense", main_job.dense_optimizer(config), range(config.dense_steps))
    if not path.exists():
        reference, (_, optimizer) = nnx.clone(model), main_job.prune_optimizer(config)
        trained, more = _fit(config, reference, f"{title}, reference", folder / "reference", optimizer, _pruning(config))
        text = json.dumps({"accuracy": trained.accuracies[-1][1], "seconds": seconds + more})
        write_atomically(path, text)
    return Dense(model, **json.loads(path.read_text()))


def _prune(config: Config, run: Run, out: Path) -> Line:
    # The speedup is not the dense network's: all runs of a seed share that.
    base = replace(config, speedup=Config.speedup)
    (machine, whole), data, dense = measure(config, out), dataset(base), _dense(base, out)
    model = nnx.clone(dense.model)
    shapes = conv_shapes(model, data.test_images[:1])
    task = main_job.task(replace(config, method=run.method), model, data, shapes, machine, whole)
    method, folder = METHODS[run.method], run.folder(out)
    line = {"network": run.network, "method": run.method, "guided": method.guided, "seed": run.seed,
            "requested": run.speedup, "precision": method.precision, "dense_accuracy": dense.accuracy,
            "dense_training_seconds": dense.seconds}
    start = time.process_time()
    try:
        optimizer = method.prepare(task, method.guide(task))
    except ValueError as error:
        print(f"  refused: {error}", flush=True)
        return line | {"refused": str(error)}
    seconds, densities = time.process_time() - start, []
    if optimizer:
        try:
            trained, fitting = _fit(config, model, str(run), folder / "training", optimizer, _pruning(config))
        except FloatingPointError as error:
            print(f"  {error}", flush=True)
            return line | {"refused": str(error)}
        seconds, densities, accuracy = seconds + fitting, trained.densities, trained.accuracies[-1][1]
    else:
        accuracy = train.accuracy(model, data.test_images, data.test_labels)
    checkpoint.save(folder / "pruned", config.prune_steps, _state(model), {})
    return line | {
        "accuracy": accuracy, "training_seconds": seconds,
        "curve": [(step, task.speed.density(density), task.speed.speedup(density)) for step, density in densities],
    }


def _pruning(config: Config) -> range:
    return range(config.dense_steps, config.dense_steps + config.prune_steps)


def _fit(config: Config, model: nnx.Module, title: str, folder: Path, optimizer: optax.GradientTransformation,
         steps: range) -> tuple[train.Trained, float]:
    """What the training left behind, and its CPU seconds: of all its updates, if only some were left to make.

    Not those of the clock: the process may share its CPU, or be stopped.
    """
    notes = sorted(folder.glob("[0-9]*.json"))
    left = len(steps) - (int(notes[-1].stem) if notes else 0)
    start = time.process_time()
    trained = train.fit(model, optimizer, dataset(replace(config, speedup=Config.speedup)), title=title, folder=folder,
                        seed=config.seed, batch=config.batch, steps=len(steps), first_step=steps.start,
                        save_every=config.save_every)
    return trained, (time.process_time() - start) * len(steps) / max(left, 1)


def _network(config: Config) -> Any:
    return config.network(config.widths, 1, config.classes, rngs=nnx.Rngs(config.seed))


def _state(model: nnx.Module) -> tuple[Any, Any]:
    _, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(statistics)
