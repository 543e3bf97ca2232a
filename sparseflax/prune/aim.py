"""A network's measurement, put right by what networks pruned by it take: whoever asks for a speed gets it measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from sparseflax.cost.progress import progress
from sparseflax.prune.guide import Guidance
from sparseflax.prune.whole import Whole

MISSED = 0.05  # a measured speedup this far from the predicted one, relatively, is aimed at again
AIMS = 4  # times in all


def aimed(whole: Whole, asked: float, guide: Callable[[Whole], Guidance], measured: Callable[[Guidance], float]) -> Whole:
    """The network's measurement by whose guide the speedup that is predicted is the one that is measured.

    Of a speedup nothing counts but the ratio of two times, so the dense one is what is put right: a machine that was busy
    when the network was first measured runs XLA's threads slower than ours. It may be busy now as well, so no measurement is
    believed alone: it is put right by the median of all, the first one among them.

    Args:
      whole: the network as it was measured.
      asked: the speedup, for the bar that is shown.
      guide: for it, or what can be had of it, by such a measurement.
      measured: the speedup of a network with a guide's densities. How fast it is, these say, and not which weights are left.
    """
    factors = [1.0]
    with progress(f"aiming at {asked:.3g}x", AIMS) as advance:
        for tried in range(AIMS):
            factor = statistics.median(factors)
            now = whole._replace(dense_seconds=factor * whole.dense_seconds)
            chosen = guide(now)
            reached = measured(chosen)
            advance(tried + 1, f"predicted {chosen.speedup:.3g}x, measured {reached:.3g}x")
            if abs(reached / chosen.speedup - 1) <= MISSED:
                return now
            factors.append(factor * reached / chosen.speedup)
    return whole._replace(dense_seconds=statistics.median(factors) * whole.dense_seconds)
