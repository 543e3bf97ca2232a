"""Training on many devices and in many processes: the masks of one, differences that are named, and a death that is told."""

import time
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from experiments import parallel, run
from experiments.configs import smoke
from sparseflax import prune
from tests.members import dies, trained, trains


def masks(trained):
    return jax.tree.leaves(prune.masks(trained.optimizer))


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("straight"))


def test_two_devices_prune_as_one(straight, tmp_path):
    """The sums of a batch are added in another order, so that weights agree up to rounding; which are kept is the same."""
    found = trained(tmp_path, parallel.mesh_of_all())
    assert jax.device_count() == 2
    for a, b in zip(masks(found), masks(straight), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose([loss for _, loss in found.losses], [loss for _, loss in straight.losses], rtol=1e-4)


def test_two_processes_and_then_another_number(straight, tmp_path):
    """The first steps in two processes, the rest on two devices of this one, from the checkpoint: the masks of one device."""
    parallel.together(partial(trains, tmp_path, 4), 2)
    assert (tmp_path / "000004.json").exists()  # written by one of them
    found = trained(tmp_path)
    for a, b in zip(masks(found), masks(straight), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_process_that_is_killed_ends_the_others():
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="process 1 of 2 ended with -9, so the others were ended too.*last checkpoint"):
        parallel.together(dies, 2)
    assert time.monotonic() - begun < 60


def test_processes_with_other_seeds_are_told():
    facts = {"seed": "3", "data": "same"}
    found = np.zeros((3, 2, 2), np.uint32)
    assert parallel.differences(found, 0, facts) == ""
    found[2, 0, 1] = 1
    assert parallel.differences(found, 2, facts) == "seed of process 2 is not that of process 0 (process 2 has 3)"
    parallel.agree(facts)


def test_devices_that_do_not_divide_the_batch(tmp_path):
    with pytest.raises(ValueError, match="a batch of 16 cannot be shared out over 3 devices"):
        run.run(replace(smoke.config, processes=3, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()
