"""A packed network step by step: which steps there are, what each is predicted to take, and that measured times are theirs."""

import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import sparseflax
from sparseflax import conv_shapes, pack_model, plan
from sparseflax.conv import ffi
from sparseflax.cost.int8 import int8_seconds
from sparseflax.cost.loop import loop_seconds
from sparseflax.cost.machine import ATOM_C2750, TYPICAL
from sparseflax.cost.model import conv_seconds, dense_seconds
from sparseflax.network.predict import predict
from sparseflax.network.program import Program, Step
from sparseflax.network.steps import Steps, step_times
from sparseflax.prune.measure import pruned
from tests.machines import HERE

pytestmark = pytest.mark.skipif(not ffi.kernels(), reason="no native kernel")
FITTED = replace(HERE, fitted=TYPICAL)
SECONDS = 0.01


class Net(nnx.Module):
    """A convolution of each kind, pooling, a residual, a concatenation, normalization over channels, and a matrix."""

    def __init__(self, rngs):
        def conv(ic, oc, size=3, **kwargs):
            return nnx.Conv(ic, oc, (size, size), rngs=rngs, **kwargs)

        self.first, self.second = conv(3, 16), conv(16, 16)
        self.left, self.right = conv(16, 8, 1), conv(16, 24)
        self.depth = conv(32, 32, feature_group_count=32)
        self.last = nnx.Linear(32, 4000, rngs=rngs)

    def __call__(self, x):
        x = nnx.max_pool(nnx.relu(self.first(x)), (2, 2), (2, 2))
        x = nnx.relu(self.second(x) + x)
        x = jnp.concatenate([nnx.relu(self.left(x)), nnx.relu(self.right(x))], -1)
        x = x / (1 + 0.1 * jax.lax.reduce_window(x * x, 0.0, jax.lax.add, (1, 1, 1, 5), (1, 1, 1, 1), "SAME"))
        return self.last(self.depth(x).mean((1, 2)))


def packed(n, machine=HERE, chunk=1):
    x = np.ones((n, 16, 16, 3), np.float32)
    model = pruned(Net(nnx.Rngs(0)), {"second": 0.2, "right": 0.1, "last": 0.5})
    planned = plan(model, x, machine)
    rows = tuple(replace(row, choice="sparse" if row.density < 1 else "dense") for row in planned.layers)
    planned = replace(planned, layers=rows)
    return model, planned, pack_model(model, planned, x, chunk=chunk), x


def test_every_step_is_there_once_and_sums_are_theirs():
    _, _, network, x = packed(1)
    steps = step_times(network, x, HERE, seconds=SECONDS)
    found = [(step.op, step.path, step.size) for step in steps.steps]
    assert found == [
        ("window", None, (18, 18, 3)), ("dense", "first", (16, 16, 16)), ("max pool", None, (8, 8, 16)),
        ("conv", "second", (8, 8, 16)), ("dense", "left", (8, 8, 8)), ("conv", "right", (8, 8, 24)),
        ("mul, channel sum, clamp, div", None, (8, 8, 32)), ("depthwise", "depth", (8, 8, 32)), ("sum pool", None, (1, 1, 32)),
        ("clamp", None, (1, 1, 32)), ("conv", "last", (1, 1, 4000))]  # what is concatenated lies there already
    assert steps.predicted == pytest.approx(math.fsum(step.predicted for step in steps.steps), rel=1e-12)
    assert steps.measured == pytest.approx(math.fsum(step.measured for step in steps.steps), rel=1e-12)
    assert all(step.measured > 0 for step in steps.steps) and steps.call
    alone = step_times(network, x, HERE, measure=False)
    assert [step.predicted for step in alone.steps] == [step.predicted for step in steps.steps]
    assert alone.call is alone.measured is None and {step.measured for step in alone.steps} == {None}


def test_a_function_that_a_convolution_does_is_part_of_its_step():
    x, rngs = np.ones((1, 8, 8, 16), np.float32), nnx.Rngs(0)
    model = nnx.Sequential(nnx.Conv(16, 24, (1, 1), rngs=rngs), nnx.silu,
                           nnx.Conv(24, 24, (3, 3), feature_group_count=24, rngs=rngs), nnx.hard_swish)
    dense, depthwise = step_times(pack_model(model, plan(model, x, HERE), x), x, HERE, measure=False).steps
    assert (dense.op, depthwise.op) == ("dense, swish", "depthwise, gate")
    alone = float(dense_seconds(conv_shapes(model, x)["layers/0"], HERE))
    assert dense.predicted == pytest.approx(alone + loop_seconds(64 * 24 * 13, 0, HERE), rel=1e-9)


def test_a_table():
    _, _, network, x = packed(2)
    steps = step_times(network, x, HERE, seconds=SECONDS)
    head, *rows, total, call, where = str(steps).splitlines()
    assert head.split() == "step layer output runs side by side predicted us measured us ratio".split()
    assert len(rows) == len(steps.steps) and rows[0].startswith("window") and " second " in rows[3]
    assert re.fullmatch(rf"all steps +{1e6 * steps.predicted:.1f} +{1e6 * (steps.measured or 0):.1f} +[\d.]+", total)
    assert call.startswith("a whole call takes") and where == f"wall time for 2 images on {HERE}"
    assert not re.search("whole call", str(step_times(network, x, HERE, measure=False)))


@pytest.mark.parametrize("machine", [HERE, FITTED], ids=["roofline", "fitted"])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("chunk", [1, 2])
@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_a_layer_takes_what_the_model_says(n, chunk, threads, machine):
    """Of the images of a run on each thread; a batch of fewer images than threads, and the matrix, on all threads at once."""
    model, planned, network, x = packed(n, chunk=chunk)
    machine = replace(machine, threads=threads)
    steps = {step.path: step for step in step_times(network, x, machine, measure=False).steps}
    units = 1 if n < threads else min(n, math.ceil(math.ceil(n / chunk) / threads) * threads)
    for path, shape in conv_shapes(model, x).items():
        step = steps[path]
        runs = 1 if path == "last" else units  # which has many weights and meets each once
        side = min(runs, threads)
        assert (step.runs, step.side) == (runs, side)
        shape = shape.with_batch(round(n / runs * side))
        density = next(row.density for row in planned.layers if row.path == path)
        if path == "depth":  # 9 taps of each output, and what it reads and writes
            loop = loop_seconds(shape.n * 64 * 32 * 9, shape.input_bytes + shape.output_bytes, machine)
            assert step.predicted == pytest.approx(runs / side * loop, rel=1e-9)
            continue
        if path == "first":  # its border is a step of its own
            shape = replace(shape, ih=shape.ih + 2, iw=shape.iw + 2, padding=((0, 0), (0, 0)))
        one = dense_seconds(shape, machine) if density == 1 else conv_seconds(shape, density, machine)
        assert step.predicted == pytest.approx(runs / side * float(one), rel=1e-6), path


def test_eight_bits():
    x = np.ones((1, 8, 8, 16), np.float32)
    model = nnx.Sequential(nnx.Conv(16, 32, (3, 3), rngs=nnx.Rngs(0)), nnx.relu, nnx.Conv(32, 8, (3, 3), rngs=nnx.Rngs(1)))
    examples = np.random.default_rng(0).standard_normal((200, 8, 8, 16), np.float32)
    planned = plan(model, x, HERE, precision="int8", examples=examples)
    rows = {row.path: row for row in planned.layers if row.inputs is not None}
    found = {step.path: step for step in step_times(pack_model(model, planned, x), x, HERE, measure=False).steps}
    assert rows and {step.op for step in found.values()} >= {"conv int8", "quantize"}
    for path, row in rows.items():
        assert found[path].predicted == pytest.approx(int8_seconds(row.shape, 1.0, HERE), rel=1e-6)


def test_linen():
    x = np.ones((1, 8, 8, 16), np.float32)
    net = nn.Sequential([nn.Conv(16, (3, 3)), nn.relu, nn.Conv(16, (3, 3))])
    model = pruned((net, net.init(jax.random.key(0), x)), {"layers_0": 0.1})
    network = pack_model(model, plan(model, x, HERE), x)
    found = [(step.op, step.path) for step in step_times(network, x, HERE, seconds=SECONDS).steps]
    assert found == [("conv", "layers_0"), ("window", None), ("dense", "layers_2")]


def test_programs_that_are_alike_share_their_times():
    class Twice(nnx.Module):
        def __init__(self):
            self.a, self.b = (nnx.Conv(16, 16, (1, 1), rngs=nnx.Rngs(i)) for i in range(2))

        def __call__(self, x):
            return self.b(jnp.cumsum(self.a(x), 1))  # XLA's

    model, x = Twice(), np.ones((1, 4, 4, 16), np.float32)
    steps = step_times(pack_model(model, plan(model, x, HERE), x), x, HERE, seconds=SECONDS).steps
    assert [step.path for step in steps] == ["a", "b"] and steps[0].measured == steps[1].measured > 0


def test_what_is_copied_of_a_concatenation():
    """An input lies elsewhere, a result of a step is written where it belongs."""
    halved = Step("map", (4, 4, 8), (0,), params=("clamp",), numbers=(0.5, 0.0, -math.inf, math.inf))
    joined = Step("concat", (4, 4, 24), (0, 2))
    program = Program(((4, 4, 16), (4, 4, 8)), (replace(halved, args=(1,)), joined), (3,), (), 1)
    first, second = predict(program, [], 2, replace(HERE, threads=1))
    assert (first.op, second.op) == ("clamp", "concat")
    machine = replace(HERE, threads=1)
    one = loop_seconds(4 * 4 * 16, 4 * 4 * 4 * (16 + 8 + 24) * 16 / 24, machine)
    assert second.predicted == pytest.approx(2 * one, rel=1e-9)


@pytest.mark.parametrize("machine", [HERE, FITTED, replace(FITTED, threads=8)])
def test_a_loop(machine):
    """A stream goes at the machine's bandwidth; instructions at a lane of its vectors, on each thread, in a cycle."""
    start = loop_seconds(0, 0, machine)
    assert start > 0
    assert loop_seconds(0, machine.bandwidth, machine) - start == pytest.approx(1, rel=1e-9)
    lanes = machine.lanes * machine.threads
    cycle = TYPICAL.sparse.fma if machine.fitted else 4 * lanes / machine.peak
    assert loop_seconds(1e9 * lanes, 0, machine) - start == pytest.approx(1e9 * cycle, rel=1e-9)


def test_errors(monkeypatch):
    _, _, network, x = packed(1)
    with pytest.raises(ValueError, match=r"measure=True times on this machine, but for Intel Atom C2750.*or say measure=False"):
        step_times(network, x, ATOM_C2750)
    dense = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"no step of the model runs in the native kernel: pass what sparseflax.pack_model"):
        step_times(dense, np.ones((1, 4), np.float32), HERE)
    assert ffi.native is not None
    for words, n, threads, message in ((b"", 1, 1, "a program of version 0, this build runs"),
                                       (bytes(8), 0, 1, "n and threads must be at least 1"),
                                       (bytes(8), 1, 0, "n and threads must be at least 1")):
        with pytest.raises(ValueError, match=message):
            ffi.native.describe(words, b"", b"", n, threads)
    monkeypatch.setattr(ffi, "available", False)
    with pytest.raises(ValueError, match="the steps of a program are those of the native kernel, which is not available"):
        step_times(network, x, HERE, measure=False)


def test_a_public_name():
    assert sparseflax.step_times is step_times and Steps.__module__ == "sparseflax.network.steps"
