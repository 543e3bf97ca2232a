"""The main job: train dense, prune under the guidance of the performance model, pack, measure, report.

    python -m experiments.run [CONFIG] [--FIELD VALUE ...]

CONFIG is a module of experiments/configs, by default digits; `--help` lists the fields. The command goes on where it
stopped when it is given again, and writes result.json, report.html and the networks' weights into the run's folder.
"""

import dataclasses
import functools
import hashlib
import importlib
import json
import pkgutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import tyro
from flax import nnx
from jax.sharding import Mesh

from experiments import configs, evaluate, parallel, report, train
from experiments.benchmark import results
from experiments.configs import Config
from experiments.data import Data
from experiments.methods import CALIBRATION, METHODS, Task
from sparseflax import prune
from sparseflax.cost.atomic import write_atomically
from sparseflax.cost.cpu import client_threads
from sparseflax.cost.machine import Machine, to_dict
from sparseflax.cost.shape import ConvShape
from sparseflax.job.afresh import afresh
from sparseflax.job.folder import claim, machine_of, whole_of
from sparseflax.network.shapes import conv_shapes
from sparseflax.prune.aim import aimed

BATCHES = 1, 16  # at which everything is timed
PRUNING = "pruning"
LESS, LEAST = 0.75, 1.2  # of what a speedup saves, the next one to try where accuracy forbids it, and when to give up


def main() -> None:
    flags = sys.argv[1:]
    name = flags.pop(0) if flags and not flags[0].startswith("-") else "digits"
    known = [module.name for module in pkgutil.iter_modules(configs.__path__)]
    if name not in known:
        sys.exit(f"there is no configuration {name!r}, wanted one of {known}")
    module = importlib.import_module(f"experiments.configs.{name}")
    program = f"python -m experiments.run {name}"
    config = tyro.cli(Config, default=module.config, args=flags, prog=program, description=module.__doc__)
    try:
        run(config)
    except (OSError, RuntimeError) as error:
        sys.exit(f"{program}: {error}")


def run(config: Config) -> dict[str, Any]:
    """Everything, from data to report; returns what result.json holds.

    Raises:
      ValueError: the folder holds a run of another configuration, or a checkpoint is damaged.
      FloatingPointError: training diverged.
    """
    start = time.perf_counter()
    if config.method not in METHODS:
        raise ValueError(f"there is no method {config.method!r}, wanted one of {list(METHODS)}")
    if not METHODS[config.method].trains:
        raise ValueError(f"method {config.method!r} prunes without training, so there is no run of it: compare it with "
                         "python -m experiments.compare")
    parallel.check_batch(config.processes, config.batch)
    out = config.out or Path("runs") / f"{config.name}-seed{config.seed}"
    claim(out, settings(config))
    print(f"{config.name}, seed {config.seed}, in {out}", flush=True)
    begun = prepare(config, out)
    if config.processes > 1:
        parallel.together(functools.partial(member, config, out), config.processes)
        begun = prepare(config, out)
    data, machine, model, _ = begun
    asked, guide, dense, pruned, shortfall = learn(config, out, begun)
    assert asked.whole is not None

    chosen = evaluate.planned(model, data, machine, METHODS[config.method].precision)
    print(chosen, flush=True)
    networks = evaluate.forms(model, chosen)
    sizes = {name: evaluate.save_weights(networks[name], out / f"{name}.npz") for name in (evaluate.DENSE, evaluate.PACKED)}
    kept, weights = evaluate.count_weights(model)
    result = {
        "name": config.name, "seed": config.seed, "threads": client_threads(), "machine": to_dict(machine),
        "accuracy": {
            "dense": dense.accuracies[-1][1],
            "pruned": pruned.accuracies[-1][1],
            "packed": train.accuracy(networks[evaluate.PACKED], data.test_images, data.test_labels),
        },
        "test_images": len(data.test_labels), "kept": kept, "weights": weights, "bytes": sizes,
        "requested": config.speedup, "shortfall": shortfall or guide.shortfall, "whole": asked.whole._asdict(),
        "predicted": asked.speed.speedup({layer.path: layer.density for layer in chosen.layers}),
        **afresh(evaluate.measured, networks, chosen, data.test_images[:max(BATCHES)], BATCHES, config.timing_seconds),
        "curves": {"dense": dense._asdict(), "pruning": pruned._asdict()},
        "settings": settings(config),
        "minutes": (time.perf_counter() - start) / 60,
    } | results.provenance(["flax", "jax", "jaxlib", "numpy", "optax"])
    for curve in result["curves"].values():
        del curve["optimizer"]
    write_atomically(out / "result.json", json.dumps(result, indent=1))
    write_atomically(out / "report.html", report.page(result))
    if config.results:
        results.append(config.results, result)
    print(report.summary(result))
    print(f"report: {out / 'report.html'}")
    return result


def prepare(config: Config, out: Path) -> tuple[Data, Machine, nnx.Module, prune.Whole]:
    """The data, the machine and its times as measured when the run began, and the network as it begins."""
    data = config.data()
    machine = machine_of(out)
    model = config.network(config.widths, data.train_images.shape[-1], config.classes, rngs=nnx.Rngs(config.seed))
    whole = whole_of(out / "whole.json", lambda: afresh(prune.measure, model, data.test_images[:1], machine,
                                                        seconds=config.timing_seconds))
    return data, machine, model, whole


def learn(config: Config, out: Path, begun: tuple[Data, Machine, nnx.Module, prune.Whole], mesh: Mesh | None = None
          ) -> tuple[Task, prune.Guidance, train.Trained, train.Trained, str]:
    """Trains the network dense and prunes it; (the task fulfilled, its guide, both trainings, what had to be given up)."""
    data, machine, model, whole = begun
    shapes = conv_shapes(model, data.test_images[:1])
    # What the machine does not grant, the run does without.
    asked = dataclasses.replace(task(config, model, data, shapes, machine, whole), best_effort=True)
    say(f"machine: {machine}\n{METHODS[config.method].guide(asked)}")
    prune.ramp(0, config.ramp_steps, total=config.prune_steps)
    dense = fit(config, model, data, out, "dense training", dense_optimizer(config), range(config.dense_steps), mesh)
    path = out / "aimed.json"
    # Processes that train together leave no core for timing; and pruning goes on by what it began with.
    if path.exists() or config.processes == 1 and not (out / PRUNING).exists():
        asked = dataclasses.replace(asked, whole=whole_of(path, lambda: steered(config, asked, data)))
    asked, guide, pruned, shortfall = prune_within(config, asked, data, out, dense.accuracies[-1][1], mesh)
    return asked, guide, dense, pruned, shortfall


def steered(config: Config, asked: Task, data: Data) -> prune.Whole:
    """The network's measurement put right for the speedup: some minutes ago the machine may have been busy."""
    method = METHODS[config.method]

    def measured(guide: prune.Guidance) -> float:
        network = nnx.clone(asked.model)
        nnx.update(network, prune.one_shot(nnx.state(network, nnx.Param), guide, block=asked.block))
        networks = evaluate.forms(network, evaluate.planned(network, data, asked.machine, asked.precision))
        return evaluate.speedup(afresh(evaluate.time_networks, networks, data.test_images[:1], config.timing_seconds / 2))

    assert asked.whole is not None
    return aimed(asked.whole, asked.speedup, lambda whole: method.guide(dataclasses.replace(asked, whole=whole)), measured)


def member(config: Config, out: Path, mesh: Mesh) -> None:
    """One of many processes that train together; raises ValueError where it has not what the others have."""
    begun = prepare(config, out)
    batch = begun[0].train_batch(config.seed, 0, config.batch)
    parallel.agree({name: str(value) for name, value in settings(config).items()}
                   | {"data": "".join(hashlib.sha256(part.tobytes()).hexdigest() for part in batch),
                      "machine": (out / "machine.json").read_text(), "jax": jax.__version__})
    learn(config, out, begun, mesh)


def say(text: str) -> None:
    """Prints in the first of many processes."""
    if jax.process_index() == 0:
        print(text, flush=True)


def prune_within(config: Config, asked: Task, data: Data, out: Path, dense: float,
                 mesh: Mesh | None = None) -> tuple[Task, prune.Guidance, train.Trained, str]:
    """Prunes the task's model for its speedup, and for less from its dense weights again while that costs too much accuracy.

    Args:
      config: says how many points it may cost.
      asked: of the method; its model is pruned in place.
      data: to learn from.
      out: the run's folder.
      dense: accuracy before.
      mesh: as `train.fit`.

    Returns:
      The task that was fulfilled, its guide, its training, and in words what had to be given up, or "".
    """
    steps = range(config.dense_steps, config.dense_steps + config.prune_steps)
    before, method, tried = jax.tree.map(jnp.copy, nnx.state(asked.model)), METHODS[config.method], list[str]()
    while True:
        guide = method.guide(asked)  # which may look at the weights
        optimizer = method.prepare(asked, guide)
        assert optimizer is not None, config.method  # it trains
        title = PRUNING if asked.speedup == config.speedup else f"{PRUNING} for {asked.speedup:.3g}x"
        pruned = fit(config, asked.model, data, out, title, optimizer, steps, mesh)
        lost = 100 * (dense - pruned.accuracies[-1][1])
        tried.append(f"{asked.speedup:.3g}x costs {max(0, lost):.2f}")
        slower = 1 + (asked.speedup - 1) * LESS
        if config.points is None or lost <= config.points or slower < LEAST:
            allowed = f"asked for {config.speedup:g}x at {config.points} points at most: {', '.join(reversed(tried))}"
            return asked, guide, pruned, allowed if len(tried) > 1 else ""
        say(f"{tried[-1]} points, {config.points} are allowed: pruned again for {slower:.3g}x")
        nnx.update(asked.model, jax.tree.map(jnp.copy, before))
        asked = dataclasses.replace(asked, speedup=slower)


def fit(config: Config, model: nnx.Module, data: Data, out: Path, title: str, optimizer: optax.GradientTransformation,
        steps: range, mesh: Mesh | None = None) -> train.Trained:
    """One of the two trainings, with its checkpoints in a folder of its own."""
    return train.fit(model, optimizer, data, title=title, folder=out / title.replace(" ", "-"), seed=config.seed,
                     batch=config.batch, steps=len(steps), first_step=steps.start, save_every=config.save_every,
                     mesh=mesh)


def dense_optimizer(config: Config) -> optax.GradientTransformation:
    """SGD with Nesterov momentum; the learning rate rises linearly to its peak and falls along a cosine to its end."""
    rate = optax.warmup_cosine_decay_schedule(0.0, config.peak_lr, config.warmup_steps, config.dense_steps, config.end_lr)
    return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(rate, config.momentum, nesterov=True))


def prune_optimizer(config: Config) -> tuple[optax.Schedule, optax.GradientTransformation]:
    """Of pruning: the learning rate, which falls along a cosine from its peak to its end, and the same optimizer with it."""
    rate = optax.cosine_decay_schedule(config.prune_peak_lr, config.prune_steps, config.prune_end_lr / config.prune_peak_lr)
    return rate, optax.chain(optax.add_decayed_weights(config.weight_decay), optax.sgd(rate, config.momentum, nesterov=True))


def task(config: Config, model: nnx.Module, data: Data, shapes: Mapping[str, ConvShape], machine: Machine,
         whole: prune.Whole) -> Task:
    """What a method is asked."""
    method = METHODS[config.method]
    return Task(model, data.train_images[:CALIBRATION], shapes, machine, config.speedup, whole, *prune_optimizer(config),
                config.prune_steps, config.ramp_steps, config.prune_every, block=max(config.block, method.block),
                precision=method.precision)


def settings(config: Config) -> dict[str, Any]:
    """What decides the run's result, in plain values: all fields but where it goes and how long it is measured."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name in ("out", "results", "timing_seconds", "folder", "processes"):
        del fields[name]
    return json.loads(json.dumps(fields, default=_name))


def _name(function: Any) -> str:
    if isinstance(function, functools.partial):
        keywords = ", ".join(f"{key}={value}" for key, value in function.keywords.items())
        return f"{_name(function.func)}({keywords})"
    return f"{function.__module__}.{function.__qualname__}"


if __name__ == "__main__":
    main()
