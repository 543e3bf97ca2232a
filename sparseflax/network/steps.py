"""A packed network step by step: what each is predicted to take, and takes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from sparseflax.conv import ffi
from sparseflax.cost.detect import detect_machine
from sparseflax.cost.machine import Machine
from sparseflax.cost.progress import progress
from sparseflax.network.measure import called, program
from sparseflax.network.plan import elsewhere
from sparseflax.network.predict import StepTime, predict
from sparseflax.network.program import Program, program_p

ROUNDS, BURST = 5, 0.01  # rounds of calls at least, and seconds of one: short ones, which others leave alone
QUARTILE = 0.25  # of the rounds
KERNELS = "kernel", "values", "words"  # of a layer: dense, sparse, in eight bits
Words = tuple[int, ...]  # what a program is known by


@dataclass(frozen=True)
class Steps:
    """The steps of a network's native programs, in the order in which they run; `print(steps)` is a table.

    Attributes:
      steps: those that have something to do.
      machine: where they run.
      images: in the batch.
      call: seconds of a whole call, the lower quartile of its rounds; None where nothing was measured.
    """

    steps: tuple[StepTime, ...]
    machine: Machine
    images: int
    call: float | None = None

    @property
    def predicted(self) -> float:
        """Seconds of all steps."""
        return sum(step.predicted for step in self.steps)

    @property
    def measured(self) -> float | None:
        """Seconds of all steps; None where nothing was measured."""
        return None if self.call is None else sum(step.measured or 0.0 for step in self.steps)

    def __str__(self) -> str:
        def us(seconds: float | None) -> str:
            return "" if seconds is None else f"{1e6 * seconds:.1f}"

        def ratio(predicted: float, measured: float | None) -> str:
            return f"{predicted / measured:.2f}" if measured else ""

        rows = [("step", "layer", "output", "runs", "side by side", "predicted us", "measured us", "ratio")]
        rows += [(step.op, step.path or "", "x".join(map(str, step.size)), str(step.runs), str(step.side), us(step.predicted),
                  us(step.measured), ratio(step.predicted, step.measured)) for step in self.steps]
        rows.append(("all steps", "", "", "", "", us(self.predicted), us(self.measured), ratio(self.predicted, self.measured)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) if column < 3 else cell.rjust(width)
                           for column, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]
        if self.call is not None:
            lines.append(f"a whole call takes {us(self.call)} us: what is no step runs in XLA")
        return "\n".join([*lines, f"wall time for {self.images} image{'s' * (self.images > 1)} on {self.machine}"])


def step_times(model: Any, x: Any, machine: Machine | None = None, *, measure: bool = True, seconds: float = 2.0,
               show: bool = False, **call: Any) -> Steps:
    """Predicts what each step of a packed network takes, and measures it.

    All times are wall times of a call: of what threads do side by side, each for images of its own, a thread's share.

    Args:
      model: what `pack_model` returned, or any that runs fused: an nnx module, or a pair (Linen module, its variables).
      x: its input, an array (n, ...) or a pytree of them.
      machine: where it runs; None for this one.
      measure: whether to run it, here; let nothing else run meanwhile. Without, the prediction alone.
      seconds: of measuring, compiling apart, in some rounds at least, whose lower quartile counts, as in a calibration: others
        on the machine only ever add to a time.
      show: how far it is, on stderr.
      **call: further keyword arguments of the call.

    Raises:
      ValueError: no step of the model runs in the native kernel, `measure` for another machine than this one, or a machine
        whose kernel the cost model cannot count.
    """
    if measure and machine is not None and elsewhere(machine):
        raise ValueError(f"measure=True times on this machine, but {elsewhere(machine)}: leave `machine` out, or say "
                         "measure=False for the prediction alone")
    machine = machine or detect_machine()
    programs = list(_native_programs(model, x, **call))
    if not programs:
        raise ValueError("no step of the model runs in the native kernel: pass what sparseflax.pack_model(model, plan) returns "
                         "with fuse=True, of a model that has a convolution")
    images = len(jax.tree.leaves(x)[0])
    predicted = [(words, predict(each, layers, images, machine)) for words, each, layers in programs]
    if not measure:
        return Steps(tuple(step for _, steps in predicted for step in steps), machine, images)
    traced, whole = _trace(program(model, x, **call), seconds, show)
    alike = Counter(words for words, _, _ in programs)  # these cannot be told apart: each takes the same share

    def measured(words: Words, step: StepTime) -> float:
        times = [found[words][step.first] if words in found else 0.0 for found in traced]  # XLA drops what nobody reads
        return float(np.quantile(times, QUARTILE)) / alike[words] / step.side / 1e9

    steps = [replace(step, measured=measured(words, step)) for words, steps in predicted for step in steps]
    return Steps(tuple(steps), machine, images, float(np.quantile(whole, QUARTILE)))


def _trace(run: Callable[[], Any], seconds: float, show: bool) -> tuple[list[dict[Words, list[float]]], list[float]]:
    """In each round {program: nanoseconds of each step in a call, of all threads}, and seconds of a whole call."""
    assert ffi.native is not None
    traced, whole = list[dict[Words, list[float]]](), list[float]()
    run()
    start = time.perf_counter()
    run()
    once = time.perf_counter() - start
    calls = max(1, round(BURST / once))
    rounds = max(ROUNDS, int(seconds / (1 + calls) / once))
    with progress("timing steps", rounds) if show else nullcontext(lambda done, text="": None) as advance:
        for done in range(1, rounds + 1):
            run()  # what lies between rounds is in the caches now
            ffi.native.trace(True)
            start = time.perf_counter()
            for _ in range(calls):
                run()
            whole.append((time.perf_counter() - start) / calls)
            found: dict[Words, list[float]] = {}
            for words, times in ffi.native.trace(False):
                if any(times):  # others of the same, of programs compiled before, did not run
                    same = found.get(tuple(words), [0.0] * len(times))
                    found[tuple(words)] = [a + b / calls for a, b in zip(same, times, strict=True)]
            traced.append(found)
            advance(done, f"{1e3 * whole[-1]:.3g} ms")
    return traced, whole


def _native_programs(model: Any, x: Any, **call: Any) -> Iterator[tuple[Words, Program, list[str | None]]]:
    """Each program of a model's call, with what a trace knows it by, and paths of the layers whose kernels its shared operands
    are, None for others."""
    function, weights = called(model, **call)
    jaxpr = jax.make_jaxpr(function)(weights, x).jaxpr
    names = dict(zip(jaxpr.invars, map(kernels(weights).get, range(len(jaxpr.invars))), strict=True))
    for each, layers in _programs(jaxpr, names):
        yield tuple(each.encode()["words"].tolist()), each, layers


def _programs(jaxpr: Any, names: dict[Any, str | None]) -> Iterator[tuple[Program, list[str | None]]]:
    """Each program with the layers whose kernels it is given, None for other operands."""
    for equation in jaxpr.eqns:
        known = [None if isinstance(atom, Literal) else names.get(atom) for atom in equation.invars]
        inner = next((value for key in ("jaxpr", "call_jaxpr") if (value := equation.params.get(key))), None)
        if equation.primitive is program_p:
            program = equation.params["program"]
            yield program, known[len(program.inputs):]
        elif inner is not None:
            inner = getattr(inner, "jaxpr", inner)
            yield from _programs(inner, dict(zip(inner.invars, known, strict=True)))
        elif len(known) == 1:
            names |= dict.fromkeys(equation.outvars, known[0])


def kernels(weights: Any) -> dict[int, str]:
    """{number of a leaf among a model's weights: path of the layer whose kernel it is}"""
    leaves, _ = jax.tree.flatten_with_path(weights)
    paths = [[str(key.key) for key in path if hasattr(key, "key")] for path, _ in leaves]
    return {number: "/".join(path[:-1]).removeprefix("params/") for number, path in enumerate(paths) if path[-1] in KERNELS}
