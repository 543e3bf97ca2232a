"""How long a program takes, step by step: layers by the performance model, the rest by its instructions and its bytes.

    t(step) = runs / side by side * t(one run)

A run takes some images through a step, a thread for each run side by side, or it is the whole batch on all threads: which of
the two, the program itself says. Steps that run pixel by pixel with others are one here, and so are a convolution and the
function that it does to its result: what lies between them stays in a register or a cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sparseflax.conv import ffi
from sparseflax.cost.int8 import int8_seconds
from sparseflax.cost.loop import loop_seconds
from sparseflax.cost.machine import Machine
from sparseflax.cost.model import conv_seconds, dense_seconds
from sparseflax.cost.shape import ConvShape
from sparseflax.network.program import Program, Size, Step
from sparseflax.network.region import CONVOLUTIONS

# Cycles of a vector, by what is done to it: of others a load, an instruction or two, a store, and a share of starting a strip.
CYCLES = {"exp": 16.0, "logistic": 11.0, "swish": 13.0, "gelu": 14.0, "tanh": 11.0, "erf": 12.0, "gate": 6.0, "sqrt": 5.0,
          "rsqrt": 8.0, "power": 10.0, "div": 3.0}
OTHERS, COPY = 2.0, 1.0


@dataclass(frozen=True)
class StepTime:
    """What a step of a program takes, or some that run pixel by pixel together.

    Attributes:
      op: what it does: "conv", "max pool", "square, channel sum, mul".
      path: of the layer; None of what is no layer.
      size: (h, w, c) of an image of its result.
      first: its number in the program.
      runs: that a call takes it in, each with the same share of the batch.
      side: how many of these run side by side, on a thread each; 1 where all threads share a run.
      predicted: seconds of a call's wall time.
      measured: likewise; None where nothing was measured.
    """

    op: str
    path: str | None
    size: Size
    first: int
    runs: int
    side: int
    predicted: float
    measured: float | None = None


def predict(program: Program, layers: Sequence[str | None], n: int, machine: Machine) -> list[StepTime]:
    """The steps that have something to do, in the order in which they run.

    Args:
      program: of a packed network.
      layers: paths of the layers whose weights its shared operands are, None for what is no kernel.
      n: images in the batch.
      machine: where it runs.

    Raises:
      ValueError: the native kernel is not available, or what the cost model raises.
    """
    if ffi.native is None or not ffi.available:
        raise ValueError(f"the steps of a program are those of the native kernel, which is not available: {ffi.reason}")
    code = program.encode()
    described = ffi.native.describe(*(code[name].tobytes() for name in ("words", "numbers", "gaps")), n, machine.threads)
    groups: dict[int, list[int]] = {}
    for number, (runs, first, _) in enumerate(described):
        if runs:
            groups.setdefault(first, []).append(number)
    times = []
    for group in groups.values():
        steps = [program.steps[number] for number in group]
        runs, first, copied = described[group[0]]
        side = min(runs, machine.threads)
        # As many runs as there are threads, a thread for each, take what all threads take for a batch of their images.
        images = max(1, round(n / runs * side))
        if steps[0].op in CONVOLUTIONS and steps[0].op != "depthwise":
            seconds = _layer(program, steps[0], images, machine)
            if steps[1:]:  # a function of what it has just written
                seconds += loop_seconds(images * sum(_cycles(program, step) for step in steps[1:]), 0, machine)
        else:
            seconds = _loop(program, group, copied, images, machine)
        path = layers[steps[0].shared[0]] if steps[0].op in CONVOLUTIONS else None
        times.append(StepTime(", ".join(map(_name, steps)), path, steps[-1].size, first, runs, side, runs / side * seconds))
    return times


def _layer(program: Program, step: Step, images: int, machine: Machine) -> float:
    """Seconds of a convolution's step for some images, on all threads, as the cost model has it."""
    h, w, c = _size(program, step.args[0])
    if step.pattern is not None:
        (kh, kw, _, oc), groups, window = step.pattern.shape, step.pattern.groups, step.params[0]
    else:
        (kh, kw), window, groups, *_ = step.params
        oc = step.size[2]
    shape = ConvShape(images, h, w, c, oc, kh, kw, window.strides, window.padding, window.dilation, groups)
    if step.pattern is None:
        return float(dense_seconds(shape, machine))
    density = max(step.pattern.nnz, 1) / math.prod(step.pattern.shape)
    return int8_seconds(shape, density, machine) if step.op == "conv_int8" else float(conv_seconds(shape, density, machine))


def _loop(program: Program, group: Sequence[int], copied: int, images: int, machine: Machine) -> float:
    """Seconds of what meets few weights or none: a depthwise convolution, or steps that run together and are no layers."""
    first = len(program.inputs)
    inside = {first + number for number in group}
    steps = [program.steps[number] for number in group]
    read = {arg for step in steps for arg in step.args} - inside
    elsewhere = {arg for number, step in enumerate(program.steps) if number not in group for arg in step.args}
    written = inside & (elsewhere | set(program.outputs))
    # Of a concatenation what lies where it belongs is not touched.
    count = images * (copied / steps[0].size[2] if steps[0].op == "concat" else 1)
    moved = sum(_bytes(program, value) for value in read | written)
    return loop_seconds(count * sum(_cycles(program, step) for step in steps), count * moved, machine)


def _cycles(program: Program, step: Step) -> float:
    """Of an image, all of whose vectors have one lane."""
    outputs = math.prod(step.size)
    if step.op == "depthwise":
        return outputs * math.prod(step.params[0])
    if step.op == "pool":  # the rows of a window first, for each column once
        _, (kh, kw), window = step.params
        return outputs * (kh * window.strides[1] + kw)
    if step.op == "channel_sum":
        return outputs * (OTHERS + step.params[0])
    if step.op == "reduce":
        return OTHERS * math.prod(_size(program, step.args[0]))
    if step.op in ("window", "concat", "upsample", "shuffle"):
        return outputs * COPY
    return outputs * CYCLES.get(step.params[0] if step.op in ("map", "combine") else step.op, OTHERS)


def _size(program: Program, value: int) -> Size:
    inputs = len(program.inputs)
    return program.inputs[value] if value < inputs else program.steps[value - inputs].size


def _bytes(program: Program, value: int) -> int:
    inputs = len(program.inputs)
    uint8 = value in program.uint8 if value < inputs else program.steps[value - inputs].uint8
    return math.prod(_size(program, value)) * (1 if uint8 else 4)


def _name(step: Step) -> str:
    if step.op == "pool":
        return "max pool" if step.params[0] else "sum pool"
    return step.params[0] if step.op in ("map", "combine") else step.op.replace("_", " ")
