"""Machines to plan for in tests."""

from dataclasses import replace
from functools import cache

from sparseflax.conv import ffi
from sparseflax.cost.cpu import client_threads, processor
from sparseflax.cost.estimate import estimate_machine
from sparseflax.cost.machine import ATOM_C2750

# Predictions that no calibration changes, for plans that are taken for this machine's; one on which sparsity never pays.
HERE = replace(ATOM_C2750, name=processor(), isa=ffi.isa(), threads=client_threads())
HOPELESS = replace(HERE, alpha=1e3, beta=1e3)


def estimated(threads, seconds, isa, because):
    """As `estimate_machine`, but measured once for all tests, and in next to no time."""
    machine = _estimated(threads, isa)
    return replace(machine, source=machine.source + because)


@cache
def _estimated(threads, isa):
    return estimate_machine(threads, 0.01, isa, because="")
