"""A function called in a process of its own: its answer, its mistakes, and a script that calls one at its top."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from sparseflax import pack_model, plan
from sparseflax.job.afresh import afresh
from sparseflax.job.times import times
from tests.called import die, process, refuse
from tests.machines import HERE


def test_another_process_answers():
    number, given, platform = afresh(process, np.arange(3))
    assert number != os.getpid() and platform == "cpu"
    np.testing.assert_array_equal(given, np.arange(3))


def test_what_it_raises_is_raised_here():
    with pytest.raises(ValueError, match="file is no folder"):
        afresh(refuse, "file", wanted="folder")


def test_a_process_that_dies():
    with pytest.raises(RuntimeError, match="die ended with 9 and without an answer: .*killed for memory"):
        afresh(die)


def test_it_ends_when_its_caller_is_killed():
    script = "from sparseflax.job.afresh import afresh; from tests.called import wait; afresh(wait)"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as caller:
        assert caller.stdout is not None and caller.stdout.readline() == "waiting\n"
        caller.kill()
        assert caller.communicate(timeout=60) == ("", None)  # the child has closed its end, too


def test_a_script_may_call_it_at_its_top(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import math\nfrom sparseflax.job.afresh import afresh\nprint('once', afresh(math.hypot, 3, 4))\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout == "once 5.0\n"


def test_networks_are_timed_there():
    draw = np.random.default_rng(0)
    rngs = nnx.Rngs(0)
    kernel = draw.standard_normal((3, 3, 16, 16), np.float32) * (draw.random((3, 3, 16, 16)) < 0.1)
    convolution = nnx.Conv(16, 16, (3, 3), kernel_init=lambda *_: jax.device_put(kernel), rngs=rngs)
    model = nnx.Sequential(convolution, nnx.BatchNorm(16, use_running_average=True, rngs=rngs))
    x = draw.standard_normal((1, 8, 8, 16)).astype(np.float32)
    packed = pack_model(model, plan(model, x, HERE), x)
    found = afresh(times, model, x, HERE, [packed, packed], 0.05)
    assert len(found.packed) == 2 and 0 < min(found.packed) and not found.engines and not found.failed
    assert 0 < found.faster_dense == min(found.dense, found.folded)
