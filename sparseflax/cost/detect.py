"""This machine: as it was calibrated, or estimated from a few measurements."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparseflax.conv import ffi
from sparseflax.conv.packing import pack
from sparseflax.conv.primitive import sparse_conv
from sparseflax.cost import cpu, profile
from sparseflax.cost.machine import TYPICAL, Machine
from sparseflax.cost.model import conv_seconds, dense_seconds
from sparseflax.cost.rates import Rates
from sparseflax.cost.shape import ConvShape
from sparseflax.cost.timing import medians

# The layer whose times scale the built-in rates.
TIMED = ConvShape(1, 28, 28, 128, 128, 3, 3, padding=((1, 1), (1, 1)))

# A kept weight costs the kernel a float32 and a 16-bit offset: 6 bytes where a dense weight has 4.
BETA = 1.5
# Where the kernel cannot be timed: what Park et al. measured with AVX2.
ESTIMATED_ALPHA = 3.0


class Timed(NamedTuple):
    """The timed layer: its density, and seconds."""

    density: float
    sparse: float
    dense: float


def detect_machine(threads: int | None = None, seconds: float = 2.0, isa: str | None = None) -> Machine:
    """This machine as `python -m experiments.calibrate` has found it, or else an estimate; once per process.

    The estimate takes about `seconds` (medians; compiling and allocating come on top): built-in rates, scaled so that
    the times of one 3x3 layer at density 0.1, sparse and XLA's dense convolution in turn, come out right. Without the
    native module there are no rates, and alpha is a guess. `source` says which of all this it is, and why.

    Args:
      threads: those the caller counts on; None takes what JAX's CPU client uses.
      seconds: time for measuring, if it comes to that.
      isa: instruction set of the sparse kernel, one of cpu.LANES; None takes the one that runs.

    Raises:
      ValueError: unknown isa, `seconds` not positive, or `threads` is not what this process uses.
    """
    running = cpu.client_threads()
    if threads not in (None, running):
        raise ValueError(f"threads={threads}, but JAX's CPU client has {running} in this process and only they can be "
                         f"measured: start Python with NPROC={threads} set")
    if not seconds > 0:
        raise ValueError(f"seconds={seconds}, wanted a positive time for measuring")
    isa = isa or cpu.instruction_set()
    if isa not in cpu.LANES:
        raise ValueError(f"isa={isa!r}, wanted one of {list(cpu.LANES)} or None for the one that runs")
    return _detect(running, float(seconds), isa)


@functools.lru_cache
def _detect(threads: int, seconds: float, isa: str) -> Machine:
    try:
        return profile.load(cpu.processor(), isa, threads)
    except profile.Unusable as error:
        return estimate_machine(threads, seconds, isa, str(error))


def estimate_machine(threads: int, seconds: float, isa: str, because: str) -> Machine:
    """This machine, measured in about `seconds` as `detect_machine` says; `because` says why that is all there is."""
    l1, l2, l3, caches = cpu.caches()
    cores = cpu.cores()
    # Eager even when a caller is being traced, and on the CPU even when another device is the default.
    with jax.ensure_compile_time_eval(), jax.default_device(jax.devices("cpu")[0]):
        peak = _peak(seconds / 4)
        bandwidth = _bandwidth(seconds / 4, cache_bytes=max(l3, l2 * cores))
        timed = _time_layer(seconds / 2, isa)
        alpha = timed.sparse / (timed.density * timed.dense) if timed else ESTIMATED_ALPHA
        source = "built-in rates scaled to one timed layer" if timed else "alpha guessed: the native kernel does not run here"
        machine = Machine(
            name=cpu.processor(), isa=isa, lanes=cpu.LANES[isa], cores=cores, threads=threads,
            l1_bytes=l1, l2_bytes=l2, l3_bytes=l3,
            peak=peak, bandwidth=bandwidth, alpha=alpha, beta=BETA, source=f"estimated, {source}, {caches}; {because}")
        return replace(machine, fitted=_scaled(machine, timed)) if timed else machine


def _scaled(machine: Machine, timed: Timed) -> Rates:
    """The built-in rates times what makes them predict the timed layer."""
    # XLA's threads do not share dense layers unevenly on every machine, and a layer left dense in doubt is never slower.
    typical = replace(TYPICAL, dense=TYPICAL.dense._replace(lone=0.0))
    known = replace(machine, fitted=typical)
    sparse = timed.sparse / float(conv_seconds(TIMED, timed.density, known))
    dense = timed.dense / float(dense_seconds(TIMED, known))
    return replace(typical, sparse=typical.sparse._make(sparse * rate for rate in typical.sparse),
                   dense=typical.dense._make(dense * rate for rate in typical.dense))


def _peak(seconds: float) -> float:
    """flop/s of a product of two 1024 x 1024 float32 matrices."""
    size = 1024
    a = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.dot)
    (median,) = medians([lambda: product(a, a)], seconds)
    return 2 * size**3 / median


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

    (median,) = medians([stream], seconds)
    return 2 * 4 * size / median


def _time_layer(seconds: float, isa: str) -> Timed | None:
    """A 128x28x28 -> 128 3x3 layer, sparse and dense; None where the kernel cannot run."""
    if isa not in ffi.kernels():
        return None
    draw = np.random.default_rng(0)
    kernel = draw.standard_normal(TIMED.kernel_shape, np.float32)
    kernel *= draw.random(kernel.shape) < 0.1
    x = jnp.ones((TIMED.n, TIMED.ih, TIMED.iw, TIMED.ic), jnp.float32)
    packed, dense = pack(kernel), jnp.asarray(kernel)
    forced = None if isa == ffi.isa() else isa
    sparse = jax.jit(lambda x, packed: sparse_conv(x, packed, kernel=forced))
    xla = jax.jit(lambda x, dense: jax.lax.conv_general_dilated(
        x, dense, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
    return Timed(packed.density, *medians([lambda: sparse(x, packed), lambda: xla(x, dense)], seconds))
