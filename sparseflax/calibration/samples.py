"""What it takes here: seconds of convolutions, dense and sparse, on a machine that others may use at the same time.

All programs are made first and then timed in turn, round after round, so that a noisy spell meets a few calls of each. The
time of a program is the lower quartile over the rounds, since others on the machine only ever add to it and may do so half of
the time; less that of a program that does nothing: inside a network, a layer is not called from Python.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseflax import sparse_conv
from sparseflax.conv.int8 import LANES, Quantization, pack_int8
from sparseflax.conv.int8_primitive import int8_conv
from sparseflax.conv.primitive import dense_conv
from sparseflax.conv.window import Window
from sparseflax.cost.progress import progress
from sparseflax.cost.shape import ConvShape
from sparseflax.network.fuse import fuse

BURST = 0.004  # seconds of timed calls in a round, and of untimed ones before: a large layer needs some until caches hold it
QUARTILE = 0.25  # of the rounds


@dataclass(frozen=True)
class Sample:
    """One time.

    Attributes:
      shape: of the layer.
      density: kept / all of its weights, in eight bits of its words; None for the dense convolution.
      seconds: of a call inside a program, lower quartile over the rounds.
      spread: distance of the quartiles over the rounds / median.
      int8: whether in eight bits.
    """

    shape: ConvShape
    density: float | None
    seconds: float
    spread: float
    int8: bool = False

    @property
    def kind(self) -> str:
        """"dense", "sparse" or "int8"."""
        return "dense" if self.density is None else "int8" if self.int8 else "sparse"


def measure(layers: Iterable[tuple[ConvShape, Sequence[float]]], seconds: float, *, isa: str | None = None,
            dense: bool = True, int8: bool = False, rounds: int = 5) -> list[Sample]:
    """Times layers, each dense and at some densities, all with bias and ReLU.

    Args:
      layers: (shape, densities) of each.
      seconds: for making and timing the programs; `rounds` are timed in any case.
      isa: instruction set of our kernel, None for what it chooses.
      dense: whether to time dense convolutions too.
      int8: whether to time every other one in eight bits too, at the first of its densities, the next one's second, and so on.
      rounds: at least.
    """
    end = time.perf_counter() + seconds
    draw = np.random.default_rng(0)
    programs: list[tuple[ConvShape, float | None, bool, Callable[[], jax.Array]]] = []
    layers = list(layers)
    with progress("making programs", len(layers)) as advance:
        for i, (shape, densities) in enumerate(layers, 1):
            programs += _programs(shape, densities, draw, isa, dense)
            if int8 and densities and i % 2:
                programs.append(_program_in_eight_bits(shape, densities[i // 2 % len(densities)], draw))
            advance(i, str(shape))
    calls = [_nothing(), *(call for *_, call in programs)]
    times: list[list[float]] = [[] for _ in calls]
    start = time.perf_counter()
    gc.collect()
    gc.disable()
    try:
        _round(calls, times, draw)
        expected = max(rounds, int((end - start) / (time.perf_counter() - start)))
        with progress("timing", expected, 1) as advance:
            for i in range(2, expected + 1):
                _round(calls, times, draw)
                advance(i, "rounds")
                if i >= rounds and time.perf_counter() > end:
                    break
    finally:
        gc.enable()
    nothing = float(np.quantile(times[0], QUARTILE))
    return [_sample(shape, density, int8, ts, nothing)
            for (shape, density, int8, _), ts in zip(programs, times[1:], strict=True)]


def _programs(shape: ConvShape, densities: Sequence[float], draw: np.random.Generator, isa: str | None, dense: bool):
    x = jnp.asarray(draw.standard_normal((shape.n, shape.ih, shape.iw, shape.ic), np.float32))
    kernel, chance = draw.standard_normal(shape.kernel_shape, np.float32), draw.random(shape.kernel_shape, np.float32)
    bias = jnp.zeros(shape.oc, jnp.float32)

    window = Window(shape.strides, shape.padding, shape.kernel_dilation)

    @jax.jit
    @fuse  # what a packed network makes of the layers that stay dense, and so what a sparse layer has to beat
    def unpruned(x, kernel, bias):
        return jnp.maximum(dense_conv(x, kernel, window, shape.groups) + bias.reshape(1, 1, 1, -1), 0)

    @jax.jit
    def ours(x, packed, bias):
        return sparse_conv(x, packed, bias, strides=shape.strides, padding=shape.padding, kernel_dilation=shape.kernel_dilation,
                           feature_group_count=shape.groups, activation="relu", kernel=isa)

    if dense:
        yield shape, None, False, _compiled(unpruned, x, jnp.asarray(kernel), bias)
    for density in densities:
        packed = shape.pack(kernel * (chance < density))
        yield shape, packed.density, False, _compiled(ours, x, packed, bias)


def _program_in_eight_bits(shape: ConvShape, density: float, draw: np.random.Generator):
    """Of uint8 images, as they are inside a network, with whole words pruned."""
    steps = Quantization(0.02, 0)
    x = steps.quantize(jnp.asarray(draw.random((shape.n, shape.ih, shape.iw, shape.ic), np.float32)))
    kh, kw, channels, oc = shape.kernel_shape
    kernel, bias = draw.standard_normal(shape.kernel_shape, np.float32), jnp.zeros(shape.oc, jnp.float32)

    @jax.jit
    def ours(x, packed, bias):
        return int8_conv(x, packed, bias, strides=shape.strides, padding=shape.padding, kernel_dilation=shape.kernel_dilation,
                         feature_group_count=shape.groups, activation="relu", output=steps).values

    kept = draw.random((kh, kw, -(-channels // LANES), oc), np.float32) < density
    packed = pack_int8(kernel * kept.repeat(LANES, 2)[:, :, :channels], steps, shape.groups)
    return shape, packed.density, True, _compiled(ours, x, packed, bias)


def _compiled(program: Callable[..., jax.Array], *operands: Any) -> Callable[[], jax.Array]:
    """A call of a program, which is compiled here."""
    program(*operands).block_until_ready()
    return lambda: program(*operands).block_until_ready()


def _nothing() -> Callable[[], jax.Array]:
    """A call that costs what calling any program costs."""
    program, operands = jax.jit(lambda x, kernel, bias: bias + 1), [jnp.zeros((1, 4, 4, 8), jnp.float32)] * 3
    return lambda: program(*operands).block_until_ready()


def _round(calls: Sequence[Callable[[], jax.Array]], times: list[list[float]], draw: np.random.Generator) -> None:
    # In another order each time: a second in which the machine is slow meets layers that have nothing in common.
    for i in draw.permutation(len(calls)):
        _burst(calls[i])  # what the others left in the caches is not its own
        times[i].append(statistics.median(_burst(calls[i])))


def _burst(call: Callable[[], jax.Array]) -> list[float]:
    times: list[float] = []
    start = time.perf_counter()
    while not times or time.perf_counter() - start < BURST:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return times


def _sample(shape: ConvShape, density: float | None, int8: bool, times: list[float], nothing: float) -> Sample:
    low, median, high = np.quantile(times, (QUARTILE, 0.5, 1 - QUARTILE))
    return Sample(shape, density, float(max(low - nothing, 0.1 * low)), float((high - low) / median), int8)
