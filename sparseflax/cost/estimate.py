"""A machine estimated in two seconds: the built-in rates, scaled to a few timed layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparseflax.conv import ffi
from sparseflax.conv.primitive import sparse_conv
from sparseflax.conv.window import Window
from sparseflax.cost import cpu
from sparseflax.cost.machine import TYPICAL, TYPICAL_PEAK, Machine
from sparseflax.cost.model import conv_seconds
from sparseflax.cost.rates import Rates
from sparseflax.cost.shape import ConvShape
from sparseflax.cost.timing import in_turn

# The layers whose times scale the built-in rates: two bound by arithmetic, one by what else there is to do.
SAME = (1, 1), (1, 1)
TIMED = (ConvShape(1, 28, 28, 128, 128, 3, 3, padding=SAME), ConvShape(1, 14, 14, 256, 256, 3, 3, padding=SAME),
         ConvShape(1, 28, 28, 256, 256, 1, 1))
DENSITY = 0.1  # of them
# Others on the machine only ever add to a time: the quartile of those that they left alone is what repeats from start to start.
QUARTILE = 0.25
BURST = 0.005  # seconds for which a program runs before it is another one's turn

# Of a larger last cache than a desktop's the other cores, and on a virtual machine other guests, have their share.
SHARED = 32 << 20
# A kept weight costs the kernel a float32 and a 16-bit offset: 6 bytes where a dense weight has 4.
BETA = 1.5
# Where the kernel cannot be timed: what Park et al. measured with AVX2.
ESTIMATED_ALPHA = 3.0


class Timed(NamedTuple):
    """A timed layer, its density, and seconds."""

    shape: ConvShape
    density: float
    seconds: float


def estimate_machine(threads: int, seconds: float, isa: str, because: str) -> Machine:
    """This machine, measured in about `seconds` as `detect_machine` says; `because` says why that is all there is."""
    l1, l2, l3, caches = cpu.caches()
    cores = cpu.cores()
    # Eager even when a caller is being traced, and on the CPU even when another device is the default.
    with jax.ensure_compile_time_eval(), jax.default_device(jax.devices("cpu")[0]):
        peak = _peak(seconds / 8)
        bandwidth = _bandwidth(seconds / 8, cache_bytes=max(l3, l2 * cores))
        timed = _time_layers(seconds * 3 / 4, isa)
        alpha = _mean([t.seconds * peak / (t.density * t.shape.flops) for t in timed]) if timed else ESTIMATED_ALPHA
        source = (f"built-in rates scaled to {len(timed)} timed layers" if timed
                  else "alpha guessed: the native kernel does not run here")
        machine = Machine(
            name=cpu.processor(), isa=isa, lanes=cpu.LANES[isa], cores=cores, threads=threads,
            l1_bytes=l1, l2_bytes=l2, l3_bytes=min(l3, SHARED),
            peak=peak, bandwidth=bandwidth, alpha=alpha, beta=BETA, source=f"estimated, {source}, {caches}; {because}",
            fma_cycles=ffi.tables().get(isa, 0.0),
            int8_cycles=next((ffi.tables("int8")[name] for name in ffi.kernels("int8")), 0.0))
        return replace(machine, fitted=_scaled(machine, timed)) if timed else machine


def _scaled(machine: Machine, timed: Sequence[Timed]) -> Rates:
    """The built-in rates times what makes them predict the timed layers, on the average, and the matrix product."""
    known = replace(machine, fitted=TYPICAL)
    sparse = _mean([t.seconds / float(conv_seconds(t.shape, t.density, known)) for t in timed])
    dense = TYPICAL_PEAK / machine.peak
    return replace(TYPICAL, sparse=TYPICAL.sparse._make(sparse * rate for rate in TYPICAL.sparse),
                   dense=TYPICAL.dense._make(dense * rate for rate in TYPICAL.dense))


def _mean(ratios: Sequence[float]) -> float:
    """The geometric one."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _quiet(calls: list[Callable[[], Any]], seconds: float) -> list[float]:
    """Seconds of each call when nothing else runs, as far as can be told."""
    return [float(np.quantile(times, QUARTILE)) for times in in_turn(calls, seconds, BURST)]


def _peak(seconds: float) -> float:
    """flop/s of a product of two 1024 x 1024 float32 matrices."""
    size = 1024
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.dot)
    (time,) = _quiet([lambda: product(a, a)], seconds)
    return 2 * size**3 / time


def _bandwidth(seconds: float, cache_bytes: int) -> float:
    """bytes/s read and written by a pass over an array of four times the cache, in place.

    In place, since a new output would time the kernel's page faults: 1.3 against 50 GB/s on a virtual machine.
    """
    size = min(max(4 * cache_bytes, 64 << 20), 256 << 20) // 4
    x = jnp.ones(size, jnp.float32)
    step = jax.jit(lambda x: x * 0.5 + 0.5, donate_argnums=0)

    def stream():
        nonlocal x
        x = step(x)
        return x

    (time,) = _quiet([stream], seconds)
    return 2 * 4 * size / time


def _time_layers(seconds: float, isa: str) -> list[Timed]:
    """Each layer of TIMED; nothing where the kernel cannot run."""
    if isa not in ffi.kernels():
        return []
    draw = np.random.default_rng(0)
    forced = None if isa == ffi.isa() else isa
    densities, calls = list[float](), list[Callable[[], Any]]()
    for shape in TIMED:
        window = Window(shape.strides, shape.padding, shape.kernel_dilation)
        kernel = draw.standard_normal(shape.kernel_shape, np.float32)
        kernel *= draw.random(kernel.shape) < DENSITY
        x = jnp.ones((shape.n, shape.ih, shape.iw, shape.ic), jnp.float32)
        packed = shape.pack(kernel)
        run = jax.jit(lambda x, packed, window=window: sparse_conv(
            x, packed, strides=window.strides, padding=window.padding, kernel=forced))
        calls.append(lambda run=run, x=x, packed=packed: run(x, packed))
        densities.append(packed.density)
    return [Timed(*each) for each in zip(TIMED, densities, _quiet(calls, seconds), strict=True)]
