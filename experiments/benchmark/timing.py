"""How a time is taken: contenders in turn, so that a noisy spell of the machine hits all of them.

A turn is a few untimed calls, then timed ones on the same arrays: caches are warm with the contender's own data as far as
they hold it, as in every library's own benchmark, and threads that another library left spinning have gone to sleep.
Outputs are allocated anew by whoever does so in a network too, but from memory that the process already has
(`keep_memory`): otherwise outputs above 32 MB time the kernel's page faults, whoever computes them.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BURST = 0.01  # seconds of timed calls in a turn
ROUNDS = 5  # at least
STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Timing:
    """Seconds of one call.

    Attributes:
      seconds: median.
      spread: distance of the quartiles / median.
      calls: number of calls timed.
    """

    seconds: float
    spread: float
    calls: int

    @classmethod
    def of(cls, times: list[float]) -> Timing:
        low, median, high = np.quantile(times, (0.25, 0.5, 0.75))
        return cls(float(median), float((high - low) / median), len(times))


def alternate(calls: dict[str, Callable[[], Any]], seconds: float, threads: int,
              peak: Callable[[], float] | None = None) -> tuple[dict[str, Timing], float | None]:
    """Times every call in turn, round after round, for about `seconds` together.

    Args:
      calls: return when their work is done.
      seconds: for all of them; five rounds are made in any case.
      threads: that they run on.
      peak: measures the flop/s of one thread; asked once a round.

    Returns:
      ({name: Timing}, median of `peak` times `threads`, or None).
    """
    settle = 0.001 if threads == 1 else 0.01  # libgomp's threads spin for some milliseconds after their work
    times: dict[str, list[float]] = {name: [] for name in calls}
    peaks = []
    end, rounds = time.perf_counter() + seconds, 0
    gc.collect()
    gc.disable()
    try:
        while rounds < ROUNDS or time.perf_counter() < end:
            for name, call in calls.items():
                burst(call, settle)
                times[name] += burst(call, BURST)
            if peak:
                peaks.append(peak())
            rounds += 1
    finally:
        gc.enable()
    return {name: Timing.of(t) for name, t in times.items()}, statistics.median(peaks) * threads if peaks else None


def burst(call: Callable[[], Any], seconds: float) -> list[float]:
    """Seconds of each call in about `seconds`, of one at least; what they return is freed outside the time."""
    times, start = [], time.perf_counter()
    while not times or time.perf_counter() - start < seconds:
        begin = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - begin)
        del result
    return times


class Others:
    """How busy the rest of the machine is: `with Others() as others: ...`, then `others.load`.

    Attributes:
      load: CPU seconds a second spent by other processes, or stolen by other machines, since entering; None off Linux.
    """

    load: float | None = None

    def __enter__(self) -> Others:
        self._start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        everybody, mine, wall = (end - start for end, start in zip(self._now(), self._start, strict=True))
        self.load = None if math.isnan(everybody) else max(0.0, everybody - mine) / wall

    @staticmethod
    def _now() -> tuple[float, float, float]:
        try:
            user, nice, system, _idle, _iowait, *rest = map(int, STAT.read_text().splitlines()[0].split()[1:9])
            everybody = (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")
        except OSError:
            everybody = math.nan
        return everybody, sum(os.times()[:4]), time.perf_counter()  # of this process and its children


def use_threads(threads: int) -> None:
    """Confines this process as `confine` does, and lets JAX run programs in the calling thread.

    To wait for another costs 30 us a call on two CPUs.
    """
    confine(threads)
    os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "0"


def confine(threads: int) -> None:
    """Confines this process, its children, and every library it loads later to `threads` threads on as many cores.

    XLA sizes its pool by NPROC when the first array is made, OpenMP reads its variable when it is loaded; other libraries
    are told by their baselines.

    Raises:
      ValueError: there are not so many CPUs.
    """
    cpus = cpus_by_core(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    if not 1 <= threads <= len(cpus):
        raise ValueError(f"threads={threads}, wanted 1 to {len(cpus)}, the CPUs this process may use")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cpus[:threads])
    os.environ |= {"JAX_PLATFORMS": "cpu", "NPROC": str(threads), "OMP_NUM_THREADS": str(threads)}


def keep_memory() -> bool:
    """Makes malloc, here and in child processes, keep what is freed instead of unmapping it; False where it is not glibc's.

    Has to be called after `use_threads`, which JAX has to see, and before other threads are there: one arena serves all.
    """
    from sparseflax.conv import memory

    os.environ |= {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(memory.KEEP), "MALLOC_ARENA_MAX": "1"}
    return memory.keep_memory()


def cpus_by_core(cpus: Iterable[int]) -> list[int]:
    """One CPU of each physical core first, then their siblings."""
    seen: dict[str, int] = {}
    order = []
    for cpu in sorted(cpus):
        try:
            core = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        except OSError:
            core = str(cpu)
        seen[core] = seen.get(core, -1) + 1
        order.append((seen[core], cpu))
    return [cpu for _, cpu in sorted(order)]
