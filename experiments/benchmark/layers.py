"""One layer, measured: ours and every rival prepared, compared, and timed in turn."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.baselines import Rival
from experiments.baselines.yardstick import can_run, time_command
from experiments.benchmark.table import OURS
from experiments.benchmark.timing import Others, alternate
from experiments.layers import Problem
from sparseflax import sparse_conv
from sparseflax.conv import ffi

TURNS = 2  # with the yardstick


def ours(problem: Problem, isa: str | None) -> Rival:
    """The sparse convolution in a jitted program of its own; its weights are an operand, as a model's are."""
    shape = problem.shape

    @jax.jit
    def conv(x, packed, bias):
        return sparse_conv(x, packed, bias, strides=shape.strides, padding=shape.padding, kernel_dilation=shape.kernel_dilation,
                           feature_group_count=shape.groups, activation="relu", kernel=isa)

    operands = jnp.asarray(problem.x), shape.pack(problem.kernel), jnp.asarray(problem.bias)
    return Rival(OURS, lambda: conv(*operands).block_until_ready(), np.asarray, dense=False)


def measure(problem: Problem, baselines: Iterable[ModuleType], *, threads: int, seconds: float, isa: str | None = None,
            yardstick: str | None = None) -> dict[str, Any]:
    """Times one layer.

    Args:
      problem: the layer.
      baselines: modules of experiments.baselines.
      threads: that the process was confined to.
      seconds: for all contenders together.
      isa: instruction set of our kernel, None for the best.
      yardstick: command of a rival in another process, see baselines/yardstick.py.

    Returns:
      Its line of the results, without provenance. Seconds, flop/s.

    Raises:
      RuntimeError: an output disagrees, or the yardstick fails.
    """
    contenders = [ours(problem, isa), *(rival for baseline in baselines for rival in baseline.rivals(problem, threads))]
    expected, tolerance = reference(problem)
    for contender in contenders:
        check(contender, expected, tolerance)
    with Others() as others:
        timings, peak = alternate({c.name: c.run for c in contenders}, seconds, threads, _fma_peak(isa))
    shape, packed = problem.shape, problem.shape.pack(problem.kernel)
    line = {
        "layer": problem.name, "n": shape.n, "threads": threads, "isa": isa or ffi.isa(), "density": problem.density,
        "flops": shape.flops, "bytes_per_weight": packed.nbytes / max(1, packed.nnz), "peak": peak,
        "others": others.load,
        "times": {c.name: vars(timings[c.name]) | {"dense": c.dense} for c in contenders},
    }
    if yardstick and can_run(problem):
        line["yardstick"] = beside(contenders[0], lambda: time_command(yardstick, problem, threads, seconds / 4), threads,
                                   seconds / 4)
    return line


def beside(ours: Rival, theirs: Callable[[], tuple[str, float]], threads: int, seconds: float) -> dict[str, Any]:
    """Ours and a yardstick in turn: seconds of both, and the median of their quotients.

    Args:
      ours: what we run.
      theirs: has the yardstick time itself; returns the engine's name and seconds.
      threads: that both run on.
      seconds: for one turn of ours.
    """
    mine, others, engine = [], [], ""
    for _ in range(TURNS):
        timings, _ = alternate({OURS: ours.run}, seconds, threads)
        mine.append(timings[OURS].seconds)
        engine, other = theirs()
        others.append(other)
    return {"engine": engine, "seconds": others, "ours": mine,
            "speedup": statistics.median(b / a for a, b in zip(mine, others, strict=True))}


def reference(problem: Problem) -> tuple[np.ndarray, float]:
    """(output (n, oh, ow, oc) by XLA, how far another order of summation may be from it).

    A sum of k products in any order is off by less than 8 sqrt(k) u sum |x w| with probability 1 - 2 exp(-32), u = 2**-24
    (Higham and Mary 2019); both sides err. The largest such sum of the layer stands for all, since Winograd's algorithm
    spreads its errors over a tile.
    """
    shape = problem.shape

    @jax.jit
    def conv(x, kernel, bias):
        return jax.lax.conv_general_dilated(
            x, kernel, shape.strides, shape.padding, rhs_dilation=shape.kernel_dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=shape.groups) + bias

    operands = problem.x, problem.kernel, problem.bias[None, None, None]
    largest = float(conv(*map(np.abs, operands)).max())
    terms = int(np.count_nonzero(problem.kernel, axis=(0, 1, 2)).max()) + 1
    return np.maximum(np.asarray(conv(*operands)), 0), 2 * 8 * terms**0.5 * 2.0**-24 * largest


def check(contender: Rival, expected: np.ndarray, tolerance: float) -> None:
    """Raises RuntimeError where the contender's output is not `expected` within `tolerance`."""
    output = contender.output(contender.run())
    if output.shape != expected.shape:
        raise RuntimeError(f"{contender.name} returned {output.shape}, wanted {expected.shape}: it computes another layer")
    error = float(np.abs(output - expected).max())
    if not error <= tolerance:
        raise RuntimeError(f"{contender.name} is off by {error:.2e}, wanted at most {tolerance:.2e}: its time means nothing")


def _fma_peak(isa: str | None) -> Callable[[], float] | None:
    """Measures the flop/s of FMAs from registers on one thread; None without the native module."""
    measure = getattr(ffi.native, "fma_gflops", None)
    return measure and (lambda: 1e9 * measure(isa or ffi.isa()))
