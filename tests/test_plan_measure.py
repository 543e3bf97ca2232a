"""A plan that is measured, and plans that meet another input, another machine or a model that cannot be traced."""

import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from sparseflax import pack_model, plan
from sparseflax.conv import ffi
from sparseflax.conv.packing import PackedKernel
from sparseflax.cost.cpu import client_threads, processor
from sparseflax.cost.machine import ATOM_C2750
from sparseflax.cost.shape import ConvShape
from sparseflax.layers.nnx import SparseConv, SparseDense
from sparseflax.network import measure
from sparseflax.network.measure import Measured
from tests.machines import HERE, HOPELESS


class Net(nnx.Module):
    """Three pruned layers, one of them depthwise, and an unpruned head."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv, self.other = nnx.Conv(16, 32, (3, 3), rngs=rngs), nnx.Conv(32, 32, (1, 1), strides=2, rngs=rngs)
        self.depthwise = nnx.Conv(32, 32, (3, 3), feature_group_count=32, rngs=rngs)
        self.head = nnx.Linear(32, 64, rngs=rngs)
        draw = np.random.default_rng(0)
        for layer in (self.conv, self.other, self.depthwise):
            layer.kernel[...] = layer.kernel[...] * (draw.random(layer.kernel.shape) < 0.2).astype(np.float32)

    def __call__(self, x):
        return self.head(self.depthwise(self.other(nnx.relu(self.conv(x)))).mean((1, 2)))


X = jax.ShapeDtypeStruct((2, 8, 8, 16), jnp.float32)
PLAN = sys.modules["sparseflax.network.plan"]


def rows(planned):
    return {row.path: row for row in planned.layers}


def test_an_unpruned_layer_stays_dense_however_fast_it_is_predicted(monkeypatch):
    """A head of density 1 was planned sparse by a model that was a few per cent off, and ran at 0.90x."""
    monkeypatch.setattr(PLAN, "dense_seconds", lambda shape, machine: 4e-3)
    monkeypatch.setattr(PLAN, "conv_seconds", lambda shape, density, machine: 1e-3)
    found = rows(plan(Net(), X, HERE))
    assert found["conv"].choice == "sparse" and found["conv"].reason == "predicted 4x"
    assert found["head"].choice == "dense" and found["head"].density == 1
    assert found["head"].reason == "not pruned, and not measured: predicted 4x"


@pytest.mark.parametrize(("gain", "choice"), [(1.09, "dense"), (1.11, "sparse")])
def test_unmeasured_layers_need_a_margin(monkeypatch, gain, choice):
    monkeypatch.setattr(PLAN, "dense_seconds", lambda shape, machine: gain)
    monkeypatch.setattr(PLAN, "conv_seconds", lambda shape, density, machine: 1.0)
    row = rows(plan(Net(), X, HERE))["conv"]
    assert row.choice == choice
    assert row.reason == f"predicted {gain}x" + (", less than the margin of 1.1x" if choice == "dense" else "")


def test_the_faster_one_is_kept_and_disagreement_is_told(monkeypatch):
    times = {(3, 3, 16, 32): Measured(3e-3, 1e-3), (1, 1, 32, 32): Measured(0.9e-3, 1e-3),
             (3, 3, 1, 32): Measured(2e-3, 1e-3), (1, 1, 32, 64): Measured(1.2e-3, 1e-3)}
    monkeypatch.setattr(measure, "time_layer", lambda shape, kernel, module, seconds: times[shape.kernel_shape])
    model = Net()
    for machine, told in [(HERE, {"conv": "", "other": " (predicted", "depthwise": " (depthwise"}),
                          (HOPELESS, {"conv": " (at no density", "other": "", "depthwise": " (depthwise"})]:
        before, planned = rows(plan(model, X, machine)), plan(model, X, machine, measure=True)
        found = rows(planned)
        assert {path: row.choice for path, row in found.items()} == {
            "conv": "sparse", "other": "dense", "depthwise": "sparse", "head": "sparse"}, "an unpruned one only if measured"
        for path, row in found.items():
            measured = times[row.shape.kernel_shape]
            assert (row.dense_measured, row.sparse_measured) == measured
            assert row.reason.startswith(f"measured {measured.dense / measured.sparse:.3g}x")
            assert (", unlike the model" in row.reason) == (row.choice != before[path].choice)
            assert row.kernel == machine.isa, "dense or sparse"
        assert all(found[path].reason.partition("unlike the model")[2].startswith(text) for path, text in told.items())
        assert (planned.seconds == sum(row.sparse_seconds if row.choice == "sparse" else row.dense_seconds
                                       for row in found.values())), "predictions stay predictions"
        lines = str(planned).splitlines()
        assert lines[0].split("  ")[-3:] == ["measured", "measured", "reason"] and "3.000     1.000" in lines[1]
        assert lines[-1] == "measured in 4 layers 7.100 ms dense, 3.900 ms as planned (1.82x)"
        assert lines[-2].startswith("predicted ")
    packed = pack_model(model, planned)
    assert isinstance(packed.conv, SparseConv) and isinstance(packed.head, SparseDense) and isinstance(packed.other, nnx.Conv)


def test_the_dense_form_is_that_of_a_packed_network(monkeypatch):
    """A depthwise layer is timed as the step of a program that `fuse` makes of it, not as XLA's grouped convolution."""
    programs = []
    monkeypatch.setattr(measure, "medians", lambda calls, seconds: programs.append(jax.make_jaxpr(calls[0])()) or (1.0, 2.0))
    shape = ConvShape(1, 8, 8, 16, 16, 3, 3, padding=((1, 1), (1, 1)), groups=16)
    layer = nnx.Conv(16, 16, (3, 3), feature_group_count=16, rngs=nnx.Rngs(0))
    measure.time_layer(shape, np.ones((3, 3, 1, 16), np.float32), layer, 0.0)
    assert "conv_general_dilated" not in str(programs[0])


def test_what_is_timed_computes_the_layer(monkeypatch):
    """Both candidates of every layer give its output, on an image of ones."""
    outputs = []

    def medians(calls, seconds):
        outputs.append([np.asarray(call()) for call in calls])
        assert seconds in (0.01, 0.04)
        return [2.0, 1.0]

    monkeypatch.setattr(measure, "medians", medians)
    model = Net()
    planned = plan(model, X, HERE, measure=True, seconds=0.01)
    assert {row.choice for row in planned.layers} == {"sparse"} and len(outputs) == 4 + 2, "two twice"
    for row, (dense, sparse) in zip(planned.layers, outputs[:4], strict=True):
        layer = getattr(model, row.path)
        s = row.shape
        x = jnp.ones((s.n, s.ic) if row.path == "head" else (s.n, s.ih, s.iw, s.ic))
        # A sum of kernel-many products of a weight with 1, bias zero: each rounds by half an ulp of the absolute sum.
        magnitude = np.abs(layer.kernel[...]).sum((0, 1, 2) if layer.kernel.ndim == 4 else 0)
        tolerance = 2 * s.weights / s.oc * np.finfo(np.float32).eps / 2 * magnitude.max()
        for y in (dense, sparse):
            np.testing.assert_allclose(y.reshape(layer(x).shape), layer(x), rtol=0, atol=tolerance)


def test_what_the_model_did_not_expect_is_timed_again(monkeypatch):
    """A disturbed measurement of an unpruned head does not make it sparse."""
    calls = []

    def time_layer(shape, kernel, module, seconds):
        calls.append((shape.kernel_shape, seconds))
        disturbed = shape.kernel_shape == (1, 1, 32, 64) and seconds == 0.25
        return Measured(9e-3 if disturbed else 1e-3, 1.5e-3)

    monkeypatch.setattr(measure, "time_layer", time_layer)
    found = rows(plan(Net(), X, HOPELESS, measure=True))
    assert [seconds for _, seconds in calls] == [0.25] * 4 + [1.0] and calls[-1][0] == (1, 1, 32, 64)
    assert found["head"].choice == "dense" and found["head"].dense_measured == 1e-3


def test_measured_for_real():
    planned = plan(Net(), X, HERE, measure=True, seconds=1e-3)
    for row in planned.layers:
        assert row.dense_measured > 0 and row.sparse_measured > 0
        assert (row.choice == "sparse") == (row.sparse_measured < row.dense_measured)


def test_what_cannot_be_sparse_is_not_measured(monkeypatch):
    monkeypatch.setattr(measure, "medians", lambda calls, seconds: pytest.fail("nothing to measure"))
    net = nnx.Sequential(nnx.ConvTranspose(8, 8, (3, 3), transpose_kernel=True, rngs=nnx.Rngs(0)),
                         SparseConv(8, 8, (3, 3), rngs=nnx.Rngs(0)))
    found = plan(net, jnp.ones((1, 8, 8, 8)), HERE, measure=True).layers
    assert [row.choice for row in found] == ["sparse", "dense"] and isinstance(net.layers[1].kernel, PackedKernel)
    assert not any(row.dense_measured for row in found)


def test_progress_only_on_a_terminal_and_only_when_long(monkeypatch, capsys):
    monkeypatch.setattr(measure, "time_layer", lambda *_: Measured(1.0, 1.0))
    clock = iter([0.0, 0.0, 3.0, 6.0, 9.0])
    monkeypatch.setattr(measure.time, "monotonic", lambda: next(clock))
    layers = dict.fromkeys("abcd", (None, np.zeros(0)))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    measure.time_layers(layers, 1.0)
    assert capsys.readouterr().err == ("\rmeasuring layer 2 of 4, about 9 s left: b\033[K"
                                       "\rmeasuring layer 3 of 4, about 6 s left: c\033[K"
                                       "\rmeasuring layer 4 of 4, about 3 s left: d\033[K\r\033[K")
    clock = iter([0.0, 0.0, 3.0, 6.0, 9.0])
    monkeypatch.setattr(sys.stderr, "isatty", lambda: False)
    measure.time_layers(layers, 1.0)
    assert capsys.readouterr().err == ""


class Branching(nnx.Module):
    def __init__(self):
        self.conv = nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0))

    def __call__(self, x):
        y = self.conv(x)
        return y if y.sum() > 0 else -y


class Masking(Branching):
    def __call__(self, x):
        y = self.conv(x)
        return y[y > 0]


class LinenBranching(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Conv(8, (3, 3))(x)
        return np.asarray(y)


def test_bad_input():
    model, here = Net(), f"this is {processor()} ({ffi.isa()}, {client_threads()} threads)"
    linen, x = LinenBranching(), jnp.ones((1, 4, 4, 8))
    variables = {"params": {"Conv_0": {"kernel": jnp.ones((3, 3, 8, 8)), "bias": jnp.ones(8)}}}
    made, elsewhere = plan(model, X, HERE), plan(model, X, ATOM_C2750)
    assert made.inputs == "float32[2,8,8,16]"
    atom = f"for {ATOM_C2750.name} (sse4.2, 8 threads)"
    bigger = jax.ShapeDtypeStruct((2, 9, 9, 16), jnp.float32)
    for error, message, call in [
        (TypeError, "call of Branching cannot be traced, wanted a model that runs under jax.jit.*jax.lax.cond",
         lambda: plan(Branching(), x, HERE)),
        (TypeError, "call of Masking cannot be traced", lambda: plan(Masking(), x, HERE)),
        (TypeError, "call of LinenBranching cannot be traced", lambda: plan((linen, variables), x, HERE)),
        (ValueError, f"measure=True times on this machine, but {atom}, {here}: leave",
         lambda: plan(model, X, ATOM_C2750, measure=True)),
        (ValueError, f"made {atom}, {here}: call sparseflax.plan(model, x) again, or pass plan=None",
         lambda: pack_model(model, elsewhere, X)),
        (TypeError, "plan and x are None, wanted a plan, or the input", lambda: pack_model(model)),
        (ValueError, "made for the input float32[2,8,8,16], this is float32[2,9,9,16]: call sparseflax.plan",
         lambda: pack_model(model, made, bigger)),
    ]:
        with pytest.raises(error) as raised:
            call()
        text = str(raised.value)
        start, *rest = message.split(".*")
        assert start in text and all(part in text for part in rest), text
    assert isinstance(pack_model(model, made, X), Net) and isinstance(pack_model(model, plan(model, bigger, HERE), bigger), Net)
    with pytest.warns(RuntimeWarning, match=re.escape(f"made {atom}, {here}: outputs will be right, but layers are chosen")):
        assert isinstance(pack_model(model, elsewhere), Net), "a plan for another machine may be meant"


def test_without_a_plan_one_is_made(monkeypatch):
    monkeypatch.setattr(PLAN, "detect_machine", lambda: HERE)
    model, x = Net(), jnp.ones(X.shape)
    packed = pack_model(model, x=x)
    assert type(packed.conv) is type(pack_model(model, plan(model, x, HERE)).conv) is SparseConv
    linen = nn.Sequential([nn.Conv(32, (3, 3)), nn.relu])
    variables = linen.init(jax.random.key(0), x)
    kernel = variables["params"]["layers_0"]["kernel"]
    variables["params"]["layers_0"]["kernel"] = kernel.at[:, :, 2:].set(0)
    module, packed_variables = pack_model((linen, variables), x=x)
    assert "values" in packed_variables["params"]["layers_0"]
    np.testing.assert_allclose(module.apply(packed_variables, x), linen.apply(variables, x), rtol=1e-5, atol=1e-5)
