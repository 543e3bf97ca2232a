"""Machines to plan for in tests."""

from dataclasses import replace

from sparseflax.conv import ffi
from sparseflax.cost.cpu import client_threads, processor
from sparseflax.cost.machine import ATOM_C2750

# Predictions that no calibration changes, for plans that are taken for this machine's; one on which sparsity never pays.
HERE = replace(ATOM_C2750, name=processor(), isa=ffi.isa(), threads=client_threads())
HOPELESS = replace(HERE, alpha=1e3, beta=1e3)
