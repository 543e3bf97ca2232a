"""JAX made strict for every test, on two virtual CPU devices, before anything computes."""

import gc
import os
import tempfile

from tests.compilation import QUICK

os.environ |= QUICK

import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Equal programs of different tests compile once. A folder for each process: JAX writes its files while others could read them.
COMPILED = tempfile.TemporaryDirectory()
jax.config.update("jax_compilation_cache_dir", COMPILED.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)

import hypothesis  # noqa: E402
import pytest  # noqa: E402

# The same examples on every run, whatever the machine's speed.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("tests")

# What takes longest begins first, so that no process waits for the other at the end.
SLOW = [f"test_{name}.py" for name in ("docs", "cpp", "report", "calibrate", "benchmark", "compare", "benchmark_networks",
                                       "prune_budget", "models", "prune_guide", "fuse")]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))
    gc.freeze()  # modules stay: no collection need look through them again


@pytest.fixture(scope="module")
def optimized():
    """Whole networks and pages: compiled with LLVM's optimizations, in other processes all as for users."""
    jax.config.update("jax_disable_most_optimizations", False)
    with pytest.MonkeyPatch.context() as patch:
        for name in QUICK:
            patch.delenv(name)
        yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def strict_dtypes():
    """Forbids implicit dtype promotion. Not for every test: optax's Adam raises a float to its integer step count."""
    with jax.numpy_dtype_promotion("strict"):
        yield
