"""One network, measured: ours, XLA's dense one, and every engine with the same pruned weights, compared and timed in turn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from flax import nnx

from experiments.baselines import Rival, nchw, nhwc
from experiments.baselines.yardstick import time_network
from experiments.benchmark.int8 import INT8
from experiments.benchmark.layers import beside
from experiments.benchmark.table import OURS
from experiments.benchmark.timing import Others, alternate
from experiments.benchmark.where import where_time_goes
from experiments.evaluate import ERROR_FACTOR, count_weights, fold_only, in_float64
from experiments.export_onnx import to_onnx
from experiments.networks import Spec, pruned
from sparseflax.conv import ffi
from sparseflax.cost.machine import Machine
from sparseflax.job.quantized import quantized
from sparseflax.network.measure import program
from sparseflax.network.pack import pack_model
from sparseflax.network.plan import in_eight_bits, plan
from sparseflax.network.planned import Plan

XLA, XLA_FOLDED = "xla", "xla, batch norm folded"
EXAMPLES = 32  # images, noise as the input is, that ranges are taken from
OFF = 0.5  # of an output in fewer bits, relative: more is another network


def measure(spec: Spec, n: int, baselines: Iterable[ModuleType], machine: Machine, *, threads: int, seconds: float,
            kernels: Mapping[str, np.ndarray] | None = None, yardstick: str | None = None,
            measured: bool = True, int8: bool = False) -> dict[str, Any]:
    """Times one network.

    Rivals get it with batch norms folded into the convolutions, as all but PyTorch would do by themselves.

    Args:
      spec: the network.
      n: images in a batch.
      baselines: modules of experiments.baselines that have a `network`.
      machine: that is planned for.
      threads: that the process was confined to.
      seconds: for all contenders together.
      kernels: trained ones, see `pruned`.
      yardstick: command of a rival in another process, see baselines/yardstick.py.
      measured: whether each layer is timed both ways to choose; else the performance model chooses.
      int8: whether the network is pruned in blocks of four, and those who can compute in eight bits do so, too.

    Returns:
      Its line of the results, without provenance. Seconds.

    Raises:
      RuntimeError: an output disagrees, or the yardstick fails.
    """
    model = pruned(spec, kernels, block=4 if int8 else 1)
    x = np.random.default_rng(1).standard_normal((n, spec.image, spec.image, 3), np.float32)
    planned = plan(model, x, machine, measure=measured)
    folded, packed = fold_only(model, planned), pack_model(model, planned)
    file = to_onnx(folded, x)
    dense = {XLA: model} | ({XLA_FOLDED: folded} if any(layer.norm for layer in planned.layers) else {})
    contenders = [Rival(OURS, program(packed, x), np.asarray, dense=False),
                  *(Rival(name, program(network, x), np.asarray) for name, network in dense.items()),
                  *(rival for baseline in baselines for rival in baseline.network(file, x, threads))]
    contenders += in_int8(model, x, file, planned, baselines, threads) if int8 else []
    errors = check(contenders, in_float64(model, x))
    with Others() as others:
        timings, _ = alternate({c.name: c.run for c in contenders}, seconds, threads)
    kept, weights = count_weights(model)
    line = {
        "layer": spec.name, "n": n, "threads": threads, "isa": ffi.isa(), "density": kept / weights,
        "flops": sum(layer.shape.flops for layer in planned.layers if layer.shape), "others": others.load,
        "times": {c.name: vars(timings[c.name]) | {"dense": c.dense, "exact": c.exact, "error": errors[c.name]}
                  for c in contenders},
        "measured": measured,
    } | breakdown(packed, planned, x)
    if yardstick:
        line["yardstick"] = beside(contenders[0], lambda: time_network(yardstick, file, n, threads, seconds / 4), threads,
                                   seconds / 4)
    return line


def in_int8(model: nnx.Module, x: np.ndarray, file: bytes, planned: Plan, baselines: Iterable[ModuleType],
            threads: int) -> list[Rival]:
    """Ours and the engines in eight bits, with ranges from the same images.

    Args:
      model: the pruned network.
      x: its input.
      file: the network as ONNX, in float32.
      planned: in float32: what is dense there stays so.
      baselines: those that read files in eight bits have a `network_int8`.
      threads: to run on.
    """
    examples = np.random.default_rng(2).standard_normal((EXAMPLES, *x.shape[1:]), np.float32)
    packed = pack_model(model, in_eight_bits(planned, model, x, examples, faster=True))
    ours = Rival(INT8, program(packed, x), np.asarray, dense=False, exact=False)
    engines = [baseline.network_int8 for baseline in baselines if hasattr(baseline, "network_int8")]
    file = quantized(file, nchw(examples), len(x)) if engines else file
    return [ours, *(rival for network in engines for rival in network(file, x, threads))]


def check(contenders: Iterable[Rival], exact: np.ndarray) -> dict[str, float]:
    """{name: largest error of an output over the largest output}, each of the size of XLA's where it is in float32.

    Raises:
      RuntimeError: an error is more than that, or than OFF, or an output has another shape.
    """
    errors, in_float32 = dict[str, float](), dict[str, bool]()
    for contender in contenders:
        output = contender.output(contender.run())
        if output.ndim == 4 and output.shape != exact.shape:  # an engine's images
            output = nhwc(output)
        if output.shape != exact.shape:
            raise RuntimeError(f"{contender.name} returned {output.shape}, wanted {exact.shape}: it computes another network")
        errors[contender.name] = float(np.abs(output - exact).max() / np.abs(exact).max())
        in_float32[contender.name] = contender.exact
    bound = {True: ERROR_FACTOR * errors[XLA], False: OFF}
    wrong = {name: error for name, error in errors.items() if not error <= bound[in_float32[name]]}
    if wrong:
        raise RuntimeError(f"the outputs of {wrong} are off by these shares of the largest, wanted at most {ERROR_FACTOR} "
                           f"times XLA's {errors[XLA]:.1e}: their times mean nothing")
    return errors


def breakdown(packed: nnx.Module, planned: Plan, x: np.ndarray) -> dict[str, Any]:
    """Where the packed network's time goes: "layers" with predicted and measured seconds, "rest" by operation, and "steps",
    predicted and measured, of all that runs in native programs."""
    layers, rest, steps = where_time_goes(packed, x)
    predicted: dict[str | None, float] = {layer.path: 0.0 for layer in planned.layers}
    for step in steps.steps if steps else ():
        predicted[step.path] = predicted.get(step.path, 0.0) + step.predicted
    rows = [{"path": layer.path, "shape": str(layer.shape), "density": layer.density, "choice": layer.choice,
             "predicted": predicted[layer.path] or layer.seconds, "measured": layers.get(layer.path, 0.0)}
            for layer in planned.layers]
    found = {"layers": rows, "rest": rest}
    return found | ({"steps": {"predicted": steps.predicted, "measured": steps.measured}} if steps else {})
