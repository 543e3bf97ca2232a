"""Values of `sparse_conv`: the product of shapes and windows against float64 and XLA, properties, bad input, threads."""

import functools
import itertools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from reference import integers, normal_kernel

import sparseflax as sf
from sparseflax.conv import ffi
from sparseflax.conv.packing import Pattern

pytestmark = pytest.mark.usefixtures("strict_dtypes")
KERNELS = ffi.kernels() or [None]
ACTIVATIONS = (None, "relu", "relu6")

# n, ih, iw, ic / groups, groups, oc, kh, kw: at and beside the edges of vectors (4, 8, 16), tiles, channel blocks and windows
SHAPES = [
    (1, 1, 1, 33, 1, 17, 3, 3),
    (2, 7, 7, 20, 1, 17, 3, 3),
    (1, 13, 16, 16, 1, 16, 3, 3),
    (17, 4, 5, 3, 1, 1, 2, 3),
    (3, 15, 17, 8, 2, 10, 3, 3),
    (8, 8, 8, 1, 6, 12, 3, 3),
    (1, 9, 31, 5, 1, 9, 5, 5),
    (2, 3, 33, 17, 1, 15, 1, 7),
    (2, 33, 3, 15, 1, 8, 7, 1),
    (1, 23, 27, 3, 1, 7, 11, 11),
    (5, 14, 9, 130, 1, 10, 1, 1),
    (16, 1, 1, 129, 3, 33, 1, 1),
]
STRIDES = [(1, 1), (2, 1), (3, 3)]
PADDINGS = ["SAME", "VALID", ((2, 1), (0, 3))]
DILATIONS = [(1, 1), (2, 2), (1, 3)]
DENSITIES = [0.1, 0.0, 1.0]


def xla_conv(x, kernel, strides, padding, dilation, groups):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, rhs_dilation=dilation, feature_group_count=groups,
                                        dimension_numbers=("NHWC", "HWIO", "NHWC"))


def xla_epilogue(y, bias=None, residual=None, activation=None):
    y = y if bias is None else y + bias.reshape(1, 1, 1, -1)
    y = y if residual is None else y + residual
    return {None: lambda a: a, "relu": jax.nn.relu, "relu6": jax.nn.relu6}[activation](y)


@functools.cache
def problems(shape):
    """Operands (x, kernel, bias, residual), statics (window, activation), exact output and its bound; all combinations."""
    n, ih, iw, icg, groups, oc, kh, kw = shape
    random = np.random.default_rng(shape)
    x = random.standard_normal((n, ih, iw, icg * groups)).astype(np.float32)
    kernels = [normal_kernel(random, (kh, kw, icg, oc), density) for density in DENSITIES]
    found = []
    for i, (strides, padding, dilation, kernel) in enumerate(itertools.product(STRIDES, PADDINGS, DILATIONS, kernels)):
        window = {"strides": strides, "padding": padding, "dilation": dilation, "groups": groups}
        y = reference.conv(x, kernel, **window)
        bias = random.standard_normal(oc).astype(np.float32) if i % 4 else None
        residual = random.standard_normal(y.shape).astype(np.float32) if i % 2 else None
        activation = ACTIVATIONS[i // 2 % 3]
        found.append(((x, kernel, bias, residual), (window, activation),
                      reference.epilogue(y, bias, residual, activation), reference.bound(x, kernel, bias, residual, **window)))
    return found


def check(outputs, found):
    for y, (_, statics, exact, bound) in zip(outputs, found, strict=True):
        assert y.shape == exact.shape and y.dtype == jnp.float32, statics
        assert np.all(np.abs(np.asarray(y, np.float64) - exact) <= bound), statics


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "n{}_{}x{}x{}_g{}_{}_k{}x{}".format(*s))
@pytest.mark.parametrize("kernel", KERNELS)
def test_product(kernel, shape):
    """Every window, density and epilogue of a shape in one program: compiling each alone would take most of the time."""
    operands, statics, _, _ = zip(*problems(shape), strict=True)

    @jax.jit
    def ours(calls):
        return [sf.sparse_conv(x, packed, bias, strides=w["strides"], padding=w["padding"], kernel_dilation=w["dilation"],
                               feature_group_count=w["groups"], activation=activation, residual=residual, kernel=kernel)
                for (x, packed, bias, residual), (w, activation) in zip(calls, statics, strict=True)]

    check(ours([(x, sf.pack(k, shape[4]), bias, residual) for x, k, bias, residual in operands]), problems(shape))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "n{}_{}x{}x{}_g{}_{}_k{}x{}".format(*s))
def test_xla_agrees_with_the_reference(shape):
    """What lets the float64 reference stand for `lax.conv_general_dilated`: its float32 obeys the same bound."""
    found = problems(shape)[:: len(DENSITIES)]
    operands, statics, _, _ = zip(*found, strict=True)

    @jax.jit
    def dense(calls):
        return [xla_epilogue(xla_conv(x, kernel, **w), bias, residual, activation)
                for (x, kernel, bias, residual), (w, activation) in zip(calls, statics, strict=True)]

    check(dense(list(operands)), found)


@st.composite
def convolutions(draw):
    """x, kernel and keyword arguments of a small convolution of whole numbers, which float32 computes exactly."""
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    groups = draw(st.integers(1, 2))
    n, icg, ocg = draw(st.integers(1, 5)), draw(st.integers(1, 18)), draw(st.integers(1, 9))
    kh, kw = draw(st.sampled_from([(1, 1), (3, 3), (2, 3), (1, 5)]))
    ih, iw = draw(st.integers(5, 12)), draw(st.integers(5, 12))
    shape = (kh, kw, icg, ocg * groups)
    kernel = integers(random, *shape) * (random.random(shape) < draw(st.sampled_from([0.1, 0.5]))).astype(np.float32)
    window = {"strides": draw(st.integers(1, 2)), "padding": draw(st.sampled_from(["SAME", "VALID", 1])),
              "kernel_dilation": draw(st.integers(1, 2)), "feature_group_count": groups}
    return integers(random, n, ih, iw, icg * groups), kernel, window


@hypothesis.given(convolutions(), st.integers(-3, 3))
def test_linear_in_the_values(convolution, factor):
    x, kernel, window = convolution
    packed = sf.pack(kernel, window["feature_group_count"])
    a = np.asarray(packed.values)
    b = np.float32(factor) * a + np.float32(1)
    y, z, both = (np.asarray(sf.sparse_conv(x, sf.PackedKernel(v, packed.pattern), **window)) for v in (a, b, a + b))
    assert np.array_equal(y + z, both)


@hypothesis.given(convolutions(), st.integers(0, 3), st.integers(0, 3))
def test_translation_equivariant(convolution, down, right):
    """An image moved inside a frame of zeros moves its output by as much, times the stride."""
    x, kernel, window = convolution
    stride, packed = window["strides"], sf.pack(kernel, window["feature_group_count"])
    window |= {"padding": "VALID"}
    frame = [np.pad(x, [(0, 0), (8 + dy, 16 - dy), (8 + dx, 16 - dx), (0, 0)])
             for dy, dx in [(0, 0), (down * stride, right * stride)]]
    y, moved = (np.asarray(sf.sparse_conv(f, packed, **window)) for f in frame)
    assert np.array_equal(y[:, :y.shape[1] - down, :y.shape[2] - right], moved[:, down:, right:])


@hypothesis.given(convolutions(), st.randoms(use_true_random=False))
def test_images_of_a_batch_are_independent(convolution, random):
    x, kernel, window = convolution
    packed = sf.pack(kernel, window["feature_group_count"])
    order = random.sample(range(len(x)), len(x))
    assert np.array_equal(sf.sparse_conv(x[order], packed, **window), np.asarray(sf.sparse_conv(x, packed, **window))[order])


@hypothesis.given(convolutions())
def test_nothing_kept_leaves_the_bias(convolution):
    x, kernel, window = convolution
    bias = np.arange(kernel.shape[3], dtype=np.float32) - 3
    packed = sf.pack(np.zeros_like(kernel), window["feature_group_count"])
    y = sf.sparse_conv(x, packed, bias, **window, activation="relu")
    assert packed.nnz == 0 and np.array_equal(y, np.broadcast_to(np.maximum(bias, 0), y.shape))


@pytest.mark.parametrize("kernel", KERNELS)
def test_channels_without_weights(kernel):
    """Whole output channels, input channels and groups pruned away."""
    random = np.random.default_rng(0)
    dense = integers(random, 3, 3, 20, 34)
    dense[..., [0, 5, 16, 33]] = 0
    dense[:, :, [0, 19]] = 0
    dense[..., 17:] = 0
    x = integers(random, 2, 9, 9, 40)
    y = sf.sparse_conv(x, sf.pack(dense, 2), feature_group_count=2, kernel=kernel)
    assert np.array_equal(y, reference.conv(x, dense, groups=2))


@pytest.mark.parametrize(("shape", "kernel_shape", "window"), [
    ((1, 33, 33, 16), (3, 3, 16, 4), {"kernel_dilation": 12}),
    ((2, 20, 20, 16), (31, 31, 16, 3), {}),
    ((1, 40, 40, 2), (3, 3, 2, 3), {"strides": 200}),
    ((1, 5, 5, 2), (3, 3, 2, 3), {"padding": 40}),
], ids=["dilation", "window", "stride", "padding"])
def test_extreme_windows(shape, kernel_shape, window):
    random = np.random.default_rng(1)
    x, dense = integers(random, *shape), integers(random, *kernel_shape)
    pad = window.get("padding", "SAME")
    exact = reference.conv(x, dense, strides=(window.get("strides", 1),) * 2, dilation=(window.get("kernel_dilation", 1),) * 2,
                           padding=pad if isinstance(pad, str) else ((pad, pad), (pad, pad)))
    assert np.array_equal(sf.sparse_conv(x, sf.pack(dense), **window), exact)


@pytest.mark.parametrize(("shape", "padding"), [
    ((0, 5, 5, 4), "SAME"), ((2, 0, 5, 4), "SAME"), ((2, 0, 5, 4), 2), ((2, 2, 9, 4), "VALID")])
def test_empty(shape, padding):
    """Empty batches and images and windows that do not fit: what XLA returns, and gradients of zero."""
    x, dense = np.ones(shape, np.float32), np.ones((3, 3, 4, 5), np.float32)
    pads = padding if isinstance(padding, str) else ((padding, padding),) * 2
    want = xla_conv(x, dense, (1, 1), pads, (1, 1), 1)
    packed = sf.pack(dense)
    bias = np.ones(5, np.float32)
    for f in (sf.sparse_conv, jax.jit(sf.sparse_conv, static_argnames="padding")):
        y = f(x, packed, bias, padding=padding)
        assert y.shape == want.shape and np.array_equal(y, xla_epilogue(want, bias))
    grads = jax.grad(lambda x, p: jnp.sum(sf.sparse_conv(x, p, padding=padding)), argnums=(0, 1))(x, packed)
    assert grads[0].shape == shape and not np.any(grads[1].values)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_and_inf_propagate_as_in_xla(kernel, density, activation):
    """0 * inf is nan: pruned weights see it too."""
    random = np.random.default_rng(2)
    x = random.standard_normal((3, 11, 14, 21)).astype(np.float32)
    dense, bias = normal_kernel(random, (3, 3, 21, 18), density), random.standard_normal(18).astype(np.float32)
    clean = x.copy()
    for i, bad in enumerate((np.nan, np.inf, -np.inf)):
        x[i, 3 * i, 2 * i, 7 * i], clean[i, 3 * i, 2 * i, 7 * i] = bad, 0
    y = np.asarray(sf.sparse_conv(x, sf.pack(dense), bias, strides=(1, 2), activation=activation, kernel=kernel))
    want = np.asarray(xla_epilogue(xla_conv(x, dense, (1, 2), "SAME", (1, 1), 1), bias, activation=activation))
    assert np.isnan(want).any() and np.array_equal(np.isnan(y), np.isnan(want))
    assert density < 1 or activation == "relu6" or np.isinf(want).any()
    assert np.array_equal(np.where(np.isinf(y), y, 0), np.where(np.isinf(want), want, 0))
    finite = np.isfinite(want)
    bound = 2 * reference.bound(clean, dense, bias, strides=(1, 2))
    assert np.all(np.abs(y[finite] - want[finite]) <= bound[finite])


X = np.ones((2, 8, 9, 4), np.float32)
DENSE = np.ones((3, 3, 4, 6), np.float32)
PACKED = sf.pack(DENSE)


@pytest.mark.parametrize(("call", "error", "match"), [
    (lambda: sf.sparse_conv(X, DENSE), TypeError, "packed is a ndarray, wanted a PackedKernel: call sparseflax.pack"),
    (lambda: sf.sparse_conv(X.astype(jnp.bfloat16), PACKED), TypeError, "x has dtype bfloat16, wanted float32: cast it"),
    (lambda: sf.sparse_conv(X, PACKED, np.ones(6, np.int32)), TypeError, "bias has dtype int32"),
    (lambda: sf.sparse_conv(X[0], PACKED), ValueError, r"x has shape \(8, 9, 4\), wanted 4 dimensions .*x\[None\]"),
    (lambda: sf.sparse_conv(X, PACKED, feature_group_count=2), ValueError, r"packed for 1 groups: call pack\(kernel, .*=2\)"),
    (lambda: sf.sparse_conv(X[..., :3], PACKED), ValueError, r"x has 3 channels .* wants 4"),
    (lambda: sf.sparse_conv(X, jax.tree.map(lambda v: v[1:], PACKED)), ValueError, r"shape \(215,\), its pattern keeps 216"),
    (lambda: sf.sparse_conv(X, PACKED, activation="gelu"), ValueError, r"activation='gelu', wanted one of \[None, 'relu'"),
    (lambda: sf.sparse_conv(X, PACKED, kernel="sse"), ValueError, "kernel='sse' cannot run here, wanted one of"),
    (lambda: sf.sparse_conv(X, PACKED, np.ones(5, np.float32)), ValueError, r"bias has shape \(5,\), wanted \(6,\)"),
    (lambda: sf.sparse_conv(X, PACKED, residual=X), ValueError, r"residual has shape \(2, 8, 9, 4\), wanted .* \(2, 8, 9, 6\)"),
    (lambda: sf.sparse_conv(X, PACKED, strides=0), ValueError, "strides=0, wanted one or two positive ints"),
    (lambda: sf.sparse_conv(X, PACKED, strides=(1.5, 2)), ValueError, r"strides=\(1.5, 2\), wanted one or two positive ints"),
    (lambda: sf.sparse_conv(X, PACKED, kernel_dilation=(1, 2, 3)), ValueError, r"kernel_dilation=\(1, 2, 3\), wanted"),
    (lambda: sf.sparse_conv(X, PACKED, padding="same"), ValueError, 'padding=\'same\', wanted "SAME", "VALID"'),
    (lambda: sf.sparse_conv(X, PACKED, padding=((0, 1), -1)), ValueError, r"padding=\(\(0, 1\), -1\), wanted .* none negative"),
    (lambda: sf.sparse_conv(X, PACKED, padding=0.5), ValueError, "padding=0.5, wanted an int or two"),
])
def test_refuses(call, error, match):
    with pytest.raises(error, match=match):
        call()


def damaged(gaps, shape=PACKED.shape, groups=1, block=4):
    """A PackedKernel made behind the back of `pack` and `from_arrays`."""
    pattern = Pattern(shape, groups, block, np.asarray(gaps, np.uint8))
    return sf.PackedKernel(jnp.ones(pattern.nnz), pattern)


@pytest.mark.skipif(not ffi.available, reason="the check is the native module's")
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("packed", "match"), [
    (damaged([0] * 217), "points outside its kernel"),
    (damaged([216]), "points outside its kernel"),
    (damaged([255, 0]), "points outside its kernel"),
    (damaged([27], block=3), None),
    (damaged([3 * 9 * 6 + 9], block=3), "points outside its kernel"),  # channel 4 of 4, in the padding of the last block
    (damaged([0], block=0), "not positive"),
    (damaged([0], block=5), "channel block is larger"),
    (damaged([255] * 100_000), None),
])
def test_damaged_patterns(packed, match, kernel):
    """The last guard, in C++: an error when the program is compiled or run, never an access outside."""
    if match is None:
        y = sf.sparse_conv(X, packed, kernel=kernel)
        assert np.array_equal(y, reference.conv(X, packed.unpack()))
    else:
        with pytest.raises(jax.errors.JaxRuntimeError, match=match):
            sf.sparse_conv(X, packed, kernel=kernel)


def independent_calls(count: int):
    """A program of `count` convolutions, each worth several threads, and what it returns."""
    random = np.random.default_rng(3)
    x = integers(random, 2, 24, 24, 32)
    kernels = [integers(random, 3, 3, 32, 64) * (random.random((3, 3, 32, 64)) < 0.1).astype(np.float32) for _ in range(count)]
    program = jax.jit(lambda x, packed: [sf.sparse_conv(x, p) for p in packed])
    return functools.partial(program, x, [sf.pack(k) for k in kernels]), functools.partial(jax.jit(
        lambda x, kernels: [xla_conv(x, k, (1, 1), "SAME", (1, 1), 1) for k in kernels]), x, kernels)


def test_many_independent_calls_in_one_program():
    ours, dense = independent_calls(64)
    assert all(np.array_equal(y, want) for y, want in zip(ours(), dense(), strict=True))


def test_python_threads_share_a_program():
    ours, dense = independent_calls(4)
    want = [np.asarray(y) for y in dense()]
    with ThreadPoolExecutor(4) as threads:
        for outputs in threads.map(lambda _: [ours() for _ in range(5)], range(4)):
            assert all(np.array_equal(y, w) for call in outputs for y, w in zip(call, want, strict=True))


def test_one_worker_does_not_deadlock():
    """The intra-op pool of a one-core machine: whoever waits has to work too."""
    script = ("import test_conv; test_conv.test_many_independent_calls_in_one_program(); "
              "test_conv.test_python_threads_share_a_program(); print('done')")
    done = subprocess.run([sys.executable, "-c", script], env=os.environ | {"NPROC": "1", "JAX_PLATFORMS": "cpu"}, timeout=120,
                          cwd=os.path.dirname(__file__), capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr
