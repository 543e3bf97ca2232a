"""Batches in parts: the same outputs, for all that keeps images apart, and nothing for what does not."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import sparseflax
from sparseflax import pack_model, plan
from sparseflax.cost.machine import TYPICAL
from sparseflax.cost.rates import FREE_DENSE, FREE_SPARSE
from sparseflax.network.chunks import in_chunks
from sparseflax.network.plan import CHUNKS
from tests import reference
from tests.machines import HERE

DRAW = np.random.default_rng(0)
X = jnp.asarray(reference.integers(DRAW, 6, 5, 5, 6))  # as many channels as images
W = jnp.asarray(reference.integers(DRAW, 3, 3, 6, 6))
PACKED = sparseflax.pack(np.asarray(W) * (DRAW.random(W.shape) < 0.4).astype(np.float32))
NHWC = ("NHWC", "HWIO", "NHWC")


def conv(w, x):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=NHWC)


APART = {
    "convolution": conv,
    "bias and relu": lambda w, x: nnx.relu(conv(w, x) + w[0, 0, 0].reshape(1, 1, 1, -1)),
    "sparse": lambda w, x: sparseflax.sparse_conv(x, PACKED, w[0, 0, 0], residual=x, activation="relu"),
    "pooling": lambda w, x: nnx.max_pool(x, (2, 2), (2, 2)),
    "average": lambda w, x: x.mean((1, 2)),
    "product": lambda w, x: x.reshape(x.shape[0], -1) @ jnp.tile(w[0, 0], (25, 1)),
    "softmax": lambda w, x: jax.nn.softmax(x.mean((1, 2))),
    "argmax": lambda w, x: jnp.argmax(x.mean((1, 2)), -1),
    "where": lambda w, x: jnp.where(x > 0, x, jnp.zeros_like(x)),
    "gelu and clip": lambda w, x: jnp.clip(nnx.gelu(x), 0, 6),
    "concatenation": lambda w, x: jnp.concatenate([x, conv(w, x)], -1),
    "padding": lambda w, x: jnp.pad(x, ((0, 0), (1, 2), (0, 0), (0, 0))),
    "channels": lambda w, x: x[:, :, :, 1:4],
    "flip": lambda w, x: x[:, ::-1],
    "transpose": lambda w, x: x.transpose(0, 3, 1, 2),
    "depthwise": lambda w, x: jax.lax.conv_general_dilated(
        x, w[:, :, :1], (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=6),
    "a constant row": lambda w, x: jnp.ones((x.shape[0], 3)) * w[0, 0, 0, 0],
    "a pair": lambda w, x: {"a": x, "b": conv(w, x)},
    "jit, remat": lambda w, x: jax.jit(jax.checkpoint(conv))(w, x),
}


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("chunk, size", [(1, 1), (2, 2), (3, 3), (4, 3), (5, 3)])
def test_images_that_do_not_meet(name, chunk, size):
    f, seen = APART[name], []

    def run(w, x):
        seen.append(x.shape)
        return f(w, x)

    found = jax.jit(lambda w, x: in_chunks(f, run, chunk, w, x))(W, X)
    assert set(seen) == {(size, *X.shape[1:])}
    jax.tree.map(np.testing.assert_array_equal, found, jax.jit(f)(W, X)) if name not in ("softmax", "gelu and clip") else (
        jax.tree.map(lambda y, z: np.testing.assert_allclose(y, z, rtol=1e-6), found, jax.jit(f)(W, X)))


MEET = {
    "norm over the batch": lambda w, x: x - x.mean((0, 1, 2)),
    "sum": lambda w, x: x.sum(),
    "order": lambda w, x: x[::-1],
    "shift": lambda w, x: jnp.roll(x, 1, 0),
    "one image for all": lambda w, x: x + x[:1],
    "as many channels as images": lambda w, x: x.mean((1, 2)) @ x.mean((1, 2)),
    "transposed": lambda w, x: x.mean((1, 2)).T,
    "their number": lambda w, x: x / x.shape[0],
    "a number for each": lambda w, x: x + jnp.arange(6.0).reshape(6, 1, 1, 1),
    "a batch of six": lambda w, x: x + jnp.zeros((6, 1, 1, 1)),
    "rows and channels": lambda w, x: x.reshape(-1, 6) + 1,
    "pooling over images": lambda w, x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (2, 1, 1, 1), (1, 1, 1, 1), "SAME"),
    "images as channels": lambda w, x: jax.lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("CHWN", "HWIO", "NHWC")),
    "a branch on their number": lambda w, x: x if x.shape[0] == 6 else -x,
    "sorting": lambda w, x: jnp.sort(x, 0),
    "scan": lambda w, x: jax.lax.scan(lambda c, y: (c + y, c), x[0], x)[1],
    "what all share": lambda w, x: (x, w),
}


@pytest.mark.parametrize("name", MEET)
def test_images_that_meet_run_together(name):
    assert in_chunks(MEET[name], lambda w, x: pytest.fail("run in parts"), 2, W, X) is None


@pytest.mark.parametrize("batch", [X[:2], jnp.float32(1), (X, X[:3]), (), "flag"],
                         ids=["small", "no images", "two sizes", "nothing", "text"])
def test_batches_that_have_no_parts(batch):
    assert in_chunks(lambda w, x: x, lambda w, x: pytest.fail("run in parts"), 2, W, batch) is None


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(8, 64, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(64, rngs=rngs)
        self.again = nnx.Conv(64, 64, (3, 3), rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x, scale=1.0):
        x = nnx.relu(self.norm(self.conv(x)))
        return self.head(self.drop(nnx.max_pool(x + self.again(x), (2, 2), (2, 2))).mean((1, 2))) * scale


def scans(f, *args):
    return [e.params["length"] for e in jax.make_jaxpr(f)(*args).eqns if e.primitive.name == "scan"]


@pytest.mark.parametrize("n, chunk, parts", [(6, 2, [3]), (6, 4, [2]), (6, 6, []), (1, 1, []), (7, 2, [7])])
def test_a_packed_model_runs_a_batch_in_parts(n, chunk, parts):
    model, x = Net(nnx.Rngs(0)), jnp.asarray(DRAW.standard_normal((n, 8, 8, 8), np.float32))
    model.eval()
    table = plan(model, x, HERE)
    whole, packed = (pack_model(model, table, x, chunk=images) for images in (n, chunk))
    for call in (lambda m, x: m(x), lambda m, x: m(x, scale=2.0)):
        assert scans(lambda x, call=call: call(packed, x), x) == parts and scans(lambda x, call=call: call(whole, x), x) == []
        # The same sums of floats, but for the tiles, which may differ: 64 * 9 + 64 terms of about 1 in an output of about 1.
        np.testing.assert_allclose(jax.jit(call)(packed, x), jax.jit(call)(whole, x), rtol=1e-4, atol=1e-4)


def test_the_plan_says_how_many_images():
    model, x = Net(nnx.Rngs(0)), jnp.zeros((16, 8, 8, 8))
    table = plan(model, x, HERE)
    assert table.chunk in [images * HERE.threads for images in CHUNKS]
    assert f"a batch runs {table.chunk} image" in str(table) or table.chunk >= 16
    assert "a batch runs" not in str(plan(model, x[:1], HERE))
    assert plan(model, x, replace(HERE, threads=64)).chunk >= 64, "an image for each thread at least"
    # What costs nothing but its call is called as seldom as can be, what costs nothing but memory beyond a cache in the
    # smallest parts.
    for counts, wanted in (({"call": 1e-3}, CHUNKS[-1]), ({"activation_bytes": 1e-9}, CHUNKS[0])):
        rates = replace(TYPICAL, dense=FREE_DENSE._replace(**counts), sparse=FREE_SPARSE._replace(call=1e9))
        machine = replace(HERE, threads=1, l3_bytes=1 << 18, fitted=rates)
        assert replace(table, machine=machine).all_dense.chunk == wanted
    elsewhere = replace(HERE, isa="another", fitted=TYPICAL)
    assert replace(table, machine=elsewhere).chunk == CHUNKS[-1] * HERE.threads


def test_a_linen_model_does_too():
    net = nn.Sequential([nn.Conv(16, (3, 3)), nn.relu, nn.Conv(8, (1, 1))])
    x = jnp.asarray(DRAW.standard_normal((4, 6, 6, 4), np.float32))
    variables = net.init(jax.random.key(0), x)
    module, packed = pack_model((net, variables), plan((net, variables), x, HERE), x, chunk=2)
    assert scans(lambda x: module.apply(packed, x), x) == [2]
    np.testing.assert_allclose(module.apply(packed, x), net.apply(variables, x), rtol=1e-5, atol=1e-5)


def test_a_chunk_that_is_none():
    model, x = Net(nnx.Rngs(0)), jnp.ones((2, 8, 8, 8))
    with pytest.raises(ValueError, match="chunk=0, wanted a number of images or None"):
        pack_model(model, plan(model, x, HERE), chunk=0)
