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

import optax
from flax import nnx

from experiments import checkpoint, evaluate, train
from experiments import run as main_job
from experiments.benchmark import results
from experiments.benchmark.results import Line
from experiments.compare import runs
from experiments.compare.runs import Run
from experiments.configs import Config
from experiments.data import Data
from experiments.methods import METHODS
from sparseflax import prune
from sparseflax.machine import Machine
from sparseflax.plan import pack_model, plan
from sparseflax.shapes import conv_shapes

MIDDLE = 0.2  # density at which a whole network is measured


class Dense(NamedTuple):
    """A trained dense network, its test accuracy in [0, 1], and the seconds that its training took."""

    model: nnx.Module
    accuracy: float
    seconds: float


class Whole(NamedTuple):
    """Of a network, measured: seconds of the dense one, and of what is no layer in the packed one."""

    dense_seconds: float
    other_seconds: float


def measure(config: Config, out: Path) -> tuple[Machine, Whole]:
    """This machine and the network's times, as measured when first asked.

    What is no layer takes what the packed network takes beyond the prediction for its layers, at a density in the middle of
    the useful ranges; so it also holds what the model does not see of them. It is at most their time again, as more is
    other programs' doing.
    """
    machine = main_job.machine_of(out)
    path = out / f"{config.name}-whole.json"
    if not path.exists():
        model, x = _network(config), dataset(config).test_images[:1]
        nnx.update(model, prune.one_shot(nnx.state(model, nnx.Param), prune.uniform(nnx.state(model, nnx.Param), MIDDLE)))
        model.eval()
        chosen = plan(model, x, machine)
        networks = {evaluate.DENSE: model, evaluate.FOLDED: evaluate.fold_only(model, chosen),
                    evaluate.PACKED: pack_model(model, chosen)}
        timings = evaluate.time_networks(networks, x, 4 * config.timing_seconds)
        times = {name: timing["seconds"] for name, timing in timings.items()}
        packed, layers = times.pop(evaluate.PACKED), chosen.seconds
        other = min(max(0.0, packed - layers), layers)
        if other == layers:
            print(f"{config.name} takes {1e3 * packed:.3g} ms packed, more than twice the {1e3 * layers:.3g} ms predicted for "
                  "its layers: is the machine busy? Only as much again is taken for everything else.", flush=True)
        checkpoint.write_atomically(path, json.dumps(Whole(min(times.values()), other)._asdict(), indent=1))
    return machine, Whole(**json.loads(path.read_text()))


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
    main_job.claim(folder, config)
    model, path = _network(config), folder / "dense.json"
    title = f"{config.name}, seed {config.seed}, dense training"
    trained, seconds = _fit(config, model, title, folder / "dense", main_job.dense_optimizer(config), config.dense_steps)
    if not path.exists():
        text = json.dumps({"accuracy": trained.accuracies[-1][1], "seconds": seconds})
        checkpoint.write_atomically(path, text)
    return Dense(model, **json.loads(path.read_text()))


def _prune(config: Config, run: Run, out: Path) -> Line:
    # The speedup is not the dense network's: all runs of a seed share that.
    base = replace(config, speedup=Config.speedup)
    (machine, whole), data, dense = measure(config, out), dataset(base), _dense(base, out)
    model = nnx.clone(dense.model)
    shapes = conv_shapes(model, data.test_images[:1])
    task = main_job.task(config, model, data, shapes, machine, *whole)
    method, folder = METHODS[run.method], run.folder(out)
    line = {"network": run.network, "method": run.method, "guided": method.guided, "seed": run.seed,
            "requested": run.speedup, "dense_accuracy": dense.accuracy, "dense_training_seconds": dense.seconds}
    start = time.perf_counter()
    try:
        optimizer = method.prepare(task)
    except ValueError as error:
        print(f"  refused: {error}", flush=True)
        return line | {"refused": str(error)}
    seconds, densities = time.perf_counter() - start, []
    if optimizer:
        try:
            trained, fitting = _fit(config, model, str(run), folder / "training", optimizer, config.prune_steps,
                                    config.dense_steps)
        except FloatingPointError as error:
            print(f"  {error}", flush=True)
            return line | {"refused": str(error)}
        seconds, densities = seconds + fitting, trained.densities
    checkpoint.save(folder / "pruned", config.prune_steps, _state(model), {})
    return line | {
        "accuracy": train.accuracy(model, data.test_images, data.test_labels), "training_seconds": seconds,
        "curve": [(step, task.speed.density(density), task.speed.speedup(density)) for step, density in densities],
    }


def _fit(config: Config, model: nnx.Module, title: str, folder: Path, optimizer: optax.GradientTransformation, steps: int,
         first_step: int = 0) -> tuple[train.Trained, float]:
    """What the training left behind, and its seconds: of all its updates, if only some were left to make."""
    notes = sorted(folder.glob("[0-9]*.json"))
    left = steps - (int(notes[-1].stem) if notes else 0)
    start = time.perf_counter()
    trained = train.fit(model, optimizer, dataset(replace(config, speedup=Config.speedup)), title=title, folder=folder,
                        seed=config.seed, batch=config.batch, steps=steps, first_step=first_step, save_every=config.save_every)
    return trained, (time.perf_counter() - start) * steps / max(left, 1)


def _network(config: Config) -> Any:
    return config.network(config.widths, 1, config.classes, rngs=nnx.Rngs(config.seed))


def _state(model: nnx.Module) -> tuple[Any, Any]:
    _, params, statistics = nnx.split(model, nnx.Param, nnx.BatchStat)
    return nnx.to_pure_dict(params), nnx.to_pure_dict(statistics)
