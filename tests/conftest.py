"""JAX made strict for every test, on two virtual CPU devices, before anything computes."""

import gc
import tempfile

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Most of the tests' time is LLVM's, and few wait for what it compiled. Those that ask for `optimized` get what users get.
jax.config.update("jax_disable_most_optimizations", True)

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
SLOW = [f"test_{name}.py" for name in ("cpp", "prune_methods", "compare", "report", "prune_budget", "prune_gsl", "calibrate",
                                       "docs", "benchmark_networks", "train", "commands")]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOW.index(item.path.name) if item.path.name in SLOW else len(SLOW))
    gc.freeze()  # modules stay: no collection need look through them again


@pytest.fixture(scope="module")
def optimized():
    """Compiles as for users: for whole networks, for programs that are looked into, and for what is timed."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="module")
def strict_dtypes():
    """Forbids implicit dtype promotion. Not for every test: optax's Adam raises a float to its integer step count."""
    with jax.numpy_dtype_promotion("strict"):
        yield
