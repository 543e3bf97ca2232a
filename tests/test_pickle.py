"""Packed models and what they are made of, pickled and copied: the same outputs on the other side, and fused as before."""

import copy
import multiprocessing
import pickle
import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import cloudpickle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import sparseflax
from sparseflax import pack_model, plan, prune
from sparseflax.cost.machine import ATOM_C2750
from tests.machines import HERE
from tests.test_fuse import epilogues

PICKLERS = pytest.mark.parametrize("pickler", [pickle, cloudpickle], ids=lambda module: module.__name__)
FUSED = [(True, False, "relu"), (True, True, None)]
X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, 12, 32)), jnp.float32)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv1, self.conv2 = (nnx.Conv(32, 32, (3, 3), rngs=rngs) for _ in range(2))

    def __call__(self, x):
        return self.conv2(jax.nn.relu(self.conv1(x))) + x


class Reducing(Net):
    def __reduce__(self):
        return nnx.merge, nnx.split(self)


class Locked(Net):
    """Refuses to be pickled but for its own state."""

    def __init__(self, rngs):
        super().__init__(rngs)
        self.lock = threading.Lock()

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state):
        vars(self).update(state, lock=threading.Lock())


class Meta(type(nnx.Module)):
    pass


class OwnMeta(Net, metaclass=Meta):
    pass


class Here(Net):
    """As if the running script had defined it: cloudpickle takes its code along."""


Here.__module__ = "__main__"


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(32, (3, 3))(x)))
        return nn.Dense(4)(x.mean((1, 2)))


def packed(model_type):
    model = model_type(nnx.Rngs(0))
    for layer in (model.conv1, model.conv2):
        keep = np.random.default_rng(1).random(layer.kernel.shape) < 0.1
        layer.kernel[...] = layer.kernel[...] * jnp.asarray(keep, jnp.float32)
    planned = plan(model, X, HERE)
    assert [row.choice for row in planned.layers] == ["sparse", "sparse"]
    return pack_model(model, planned)


def run(payload, x):
    """What becomes of a pickled model: its class, the epilogues of its layers, and its outputs."""
    model = pickle.loads(payload)
    if isinstance(model, tuple):
        model = nnx.merge(*model)
    return type(model).__name__, epilogues(lambda m, x: m(x), model, x), np.asarray(jax.jit(lambda m, x: m(x))(model, x))


def run_linen(payload, x):
    model, variables = pickle.loads(payload)
    return np.asarray(jax.jit(model.apply)(variables, x))


@pytest.fixture(scope="module")
def fresh():
    """Calls a function in a process that has inherited nothing."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda *call: pool.submit(*call).result()


@PICKLERS
@pytest.mark.parametrize("model_type", [Net, Reducing, Locked, OwnMeta])
def test_a_packed_model(pickler, model_type, fresh):
    model = packed(model_type)
    wanted = np.asarray(jax.jit(lambda m, x: m(x))(model, X))
    payload = pickler.dumps(model)
    for name, found, y in (run(payload, X), fresh(run, payload, np.asarray(X))):
        assert (name, found) == (model_type.__name__, FUSED)
        np.testing.assert_array_equal(y, wanted)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        again = pickle.loads(pickler.dumps(model, protocol))
        assert type(again) is type(model)
        assert model_type is Locked or nnx.graphdef(again) == nnx.graphdef(model), "nothing compiles again"


@PICKLERS
def test_its_graphdef_and_state(pickler, fresh):
    model = packed(Net)
    payload = pickler.dumps(nnx.split(model))
    for name, found, y in (run(payload, X), fresh(run, payload, np.asarray(X))):
        assert (name, found) == ("Net", FUSED)
        np.testing.assert_array_equal(y, jax.jit(lambda m, x: m(x))(model, X))


def test_a_model_of_the_running_script(fresh):
    model = packed(Here)
    name, found, y = fresh(run, cloudpickle.dumps(model), np.asarray(X))
    assert (name, found) == ("Here", FUSED)
    np.testing.assert_array_equal(y, jax.jit(lambda m, x: m(x))(model, X))


def test_one_in_a_circle():
    model = packed(Net)
    object.__setattr__(model, "itself", [model])
    again = pickle.loads(pickle.dumps(model))
    assert again.itself[0] is again and type(again) is type(model)


@pytest.mark.parametrize("model_type", [Net, Reducing, Locked, OwnMeta, Here])
@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy], ids=lambda how: how.__name__)
def test_copies(how, model_type):
    model = packed(model_type)
    if model_type is Locked and how is copy.deepcopy:
        with pytest.raises(TypeError, match="cannot pickle '_thread.lock'"):  # nor does Flax copy the dense one
            how(model)
        return
    again = how(model)
    assert type(again) is type(model) and again is not model
    assert (again.conv1.values is model.conv1.values) == (how is copy.copy)
    np.testing.assert_array_equal(jax.jit(lambda m, x: m(x))(again, X), jax.jit(lambda m, x: m(x))(model, X))


@pytest.fixture(scope="module")
def linen():
    """(packed, its variables, plan)"""
    variables = Linen().init(jax.random.key(0), X)
    kernel = variables["params"]["Conv_0"]["kernel"]
    variables["params"]["Conv_0"]["kernel"] = jnp.where(jnp.abs(kernel) > 1.6 * kernel.std(), kernel, 0)
    planned = plan((Linen(), variables), X, HERE)
    packed, variables = pack_model((Linen(), variables), planned, X)
    assert packed.patterns and packed.folded and packed.fused
    return packed, variables, planned


@PICKLERS
def test_a_packed_linen_model(pickler, linen, fresh):
    packed, variables, _ = linen
    payload = pickler.dumps((packed, variables))
    assert pickle.loads(payload)[0] == packed
    wanted = jax.jit(packed.apply)(variables, X)
    np.testing.assert_array_equal(run_linen(payload, X), wanted)
    np.testing.assert_array_equal(fresh(run_linen, payload, np.asarray(X)), wanted)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value)),
                                 lambda value: pickle.loads(cloudpickle.dumps(value))],
                         ids=["copy", "deepcopy", "pickle", "cloudpickle"])
def test_plans_kernels_and_guides(how, linen):
    planned = linen[2]
    assert how(planned) == planned and str(how(planned)) == str(planned)
    kernel = sparseflax.pack(np.random.default_rng(0).standard_normal((3, 3, 8, 8)).astype(np.float32).clip(0))
    assert kernel.pattern.index.size, "cached, and not to be taken along"
    again = how(kernel)
    np.testing.assert_array_equal(again.values, kernel.values)
    for pattern in (again.pattern, how(kernel.pattern)):
        assert pattern == kernel.pattern and hash(pattern) == hash(kernel.pattern)
        np.testing.assert_array_equal(pattern.gaps, kernel.pattern.gaps)
        assert not pattern.gaps.flags.writeable, "its digest is computed once"
    assert len(pickle.dumps(kernel.pattern)) < kernel.pattern.gaps.nbytes + 500
    guide = replace(prune.constant({"conv": 0.1}), whole=prune.Whole(1.0, 0.5), machine=ATOM_C2750, seconds=0.5)
    assert str(how(guide)) == str(guide) and how(guide).densities == guide.densities
