"""Eight bits: kernels of int8 words and the convolutions that run them, against exact integers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

from sparseflax import pack, sparse_conv
from sparseflax.conv import ffi, int8_primitive
from sparseflax.conv.int8 import Quantization, QuantizedArray, QuantizedKernel, pack_int8
from sparseflax.conv.window import Window

KERNELS = ffi.kernels("int8") or [None]
INPUTS, OUTPUT = Quantization(0.05, 7), Quantization(0.1, 31)


def draw(*shape, density=0.3, seed=0):
    """A kernel (kh, kw, icg, oc) pruned in blocks of four input channels."""
    random = np.random.default_rng(seed)
    kernel = random.standard_normal(shape).astype(np.float32)
    blocks = random.random((*shape[:2], -(-shape[2] // 4), shape[3])) < density
    return kernel * np.repeat(blocks, 4, axis=2)[:, :, :shape[2]]


def steps(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def integers(packed: QuantizedKernel) -> np.ndarray:
    """The int8 weights, by an arithmetic of its own: the float32 kernel over its scales."""
    return np.rint(np.asarray(packed.unpack(), np.float64) / np.asarray(packed.scale, np.float64)).astype(np.int64)


def exact_sums(x, packed, strides, padding, dilation):
    """sum (x - zero) w in int64, tap by tap."""
    w, groups = integers(packed), packed.groups
    kh, kw, icg, oc = w.shape
    steps = np.pad(x.astype(np.int64) - packed.inputs.zero, ((0, 0), *padding, (0, 0)))
    oh, ow = ((size - (k - 1) * d - 1) // s + 1
              for size, k, d, s in zip(steps.shape[1:3], (kh, kw), dilation, strides, strict=True))
    total = np.zeros((len(x), oh, ow, oc), np.int64)
    for r, q, g in itertools.product(range(kh), range(kw), range(groups)):
        seen = steps[:, r * dilation[0]:, q * dilation[1]:, g * icg:(g + 1) * icg][:, ::strides[0], ::strides[1]][:, :oh, :ow]
        part = slice(g * oc // groups, (g + 1) * oc // groups)
        total[..., part] += seen @ w[r, q][:, part]
    return total


def both(f, *operands):
    """f by the kernel and by plain JAX."""
    @jax.jit
    def results(*operands):
        by_kernel = f(*operands)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(int8_primitive, "bind_int8", int8_primitive.reference)
            return by_kernel, f(*operands)

    return results(*operands)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("shape", "groups", "kind"), [
    ((3, 3, 8, 10), 1, {"strides": (1, 1), "padding": ((1, 1), (1, 1)), "kernel_dilation": (1, 1)}),
    ((3, 2, 5, 6), 2, {"strides": (2, 1), "padding": ((2, 0), (1, 3)), "kernel_dilation": (1, 2)}),
    ((1, 1, 37, 4), 1, {"strides": (1, 1), "padding": ((0, 0), (0, 0)), "kernel_dilation": (1, 1)}),
])
def test_sums_are_exact_and_the_epilogue_is_the_same_everywhere(kernel, shape, groups, kind):
    packed = pack_int8(draw(*shape), INPUTS, groups)
    x = steps(3, 9, 7, shape[2] * groups)
    sums = exact_sums(x, packed, kind["strides"], kind["padding"], kind["kernel_dilation"])
    bias = np.linspace(-3, 3, shape[3], dtype=np.float32)
    residual = QuantizedArray(jnp.asarray(steps(*sums.shape, seed=1)), Quantization(0.2, 100))

    def conv(x, residual, output, activation):
        return sparse_conv(QuantizedArray(x, INPUTS), packed, bias, feature_group_count=groups, kernel=kernel,
                           activation=activation, residual=residual, output=output, **kind)

    scale = np.asarray(packed.scale, np.float64) * INPUTS.scale
    cases = [(False, None, None), (True, None, "relu6"), (True, OUTPUT, None), (False, OUTPUT, "relu")]
    all_got, all_plain = both(lambda x, residual: [conv(x, residual if adds else None, output, activation)
                                                   for adds, output, activation in cases], x, residual)
    for (adds, output, activation), got, plain in zip(cases, all_got, all_plain, strict=True):
        got, plain = (np.asarray(y.values if output else y) for y in (got, plain))
        np.testing.assert_array_equal(got, plain)
        y = sums * scale + bias + ((np.int32(residual.values) - 100) * 0.2 if adds else 0)
        y = y if activation is None else np.clip(y, 0, 6 if activation == "relu6" else np.inf)
        if output is None:
            # Five roundings of 2^-24 and the residual's ratio, rounded to 16 bits: 2^-16 of at most 255 * 0.2.
            np.testing.assert_allclose(got, y, rtol=5 * 2**-24, atol=51 * 2**-16 + 2**-20 * np.abs(sums * scale).max())
        else:
            near = np.clip(y / OUTPUT.scale + OUTPUT.zero, 0, 255)
            assert np.abs(got - near).max() <= 0.5 + 0.01


def test_positions_outside_the_image_are_the_zero_point():
    packed = pack_int8(np.ones((3, 3, 4, 1), np.float32), INPUTS)
    y = sparse_conv(QuantizedArray(jnp.full((1, 2, 2, 4), INPUTS.zero, jnp.uint8), INPUTS), packed)
    np.testing.assert_array_equal(y, 0)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([(1, 1), (3, 2), (4, 5), (5, 1), (8, 3), (9, 4)]), st.floats(0, 1), st.integers(0, 2**31))
def test_packing_rounds_to_the_nearest_step(sizes, density, seed):
    channels, oc = sizes
    kernel = draw(2, 1, channels, oc, density=density, seed=seed)
    packed = pack_int8(kernel, INPUTS)
    dense = np.asarray(packed.unpack())
    assert dense.shape == kernel.shape
    assert (dense[kernel == 0] == 0).all()
    largest = np.abs(kernel).max((0, 1, 2))
    assert (np.abs(dense - kernel) <= largest / 127 * (0.5 + 2**-20)).all()
    np.testing.assert_array_equal(packed.sums, integers(packed).sum((0, 1, 2)))
    back = QuantizedKernel.from_arrays(packed.to_arrays())
    np.testing.assert_array_equal(back.unpack(), dense)
    assert (back.inputs, back.shape, back.pattern) == (packed.inputs, packed.shape, packed.pattern)


def test_a_block_of_four_costs_one_word():
    packed = pack_int8(draw(3, 3, 64, 32, density=0.1), INPUTS)
    assert packed.pattern.nnz == pytest.approx(0.1 * 9 * 16 * 32, rel=0.15)
    assert packed.nbytes < 0.4 * 5 * 4 * packed.pattern.nnz  # of float32 with as many weights


def test_float_inputs_are_quantized_and_nan_is_the_lowest():
    packed = pack_int8(draw(1, 1, 4, 3, density=1.0), INPUTS)
    x = jnp.asarray([np.nan, np.inf, -np.inf, 0.125], jnp.float32).reshape(1, 1, 1, 4)
    q = INPUTS.quantize(x)
    np.testing.assert_array_equal(q.values.ravel(), [0, 255, 0, 9])  # 2.5 steps: ties to even
    np.testing.assert_array_equal(sparse_conv(x, packed), sparse_conv(q, packed))


@pytest.mark.parametrize(("whole", "bounds", "wanted"), [
    (Quantization(0.1, 128), (0.0, np.inf), (12.7 / 255, 0)), (Quantization(0.1, 55), (0.0, 6.0), (6 / 255, 0)),
    (Quantization(0.01, 0), (0.0, 6.0), (0.01, 0)), (Quantization(0.1, 255), (0.0, np.inf), (0.1, 255)),
    (Quantization(0.1, 20), (-np.inf, np.inf), (0.1, 20))])
def test_a_range_between_bounds(whole, bounds, wanted):
    got = whole.between(*bounds)
    assert got.zero == wanted[1] and got.scale == pytest.approx(wanted[0], rel=2.0**-20)


def test_a_float_residual_is_added_in_float32():
    packed, x = pack_int8(draw(1, 1, 4, 3), INPUTS), INPUTS.quantize(jnp.ones((1, 2, 2, 4)))
    residual = jnp.linspace(-20, 20, 12, dtype=jnp.float32).reshape(1, 2, 2, 3)
    y = sparse_conv(x, packed)
    np.testing.assert_array_equal(sparse_conv(x, packed, residual=residual, activation="relu"), jnp.maximum(y + residual, 0))
    got = sparse_conv(x, packed, residual=residual, output=OUTPUT)
    np.testing.assert_array_equal(got.values, OUTPUT.quantize(y + residual).values)


def test_vmap_over_images_and_over_weights():
    packed = pack_int8(draw(3, 3, 4, 3), INPUTS)
    x = steps(2, 3, 5, 5, 4)
    residual = QuantizedArray(jnp.asarray(steps(2, 3, 5, 5, 3, seed=1)), OUTPUT)
    one = [sparse_conv(QuantizedArray(x[i], INPUTS), packed, residual=QuantizedArray(residual.values[i], OUTPUT))
           for i in range(2)]
    mapped = jax.vmap(lambda x, r: sparse_conv(QuantizedArray(x, INPUTS), packed, residual=r))(x, residual)
    np.testing.assert_array_equal(mapped, np.stack(one))
    bias = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    looped = jax.vmap(lambda b: sparse_conv(QuantizedArray(x[0], INPUTS), packed, b))(bias)
    one = np.stack([sparse_conv(QuantizedArray(x[0], INPUTS), packed, b) for b in bias])
    np.testing.assert_allclose(looped, one, rtol=0, atol=2**-23 * np.abs(one).max())  # XLA computes bias / scale in two ways


def test_export_for_any_batch():
    packed = pack_int8(draw(3, 3, 4, 3), INPUTS)
    (n,) = export.symbolic_shape("n")
    checks = [export.DisabledSafetyCheck.custom_call(ffi.INT8_TARGET)]
    f = jax.jit(lambda x: sparse_conv(x, packed, output=OUTPUT).values)
    exported = export.export(f, disabled_checks=checks)(jax.ShapeDtypeStruct((n, 5, 5, 4), np.float32))
    loaded = export.deserialize(exported.serialize())
    x = np.random.default_rng(0).standard_normal((2, 5, 5, 4)).astype(np.float32)
    np.testing.assert_array_equal(loaded.call(x), f(x))


def test_empty_images():
    packed = pack_int8(draw(3, 3, 4, 3), INPUTS)
    assert sparse_conv(jnp.zeros((0, 5, 5, 4)), packed).shape == (0, 5, 5, 3)
    assert sparse_conv(jnp.zeros((1, 2, 2, 4)), packed, padding="VALID", output=OUTPUT).shape == (1, 0, 0, 3)


def test_derivatives_are_refused():
    packed, x = pack_int8(draw(1, 1, 4, 3), INPUTS), jnp.ones((1, 2, 2, 4))
    steps = INPUTS.quantize(x)
    for f, at in ((lambda x: sparse_conv(x, packed).sum(), x),
                  (lambda bias: sparse_conv(steps, packed, bias).sum(), x[0, 0, 0, :3])):
        with pytest.raises(TypeError, match="no derivative: train the float32 model"):
            jax.grad(f)(at)


def test_a_window_beyond_the_panel_runs_as_plain_jax():
    packed = pack_int8(draw(40, 1, 4, 2, density=0.2), INPUTS)
    x = steps(1, 45, 40, 4)
    wide = {"padding": "VALID", "kernel_dilation": (1, 1)}
    got = sparse_conv(QuantizedArray(x, INPUTS), packed, **wide)
    want = exact_sums(x, packed, (1, 1), ((0, 0), (0, 0)), (1, 1)) * (np.asarray(packed.scale) * np.float32(INPUTS.scale))
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_what_is_refused():
    packed, x = pack_int8(draw(3, 3, 4, 3), INPUTS), jnp.ones((1, 5, 5, 4))
    float_packed = pack(draw(3, 3, 4, 3))
    cases = [
        (lambda: Quantization(0.0, 3), ValueError, "wanted one between"),
        (lambda: Quantization(0.1, 256), ValueError, "wanted 0 to 255"),
        (lambda: Quantization.of_range(0, 0), ValueError, "has no steps"),
        (lambda: Quantization.of_range(0, np.inf), ValueError, "not all zero"),
        (lambda: INPUTS.quantize(np.ones(3, np.int32)), TypeError, "wanted float32"),
        (lambda: pack_int8(draw(3, 3, 4, 3), 0.1), TypeError, "wanted a Quantization"),
        (lambda: pack_int8(np.full((1, 1, 4, 1), np.nan, np.float32), INPUTS), ValueError, "non-finite"),
        (lambda: jax.jit(lambda k: pack_int8(k, INPUTS))(draw(3, 3, 4, 3)), TypeError, "pack outside jit"),
        (lambda: pack_int8(np.ones((1, 1, 70_000, 1), np.float32), INPUTS), ValueError, "cannot overflow an int32"),
        (lambda: sparse_conv(QuantizedArray(jnp.zeros((1, 5, 5, 4), jnp.uint8), OUTPUT), packed), ValueError, "packed for"),
        (lambda: sparse_conv(x[0], packed), ValueError, "wanted 4 dimensions"),
        (lambda: sparse_conv(x[..., :3], packed), ValueError, "wants 4"),
        (lambda: sparse_conv(x, packed, feature_group_count=3), ValueError, "call pack_int8"),
        (lambda: sparse_conv(x, packed, activation="tanh"), ValueError, "apply others"),
        (lambda: sparse_conv(x, packed, kernel="sse"), ValueError, "cannot run here"),
        (lambda: sparse_conv(x, packed, jnp.ones(2)), ValueError, "one per output channel"),
        (lambda: sparse_conv(x, packed, jnp.ones(3, jnp.int32)), TypeError, "one per output channel"),
        (lambda: sparse_conv(x, packed, residual=x), ValueError, "wanted the output's shape"),
        (lambda: sparse_conv(x, float_packed, output=OUTPUT), TypeError, "pack_int8"),
        (lambda: QuantizedKernel.from_arrays({"words": np.zeros(1, np.int32)}), ValueError, "to_arrays"),
        (lambda: QuantizedKernel.from_arrays(packed.to_arrays() | {"scale": np.ones(2, np.float32)}),
         ValueError, "no int8 kernel's"),
        (lambda: QuantizedKernel.from_arrays(packed.to_arrays() | {"words": np.full(packed.words.shape, 0x80, np.int32)}),
         ValueError, "-128"),
    ]
    for call, error, message in cases:
        with pytest.raises(error, match=message):
            call()


def test_the_border_checks_again():
    """What Python let through, C++ refuses."""
    if not ffi.available:
        pytest.skip("no native module")
    packed, x = pack_int8(draw(3, 3, 4, 3), INPUTS), jnp.zeros((1, 5, 5, 4), jnp.uint8)
    rescale = int8_primitive.Rescale(7, 0, 0, -1.0, 300.0, False, 1.0, 1.0)
    window = Window((1, 1), ((1, 1), (1, 1)), (1, 1))
    with pytest.raises(jax.errors.JaxRuntimeError, match="bounds do not fit uint8"):
        int8_primitive.bind_int8(x, packed.words, packed.sums, packed.scale, packed.scale, pattern=packed.pattern,
                                 window=window, rescale=rescale, kernel=None)
