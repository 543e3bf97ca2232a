"""What a whole network takes: the arithmetic of the line, and that both kinds of models are timed and guided by it."""

import dataclasses
import importlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from sparseflax import prune
from sparseflax.conv import ffi
from sparseflax.cost.cpu import client_threads, processor
from sparseflax.cost.machine import ATOM_C2750
from sparseflax.network.shapes import conv_shapes
from sparseflax.prune.aim import AIMS
from sparseflax.prune.mask import kernels
from sparseflax.prune.whole import Packed, fit

X = np.ones((1, 12, 12, 16), np.float32)
# Known constants under this machine's name: what is measured must not depend on a second measurement.
HERE = dataclasses.replace(ATOM_C2750, name=processor(), isa=ffi.isa(), threads=client_threads())


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(16, 64, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.conv(x))).mean((1, 2)))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Conv(64, (3, 3), name="conv")(x))
        return nn.Dense(10, name="head")(nn.relu(x).mean((1, 2)))


def test_the_scales_and_the_rest_explain_every_time_that_was_measured():
    """Packed times that are 1.2 times the prediction for dense layers, 1.5 times for sparse ones, and 50 us more."""
    layers = [(900e-6, 100e-6), (500e-6, 200e-6), (0.0, 300e-6)]
    packed = [Packed(dense, sparse, 1.2 * dense + 1.5 * sparse + 50e-6) for dense, sparse in layers]
    whole = fit(1.3e-3, packed)
    assert whole.checked() is whole and len(whole.points) == 3
    for dense, sparse, seconds in packed:
        own = whole.dense_scale * dense + whole.scale * sparse
        assert own + whole.other(seconds) == pytest.approx(seconds, rel=1e-6)
        assert whole.seconds(own) == pytest.approx(seconds, rel=1e-6)
    assert whole.dense_scale == pytest.approx(1.2, rel=0.2) and whole.scale == pytest.approx(1.5, rel=0.3)


@pytest.mark.parametrize("times", [(1e-6, 1e-6), (1.0, 1e-3), (1e-3, 1.0)])
def test_no_noise_makes_a_rest_of_less_than_no_time(times):
    whole = fit(1e-3, [Packed(5e-4, 1e-4, times[0]), Packed(0.0, 1e-4, times[1])]).checked()
    assert all(other >= 0 for _, other in whole.points) and whole.dense_scale > 0


@pytest.mark.parametrize("linen", [False, True])
def test_a_network_is_timed_and_stays_as_it_is(linen):
    if linen:
        model, call = (LinenNet(), LinenNet().init(jax.random.key(0), X, train=False)), {"train": False}
        before = jax.tree.map(np.asarray, model[1])
    else:
        model, call = Net(nnx.Rngs(0)), {}
        before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))
    whole = prune.measure(model, X, HERE, seconds=0.1, **call)
    assert whole.checked() is whole and math.isfinite(whole.dense_seconds)
    after = model[1] if linen else nnx.to_pure_dict(nnx.state(model))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert linen or not model.norm.use_running_average
    guide = prune.guided(conv_shapes(model, X, **call), HERE, speedup=1, whole=whole)
    assert guide.dense_seconds == whole.dense_seconds and guide.layers["conv"].density == 1


def clock(monkeypatch, dense):
    """Networks take 10 ms packed, and less by up to 6 without weights; in either dense form, dense(seconds of timing)."""
    def seconds(network):
        weights = kernels(nnx.state(network, nnx.Param))["conv"]
        return 4e-3 + 6e-3 * np.count_nonzero(weights) / weights.size

    measuring = importlib.import_module("sparseflax.prune.measure")  # whose name is the function's
    monkeypatch.setattr(measuring, "program", lambda network, x: network)
    monkeypatch.setattr(measuring, "pack_model", lambda network, *_, **__: network)
    monkeypatch.setattr(measuring, "medians", lambda networks, time, _: [dense(time), dense(time), *map(seconds, networks[2:])])


@pytest.mark.parametrize("busy", [0.6, 1.0, 1.5])
def test_a_speedup_is_aimed_at(busy, monkeypatch):
    """The machine was busy while the network was measured for any speedup, or is while that one is aimed at."""
    clock(monkeypatch, lambda seconds: 12e-3 * (1.0 if seconds == 15.0 / AIMS else busy))
    whole = prune.measure(Net(nnx.Rngs(0)), X, HERE, speedup=2.0)
    guide = prune.guided(conv_shapes(Net(nnx.Rngs(0)), X), HERE, speedup=2.0, whole=whole)
    assert 12e-3 / (4e-3 + 6e-3 * guide.densities["conv"]) == pytest.approx(2.0, rel=0.06)


def test_a_network_that_gains_most_without_pruning_is_timed_where_it_gains_by_it(monkeypatch):
    """XLA takes 100 ms for it, the program 10 unpruned and 4 with hardly any weights: there the times are taken."""
    clock(monkeypatch, lambda *_: 0.1)
    whole = prune.measure(Net(nnx.Rngs(0)), X, HERE)
    times = [time for time, _ in whole.points]
    assert whole.dense_seconds == 0.1 and len(times) >= 4 and times[-1] == pytest.approx(10e-3, rel=1e-6)
    assert min(times) < 5e-3 and all(after / before < 2 for before, after in zip(times, times[1:], strict=False))


def test_refusals():
    with pytest.raises(ValueError, match="a network is timed on this machine, but for elsewhere .*: leave `whole` out of the"):
        prune.measure(Net(nnx.Rngs(0)), X, dataclasses.replace(HERE, name="elsewhere"))
    with pytest.raises(ValueError, match="seconds must be positive and finite, got 0"):
        prune.measure(Net(nnx.Rngs(0)), X, HERE, seconds=0)
    with pytest.raises(ValueError, match="speedup must be at least 1 .the dense network., or None, got 0.5"):
        prune.measure(Net(nnx.Rngs(0)), X, HERE, speedup=0.5)
    with pytest.raises(ValueError, match="found no convolution in Linear"):
        prune.measure(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), jnp.ones((1, 3)), HERE)
