"""Plans in eight bits: which layers take them, with which ranges, and what the packed model computes then."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparseflax
from sparseflax.conv.int8 import Quantization
from sparseflax.network.fuse import fuse
from tests import reference
from tests.machines import HERE


class Net(nnx.Module):
    """Two convolutions with batch norm, the second unstructured, and a fully connected layer."""

    def __init__(self, rngs):
        self.first = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.second = nnx.Conv(32, 32, (3, 3), rngs=rngs)
        self.head = nnx.Linear(32, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.first(x)))
        return self.head(nnx.relu(self.second(x)).mean((1, 2)))


def net():
    model = Net(nnx.Rngs(0))
    random = np.random.default_rng(0)
    keep = np.repeat(random.random((3, 3, 4, 32)) < 0.1, 4, axis=2)
    model.first.kernel.set_value(jnp.asarray(np.asarray(model.first.kernel[...]) * keep))
    model.second.kernel.set_value(jnp.asarray(np.asarray(model.second.kernel[...]) * (random.random((3, 3, 32, 32)) < 0.1)))
    model.norm.mean.set_value(jnp.asarray(np.linspace(-0.5, 0.5, 32, dtype=np.float32)))
    model.norm.var.set_value(jnp.asarray(np.linspace(0.5, 2, 32, dtype=np.float32)))
    model.eval()
    return model


def inputs(n, seed=0):
    return np.random.default_rng(seed).standard_normal((n, 12, 12, 16)).astype(np.float32)


@pytest.fixture(scope="module")
def planned():
    model = net()
    return model, sparseflax.plan(model, inputs(2), HERE, precision="int8", examples=inputs(40))


def both(one, other, x):
    """The outputs of two models, from one compilation."""
    return map(np.asarray, jax.jit(lambda one, other, x: (one(x), other(x)))(one, other, x))


def test_layers_with_blocks_of_four_run_in_int8_and_the_others_say_why_not(planned):
    _, plan = planned
    rows = {row.path: row for row in plan.layers}
    assert rows["first"].inputs is not None and 0 < rows["first"].error < 0.05 and len(rows["first"].correction) == 32
    low, high = (rows["first"].inputs.scale * (q - rows["first"].inputs.zero) for q in (0, 255))
    assert -5 < low < -3 < 3 < high < 5  # tails of 1e-4 are cut: normal inputs end near 3.7
    assert rows["second"].inputs is None and "prune with block=4" in rows["second"].reason
    assert "int8, off by" in str(plan)
    json.dumps(plan.to_dict())


def test_the_packed_model_is_close_to_the_dense_one(planned):
    model, plan = planned
    packed = sparseflax.pack_model(model, plan)
    assert isinstance(packed.first, sparseflax.nnx.Int8Conv) and isinstance(packed.second, sparseflax.nnx.SparseConv)
    x = inputs(2, seed=1)
    y, want = both(packed, model, x)
    assert np.linalg.norm(y - want) < 0.03 * np.linalg.norm(want)


def test_biases_are_corrected():
    """Without correction the mean of each channel is off by what rounding its few weights did."""
    model = net()
    plan = sparseflax.plan(model, inputs(2), HERE, precision="int8", examples=inputs(40))
    bare = dataclasses.replace(plan, layers=tuple(
        dataclasses.replace(row, correction=(0.0,) * len(row.correction)) for row in plan.layers))
    x = inputs(40)
    want = np.asarray(sparseflax.pack_model(model, plan.all_dense, fuse=False).first(x)).mean((0, 1, 2))
    means = [np.asarray(sparseflax.pack_model(model, p, fuse=False).first(x)).mean((0, 1, 2)) for p in (plan, bare)]
    assert np.abs(means[0] - want).max() < 1e-5 < np.abs(means[1] - want).max()


def chain():
    """Three convolutions in a row, which nothing but activations stands between."""
    layers = [nnx.Conv(8, 16, (3, 3), rngs=nnx.Rngs(0)), nnx.relu, nnx.Conv(16, 16, (1, 1), rngs=nnx.Rngs(1)), nnx.relu6,
              nnx.Conv(16, 8, (3, 3), rngs=nnx.Rngs(2))]
    model = nnx.Sequential(*layers)
    nnx.update(model, sparseflax.prune.one_shot(nnx.state(model, nnx.Param), sparseflax.prune.constant(
        {f"layers/{i}": 0.5 for i in (0, 2, 4)}), block=4))
    return model


def test_between_layers_in_int8_is_uint8(monkeypatch):
    monkeypatch.setattr("sparseflax.network.plan.MARGIN", 0)
    model, x = chain(), np.random.default_rng(0).standard_normal((20, 9, 9, 8)).astype(np.float32)
    plan = sparseflax.plan(model, x[:4], HERE, precision="int8", examples=x)
    plan = dataclasses.replace(plan, layers=tuple(dataclasses.replace(row, choice="sparse") for row in plan.layers))
    assert all(row.inputs is not None for row in plan.layers)
    packed, apart = sparseflax.pack_model(model, plan, chunk=2), sparseflax.pack_model(model, plan, fuse=False)
    assert [(step.op, step.uint8) for step in steps(packed, x[:4])] == [
        ("quantize", True), ("conv_int8", True), ("conv_int8", True), ("conv_int8", False)]
    y, want = both(packed, apart, x[:4])
    # A rounded output may fall to the other side of a tie; then it is off by a step, in few places.
    assert np.abs(y - want).max() < 0.05 * np.abs(want).max() and np.mean(y != want) < 0.1


class Branches(nnx.Module):
    """A residual, a maximum, a concatenation and a mean: what lies between the layers of real networks."""

    def __init__(self, rngs):
        self.one, self.two, self.three = (nnx.Conv(8, 8, (3, 3), rngs=rngs) for _ in range(3))
        self.four, self.head = nnx.Conv(16, 8, (1, 1), rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.one(x))
        y = nnx.relu(self.two(x))
        x = nnx.relu(self.three(y) + x)
        x = jnp.concatenate([x, nnx.max_pool(y, (3, 3), padding="SAME")], -1)
        return self.head(self.four(nnx.max_pool(x, (2, 2), strides=(2, 2))).mean((1, 2)))


def test_what_lies_between_is_uint8_too(monkeypatch):
    monkeypatch.setattr("sparseflax.network.plan.MARGIN", 0)
    model, x = Branches(nnx.Rngs(0)), np.random.default_rng(0).standard_normal((20, 8, 8, 8)).astype(np.float32)
    nnx.update(model, sparseflax.prune.one_shot(nnx.state(model, nnx.Param), sparseflax.prune.constant(
        {name: 0.5 for name in ("one", "two", "three", "four")}), block=4))
    plan = sparseflax.plan(model, x[:3], HERE, precision="int8", examples=x)
    plan = dataclasses.replace(plan, layers=tuple(
        dataclasses.replace(row, choice="dense" if row.path == "head" else "sparse") for row in plan.layers))
    packed, apart = sparseflax.pack_model(model, plan), sparseflax.pack_model(model, plan, fuse=False)
    made = steps(packed, x[:3])
    assert [(step.op, step.uint8, len(step.args)) for step in made] == [
        ("quantize", True, 1), ("conv_int8", True, 1), ("conv_int8", True, 1),
        ("dequantize", False, 1), ("conv_int8", True, 2), ("quantize", True, 1),  # as `four` and `three` have other ranges
        ("pool", True, 1), ("concat", True, 2), ("pool", True, 1), ("conv_int8", False, 1), ("pool", False, 1),
        ("map", False, 1), ("dense", False, 1)]
    got, want = both(packed, apart, x[:3])
    # The residual is off by half a step of 255; so is each rounded value that falls to the other side of a tie.
    assert np.abs(got - want).max() < 0.02 * np.abs(want).max()


class Separable(nnx.Module):
    """Depthwise convolutions between sparse ones, the second for two readers."""

    def __init__(self, rngs):
        self.one, self.two, self.three = (nnx.Conv(16, 16, (1, 1), rngs=rngs) for _ in range(3))
        self.first, self.second, self.last = (
            nnx.Conv(16, 16, (3, 3), strides=strides, feature_group_count=16, rngs=rngs) for strides in (1, 2, 1))

    def __call__(self, x):
        x = nnx.relu6(self.one(x))
        x = nnx.relu(self.two(nnx.relu(self.first(x))))
        y = self.second(x)
        return self.last(self.three(y)) + y


def halved(model, x):
    """Its plan in eight bits with half of the blocks of three layers, and the model packed, fused and not."""
    nnx.update(model, sparseflax.prune.one_shot(nnx.state(model, nnx.Param), sparseflax.prune.constant(
        {name: 0.5 for name in ("one", "two", "three")}), block=4))
    plan = sparseflax.plan(model, x[:3], HERE, precision="int8", examples=x)
    return plan, sparseflax.pack_model(model, plan), sparseflax.pack_model(model, plan, fuse=False)


def test_depthwise_between_layers_in_int8_is_uint8(monkeypatch):
    monkeypatch.setattr("sparseflax.network.plan.MARGIN", 0)
    x = np.random.default_rng(0).standard_normal((20, 9, 9, 16)).astype(np.float32)
    plan, packed, apart = halved(Separable(nnx.Rngs(0)), x)
    made = steps(packed, x[:3])
    assert [(step.op, step.uint8) for step in made] == [
        ("quantize", True), ("conv_int8", True), ("depthwise", True), ("conv_int8", True), ("depthwise", True),
        ("dequantize", False), ("conv_int8", True), ("depthwise", False), ("combine", False)]
    ranges = {row.path: row.outputs for row in plan.layers}
    assert [step.params[2] for step in made if step.op == "depthwise"] == [
        ranges["one"].between(0.0, 6.0), ranges["two"].between(0.0, math.inf), ranges["three"]]
    got, want = both(packed, apart, x[:3])
    # Half a step of 255 of what each depthwise convolution reads, and of what the second is rounded to for both of its readers.
    assert 0 < np.abs(got - want).max() < 0.03 * np.abs(want).max()


def test_depthwise_of_bytes_is_what_the_primitives_compute():
    """Bit for bit: sums of multiples of a quarter are exact."""
    inputs, outputs = Quantization(0.25, 100), Quantization(0.7, 3)
    draw = np.random.default_rng(0)
    kernel, bias, x = (jnp.asarray(reference.integers(draw, *size)) for size in ((3, 3, 1, 19), (19,), (2, 9, 13, 19)))

    def f(x):
        y = jax.lax.conv_general_dilated(inputs.quantize(5.3 * x).dequantize(), kernel, (1, 2), "SAME", feature_group_count=19,
                                         dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return outputs.quantize(nnx.relu(y + bias.reshape(1, 1, 1, -1))).values

    assert [(step.op, step.uint8) for step in steps(fuse(f), x)] == [("quantize", True), ("depthwise", True)]
    np.testing.assert_array_equal(*jax.jit(lambda x: (fuse(f)(x), f(x)))(x))


class Shortcut(nnx.Module):
    """A block whose shortcut is a convolution, too."""

    def __init__(self, rngs):
        self.one, self.two, self.three = (nnx.Conv(8, 8, (3, 3), rngs=rngs) for _ in range(3))

    def __call__(self, x):
        return self.three(nnx.relu(self.one(x) + self.two(x)))


def test_a_shortcut_is_rounded_by_its_own_range(monkeypatch):
    monkeypatch.setattr("sparseflax.network.plan.MARGIN", 0)
    x = np.random.default_rng(0).standard_normal((20, 8, 8, 8)).astype(np.float32)
    _, packed, apart = halved(Shortcut(nnx.Rngs(0)), x)
    assert [(step.op, step.uint8, len(step.args)) for step in steps(packed, x[:3])] == [
        ("quantize", True, 1), ("conv_int8", True, 1), ("conv_int8", True, 2), ("conv_int8", False, 1)]
    got, want = both(packed, apart, x[:3])
    assert 0 < np.abs(got - want).max() < 0.02 * np.abs(want).max()  # half a step of 255 of the shortcut


def steps(packed, x):
    """Of the only program that a packed model runs."""
    found = []

    def look(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "sparse_program":
                found.append(equation.params["program"].steps)
            for key in ("jaxpr", "call_jaxpr"):
                if key in equation.params:
                    look(getattr(equation.params[key], "jaxpr", equation.params[key]))

    look(jax.make_jaxpr(lambda x: packed(x))(x).jaxpr)
    assert len(found) == 1
    return found[0]


def test_what_is_refused():
    model, x = net(), inputs(2)
    with pytest.raises(ValueError, match="wanted one of \\('float32', 'int8', 'auto'\\)"):
        sparseflax.plan(model, x, HERE, precision="int4")
    with pytest.raises(ValueError, match="examples=inputs"):
        sparseflax.plan(model, x, HERE, precision="int8")
    with pytest.raises(ValueError, match="examples hold none"):
        sparseflax.plan(model, x, HERE, precision="int8", examples=x[:0])
    bad = inputs(20)
    bad[3] = np.nan
    with pytest.raises(ValueError, match="inputs of layer 'first' are not finite"):
        sparseflax.plan(model, x, HERE, precision="int8", examples=bad)
    with pytest.warns(RuntimeWarning, match="ranges from 2 examples"):
        plan = sparseflax.plan(model, x, HERE, precision="int8", examples=np.zeros_like(x))
    assert "its inputs are 0 in all examples" in plan.layers[0].reason


class Refused(nnx.Module):
    """A layer that the call reads elsewhere as well, one of another dtype, and one that can run in eight bits."""

    def __init__(self, rngs):
        self.first, self.second, self.third = (nnx.Conv(8, 8, (3, 3), dtype=dtype, rngs=rngs)
                                               for dtype in (jnp.float32, jnp.float32, jnp.bfloat16))

    def __call__(self, x):
        x = nnx.relu(self.second(nnx.relu(self.first(x)))) * self.second.kernel[...].sum()
        return self.third(x).astype(jnp.float32)


def test_layers_that_have_to_stay_as_they_are_do():
    model, x = Refused(nnx.Rngs(0)), np.random.default_rng(0).standard_normal((20, 8, 8, 8)).astype(np.float32)
    plan = sparseflax.plan(model, x[:2], HERE, precision="int8", examples=x)
    rows = {row.path: row for row in plan.layers}
    assert rows["first"].inputs is not None and rows["second"].inputs is None and rows["third"].inputs is None
    assert "uses its kernel elsewhere" in rows["second"].reason and "only float32" in rows["third"].reason
    y, want = both(sparseflax.pack_model(model, plan), model, x[:2])
    assert np.linalg.norm(y - want) < 0.05 * np.linalg.norm(want)


def test_a_layer_whose_outputs_are_zero_is_planned():
    """Weights, none of which meets an input that is not 0: nothing to round its outputs by."""
    conv = nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0))
    conv.kernel.set_value(conv.kernel[...].at[:, :, 4:].set(0))
    x = np.random.default_rng(0).standard_normal((20, 8, 8, 8)).astype(np.float32)
    x[..., :4] = 0
    (row,) = sparseflax.plan(nnx.Sequential(conv, nnx.relu), x[:2], HERE, precision="int8", examples=x).layers
    assert row.inputs is not None and row.outputs is None


def test_a_layer_that_loses_too_much_stays_float32(monkeypatch):
    monkeypatch.setattr("sparseflax.network.ranges.ERROR", 1e-6)
    plan = sparseflax.plan(net(), inputs(2), HERE, precision="int8", examples=inputs(20))
    assert plan.layers[0].inputs is None and "int8 would be off by" in plan.layers[0].reason


@pytest.mark.parametrize("stride", [1, 2, 5, 8, 16, 32])
def test_ranges_are_those_of_all_channels(stride, monkeypatch):
    """However many of the inputs are looked at: channels lie side by side, and every second value is of half of them."""
    examples = inputs(20)
    examples[..., 5] *= 1000
    monkeypatch.setattr("sparseflax.network.ranges.MOST", examples.size // stride)
    first = sparseflax.plan(net(), inputs(2), HERE, precision="int8", examples=examples).layers[0]
    # Of 90 values of that channel, the fewest, the outermost lie at 2.5 of their deviations, of all at 3.3.
    assert first.inputs.scale == pytest.approx(2 * 2900 / 255, rel=0.3)


def test_layers_are_made_of_their_own_kind():
    q = sparseflax.Quantization(0.05, 7)
    with pytest.raises(TypeError, match="Int8Dense takes an nnx.Linear"):
        sparseflax.nnx.Int8Conv(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), q)
    with pytest.raises(TypeError, match="wanted an nnx.ConvTranspose"):
        sparseflax.nnx.Int8ConvTranspose(nnx.Conv(4, 3, (3, 3), rngs=nnx.Rngs(0)), q)
    with pytest.raises(ValueError, match="no sparse form"):
        sparseflax.nnx.Int8Conv(nnx.Conv(4, 3, (3, 3), input_dilation=2, rngs=nnx.Rngs(0)), q)
    linear, line = nnx.Linear(6, 3, rngs=nnx.Rngs(0)), nnx.Conv(6, 3, 3, strides=2, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).uniform(0, 10, (5, 7, 6)).astype(np.float32)
    for kind, layer in ((sparseflax.nnx.Int8Dense, linear), (sparseflax.nnx.Int8Conv, line)):
        y, want = kind(layer, q)(x), layer(x)
        assert y.shape == want.shape and np.abs(y - want).max() < 0.02 * np.abs(want).max() + 0.2


def test_auto_takes_eight_bits_where_they_are_faster():
    """Of machines that differ in what a product of four costs, with a layer in blocks of four and one without."""
    model, x = net(), inputs(2)
    rows = {}
    for name, cycles in (("cheap", 0.5), ("dear", 50.0)):
        machine = dataclasses.replace(HERE, fma_cycles=0.5, int8_cycles=cycles)
        rows[name] = {row.path: row for row in sparseflax.plan(model, x, machine, precision="auto", examples=inputs(20)).layers}
    cheap, dear = rows["cheap"]["first"], rows["dear"]["first"]
    assert cheap.inputs is not None and cheap.choice == "sparse" and cheap.seconds == cheap.int8_seconds < cheap.sparse_seconds
    assert dear.inputs is None and dear.int8_seconds > dear.seconds and "float32: int8 predicted 0." in dear.reason
    assert rows["cheap"]["second"].inputs is None
    # Without "auto" it runs in eight bits whatever that costs.
    plan = sparseflax.plan(model, x, machine, precision="int8", examples=inputs(20))
    assert plan.layers[0].inputs is not None and "int8 ms" in str(plan)
