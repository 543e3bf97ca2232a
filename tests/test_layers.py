"""The layers compute what Flax's own compute on the same masked weights, and are as usable as they are."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import sparseflax
from sparseflax.layers.rules import unsupported

pytestmark = pytest.mark.usefixtures("strict_dtypes")
EPS = float(jnp.finfo(jnp.float32).eps) / 2
FLAX = nnx.Rngs(0)


def normal(key, shape, dtype=jnp.float32):
    """Weights from NumPy, which compiles nothing."""
    return jnp.asarray(np.random.default_rng(int(np.prod(shape))).standard_normal(shape), dtype)


def conv(*args, density=0.3, use_bias=True, **kwargs):
    """An nnx.Conv with random biases and weights, of which a share `density` is not zero."""
    layer = nnx.Conv(*args, use_bias=use_bias, kernel_init=normal, bias_init=normal, rngs=FLAX, **kwargs)
    prune(layer, density)
    return layer


def linear(*args, density=0.3, **kwargs):
    layer = nnx.Linear(*args, kernel_init=normal, bias_init=normal, rngs=FLAX, **kwargs)
    prune(layer, density)
    return layer


def prune(layer, density):
    kept = np.random.default_rng(2).random(layer.kernel.shape) < density
    layer.kernel.set_value(layer.kernel[...] * kept.astype(layer.kernel.dtype))


def draw(*shape):
    return jnp.asarray(np.random.default_rng(3).standard_normal(shape), jnp.float32)


def assert_close(actual, layer, x):
    wanted, magnitude = jax.jit(lambda layer, large, x: (layer(x), large(abs(x))))(layer, jax.tree.map(np.abs, layer), x)
    assert_near(actual, wanted, magnitude, layer)


def assert_near(actual, wanted, magnitude, layer):
    """Two float32 sums of the same K terms and a bias differ by at most 2 (K + 1) eps sum |terms|."""
    terms = np.prod(layer.kernel.shape[:-1]) + 1
    assert actual.shape == wanted.shape and actual.dtype == wanted.dtype
    assert np.all(np.abs(np.asarray(actual) - np.asarray(wanted)) <= 2 * (terms + 1) * EPS * np.asarray(magnitude))


CONVS = [
    dict(),
    dict(strides=2),
    dict(strides=(2, 1), padding="VALID", use_bias=False),
    dict(padding="SAME_LOWER", strides=2),
    dict(padding=1, kernel_dilation=2),
    dict(padding=[1, (0, 2)], strides=[1, 2]),
    dict(padding="CIRCULAR", strides=2),
    dict(padding="REFLECT", kernel_dilation=(2, 1)),
    dict(feature_group_count=3, kernel_dilation=None, strides=None),
]


@pytest.mark.parametrize("kwargs", CONVS, ids=str)
def test_conv_agrees_with_flax(kwargs):
    dense, x = conv(6, 9, (3, 2), **kwargs), draw(2, 7, 8, 6)
    assert_close(sparseflax.nnx.SparseConv.from_dense(dense)(x), dense, x)


BATCHES = [(), (2,), (2, 3), (0,)]
ROWS = [
    dict(),
    dict(strides=2, padding="VALID", use_bias=False),
    dict(padding="SAME_LOWER", strides=(2,)),
    dict(padding="CAUSAL", kernel_dilation=2),
    dict(padding=1, kernel_dilation=[2]),
    dict(padding=[(0, 2)], strides=[2]),
    dict(padding=[2], feature_group_count=3),
    dict(padding="CIRCULAR", strides=2),
    dict(padding="REFLECT", kernel_dilation=2),
    dict(kernel_dilation=None, strides=None),
]


@pytest.mark.parametrize("size", [3, (1,), (4,)], ids=str)
@pytest.mark.parametrize("kwargs", ROWS, ids=str)
def test_1d_conv_agrees_with_flax(kwargs, size):
    assert_both_agree(conv(6, 9, size, **kwargs), nn.Conv(9, size, **kwargs), [draw(*batch, 11, 6) for batch in BATCHES])


VOLUMES = [
    dict(),
    dict(strides=2, padding="VALID", use_bias=False),
    dict(padding="SAME_LOWER", strides=(2, 1, 2)),
    dict(padding=1, kernel_dilation=(2, 1, 2)),
    dict(padding=[(0, 2), 1, (1, 0)], strides=[1, 2, 3]),
    dict(padding="CIRCULAR", feature_group_count=3),
    dict(padding="REFLECT", kernel_dilation=(2, 1, 1)),
    dict(kernel_dilation=None, strides=None, feature_group_count=2),
]


@pytest.mark.parametrize("size", [(3, 2, 1), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("kwargs", VOLUMES, ids=str)
def test_3d_conv_agrees_with_flax(kwargs, size):
    assert_both_agree(conv(6, 12, size, **kwargs), nn.Conv(12, size, **kwargs), [draw(*batch, 5, 6, 7, 6) for batch in BATCHES])


def assert_both_agree(dense, module, inputs):
    """The sparse layers of NNX and Linen, with a residual and without."""
    params = {name: getattr(dense, name)[...] for name in ("kernel", "bias") if getattr(dense, name) is not None}
    sparse, (packed, packed_params) = sparseflax.nnx.SparseConv.from_dense(dense), sparseflax.linen.SparseConv.from_dense(
        module, params)
    residuals = [draw(*jax.eval_shape(lambda layer, x: layer(x), dense, x).shape) for x in inputs]
    results = jax.jit(lambda dense, large, sparse, params: [
        (sparse(x), sparse(x, residual=residual), packed.apply({"params": params}, x), dense(x), large(abs(x)))
        for x, residual in zip(inputs, residuals, strict=True)])(dense, jax.tree.map(np.abs, dense), sparse, packed_params)
    for (y, added, linen, wanted, magnitude), residual in zip(results, map(np.asarray, residuals), strict=True):
        assert_near(y, wanted, magnitude, dense)
        assert_near(added, np.asarray(wanted) + residual, np.asarray(magnitude) + np.abs(residual), dense)
        np.testing.assert_array_equal(linen, y)


TRANSPOSED = [
    dict(strides=2),
    dict(strides=(2, 3), padding="VALID", use_bias=False),
    dict(padding=((1, 1), (2, 0)), strides=[2, 1]),
    dict(padding=((0, -1), (3, 2)), strides=(3, 2)),
    dict(padding=1, strides=None, kernel_dilation=None),
]


@pytest.mark.parametrize("size", [(2, 2), (4, 3), (1, 5), (3, 3)], ids=str)
@pytest.mark.parametrize("kwargs", TRANSPOSED, ids=str)
def test_transposed_conv_agrees_with_flax(kwargs, size):
    assert_transposed(transposed(5, 7, size, **kwargs), [draw(*batch, 4, 6, 5) for batch in BATCHES])


@pytest.mark.parametrize("kwargs", [
    dict(strides=2), dict(strides=(3,), padding="VALID"), dict(padding=[(1, 0)], strides=2)], ids=str)
def test_1d_transposed_conv_agrees_with_flax(kwargs):
    assert_transposed(transposed(5, 7, 4, **kwargs), [draw(*batch, 9, 5) for batch in BATCHES])


def assert_transposed(dense, inputs):
    results = jax.jit(lambda dense, large, sparse: [(sparse(x), dense(x), large(abs(x))) for x in inputs])(
        dense, jax.tree.map(np.abs, dense), sparseflax.nnx.SparseConvTranspose(dense))
    for result in results:
        assert_near(*result, dense)


@pytest.mark.parametrize("make, reason", [
    (lambda: transposed(4, 5, (3, 3, 3)), "3-D transposed convolution: only 1-D and 2-D are supported; keep it dense"),
    (lambda: transposed(4, 5, (3, 3), kernel_dilation=2), "kernel_dilation=2 of a transposed convolution: only 1 is supported"),
    (lambda: transposed(4, 4, (3, 3), transpose_kernel=True), "transpose_kernel=True: only False is supported"),
    (lambda: transposed(4, 5, (3, 3), padding="CIRCULAR"), "padding='CIRCULAR' of a transposed convolution: only SAME"),
    (lambda: transposed(4, 5, (3, 3), dtype=jnp.bfloat16), "dtype=bfloat16: only float32"),
])
def test_a_transposed_conv_refuses_with_the_reason(make, reason):
    with pytest.raises(ValueError, match=reason):
        sparseflax.nnx.SparseConvTranspose(make())


def transposed(*args, density=0.3, **kwargs):
    layer = nnx.ConvTranspose(*args, kernel_init=normal, bias_init=normal, rngs=FLAX, **kwargs)
    prune(layer, density)
    return layer


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,)], ids=str)
def test_any_number_of_batch_dimensions(batch):
    dense, x = conv(4, 5, (3, 3)), draw(*batch, 6, 6, 4)
    assert_close(sparseflax.nnx.SparseConv.from_dense(dense)(x), dense, x)
    dense, x = linear(7, 5), draw(*batch, 7)
    assert_close(sparseflax.nnx.SparseDense.from_dense(dense)(x), dense, x)


@pytest.mark.parametrize("batch", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("features", [(1024, 16), (2051, 13)], ids=str)
def test_fully_connected_layers_of_several_blocks(features, batch):
    dense, x = linear(*features), draw(batch, features[0])
    assert_close(sparseflax.nnx.SparseDense.from_dense(dense)(x), dense, x)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.uint8, jnp.int32], ids=lambda d: d.__name__)
def test_narrow_inputs_are_promoted(dtype):
    x = jnp.arange(2 * 5 * 5 * 4).reshape(2, 5, 5, 4).astype(dtype)
    layer = sparseflax.nnx.SparseConv.from_dense(conv(4, 5, (3, 3)))
    np.testing.assert_array_equal(layer(x), layer(x.astype(jnp.float32)))


@pytest.mark.parametrize("activation", [None, "relu", "relu6"])
def test_residual_and_activation(activation):
    act = {None: lambda y: y, "relu": jax.nn.relu, "relu6": jax.nn.relu6}[activation]
    dense, x, residual = conv(4, 5, (3, 3), strides=2), draw(2, 1, 6, 6, 4), draw(2, 1, 3, 3, 5)
    sparse = sparseflax.nnx.SparseConv.from_dense(dense, activation)
    # The fused sum may round differently: 40 terms of order 1.
    np.testing.assert_allclose(sparse(x, residual=residual), act(dense(x) + residual), rtol=0, atol=40 * 8 * EPS * 2)
    dense, x, residual = linear(7, 5), draw(2, 3, 7), draw(2, 3, 5)
    sparse = sparseflax.nnx.SparseDense.from_dense(dense, activation)
    np.testing.assert_allclose(sparse(x, residual=residual), act(dense(x) + residual), rtol=0, atol=10 * 8 * EPS * 2)


def test_flax_mask_is_packed():
    mask = np.random.default_rng(0).random((3, 3, 4, 5)) < 0.5
    dense = nnx.Conv(4, 5, (3, 3), mask=jnp.asarray(mask, jnp.float32), kernel_init=normal, rngs=FLAX)
    sparse = sparseflax.nnx.SparseConv.from_dense(dense)
    np.testing.assert_array_equal(sparse.kernel.unpack(), np.where(mask, dense.kernel[...], 0))


@pytest.mark.parametrize("ours, flax", [
    (sparseflax.nnx.SparseConv, nnx.Conv), (sparseflax.nnx.SparseDense, nnx.Linear),
    (sparseflax.linen.SparseConv, nn.Conv), (sparseflax.linen.SparseDense, nn.Dense)], ids=lambda c: c.__module__ + c.__name__)
def test_names_and_defaults_are_those_of_flax(ours, flax):
    def plain(default):  # initializers are closures: compare what made them
        return getattr(default, "__qualname__", default)

    ours, flax = (inspect.signature(c.__init__).parameters for c in (ours, flax))
    assert set(ours) - set(flax) == {"activation", "pattern"}
    assert {n: (plain(p.default), p.kind) for n, p in ours.items() if n in flax} == {
        n: (plain(p.default), p.kind) for n, p in flax.items() if n in ours}
    assert [n for n in ours if n in flax] == [n for n in flax if n in ours]


def test_fresh_layers_start_with_the_weights_of_flax():
    init = nnx.initializers.uniform()  # the default takes seconds to compile
    sparse = sparseflax.nnx.SparseConv(3, 8, (1, 1), kernel_init=init, bias_init=init, rngs=nnx.Rngs(5))
    dense = nnx.Conv(3, 8, (1, 1), kernel_init=init, bias_init=init, rngs=nnx.Rngs(5))
    np.testing.assert_array_equal(sparse.kernel.unpack(), dense.kernel[...])
    np.testing.assert_array_equal(sparse.bias[...], dense.bias[...])
    sparse = sparseflax.nnx.SparseDense(3, 8, kernel_init=init, rngs=nnx.Rngs(5))
    dense = nnx.Linear(3, 8, kernel_init=init, rngs=nnx.Rngs(5))
    np.testing.assert_array_equal(sparse.kernel.unpack()[0, 0], dense.kernel[...])


def test_pattern_chooses_the_weights_and_training_keeps_it():
    mask = np.asarray(np.random.default_rng(0).random((3, 3, 4, 8)) < 0.2, np.float32)
    layer = sparseflax.nnx.SparseConv(4, 8, (3, 3), pattern=sparseflax.pack(mask).pattern, kernel_init=normal, rngs=FLAX)
    x, y = draw(4, 6, 6, 4), draw(4, 6, 6, 8)
    optimizer = nnx.Optimizer(layer, optax.sgd(0.05), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(layer, optimizer):
        traces.append(1)
        loss, grads = nnx.value_and_grad(lambda layer: jnp.mean((layer(x) - y) ** 2))(layer)
        optimizer.update(layer, grads)
        return loss

    losses = [float(step(layer, optimizer)) for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
    assert len(traces) == 1, "new values should not compile again"
    np.testing.assert_array_equal(layer.kernel.unpack() != 0, mask != 0)


def test_gradients_are_those_of_the_dense_layer_at_the_kept_weights():
    dense, x = conv(4, 5, (3, 3)), draw(2, 6, 6, 4)
    sparse = sparseflax.nnx.SparseConv.from_dense(dense)
    want = nnx.grad(lambda layer: jnp.sum(jnp.sin(layer(x))))(dense)
    got = nnx.grad(lambda layer: jnp.sum(jnp.sin(layer(x))))(sparse)
    # Sums of 72 products of order 1, and their inputs are off by what the forward pass allows.
    np.testing.assert_allclose(got["values"][...], want["kernel"][...].reshape(-1)[sparse.pattern.index], atol=72 * 40 * EPS)
    np.testing.assert_allclose(got["bias"][...], want["bias"][...], atol=72 * 40 * EPS)


@pytest.mark.parametrize("graph_mode", [True, False])
def test_transformations_and_state(graph_mode):
    class Net(nnx.Module):
        def __init__(self):
            self.conv = sparseflax.nnx.SparseConv.from_dense(conv(4, 5, (3, 3)), "relu")
            self.dense = sparseflax.nnx.SparseDense.from_dense(linear(5, 3))

        def __call__(self, x):
            return self.dense(self.conv(x).mean((-3, -2)))

    with nnx.set_graph_mode(graph_mode):
        net, x = Net(), draw(2, 6, 6, 4)
        want = net(x)
        graphdef, state = nnx.split(net)
        assert sorted("/".join(map(str, path)) for path, _ in nnx.to_flat_state(state)) == [
            "conv/bias", "conv/values", "dense/bias", "dense/values"]
        for y in (nnx.jit(lambda net, x: net(x))(net, x), jax.jit(lambda net, x: net(x))(net, x),
                  jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)):
            # XLA may sum the mean in another order: 36 terms, then 5 products.
            np.testing.assert_allclose(y, want, atol=64 * EPS * float(jnp.abs(want).max() + 1))
        other = Net()
        nnx.update(other, jax.tree.map(jnp.zeros_like, nnx.state(other)))
        assert not np.any(other(x))
        nnx.update(other, nnx.state(net))
        np.testing.assert_array_equal(other(x), want)


def test_linen_agrees_with_nnx():
    dense, x = conv(4, 6, (3, 3), strides=2, feature_group_count=2), draw(2, 6, 6, 4)
    params = {"kernel": dense.kernel[...], "bias": dense.bias[...]}
    layer = nn.Conv(6, (3, 3), 2, feature_group_count=2)
    module, packed = sparseflax.linen.SparseConv.from_dense(layer, params, "relu")
    assert sorted(packed) == ["bias", "values"]
    want = sparseflax.nnx.SparseConv.from_dense(dense, "relu")
    np.testing.assert_array_equal(jax.jit(module.apply)({"params": packed}, x), want(x))
    dense, x = linear(4, 6), draw(2, 3, 4)
    params = {"kernel": dense.kernel[...], "bias": dense.bias[...]}
    module, packed = sparseflax.linen.SparseDense.from_dense(nn.Dense(6), params)
    np.testing.assert_array_equal(module.apply({"params": packed}, x), sparseflax.nnx.SparseDense.from_dense(dense)(x))


def test_linen_layers_initialize_and_train_inside_a_model():
    mask = np.asarray(np.random.default_rng(0).random((3, 3, 4, 8)) < 0.2, np.float32)
    pattern = sparseflax.pack(mask).pattern

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = sparseflax.linen.SparseConv(8, (3, 3), activation="relu", kernel_init=normal, pattern=pattern)(x)
            return sparseflax.linen.SparseDense(3, use_bias=False, kernel_init=normal)(x.mean((1, 2)))

    net, x = Net(), draw(2, 6, 6, 4)
    params = jax.jit(net.init)(jax.random.key(0), x)["params"]
    shapes = jax.tree.map(jnp.shape, params)
    assert shapes == {"SparseConv_0": {"values": (int(mask.sum()),), "bias": (8,)}, "SparseDense_0": {"values": (24,)}}
    grads = jax.jit(jax.grad(lambda params: jnp.sum(net.apply({"params": params}, x) ** 2)))(params)
    assert jax.tree.map(jnp.shape, grads) == shapes and all(np.any(g) for g in jax.tree.leaves(grads))


REFUSED = [
    (lambda: conv(4, 5, (1, 1, 1, 2)), "4-D convolution: only 1-D, 2-D and 3-D are supported; keep it dense"),
    (lambda: conv(4, 5, 3, input_dilation=2), "input_dilation=2: only 1"),
    (lambda: conv(4, 5, (3, 3), input_dilation=2), "input_dilation=2: only 1"),
    (lambda: conv(4, 5, (3, 3), padding="CAUSAL"), "padding='CAUSAL' is not a 2-D padding"),
    (lambda: conv(4, 5, (3, 3), padding=[(-1, 0), 0]), "none negative"),
    (lambda: conv(4, 5, (3, 3), dtype=jnp.bfloat16), "dtype=bfloat16: only float32"),
    (lambda: conv(4, 5, (3, 3), conv_general_dilated=lambda *a, **k: None), "conv_general_dilated of its own"),
    (lambda: Standardized(4, 5, (3, 3), kernel_init=normal, rngs=FLAX), "Standardized has a __call__ of its own"),
]


class Standardized(nnx.Conv):
    def __call__(self, inputs):
        raise NotImplementedError


@pytest.mark.parametrize("make, reason", REFUSED, ids=[r for _, r in REFUSED])
def test_from_dense_refuses_with_the_reason(make, reason):
    with pytest.raises(ValueError, match=reason):
        sparseflax.nnx.SparseConv.from_dense(make())


def test_a_subclass_that_only_builds_differently_is_supported():
    class Mine(nnx.Conv):
        pass

    assert unsupported(Mine(4, 5, (3, 3), kernel_init=normal, rngs=FLAX)) is None


def test_bad_arguments():
    new, dense = sparseflax.nnx.SparseConv, sparseflax.nnx.SparseDense
    pattern = sparseflax.pack(np.ones((3, 3, 4, 5), np.float32)).pattern

    def small():
        return new(4, 5, (3, 3), kernel_init=normal, rngs=FLAX)

    for error, message, call in [
        (ValueError, "SparseConv: 4-D convolution.*keep Flax's own", lambda: new(4, 5, (1, 1, 1, 2), rngs=FLAX)),
        (ValueError, r"inputs have shape \(6, 6, 4\), wanted \(..., id, ih, iw, 4\)",
         lambda: new(4, 5, (2, 1, 1), kernel_init=normal, rngs=FLAX)(jnp.ones((6, 6, 4)))),
        (TypeError, "layer is a Conv, wanted an nnx.ConvTranspose",
         lambda: sparseflax.nnx.SparseConvTranspose(conv(4, 5, (3, 3)))),
        (ValueError, r"inputs have shape \(4,\), wanted \(..., iw, 4\)", lambda: new(4, 5, 3, rngs=FLAX)(jnp.ones(4))),
        (ValueError, "param_dtype=bfloat16", lambda: dense(4, 5, param_dtype=jnp.bfloat16, rngs=FLAX)),
        (ValueError, "activation='tanh', wanted one of", lambda: new(4, 5, (3, 3), activation="tanh", rngs=FLAX)),
        (ValueError, "pattern is for a kernel", lambda: new(4, 6, (3, 3), pattern=pattern, rngs=FLAX)),
        (TypeError, "pattern is a ndarray.*pack", lambda: new(4, 6, (3, 3), pattern=np.ones(3), rngs=FLAX)),
        (TypeError, "layer is a Linear, wanted an nnx.Conv", lambda: new.from_dense(linear(4, 5))),
        (TypeError, "layer is a Conv, wanted an nnx.Linear", lambda: dense.from_dense(conv(4, 5, (3, 3)))),
        (TypeError, "layer is a Dense, wanted a linen.Conv", lambda: sparseflax.linen.SparseConv.from_dense(nn.Dense(4), {})),
        (TypeError, "layer is a Conv, wanted a linen.Dense",
         lambda: sparseflax.linen.SparseDense.from_dense(nn.Conv(4, (3, 3)), {})),
        (TypeError, "traced kernel.*pack outside jit", lambda: nnx.jit(new.from_dense)(conv(4, 5, (3, 3)))),
        (ValueError, r"inputs have shape \(4, 4\), wanted \(..., ih, iw, 4\)",
         lambda: small()(jnp.ones((4, 4)))),
        (ValueError, "x has 3 channels", lambda: small()(jnp.ones((4, 4, 3)))),
        (ValueError, "residual has shape", lambda: small()(jnp.ones((4, 4, 4)), residual=jnp.ones(5))),
        (ValueError, "residual has shape",
         lambda: dense(4, 5, kernel_init=normal, rngs=FLAX)(jnp.ones((2, 4)), residual=jnp.ones(5))),
        (TypeError, "x has dtype complex64", lambda: small()(jnp.ones((4, 4, 4), jnp.complex64))),
        (ValueError, "4-D convolution", lambda: sparseflax.linen.SparseConv(4, (1, 1, 1, 2)).init(
            jax.random.key(0), jnp.ones((1, 4, 4, 4, 4, 4)))),
    ]:
        with pytest.raises(error, match=message):
            call()
