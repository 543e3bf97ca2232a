"""This machine: as it was calibrated, or estimated from a few measurements."""

from __future__ import annotations

import functools

from sparseflax.conv import ffi
from sparseflax.cost import cpu, profile
from sparseflax.cost.estimate import estimate_machine
from sparseflax.cost.machine import Machine


def detect_machine(threads: int | None = None, seconds: float = 2.0, isa: str | None = None) -> Machine:
    """This machine as `sparseflax.calibrate` has found it, or else an estimate; once per process.

    The estimate takes about `seconds`, compiling and allocating come on top: built-in rates, scaled so that the times of
    three layers at density 0.1, and that of a matrix product, come out right on the average. Without the
    native module there are no rates, and alpha is a guess. `source` says which of all this it is, and why.

    Args:
      threads: those the caller counts on; None takes what JAX's CPU client uses.
      seconds: time for measuring, if it comes to that.
      isa: instruction set of the sparse kernel, one of avx512, avx2, neon, portable; None takes the one that runs.

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
        return estimate_machine(threads, seconds, isa, str(error) if ffi.kernels() else error.why)


def forget() -> None:
    """Lets the next `detect_machine` look again: what it has found holds for the process."""
    _detect.cache_clear()
