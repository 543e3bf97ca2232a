"""Where a network's time goes: its compiled program under XLA's profiler, by layer and by what is no layer."""

from __future__ import annotations

import re
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from sparseflax.network.program import program_p
from sparseflax.network.steps import Steps, kernels, step_times

CALLS = 5
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = .*? ([a-z][\w-]*)\((.*)$")
LAYOUT = "bitcast", "broadcast", "copy", "reshape", "transpose"  # of weights: still weights


class Where(NamedTuple):
    """Seconds of one call's wall time, of XLA's instructions that of all threads.

    Attributes:
      layers: {path of a layer: seconds}.
      rest: {JAX's name of an operation outside of layers, or what a step does: seconds}, the largest first.
      steps: of the native programs, which are counted above; None where nothing runs in one.
    """

    layers: dict[str, float]
    rest: dict[str, float]
    steps: Steps | None


def where_time_goes(model: nnx.Module, x: Any) -> Where:
    """Runs the network under the profiler, in which XLA times each instruction of the compiled program.

    What reads a layer's kernel is that layer, with whatever XLA or the sparse kernel has fused into it; of native programs the
    steps count.

    Args:
      model: in evaluation mode.
      x: its input.
    """
    graphdef, state = nnx.split(model)
    images = jax.numpy.asarray(x)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x), keep_unused=True)
    program = run.lower(state, images).compile()
    layers, names = _instructions(program.as_text() or "", kernels(state))
    inside: dict[str, float] = dict.fromkeys(layers.values(), 0.0)
    outside: dict[str, float] = {}
    native = False
    for instruction, seconds in _profile(lambda: jax.block_until_ready(program(state, images))).items():
        if instruction.startswith(program_p.name):
            native = True
        elif instruction in layers:
            inside[layers[instruction]] += seconds
        else:
            name = names.get(instruction, instruction)
            outside[name] = outside.get(name, 0.0) + seconds
    steps = step_times(model, images) if native else None
    for step in steps.steps if steps else ():
        times, name = (outside, step.op) if step.path is None else (inside, step.path)
        times[name] = times.get(name, 0.0) + (step.measured or 0.0)
    return Where(inside, dict(sorted(outside.items(), key=lambda item: -item[1])), steps)


def _instructions(program: str, kernels: dict[int, str]) -> tuple[dict[str, str], dict[str, str]]:
    """({instruction that reads a kernel: path of the layer}, {instruction: JAX's name of the operation that it comes from})"""
    weights: dict[str, str] = {}  # an instruction that is a kernel, in whatever layout
    layers: dict[str, str] = {}
    names: dict[str, str] = {}
    entry = program[program.find("\nENTRY "):]
    for match in filter(None, map(INSTRUCTION.match, entry.splitlines())):
        name, opcode, rest = match.groups()
        origin = re.search(r'op_name="([^"]*)"', rest)
        names[name] = origin[1].rpartition("/")[2] if origin else opcode
        arguments = rest.partition(")")[0]
        if opcode == "parameter":
            weights |= {name: kernels[int(arguments)]} if int(arguments) in kernels else {}
        elif owners := [weights[operand] for operand in re.findall(r"%([\w.-]+)", arguments) if operand in weights]:
            (weights if opcode in LAYOUT else layers)[name] = owners[0]
    return weights | layers, names


def _profile(run: Callable[[], Any]) -> dict[str, float]:
    """{instruction: seconds of one call, the median}"""
    run()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    found: dict[str, list[float]] = {}
    for _ in range(CALLS):
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder, profiler_options=options):
                run()
            (file,) = Path(folder).glob("**/*.xplane.pb")
            once: dict[str, float] = {}
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                for line in plane.lines:
                    for event in line.events:
                        if dict(event.stats).get("hlo_op") == event.name:  # not its end
                            once[event.name] = once.get(event.name, 0.0) + event.duration_ns / 1e9
        for name, seconds in once.items():
            found.setdefault(name, []).append(seconds)
    return {name: statistics.median(seconds) for name, seconds in found.items()}
