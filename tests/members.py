"""What processes of tests/test_parallel.py do. A module of its own, since each of them imports it."""

import os
import signal
from functools import partial

import jax

from experiments import parallel


def trained(folder, mesh=None, steps=6):
    """The training of tests/test_train.py on a mesh."""
    from experiments import train
    from tests.test_train import fit

    real, train.fit = train.fit, partial(train.fit, mesh=mesh)
    try:
        return fit(folder, steps=steps)[1]
    finally:
        train.fit = real


def trains(folder, steps, mesh):
    parallel.agree({"seed": "3", "data": "same"})
    trained(folder, mesh, steps)


def dies(mesh):
    """One is killed, the other waits for it."""
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    parallel.agree({"seed": "3"})
