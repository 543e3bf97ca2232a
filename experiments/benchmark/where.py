"""Where a network's time goes: its compiled program under XLA's profiler, by layer and by what is no layer."""

from __future__ import annotations

import re
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.extend.core import Literal

from sparseflax.conv import ffi
from sparseflax.network.program import Program, program_p
from sparseflax.network.region import CONVOLUTIONS

CALLS = 5
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = .*? ([a-z][\w-]*)\((.*)$")
LAYOUT = "bitcast", "broadcast", "copy", "reshape", "transpose"  # of weights: still weights


def where_time_goes(model: nnx.Module, x: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Runs the network under the profiler, in which XLA times each instruction of the compiled program.

    What reads a layer's kernel is that layer, with whatever XLA or the sparse kernel has fused into it; of native programs the
    steps count. Times of what runs at the same time add up.

    Args:
      model: in evaluation mode.
      x: its input.

    Returns:
      ({path of a layer: seconds of one call}, {JAX's name of an operation outside of layers: seconds, the largest first})
    """
    graphdef, state = nnx.split(model)
    images = jax.numpy.asarray(x)
    run = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x), keep_unused=True)
    program = run.lower(state, images).compile()
    layers, names = _instructions(program.as_text() or "", _kernels(state))
    inside: dict[str, float] = dict.fromkeys(layers.values(), 0.0)
    outside: dict[str, float] = {}
    call = lambda: jax.block_until_ready(program(state, images))  # noqa: E731
    for instruction, seconds in _profile(call).items():
        if instruction.startswith(program_p.name):
            continue
        if instruction in layers:
            inside[layers[instruction]] += seconds
        else:
            name = names.get(instruction, instruction)
            outside[name] = outside.get(name, 0.0) + seconds
    closed = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, images)
    for path, name, seconds in _steps(closed, state, call):
        if path:
            inside[path] = inside.get(path, 0.0) + seconds
        else:
            outside[name] = outside.get(name, 0.0) + seconds
    return inside, dict(sorted(outside.items(), key=lambda item: -item[1]))


def _steps(closed: Any, state: Any, call: Callable[[], Any]) -> Iterator[tuple[str | None, str, float]]:
    """(path of a layer or None, what it does, seconds of one call) of each step of the native programs in a traced call."""
    if ffi.native is None:
        return
    call()
    ffi.native.trace(True)
    for _ in range(CALLS):
        call()
    traced = {tuple(words): times for words, times in ffi.native.trace(False) if any(times)}  # others of the same did not run
    names = dict(zip(closed.jaxpr.invars, map(_kernels(state).get, range(len(closed.jaxpr.invars))), strict=True))
    for program, paths in _programs(closed.jaxpr, names):
        for step, nanoseconds in zip(program.steps, traced[tuple(program.encode()["words"].tolist())], strict=True):
            name = step.params[0] if step.op in ("combine", "map") else step.op
            if nanoseconds == 0:  # it stays where it is, or runs with the one before
                continue
            yield paths[step.shared[0]] if step.op in CONVOLUTIONS else None, name, nanoseconds / CALLS / 1e9


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


def _kernels(state: Any) -> dict[int, str]:
    """{number of the program's parameter: path of the layer whose kernel it is}"""
    leaves, _ = jax.tree.flatten_with_path(state)
    paths = [[str(key.key) for key in path if hasattr(key, "key")] for path, _ in leaves]
    return {number: "/".join(path[:-1]) for number, path in enumerate(paths) if path[-1] in ("kernel", "values", "words")}


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
