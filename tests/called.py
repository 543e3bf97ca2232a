"""What tests/test_afresh.py has called in other processes. A module of its own, since each of them imports it: without JAX."""

import os
import time


def process(of):
    import jax

    return os.getpid(), of, jax.devices()[0].platform


def refuse(path, *, wanted):
    raise ValueError(f"{path} is no {wanted}")


def die():
    os._exit(9)


def wait():
    print("waiting", flush=True)
    time.sleep(120)
