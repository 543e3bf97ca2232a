"""What the machine is: the few numbers of a CPU that decide whether sparsity pays, measured or from the literature."""

from __future__ import annotations

import functools
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparseflax import profile
from sparseflax.counts import DenseCounts, Rates, SparseCounts, roofline
from sparseflax.shapes import ConvShape

SYSFS = Path("/sys/devices/system/cpu")
CPUINFO = Path("/proc/cpuinfo")
LANES = {"avx512": 16, "avx2": 8, "neon": 4, "portable": 4}  # float32 per vector register

# The layer whose times scale the built-in rates.
TIMED = ConvShape(1, 28, 28, 128, 128, 3, 3, padding=((1, 1), (1, 1)))

# A kept weight costs the kernel a float32 and a 16-bit offset: 6 bytes where a dense weight has 4.
BETA = 1.5
# Where the kernel cannot be timed: what Park et al. measured with AVX2.
ESTIMATED_ALPHA = 3.0


@dataclass(frozen=True)
class Machine:
    """A machine as the cost model sees it.

    Attributes:
      name: of the processor.
      isa: instruction set of the sparse kernel.
      lanes: float32 per vector register.
      cores: physical cores in use.
      threads: threads that share one convolution.
      l1_bytes, l2_bytes, l3_bytes: data caches as one core sees them; 0 where there is none.
      peak: dense float32 flop/s that `threads` threads reach in a matrix product.
      bandwidth: bytes/s they stream to and from memory.
      alpha: time per kept weight over time per dense weight, when arithmetic is the limit.
      beta: bytes read per kept weight over bytes per dense weight.
      source: where the numbers come from.
      fitted: seconds of each thing that the kernel and XLA do; None for a machine of which only the numbers above are
        known.

    Raises:
      ValueError: a rate or a factor that is not positive.
    """

    name: str
    isa: str
    lanes: int
    cores: int
    threads: int
    l1_bytes: int
    l2_bytes: int
    l3_bytes: int
    peak: float
    bandwidth: float
    alpha: float
    beta: float
    source: str
    fitted: Rates | None = None

    @property
    def rates(self) -> Rates:
        """What the cost model charges: the fitted rates, or those of a machine that only has peak and bandwidth."""
        return self.fitted or roofline(self.peak, self.bandwidth, self.alpha, self.beta)

    def __post_init__(self):
        rates = ("lanes", "cores", "threads", "peak", "bandwidth", "alpha", "beta")
        wrong = {name: getattr(self, name) for name in rates if not 0 < getattr(self, name) < float("inf")}
        if self.fitted and not self.l1_bytes > 0:
            wrong |= {"l1_bytes": self.l1_bytes}
        if wrong:
            raise ValueError(f"machine {self.name!r} has {wrong}: these have to be positive and finite")

    def __str__(self) -> str:
        return (f"{self.name} ({self.isa}, {self.cores} cores, {self.threads} threads, {self.peak / 1e9:.0f} GFLOP/s, "
                f"{self.bandwidth / 1e9:.0f} GB/s, alpha {self.alpha:.2f}, beta {self.beta:.2f}; {self.source})")


# The machines of Park et al., "Faster CNNs with Direct Sparse Convolutions and Guided Pruning" (ICLR 2017): peak is
# MKL's SGEMM, bandwidth is STREAM, alpha is SGEMM's rate over the sparse kernel's on kept weights, beta = 2 stands for
# a 4-byte column index beside each 4-byte value. Caches from Intel's specifications.
ATOM_C2750 = Machine(
    name="Intel Atom C2750", isa="sse4.2", lanes=4, cores=8, threads=8, l1_bytes=24 << 10, l2_bytes=1 << 20, l3_bytes=0,
    peak=62e9, bandwidth=15e9, alpha=1.2, beta=2.0, source="Park et al. 2017")
# The paper's peak and bandwidth exceed one 18-core socket, so both of a two-socket machine are meant.
XEON_E5_2697V4 = Machine(
    name="2x Intel Xeon E5-2697 v4", isa="avx2", lanes=8, cores=36, threads=72, l1_bytes=32 << 10, l2_bytes=256 << 10,
    l3_bytes=45 << 20, peak=2150e9, bandwidth=122e9, alpha=3.0, beta=2.0, source="Park et al. 2017")
# The paper gives no alpha for this one, but 13.9 effective TFLOP/s at density 0.09. Arithmetic is the limit there, so
# alpha = 4.54 / (0.09 * 13.9) = 3.6.
XEON_PHI_7250 = Machine(
    name="Intel Xeon Phi 7250", isa="avx512", lanes=16, cores=68, threads=272, l1_bytes=32 << 10,
    l2_bytes=1 << 20, l3_bytes=0, peak=4540e9, bandwidth=480e9, alpha=3.6, beta=2.0,
    source="Park et al. 2017, alpha derived from its speedup")


# Fitted on an AMD EPYC of the Zen 4 generation, one thread (`far`, `lone` and `split` on Zen 3): what an estimate of another
# machine starts from.
TYPICAL = Rates(
    SparseCounts(fma=2.8e-10, weight=2.4e-10, wait=7e-11, spill=5e-11, kernel_bytes=1e-11, visit=1e-9, accumulate=5.5e-10,
                 store=1.5e-9, pack=9e-10, input_bytes=4e-12, output_bytes=1.5e-11, memory_bytes=2e-11, split=5e-6,
                 call=1.5e-6),
    DenseCounts(flop=9.3e-12, deep=3.8e-12, far=3e-12, lone=1.2e-11, shifted=7e-11, group_taps=1.5e-8, odd=1.5e-8,
                patches=6e-11, pixels=3e-11, outputs=6e-11, kernel_bytes=1.7e-11, packed_bytes=6e-11, activation_bytes=1.5e-10,
                split=1e-4, call=1.6e-5),
    overlap=1.0)


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
      isa: instruction set of the sparse kernel, one of LANES; None takes the one that runs.

    Raises:
      ValueError: unknown isa, `seconds` not positive, or `threads` is not what this process uses.
    """
    running = client_threads()
    if threads not in (None, running):
        raise ValueError(f"threads={threads}, but JAX's CPU client has {running} in this process and only they can be "
                         f"measured: start Python with NPROC={threads} set")
    if not seconds > 0:
        raise ValueError(f"seconds={seconds}, wanted a positive time for measuring")
    isa = isa or _isa()
    if isa not in LANES:
        raise ValueError(f"isa={isa!r}, wanted one of {list(LANES)} or None for the one that runs")
    return _detect(running, float(seconds), isa)


@functools.lru_cache
def _detect(threads: int, seconds: float, isa: str) -> Machine:
    try:
        return profile.load(processor(), isa, threads)
    except profile.Unusable as error:
        return estimate_machine(threads, seconds, isa, str(error))


def client_threads() -> int:
    """Threads in the intra-op pool of JAX's CPU client: PJRT_NPROC, else NPROC, else the CPUs this process may use."""
    for variable in ("PJRT_NPROC", "NPROC"):
        if os.environ.get(variable, "").strip().isdigit():
            return max(1, int(os.environ[variable]))
    return len(_cpus())


def estimate_machine(threads: int, seconds: float, isa: str, because: str) -> Machine:
    """This machine, measured in about `seconds` as `detect_machine` says; `because` says why that is all there is."""
    l1, l2, l3, caches = _caches()
    cores = _cores()
    # Eager even when a caller is being traced, and on the CPU even when another device is the default.
    with jax.ensure_compile_time_eval(), jax.default_device(jax.devices("cpu")[0]):
        peak = _peak(seconds / 4)
        bandwidth = _bandwidth(seconds / 4, cache_bytes=max(l3, l2 * cores))
        timed = _time_layer(seconds / 2, isa)
        alpha = timed.sparse / (timed.density * timed.dense) if timed else ESTIMATED_ALPHA
        source = "built-in rates scaled to one timed layer" if timed else "alpha guessed: the native kernel does not run here"
        machine = Machine(
            name=processor(), isa=isa, lanes=LANES[isa], cores=cores, threads=threads, l1_bytes=l1, l2_bytes=l2, l3_bytes=l3,
            peak=peak, bandwidth=bandwidth, alpha=alpha, beta=BETA, source=f"estimated, {source}, {caches}; {because}")
        return replace(machine, fitted=_scaled(machine, timed)) if timed else machine


def _scaled(machine: Machine, timed: Timed) -> Rates:
    """The built-in rates times what makes them predict the timed layer."""
    from sparseflax.cost import conv_seconds, dense_seconds  # here, since cost models are made of machines

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
    from sparseflax import ffi  # here, so that describing a machine does not need the native module
    from sparseflax.conv import sparse_conv
    from sparseflax.packing import pack

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


def medians(calls: list[Callable[[], Any]], seconds: float, burst: float = 0.0) -> list[float]:
    """Median seconds of each call, timed in turn so that a noisy moment hits all of them; three rounds at least.

    Args:
      calls: return arrays.
      seconds: for all of them, compiling apart.
      burst: seconds for which a call is repeated before it is the next one's turn, after one that is not timed: its data
        are in the caches then, as far as they fit. 0 times it once, after the others.
    """
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        jax.block_until_ready(call())  # compiles
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for call, durations in zip(calls, times, strict=True):
            if burst:
                jax.block_until_ready(call())
            turn = time.perf_counter() + burst
            while True:
                start = time.perf_counter()
                jax.block_until_ready(call())
                durations.append(time.perf_counter() - start)
                if time.perf_counter() >= turn:
                    break
    return [statistics.median(durations) for durations in times]


def _isa() -> str:
    """What the native module runs; without it, the best that the processor could run."""
    from sparseflax import ffi

    if ffi.kernels():
        return ffi.isa()
    flags = _cpuinfo("flags").split()
    if "avx512f" in flags:
        return "avx512"
    if "avx2" in flags and "fma" in flags:
        return "avx2"
    return "neon" if platform.machine() in ("aarch64", "arm64") else "portable"


def _caches() -> tuple[int, int, int, str]:
    """(L1 data, L2, L3) bytes as the first core sees them, and whether they were read or assumed."""
    found = {}
    for index in sorted((SYSFS / "cpu0" / "cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            if kind != "Instruction":
                found[int(level)] = int(size.rstrip("KM")) << (20 if size.endswith("M") else 10)
        except (OSError, ValueError):
            continue
    if 1 in found:
        return found[1], found.get(2, 0), found.get(3, 0), "caches read"
    return 32 << 10, 512 << 10, 8 << 20, "caches assumed"


def _cores() -> int:
    """Physical cores among the CPUs this process may use; the CPUs themselves where the topology is not told."""
    cpus = _cpus()
    try:
        parts = ("physical_package_id", "core_id")
        return len({tuple((SYSFS / f"cpu{cpu}" / "topology" / part).read_text() for part in parts) for cpu in cpus})
    except OSError:
        return len(cpus)


def _cpus() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


NUMBERS = "cpu family", "model", "stepping"  # in CPUINFO


def processor() -> str:
    """The name of the processor, and which one of that name: "AMD EPYC" are many."""
    name = _cpuinfo("model name") or platform.processor() or platform.machine() or "unknown CPU"
    numbers = [f"{field.removeprefix('cpu ')} {number}" for field in NUMBERS if (number := _cpuinfo(field))]
    return f"{name} ({', '.join(numbers)})" if numbers else name


def identity() -> dict[str, str | list[int]]:
    """What tells CPUs of one name apart: family, model and stepping, "" where they are not told, and bytes of the caches."""
    told: dict[str, str | list[int]] = {field: _cpuinfo(field) for field in NUMBERS}
    return told | {"caches": list(_caches()[:3])}


def _cpuinfo(field: str) -> str:
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.split(":")[0].strip() == field), "")
