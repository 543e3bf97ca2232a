"""Machines to plan for in tests."""

from dataclasses import replace

from sparseflax import ffi
from sparseflax.machine import ATOM_C2750, client_threads, processor

# Predictions that no calibration changes, for plans that are taken for this machine's; one on which sparsity never pays.
HERE = replace(ATOM_C2750, name=processor(), isa=ffi.isa(), threads=client_threads())
HOPELESS = replace(HERE, alpha=1e3, beta=1e3)
