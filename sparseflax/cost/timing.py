"""Calls timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def medians(calls: list[Callable[[], Any]], seconds: float, burst: float = 0.0) -> list[float]:
    """Median seconds of each call, timed `in_turn`."""
    return [statistics.median(times) for times in in_turn(calls, seconds, burst)]


def in_turn(calls: list[Callable[[], Any]], seconds: float, burst: float = 0.0) -> list[list[float]]:
    """Seconds of each call, again and again, one after the other so that a noisy moment hits all; three rounds at least.

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
    return times
