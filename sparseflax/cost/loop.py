"""How long a loop takes that is no convolution: its vector instructions, and the bytes that leave a core's own cache."""

from __future__ import annotations

from sparseflax.cost.counts import traffic
from sparseflax.cost.machine import Machine

OPERATIONS = 4  # of a lane in a cycle, at the peak of a machine of which no more is known: two multiply-adds


def loop_seconds(cycles: float, read: float, written: float, machine: Machine) -> float:
    """Seconds of a loop over images that all threads share.

        t = cycles * seconds per cycle / lanes / threads + bytes of each cache that is left * seconds per byte

    Args:
      cycles: elements times cycles of a vector of them.
      read, written: bytes of all images.
      machine: where it runs. Its sparse kernel's multiply-adds are counted in cycles: how long one takes was fitted.
    """
    rates = machine.rates.sparse
    cycle = rates.fma / machine.lanes / machine.threads if machine.fitted else OPERATIONS / machine.peak
    return cycles * cycle + sum(count * rate for count, rate in zip(traffic(read, written, machine), rates, strict=True))
