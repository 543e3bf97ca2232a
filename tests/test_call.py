"""Calls of packed nnx modules outside of a trace: compiled once, with the weights and the parts that the module has by then."""

import gc
import weakref
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseflax.conv.int8 import Quantization
from sparseflax.layers.int8 import Int8Conv
from sparseflax.layers.nnx import SparseConv
from sparseflax.network.call import _calls, fuse_call
from sparseflax.network.joined import join
from sparseflax.network.program import Part

traced = []


class Net(nnx.Module):
    """Two layers, of which calls say when they are traced."""

    def __init__(self, rngs: nnx.Rngs):
        self.first, self.rest = nnx.Linear(4, 4, rngs=rngs), nnx.List([nnx.Linear(4, 3, rngs=rngs)])
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x, scale=1, count=False, names=None):
        traced.append(type(scale))
        if count:
            self.calls[...] += 1
        y = x
        for layer in (self.first, *self.rest):
            y = layer(y)
        return y * scale if names is None else dict.fromkeys(names, y)


@pytest.fixture
def net():
    traced.clear()
    return fuse_call(Net(nnx.Rngs(0)))


X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4)), jnp.float32)


def exact(net, x):
    """In double, of the module's weights as they are; and how far float32 may be off: two sums of five terms each."""
    y, size = np.asarray(x, np.float64), np.abs(np.asarray(x, np.float64))
    for layer in (net.first, *net.rest):
        kernel, bias = np.asarray(layer.kernel[...], np.float64), np.asarray(layer.bias[...], np.float64)
        y, size = y @ kernel + bias, size @ np.abs(kernel) + np.abs(bias)
    return y, 16 * 2.0**-24 * size


def check(net, x=X):
    y, bound = exact(net, x)
    assert (np.abs(np.asarray(net(x), np.float64) - y) <= bound).all()


def test_a_call_is_traced_once_for_each_shape_and_flag(net):
    for x in (X, X, np.asarray(X), X[:1], X[:1]):
        check(net, x)
    assert len(traced) == 2, "once for two images, once for one"
    assert net(X, scale=2).shape == net(X, scale=2.0).shape == net(X, scale=2).shape == (2, 3)
    assert traced[2:] == [int, float], "2 and 2.0 are equal, but other flags"
    names = {"a", "b"}  # has no hash, and may be another one next time
    assert set(net(X, names=names)) == names and names.add("c") is None and set(net(X, names=names)) == {"a", "b", "c"}


def test_weights_are_those_of_the_moment(net):
    check(net)
    net.first.kernel[...] *= 2
    check(net)
    nnx.update(net, jax.tree.map(lambda w: -w, nnx.state(net, nnx.Param)))
    check(net)
    nnx.update(net, jax.tree.map(np.asarray, nnx.state(net, nnx.Param)))
    check(net)
    assert len(traced) == 1


def test_other_parts_are_traced_again(net):
    check(net)
    net.first = nnx.Linear(4, 4, rngs=nnx.Rngs(1))
    check(net)
    net.rest[0] = nnx.Linear(4, 3, rngs=nnx.Rngs(2))
    check(net)
    net.rest.append(nnx.Linear(3, 3, rngs=nnx.Rngs(3)))
    check(net)
    assert len(traced) == 4


def test_small_weights_are_handed_over_together_and_a_program_reads_them_there():
    """Of a network with convolutions of its own dtypes: sparse, in eight bits, depthwise and dense."""
    rngs = nnx.Rngs(0)
    layers = [nnx.Conv(16, 16, (3, 3), rngs=rngs), nnx.relu, nnx.Conv(16, 16, (3, 3), feature_group_count=16, rngs=rngs),
              nnx.Conv(16, 32, (1, 1), rngs=rngs), nnx.Conv(32, 8, (3, 3), rngs=rngs)]
    q = Quantization(0.05, 128)
    layers[0], layers[3] = SparseConv.from_dense(layers[0]), Int8Conv(layers[3], q)
    net = fuse_call(nnx.Sequential(*layers))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 8, 16)), jnp.float32)
    y = net(x)
    held = _calls[id(net)].held
    assert [array.dtype for array in held.weights] == [jnp.float32, jnp.int32]
    assert len(held.parts) == 10 and all(part.shape is not None for part in held.parts)
    jaxpr = jax.make_jaxpr(held.compiled(jax.tree.structure(((x,), {})), None))(held.weights, [x])
    found = jax.tree.leaves(equations(jaxpr.jaxpr))
    assert [len(each.invars) for each in found if each.primitive.name == "sparse_program"] == [3]
    assert len(jax.make_jaxpr(net)(x).consts) == 2  # of a trace that closes over the weights, or is exported
    apart = jax.jit(lambda net, x: net(x))(net, x)  # each an argument of its own
    np.testing.assert_array_equal(y, apart)


def equations(jaxpr):
    """All of it, and of what it calls."""
    return [[equation, *(equations(getattr(inner, "jaxpr", inner)) for key in ("jaxpr", "call_jaxpr")
                         if (inner := equation.params.get(key)) is not None)] for equation in jaxpr.eqns]


def test_which_weights_are_joined():
    small, large = jnp.ones((3, 5)), jnp.ones((1 << 14) + 1)
    there = jax.device_put(jnp.ones(4), jax.devices()[0])  # bound to a device
    both = [jax.device_put(jnp.full(2, k, jnp.float32), jax.devices()[0]) for k in range(2)]
    half, none, other = jnp.ones(4, jnp.bfloat16), jnp.ones((0, 3)), np.arange(7, dtype=np.float32)
    some = [small, large, half, none, other, jnp.ones(3, jnp.int32)]
    parts, arrays = join(some)
    assert parts == (Part(0, 0, (3, 5)), Part(1), Part(2), Part(3), Part(0, 16, (7,)), Part(4))
    parts, arrays = join([*some, there, *both])
    assert [part.array for part in parts] == [0, 2, 3, 4, 0, 5, 1, 1, 1] and arrays[1].committed and not arrays[0].committed
    for part, array in zip(parts, [*some, there, *both], strict=True):
        found = part.of(arrays)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def test_an_array_that_may_be_written_to_is_read_at_each_call(net):
    kernel = np.array(net.first.kernel[...])
    net.first.kernel.set_value(kernel)
    check(net)
    kernel *= 3
    check(net)


def test_what_a_call_writes_is_written_by_each(net):
    for _ in range(3):
        net(X, count=True)
    assert net.calls[...] == 3 and len(traced) == 1


def test_calls_in_a_trace_are_part_of_it(net):
    y = net(X)
    np.testing.assert_array_equal(jax.jit(lambda x: net(x))(X), y)
    np.testing.assert_allclose(jax.vmap(net)(X), y, rtol=1e-6)
    first, last = (np.asarray(layer.kernel[...]) for layer in (net.first, net.rest[0]))
    np.testing.assert_allclose(jax.grad(lambda x: net(x).sum())(X), np.ones((2, 3)) @ last.T @ first.T, rtol=1e-5)
    assert jax.eval_shape(net, X).shape == (2, 3)


def test_nothing_is_kept_of_a_module_that_is_gone():
    net = fuse_call(Net(nnx.Rngs(0)))
    copy = nnx.clone(net)
    check(net)
    check(copy)
    keys = {id(net), id(copy)}
    assert keys <= _calls.keys()
    kernel = weakref.ref(net.first.kernel.get_raw_value())
    del net, copy
    gc.collect()
    assert kernel() is None and not keys & _calls.keys()


def test_from_many_threads(net):
    y = np.asarray(net(X))
    with ThreadPoolExecutor(8) as pool:
        for result in pool.map(lambda i: net(X if i % 2 else X[:1]), range(64)):
            np.testing.assert_allclose(result, y[:len(result)], rtol=1e-6)
