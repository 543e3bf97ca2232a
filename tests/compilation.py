"""How the tests compile, in an environment that JAX reads once: imported before it."""

import re
from importlib.metadata import version

# Two thirds of the tests' time was compilation, and few wait for what is compiled: so without LLVM's optimizations, and with
# XLA's first emitter of fusions, which jaxlib has up to 0.11.0: a newer one ends the process over a flag that it does not know.
# In the environment: other processes have to compute the same, to the bit.
FIRST_EMITTER = [int(part) for part in re.findall(r"\d+", version("jaxlib"))[:3]] <= [0, 11, 0]
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"} | (
    {"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"} if FIRST_EMITTER else {})
# Compiler options that undo the second.
AS_FOR_USERS = {"xla_cpu_use_fusion_emitters": True} if FIRST_EMITTER else {}
