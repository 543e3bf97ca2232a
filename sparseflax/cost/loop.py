"""How long a loop takes that meets few weights or none: its vector instructions, and the bytes that go through the caches."""

from __future__ import annotations

from sparseflax.cost.machine import Machine

OPERATIONS = 4  # of a lane in a cycle, at the peak of a machine of which no more is known: two multiply-adds
START = 2000  # cycles until a loop runs at its speed, whose code others have put out of the first cache


def loop_seconds(cycles: float, bytes_: float, machine: Machine) -> float:
    """Seconds of a loop over images that all threads share.

        t = (start + cycles / lanes / threads) * seconds per cycle + bytes / bandwidth

    What goes from one loop to the next has seldom stayed in a core's own cache: it comes at about the speed of memory.

    Args:
      cycles: elements times cycles of a vector of them.
      bytes_: of all images, read and written.
      machine: where it runs. Its sparse kernel's multiply-adds are counted in cycles: how long one takes was fitted.
    """
    lanes = machine.lanes * machine.threads
    cycle = machine.rates.sparse.fma if machine.fitted else OPERATIONS / machine.peak * lanes
    return (START + cycles / lanes) * cycle + bytes_ / machine.bandwidth
