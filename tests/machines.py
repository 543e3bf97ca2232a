"""Machines to plan for in tests."""

import os
from dataclasses import replace
from functools import cache
from unittest.mock import patch

from sparseflax.conv import ffi
from sparseflax.cost.cpu import client_threads, processor
from sparseflax.cost.estimate import estimate_machine
from sparseflax.cost.machine import ATOM_C2750, TYPICAL
from sparseflax.cost.profile import save

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


def stored(folder, threads):
    """The environment of a process that finds constants of this machine, for so many threads, in a folder: it measures none."""
    environment = os.environ | {"XDG_CACHE_HOME": str(folder)}
    with patch.dict(os.environ, environment):
        save(replace(HERE, threads=threads, fitted=TYPICAL), {})
    return environment
