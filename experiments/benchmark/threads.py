"""What more threads bring: a process on all CPUs, one on each of them, and those at the same time, in turn.

CPUs of one machine differ, and a virtual one changes its speed from second to second: two runs, minutes apart, tell nothing of
1.8x. What independent copies bring together is what the machine allows at that moment.
"""

from __future__ import annotations

import os
import statistics
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from experiments.benchmark.timing import burst, cpus_by_core, keep_memory, use_threads

if TYPE_CHECKING:  # imports JAX, which has to see first on how many threads it runs
    from experiments.layers import Problem

SETTLE, BURST = 0.005, 0.03  # seconds of untimed and of timed calls in a turn
ROUNDS = 12


def gain(all_cpus: float, alone: Sequence[float]) -> float:
    """How many times faster all CPUs are than one of them, on average: seconds of a call on all, and on each alone."""
    return statistics.mean(alone) / all_cpus


def copies(together: Sequence[float], alone: Sequence[float]) -> float:
    """How many times more calls a second all CPUs make with a copy on each than one of them alone, on average."""
    return statistics.mean(alone) * sum(1 / seconds for seconds in together)


def measure(problem: Problem, threads: int, rounds: int = ROUNDS, isa: str | None = None) -> dict[str, Any]:
    """Times our kernel in one layer, on one thread and on several.

    Returns:
      Its line of the results, without provenance: medians of seconds ("all"; "alone" on each CPU), of `gain` and `copies`.

    Raises:
      ValueError: there are not so many CPUs, or processes cannot be confined to them.
      RuntimeError: the outputs differ in a bit.
    """
    if not hasattr(os, "sched_getaffinity"):
        raise ValueError("this system cannot confine a process to CPUs: measure on Linux")
    cpus = cpus_by_core(os.sched_getaffinity(0))
    if not 2 <= threads <= len(cpus):
        raise ValueError(f"threads={threads}, wanted 2 to {len(cpus)}, the CPUs this process may use")
    with _workers([[cpu] for cpu in cpus[:threads]] + [cpus[:threads]]) as (*singles, every):
        sums = {_ask([worker], (problem, isa))[0] for worker in (*singles, every)}
        if len(sums) > 1:
            raise RuntimeError(f"{problem.name} has another output on {threads} threads than on one: a defect, report it")
        turns = [([_ask([worker])[0] for worker in singles], _ask(singles), _ask([every])[0]) for _ in range(rounds)]
    return {
        "layer": problem.name, "n": problem.shape.n, "threads": threads, "isa": isa, "density": problem.density,
        "alone": [statistics.median(times) for times in zip(*(alone for alone, _, _ in turns), strict=True)],
        "all": statistics.median(every for _, _, every in turns),
        "gain": statistics.median(gain(every, alone) for alone, _, every in turns),
        "copies": statistics.median(copies(together, alone) for alone, together, _ in turns),
    }


@contextmanager
def _workers(cpu_sets: Sequence[Sequence[int]]) -> Iterator[list[Connection]]:
    """Processes confined to CPUs, each at the other end of a connection."""
    context, ends, processes = get_context("spawn"), [], []
    try:
        for cpus in cpu_sets:
            end, other = context.Pipe()
            processes.append(context.Process(target=_serve, args=(other, cpus), daemon=True))
            processes[-1].start()
            other.close()  # so that a worker's death is the end of the file here
            ends.append(end)
        yield ends
    finally:
        for end in ends:
            end.close()
        for process in processes:
            process.join()


def _serve(connection: Connection, cpus: Sequence[int]) -> None:
    """Answers a problem and an instruction set with the output's checksum, then every call with seconds, until hung up."""
    os.sched_setaffinity(0, cpus)
    use_threads(len(cpus))
    keep_memory()
    from experiments.benchmark.layers import ours

    contender = ours(*connection.recv())
    connection.send(zlib.crc32(contender.output(contender.run()).tobytes()))
    try:
        while connection.recv() is None:
            burst(contender.run, SETTLE)
            connection.send(statistics.median(burst(contender.run, BURST)))
    except EOFError:
        pass


def _ask(workers: Sequence[Connection], question: Any = None) -> list[Any]:
    """All their answers to a question put to all of them at once."""
    for worker in workers:
        worker.send(question)
    return [worker.recv() for worker in workers]
