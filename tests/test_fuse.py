"""That fused functions compute what they did, and that what should join or change form does, seen in jaxprs and compiled HLO.

Values are small integers wherever equality is asked for: float32 sums of them are exact in any order.
"""

import math
import re
import warnings
from collections import Counter

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

import sparseflax
from sparseflax import fuse, pack_model, plan
from sparseflax.conv import ffi
from tests import reference
from tests.compilation import AS_FOR_USERS
from tests.machines import HERE

pytestmark = pytest.mark.usefixtures("strict_dtypes")
DRAW = np.random.default_rng(0)
X = jnp.asarray(reference.integers(DRAW, 2, 6, 6, 8))
KERNEL = reference.integers(DRAW, 3, 3, 8, 8) * (DRAW.random((3, 3, 8, 8)) < 0.3).astype(np.float32)
PACKED, OTHER = sparseflax.pack(KERNEL), sparseflax.pack(KERNEL[::-1])
DENSE = sparseflax.pack(KERNEL[:1, :1])
BIAS = jnp.asarray(reference.integers(DRAW, 8))
NHWC = ("NHWC", "HWIO", "NHWC")


def conv(x, packed=PACKED):
    return sparseflax.sparse_conv(x, packed)


def avg_pool(*args, **kwargs):
    with jax.numpy_dtype_promotion("standard"):  # Flax divides by an integer
        return nnx.avg_pool(*args, **kwargs)


def equations(f, *args):
    """All equations of a function's jaxpr, those of the calls in it included."""
    def walk(jaxpr):
        for equation in jaxpr.eqns:
            inner = [getattr(value, "jaxpr", value) for value in jax.tree.leaves(
                equation.params, is_leaf=lambda value: hasattr(getattr(value, "jaxpr", value), "eqns"))]
            found = [value for value in inner if hasattr(value, "eqns") and not equation.primitive.name.startswith("sparse_")]
            yield from (part for value in found for part in walk(value))
            if not found:
                yield equation

    return list(walk(jax.make_jaxpr(f)(*args).jaxpr))


def steps(f, *args):
    """All steps of a function's programs, in order."""
    return [step for e in equations(f, *args) if e.primitive.name == "sparse_program" for step in e.params["program"].steps]


def names(f, *args):
    """Of the equations, and of the steps of programs: those of arithmetic by what they do."""
    inside = (step.params[0] if step.op in ("combine", "map") else step.op for step in steps(f, *args))
    return Counter([*(equation.primitive.name for equation in equations(f, *args)), *inside])


def epilogues(f, *args):
    """(has bias, has residual, activation) of the sparse convolutions, in order."""
    found = []
    for e in equations(f, *args):
        if e.primitive.name == "sparse_conv":
            found.append((e.params["has_bias"], e.params["has_residual"], e.params["activation"]))
        if e.primitive.name == "sparse_program":
            for step in e.params["program"].steps:
                if step.op == "conv":
                    _, activation, has_bias, has_residual = step.params
                    found.append((has_bias, has_residual, activation))
    return found


def both(f, *args):
    """What the fused form of a function returns, and what it itself does: one compilation."""
    return jax.jit(lambda *args: (fuse(f)(*args), f(*args)))(*args)


def agrees(f, *args):
    """That a function and its fused form return the same values."""
    same(*both(f, *args))


def same(result, wanted):
    assert jax.tree.structure(result) == jax.tree.structure(wanted)
    for got, want in zip(jax.tree.leaves(result), jax.tree.leaves(wanted), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)


class Scale(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(conv(x) + self.param("bias", lambda _: BIAS).reshape(1, 1, 1, -1))


# f: what its convolutions shall have, and which equations shall be gone.
JOINED = {
    "jax.nn.relu": (lambda x: jax.nn.relu(conv(x)), [(False, False, "relu")], ["max"]),
    "nnx.relu6": (lambda x: nnx.relu6(conv(x)), [(False, False, "relu6")], ["max", "min"]),
    "maximum": (lambda x: jnp.maximum(0.0, conv(x)), [(False, False, "relu")], ["max"]),
    "clip": (lambda x: jnp.clip(conv(x), 0, 6), [(False, False, "relu6")], ["max", "min"]),
    "clip from 0": (lambda x: jnp.clip(conv(x), 0.0), [(False, False, "relu")], ["max"]),
    "clamp": (lambda x: jax.lax.clamp(0.0, conv(x), 6.0), [(False, False, "relu6")], ["clamp"]),
    "minimum of relu": (lambda x: jnp.minimum(nnx.relu(conv(x)), 6), [(False, False, "relu6")], ["max", "min"]),
    "bias": (lambda x: conv(x) + BIAS.reshape(1, 1, 1, -1), [(True, False, None)], ["add"]),
    "bias before": (lambda x: BIAS[None, None, None] + conv(x), [(True, False, None)], ["add"]),
    "residual": (lambda x: conv(x) + x, [(False, True, None)], ["add"]),
    "residual, bias, relu": (lambda x: nnx.relu(x + conv(x) + BIAS.reshape(1, 1, 1, -1)), [(True, True, "relu")], ["add"]),
    "two": (lambda x: nnx.relu(conv(x) + conv(x, OTHER)), [(False, False, None), (False, True, "relu")], ["add", "max"]),
    "two, one active": (lambda x: nnx.relu(conv(x)) + conv(x, OTHER), [(False, False, "relu"), (False, True, None)], ["add"]),
    "residual computed later": (lambda x: (lambda y: nnx.relu(y + jnp.sin(x) * 0.0))(conv(x)), [(False, True, "relu")],
                                ["add", "max"]),
    "through a reshape": (lambda x: nnx.relu(conv(x).reshape(2, 36, 8) + BIAS.reshape(1, 1, -1)),
                          [(True, False, "relu")], ["add", "max"]),
    "reshaped residual": (lambda x: nnx.relu(conv(x).reshape(2, -1) + x.reshape(2, -1)), [(False, True, "relu")],
                          ["add", "max"]),
    "fully connected": (lambda x: nnx.relu(sparseflax.sparse_conv(x.reshape(72, 1, 1, 8), DENSE).reshape(72, 8) + BIAS[None]),
                        [(True, False, "relu")], ["add", "max"]),
    "chain": (lambda x: nnx.relu(conv(nnx.relu(conv(x))) + x), [(False, False, "relu"), (False, True, "relu")], ["add", "max"]),
    "jit": (lambda x: nnx.relu(jax.jit(conv)(x)), [(False, False, "relu")], ["max"]),
    "jit around the add": (lambda x: jax.jit(jnp.add)(conv(x), x), [(False, True, None)], ["add"]),
    "remat": (jax.checkpoint(lambda x: nnx.relu(conv(x))), [(False, False, "relu")], ["max"]),
    "linen": (lambda x: Scale().apply({"params": {"bias": BIAS}}, x), [(True, False, "relu")], ["add", "max"]),
    "fused twice": (fuse(lambda x: nnx.relu(conv(x))), [(False, False, "relu")], ["max"]),
}


@pytest.mark.parametrize("f, wanted, gone", JOINED.values(), ids=JOINED)
def test_what_follows_a_convolution_joins_it(f, wanted, gone):
    assert epilogues(fuse(f), X) == wanted
    assert not set(gone) & set(names(fuse(f), X))
    agrees(f, X)


@jax.custom_jvp
def doubled(x):
    return 2 * x


doubled.defjvp(lambda primals, tangents: (2 * primals[0], 5 * tangents[0]))

LEFT = {
    "another use": (lambda x: (lambda y: (nnx.relu(y), y))(conv(x)), [(False, False, None)], {"clamp": 1}),
    "twice itself": (lambda x: (lambda y: y + y)(conv(x)), [(False, False, None)], {"add": 1}),
    "twice in a call": (lambda x: jax.jit(lambda y: y + y)(conv(x)), [(False, False, None)], {"add": 1}),
    "after the activation": (lambda x: nnx.relu(conv(x)) + x, [(False, False, "relu")], {"add": 1}),
    "second residual": (lambda x: conv(x) + x + 2 * x, [(False, True, None)], {"add": 1}),
    "second bias": (lambda x: (conv(x) + BIAS.reshape(1, 1, 1, -1)) + BIAS.reshape(1, 1, 1, -1), [(True, False, None)],
                    {"add": 1}),
    "a number": (lambda x: conv(x) + 1, [(False, False, None)], {"clamp": 1}),
    "per row": (lambda x: conv(x) + x[:1, :, :1], [(False, False, None)], {"add": 1}),
    "per image": (lambda x: conv(x[:1]) + x, [(False, False, None)], {"add": 1}),
    "per channel, moved": (lambda x: conv(x).reshape(2, 8, 36) + jnp.ones((1, 1, 36)), [(False, False, None)], {"add": 1}),
    "max with 1": (lambda x: jnp.maximum(conv(x), 1), [(False, False, None)], {"clamp": 1}),
    "max with an array": (lambda x: jnp.maximum(conv(x), x), [(False, False, None)], {"max": 1}),
    "clip at 5": (lambda x: jnp.clip(conv(x), 0, 5), [(False, False, "relu")], {"clamp": 1}),
    "min first": (lambda x: jnp.minimum(conv(x), 6), [(False, False, None)], {"clamp": 1}),
    "max of relu6": (lambda x: jnp.maximum(nnx.relu6(conv(x)), 0), [(False, False, "relu6")], {"clamp": 1}),
    "traced bound": (lambda x: jnp.maximum(conv(x), 0 * x[0, 0, 0, 0]), [(False, False, None)], {"max": 1}),
    "leaky": (lambda x: nnx.leaky_relu(conv(x)), [(False, False, None)], {"leaky": 1}),
    "scan": (lambda x: jax.lax.scan(lambda c, _: (nnx.relu(conv(c)), None), x, None, length=1)[0],
             [(False, False, None)], {"max": 1}),
    "cond": (lambda x: jax.lax.cond(x[0, 0, 0, 0] > 9, lambda y: nnx.relu(conv(y)), lambda y: y, conv(x)),
             [(False, False, None), (False, False, None)], {"max": 1}),
    "another type": (lambda x: nnx.max_pool(x.astype(jnp.bfloat16), (3, 3), padding="SAME"), [], {"reduce_window_max": 1}),
    "rows of zero width": (lambda x: nnx.relu(conv(x[:0])), [], {"max": 1}),
}


@pytest.mark.parametrize("f, wanted, kept", LEFT.values(), ids=LEFT)
def test_what_cannot_join_stays(f, wanted, kept):
    assert epilogues(fuse(f), X) == wanted
    assert kept.items() <= names(fuse(f), X).items()
    agrees(f, X)


TRANSPOSED = jnp.asarray(reference.integers(DRAW, 2, 3, 8, 5))
UPSAMPLED = {
    "jnp.repeat": (lambda x: jnp.repeat(jnp.repeat(conv(x), 2, axis=1), 3, axis=2), (2, 3)),
    "broadcast of a row": (lambda x: jnp.broadcast_to(conv(x)[:, :, None], (2, 6, 4, 6, 8)).reshape(2, 24, 6, 8), (4, 1)),
    "jax.image.resize": (lambda x: jax.image.resize(conv(x), (2, 18, 6, 8), "nearest"), (3, 1)),
    "depth to space": (lambda x: conv(x).reshape(2, 6, 6, 2, 2, 2).transpose(0, 1, 3, 2, 4, 5).reshape(2, 12, 12, 2), (2, 2)),
    "transposed convolution": (lambda x: jax.lax.conv_transpose(conv(x), TRANSPOSED, (2, 3), "VALID", dimension_numbers=NHWC),
                               (2, 3)),
}


@pytest.mark.parametrize("f, factors", UPSAMPLED.values(), ids=UPSAMPLED)
def test_larger_images_are_a_step(f, factors):
    assert [step.params for step in steps(fuse(f), X) if step.op == "upsample"] == [factors]
    assert names(fuse(f), X)["sparse_program"] == 1 and "conv_general_dilated" not in names(fuse(f), X)
    agrees(f, X)


def upward(x):
    return jax.lax.conv_transpose(conv(x), TRANSPOSED, (2, 3), "VALID", dimension_numbers=NHWC)


WIDE, OVERLAPPING = jnp.asarray(reference.integers(DRAW, 20)), jnp.asarray(reference.integers(DRAW, 4, 3, 8, 20))


def overlapping(x):
    return jax.lax.conv_transpose(conv(x), OVERLAPPING, (2, 2), "SAME", dimension_numbers=NHWC)


FIVE = jnp.asarray(reference.integers(DRAW, 5))
# f: what of it is no convolution and no upsampling.
THROUGH = {
    "relu": (lambda x: nnx.relu(upward(x)), []),
    "bias and relu6": (lambda x: nnx.relu6(upward(x) + FIVE.reshape(1, 1, 1, 5)), []),
    "clamp of repeated pixels": (lambda x: jax.lax.clamp(0.0, jnp.repeat(conv(x), 2, axis=1), 6.0), []),
    "bias of repeated pixels": (lambda x: BIAS.reshape(1, 1, 1, 8) + jnp.repeat(conv(x), 2, axis=1), []),
    "bias after relu": (lambda x: nnx.relu(upward(x)) + FIVE.reshape(1, 1, 1, 5), [("add", "channel", False)]),
    "two biases": (lambda x: upward(x) + FIVE.reshape(1, 1, 1, 5) + FIVE.reshape(1, 1, 1, 5), [("add", "channel", False)]),
    "read again": (lambda x: (lambda y: nnx.relu(y) * y)(upward(x)), [("gate",)]),
    "overlapping blocks": (lambda x: nnx.relu(overlapping(x) + WIDE.reshape(1, 1, 1, 20)), []),
    "concatenated ranges": (lambda x: jnp.repeat(jnp.concatenate([conv(x), conv(x, OTHER)], 3), 2, axis=1) + WIDE[:16].reshape(
        1, 1, 1, 16), [("add", "channel", False)]),
}


@pytest.mark.parametrize("f, wanted", THROUGH.values(), ids=THROUGH)
def test_what_follows_larger_images_joins_the_convolution_before_them(f, wanted):
    assert [step.params for step in steps(fuse(f), X) if step.op in ("combine", "map")] == wanted
    agrees(f, X)


@pytest.mark.parametrize("channels", [3, 20])  # those of all positions are one vector, or several
@pytest.mark.parametrize("strides", [(2, 2), (1, 3), (3, 2)])
@pytest.mark.parametrize("taps", [(3, 3), (4, 5)])
def test_transposed_convolutions_are_ordinary_ones(taps, strides, channels):
    kernel = jnp.asarray(reference.integers(np.random.default_rng(1), *taps, 8, channels))

    def up(x, padding):
        return jax.lax.conv_transpose(conv(x), kernel, strides, padding, dimension_numbers=NHWC)

    for padding in ("SAME", "VALID", ((1, 1), (2, 1)), ((0, 3), (4, 0))):
        found = names(fuse(lambda x, padding=padding: up(x, padding)), X)
        assert found["sparse_program"] == 1 and "conv_general_dilated" not in found
    agrees(lambda x: [up(x, padding) for padding in ("SAME", "VALID", ((1, 1), (2, 1)), ((0, 3), (4, 0)))], X)


NOT_UPSAMPLED = {
    "jnp.tile": lambda x: jnp.tile(conv(x), (1, 2, 1, 1)),
    "another order of blocks": lambda x: conv(x).reshape(2, 6, 6, 2, 2, 2).transpose(0, 1, 5, 2, 4, 3).reshape(2, 12, 12, 2),
    "no rows": lambda x: jnp.take(conv(x), jnp.zeros(0, jnp.int32), axis=1),
    "repeated no times": lambda x: jnp.repeat(conv(x), 0, axis=2),
    "no whole number": lambda x: jax.image.resize(conv(x), (2, 9, 6, 8), "nearest"),
    "rows that are drawn": lambda x: conv(x)[:, jnp.argsort(x[0, :, 0, 0])],
    "pixels that nothing reaches": lambda x: jax.lax.conv_transpose(
        conv(x), TRANSPOSED, (3, 3), "VALID", dimension_numbers=NHWC),
}


@pytest.mark.parametrize("f", NOT_UPSAMPLED.values(), ids=NOT_UPSAMPLED)
def test_other_larger_images_are_none(f):
    assert "upsample" not in names(fuse(f), X)
    agrees(f, X)


LINES = {  # what is done, and the (scale, shift, low, high) of its steps
    "hard sigmoid": (lambda y: jnp.clip(y + 4, 0, 8) / 8, [(0.125, 0.5, 0.0, 1.0)]),
    "scaled first": (lambda y: jnp.clip(0.25 * y + 0.5, 0, 1), [(0.25, 0.5, 0.0, 1.0)]),
    "subtracted": (lambda y: 2 - y, [(-1.0, 2.0, -np.inf, np.inf)]),
    "turned round": (lambda y: -2 * jnp.minimum(y, 3), [(1.0, 0.0, -np.inf, 3.0), (-2.0, 0.0, -np.inf, np.inf)]),
    "two sums": (lambda y: (y + 16) - 16, [(1.0, 16.0, -np.inf, np.inf), (1.0, -16.0, -np.inf, np.inf)]),
    "bounds that cross": (lambda y: jnp.minimum(jnp.maximum(y, 3), 1), [(1.0, 0.0, 3.0, np.inf), (1.0, 0.0, -np.inf, 1.0)]),
    "read twice": (lambda y: (lambda z: z * 2 + z)(y + 1), [(1.0, 1.0, -np.inf, np.inf), (2.0, 0.0, -np.inf, np.inf)]),
    "an array of one number": (lambda y: y * np.full((1, 1, 1, 1), 0.5, np.float32), [(0.5, 0.0, -np.inf, np.inf)]),
}


@pytest.mark.parametrize("f, wanted", LINES.values(), ids=LINES)
def test_arithmetic_with_numbers_is_a_line_between_bounds(f, wanted):
    found = [step.numbers for step in steps(fuse(lambda x: f(conv(x))), X) if step.params == ("clamp",)]
    assert found == wanted
    agrees(lambda x: f(conv(x)), X)


# f: the gates that it has, and how many steps beside the convolution.
PLAIN = (1.0, -0.0)
GATES = {
    "hard swish": (lambda y: y * jnp.clip(y + 3, 0, 6), [(1.0, 3.0, 0.0, 6.0, *PLAIN, *PLAIN)], 0),
    "the other way": (lambda y: jnp.clip(y * 0.25 + 0.5, 0, 1) * y, [(0.25, 0.5, 0.0, 1.0, *PLAIN, *PLAIN)], 0),
    "line before": (lambda y: (lambda z: z * jnp.clip(z + 3, 0, 6))(y * 2 - 1), [(1.0, 3.0, 0.0, 6.0, 2.0, -1.0, *PLAIN)], 0),
    "lines after": (lambda y: (y * jnp.clip(y + 3, 0, 6) / 4 - 1) * 2, [(1.0, 3.0, 0.0, 6.0, *PLAIN, 0.5, -2.0)], 0),
    "two sums after": (lambda y: (y * jnp.clip(y + 3, 0, 6) + 16) - 16, [(1.0, 3.0, 0.0, 6.0, *PLAIN, 1.0, 16.0)], 1),
    "small factors after": (lambda y: y * jnp.clip(y + 3, 0, 6) * 2.0**-100 * 2.0**-100,
                            [(1.0, 3.0, 0.0, 6.0, *PLAIN, 2.0**-100, -0.0)], 1),
    "bounded after": (lambda y: jnp.maximum(y * jnp.clip(y + 3, 0, 6), 1), [(1.0, 3.0, 0.0, 6.0, *PLAIN, *PLAIN)], 1),
    "line read again": (lambda y: (lambda z: z * jnp.clip(z + 3, 0, 6) + z)(y * 2), [(1.0, 3.0, 0.0, 6.0, *PLAIN, *PLAIN)], 2),
    "gate read again": (lambda y: (lambda g: y * g + g)(jnp.clip(y + 3, 0, 6)), [], 3),
    "gate of another": (lambda y: y * jnp.clip(y[:, ::-1] + 3, 0, 6), [], 1),
}


@pytest.mark.parametrize("f, wanted, others", GATES.values(), ids=GATES)
def test_what_is_gated_by_itself_is_one_step(f, wanted, others):
    found = [step for step in steps(fuse(lambda x: f(conv(x))), X) if step.op not in ("conv", "reshape")]
    gates = [step.numbers for step in found if step.params == ("gate",)]
    assert gates == wanted and len(found) - len(gates) == others
    agrees(lambda x: f(conv(x)), X)


def erf(y):
    return jax.lax.erf(y)


ROOT, TANH = float(np.float32(0.5**0.5)), float(np.float32((2 / np.pi) ** 0.5))
SMOOTH = {  # what is done, and the names and numbers of its steps
    "silu": (nnx.silu, [("swish", 1.0, 0.0, 1.0)]),
    "the other way": (lambda y: jax.nn.sigmoid(y) * y, [("swish", 1.0, 0.0, 1.0)]),
    "swish": (lambda y: y * jax.nn.sigmoid(1.5 * y) * 4, [("swish", 1.5, 0.0, 4.0)]),
    "steep swish": (lambda y: y * jax.nn.sigmoid(2048 * y), [("clamp",), ("logistic",), ("mul",)]),
    "gate read again": (lambda y: (lambda g: y * g + g)(jax.nn.sigmoid(y)), [("logistic",), ("mul",), ("add",)]),
    "gelu": (nnx.gelu, [("swish", 2 * TANH, 2 * TANH * 0.044715, 1.0)]),
    "gelu, factors first": (lambda y: 0.5 * y * (1 + jnp.tanh(TANH * (y + 0.044715 * y**3))),
                            [("swish", 2 * TANH, 2 * TANH * 0.044715, 1.0)]),
    "one minus tanh": (lambda y: y * (1 - jnp.tanh(y)), [("swish", -2.0, 0.0, 2.0)]),
    "exact gelu": (lambda y: nnx.gelu(y, approximate=False), [("gelu", ROOT, 0.5)]),
    "exact gelu of ONNX": (lambda y: y * (erf(y / 2**0.5) + 1) * 0.5, [("gelu", ROOT, 0.5)]),
    "small factors after": (lambda y: nnx.silu(y) * 2.0**-100 * 2.0**-100, [("swish", 1.0, 0.0, 2.0**-100), ("clamp",)]),
    "one minus erf": (lambda y: y * (1 - erf(2 * y)) * 3, [("gelu", -2.0, 3.0)]),
    "two plus erf": (lambda y: y * (2 + erf(y)), [("erf",), ("clamp",), ("mul",)]),
    "erf of another": (lambda y: y * (1 + erf(y[:, ::-1])), [("mul",)]),
    "tanh": (jnp.tanh, [("tanh",)]),
    "cube": (lambda y: y**3, [("square",), ("mul",)]),
    "power": (lambda y: jax.lax.pow(y, 3.0), [("square",), ("mul",)]),
}


@pytest.mark.parametrize("f, wanted", SMOOTH.values(), ids=SMOOTH)
def test_smooth_functions_are_steps(f, wanted):
    made = [step for step in steps(fuse(lambda x: f(conv(x))), X) if step.op in ("map", "combine")]
    assert [step.params[0] for step in made] == [name for name, *_ in wanted]
    for step, (_, *numbers) in zip(made, wanted, strict=True):
        if numbers:
            np.testing.assert_allclose(step.numbers, numbers, rtol=4 * 2.0**-24)
    got, want = both(lambda x: f(conv(x)), X / 8)
    # As in tests/test_program.py; XLA's is off by as much, and by its own size where a sum with 1 cancels.
    np.testing.assert_allclose(got, want, rtol=80 * 2.0**-24, atol=64 * 2.0**-24 * float(jnp.abs(want).max()))


@pytest.mark.parametrize("f", [nnx.silu, lambda y: jax.nn.sigmoid(y) * y, lambda y: (lambda g: y * g + g)(jax.nn.sigmoid(y))])
def test_silu_as_xla_has_it(f):
    got, want = both(lambda x: f(conv(x)), X)
    # As in tests/test_program.py; XLA's is off by as much, and what it makes of a large negative number may be 0.
    np.testing.assert_allclose(got, want, rtol=16 * 2.0**-24, atol=2.0**-126)


SLOPE = jnp.asarray(reference.integers(DRAW, 8)) / 4
LEAKY = {
    "a slope for each channel": (lambda y: jnp.where(y >= 0, y, SLOPE.reshape(1, 1, 1, 8) * y), ("leaky", "channel", False)),
    "a traced slope": (lambda y: jnp.where(y > 0, y, y * SLOPE[0]), ("leaky", "scalar", False)),
    "less": (lambda y: jnp.where(y < 0, SLOPE.reshape(1, 1, 1, 8) * y, y), ("leaky", "channel", False)),
    "at most": (lambda y: jnp.where(y <= 0, 0.25 * y, y), ("leaky",)),
    "nnx.PReLU": (nnx.PReLU(negative_slope_init=0.25), ("leaky", "scalar", False)),
}


@pytest.mark.parametrize("f, wanted", LEAKY.values(), ids=LEAKY)
def test_leaky_rectifiers_are_one_step(f, wanted):
    assert [step.params for step in steps(fuse(lambda x: f(conv(x))), X) if step.op in ("map", "combine")] == [wanted]
    agrees(lambda x: f(conv(x)), X)


NOT_LEAKY = {
    "the other case": lambda y: jnp.where(y >= 0, 2 * y, y),
    "another bound": lambda y: jnp.where(y >= 1, y, 2 * y),
    "of another": lambda y: jnp.where(y[:, ::-1] >= 0, y, 2 * y),
    "the sign itself": lambda y: y * (y < 0).astype(jnp.float32),
}


@pytest.mark.parametrize("f", NOT_LEAKY.values(), ids=NOT_LEAKY)
def test_what_is_no_leaky_rectifier(f):
    assert not any("leaky" in step.params for step in steps(fuse(lambda x: f(conv(x))), X))
    agrees(lambda x: f(conv(x)), X)


MOVED = {
    "jnp.split": (lambda y: jnp.concatenate(jnp.split(y, [3, 5], -1)[::-1], -1), ["window", "window", "window", "concat"]),
    "of vectors": (lambda y: jnp.split(y.reshape(2, -1), 2, -1)[1], ["reshape", "window"]),
    "shuffle": (lambda y: y.reshape(2, 6, 6, 2, 4).swapaxes(3, 4).reshape(2, 6, 6, 8), ["shuffle"]),
    "pixel and channel": (lambda y: y.sum(-1, keepdims=True) * BIAS.reshape(1, 1, 1, 8), ["reduce", "combine"]),
    "groups": (lambda y: y.reshape(2, 36, 2, 4).sum((1, 3)), ["reshape", "pool", "reshape", "reduce"]),
    "repeated": (lambda y: jnp.repeat(y.sum((1, 2)), 4, -1), ["pool", "reshape", "upsample"]),
}


@pytest.mark.parametrize("f, wanted", MOVED.values(), ids=MOVED)
def test_what_moves_channels_is_a_step(f, wanted):
    made = steps(fuse(lambda x: f(conv(x))), X)
    assert [step.op for step in made][1:] == wanted
    assert names(fuse(lambda x: f(conv(x))), X)["sparse_program"] == 1
    agrees(lambda x: f(conv(x)), X)


NORMS = {
    "layer": nnx.LayerNorm(8, rngs=nnx.Rngs(0)),
    "layer, exact variance": nnx.LayerNorm(8, use_fast_variance=False, rngs=nnx.Rngs(0)),
    "root mean square": nnx.RMSNorm(8, rngs=nnx.Rngs(0)),
    "group": nnx.GroupNorm(8, num_groups=2, rngs=nnx.Rngs(0)),
    "instance": nnx.InstanceNorm(8, rngs=nnx.Rngs(0)),
}


@pytest.mark.parametrize("norm", NORMS.values(), ids=NORMS)
def test_norms_of_what_a_network_computes_are_steps(norm):
    with jax.numpy_dtype_promotion("standard"):  # Flax divides by an integer
        outside = [equation.primitive.name for equation in equations(fuse(lambda x: norm(conv(x))), X)]
        assert outside.count("sparse_program") == 1 and not {"reduce_sum", "rsqrt", "sub", "add", "mul"} & set(outside)
        got, want = both(lambda x: norm(conv(x)), X)
    # Means of up to 144 numbers: their squares' and the square of their mean may cancel, to an eighth at most here.
    np.testing.assert_allclose(got, want, atol=8 * 144 * 2.0**-24 * float(jnp.abs(want).max()))


def test_a_number_that_is_traced():
    def f(x, scale, shift):
        return conv(x) * scale + shift

    scale, shift = jnp.asarray(3.0), jnp.full((1, 1, 1, 1), 2.0)
    assert [step.params for step in steps(fuse(f), X, scale, shift) if step.op == "combine"] == [
        ("mul", "scalar", False), ("add", "scalar", False)]
    agrees(f, X, scale, shift)


def test_nan_and_inf_propagate_alike():
    x = np.array(X)
    x[0, 0, 0, 0], x[0, 3, 3, 1], x[1, 2, 2, 2], x[1, 5, 5, 3] = np.nan, np.inf, -np.inf, np.inf
    depthwise = jnp.asarray(reference.integers(DRAW, 3, 3, 1, 8))
    functions = (
        lambda x: nnx.relu(conv(x) + x), lambda x: jnp.clip(conv(x), 0, 6), lambda x: nnx.relu6(conv(x)),
        lambda x: jax.lax.clamp(0.0, conv(x), 6.0), lambda x: nnx.max_pool(x, (3, 3), (2, 2), padding="SAME"),
        lambda x: nnx.max_pool(x, (2, 2), (2, 2)), lambda x: avg_pool(x, (3, 3), (1, 1), padding="SAME"),
        lambda x: jax.lax.conv_general_dilated(x, depthwise, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=8),
        lambda x: jax.lax.conv_general_dilated(x, depthwise, (2, 2), "SAME", dimension_numbers=NHWC, feature_group_count=8))
    for got, want in jax.jit(lambda x: [(fuse(f)(x), f(x)) for f in functions])(x):
        assert np.isnan(want).any()
        same(got, want)


def test_any_numbers():
    x, kernel, bias = (DRAW.standard_normal(shape).astype(np.float32) for shape in ((2, 6, 6, 8), (3, 3, 8, 8), (8,)))
    packed = sparseflax.pack(kernel)
    y = jax.jit(fuse(lambda x: nnx.relu(conv(x, packed) + x + bias.reshape(1, 1, 1, -1))))(x)
    wanted = reference.epilogue(reference.conv(x, kernel), bias, x, "relu")
    assert np.all(np.abs(y - wanted) <= reference.bound(x, kernel, bias, x))


@pytest.mark.parametrize("shape", [(4, 3, 5), (1, 1, 7), (12, 5), (60,), (2, 2, 15), (1, 4, 3, 5)], ids=str)
def test_softmax(shape):
    """Over the last axis of whatever shape, of values far apart, with some that are not finite."""
    last = shape[-1]
    packed = sparseflax.pack(reference.integers(DRAW, 1, 1, 4, last))
    x = reference.integers(DRAW, 5, math.prod(shape[:-1]), 1, 4)
    added = np.zeros((5, math.prod(shape[:-1]), 1, last), np.float32)
    added[1:4, 0, 0, 0], added[4, 0, 0] = [np.nan, np.inf, -np.inf], -np.inf

    def f(x, added):
        return nnx.softmax((conv(x, packed) + added).reshape(5, *shape))

    y = np.asarray(conv(x, packed) + added).reshape(5, *shape)
    with np.errstate(invalid="ignore"):
        e = np.exp((y - y.max(-1, keepdims=True)).astype(np.float64))
        wanted = e / e.sum(-1, keepdims=True)
    # Each exponential is off by 4 units of 2^-24, their sum by one for each term; what is no normal number may be 0.
    np.testing.assert_allclose(jax.jit(fuse(f))(x, added), wanted, rtol=(9 + last) * 2.0**-24, atol=2.0**-126)
    found = names(fuse(f), x, added)
    assert found["sparse_program"] == 1 and found["reduce"] == 2 and found["exp"] == found["div"] == 1
    assert not set(found) - {"sparse_program", "conv", "reduce", "sub", "exp", "div", "reshape"}


def test_derivatives_are_those_of_the_function():
    def loss(f):
        return lambda x, bias: (avg_pool(f(x, bias), (3, 3), padding="SAME") ** 2).sum()

    def f(x, bias):
        return doubled(nnx.relu(conv(x) + x + bias.reshape(1, 1, 1, -1)))  # whose derivative is not that of its inlined call

    for transform in (lambda f: jax.grad(loss(f), (0, 1)), lambda f: jax.jit(jax.grad(loss(jax.jit(f)), (0, 1))),
                      lambda f: jax.grad(lambda x, bias: jax.grad(loss(f))(x, bias).sum(), 1)):
        got, wanted = transform(fuse(f))(X, BIAS), jax.jit(transform(f))(X, BIAS)
        # The means over 9 are not integers: a few roundings, relative to the largest value.
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=64 * 2**-23 * float(jnp.abs(b).max()))
    assert "conv" in names(fuse(f), X, BIAS)


def test_transformations_around_and_inside():
    def f(x, bias):
        return nnx.relu(conv(x) + x + bias)

    bias, three = BIAS.reshape(1, 1, 1, -1), jnp.stack([X, 2 * X, -X])
    np.testing.assert_array_equal(jax.vmap(fuse(f), (0, None))(three, bias), jax.vmap(f, (0, None))(three, bias))
    np.testing.assert_array_equal(jax.vmap(lambda a: fuse(lambda x: f(a * x, bias))(X))(jnp.arange(3.0)),  # closed over
                                  jax.vmap(lambda a: f(a * X, bias))(jnp.arange(3.0)))
    mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
    sharded = {name: jax.jit(jax.grad(lambda bias, g=g: jax.shard_map(
        lambda x: g(x, bias), mesh=mesh, in_specs=PartitionSpec("d"), out_specs=PartitionSpec("d"))(X).sum()))(bias)
        for name, g in (("fused", fuse(f)), ("plain", f))}
    np.testing.assert_array_equal(sharded["fused"], sharded["plain"])

    def scanned(x):
        return jax.lax.scan(lambda c, _: (nnx.relu(conv(c) + c) / 16, None), x, None, length=2)[0]

    agrees(scanned, X)

    def chatty(x):
        jax.debug.callback(lambda _: None, x[0, 0, 0, 0])
        return nnx.relu(conv(x))

    agrees(chatty, X)
    assert epilogues(fuse(chatty), X) == [(False, False, "relu")]


def test_arguments_and_results_of_any_kind():
    def f(x, flags, *, train, key):
        assert train is False and flags == ("a", None)
        return {"y": nnx.relu(conv(x)), "n": jnp.int32(3) + 1, "constant": jnp.zeros(2), "key": jax.random.key_data(key)}

    agrees(lambda x, key: f(x, ("a", None), train=False, key=key), X, jax.random.key(1))
    y = fuse(f)(np.asarray(X), ("a", None), train=False, key=jax.random.key(1))
    np.testing.assert_array_equal(y["y"], nnx.relu(conv(X)))
    assert isinstance(fuse(lambda x: 3.0)(X), jax.Array)
    with pytest.raises(jax.errors.TracerBoolConversionError):
        fuse(lambda x: x if x.sum() > 0 else -x)(X)


def test_export_with_any_batch():
    depthwise = jnp.asarray(reference.integers(DRAW, 3, 3, 1, 8))

    def f(x):
        x = nnx.max_pool(nnx.relu(conv(x) + x), (3, 3), (2, 2), padding="SAME")
        x = jax.lax.conv_general_dilated(x, depthwise, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=8)
        return nnx.relu(conv(nnx.max_pool(x, (2, 2))).reshape(x.shape[0], -1))

    batch = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, 6, 6, 8"), jnp.float32)
    exported = jax.export.export(jax.jit(fuse(f)), disabled_checks=[
        jax.export.DisabledSafetyCheck.custom_call(ffi.PROGRAM)])(batch)
    for n in (1, 2):
        np.testing.assert_array_equal(exported.call(X[:n]), f(X[:n]))
    image = jax.ShapeDtypeStruct(jax.export.symbolic_shape("n, h, w, 8"), jnp.float32)

    def g(x):
        x = jax.lax.conv_general_dilated(x, depthwise, (1, 1), "SAME", dimension_numbers=NHWC, feature_group_count=8)
        return nnx.max_pool(nnx.max_pool(x, (3, 3), padding="SAME"), (2, 2))

    np.testing.assert_array_equal(jax.export.export(jax.jit(fuse(g)))(image).call(X), g(X))


PADDING = st.tuples(st.integers(0, 2), st.integers(0, 2))
PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(window=st.tuples(st.integers(1, 5), st.integers(1, 5)), strides=PAIR, dilation=PAIR, padding=st.tuples(PADDING, PADDING),
       size=st.tuples(st.integers(1, 9), st.integers(1, 9)), reducer=st.sampled_from(["max", "min", "sum"]))
def test_pooling_agrees_with_reduce_window(window, strides, dilation, padding, size, reducer):
    initial, combine = {"max": (-np.inf, jax.lax.max), "min": (np.inf, jax.lax.min), "sum": (0.0, jax.lax.add)}[reducer]

    def f(x):
        return jax.lax.reduce_window(x, np.float32(initial), combine, (1, *window, 1), (1, *strides, 1),
                                     ((0, 0), *padding, (0, 0)), window_dilation=(1, *dilation, 1))

    agrees(f, jnp.asarray(reference.integers(np.random.default_rng(0), 2, *size, 3)))


def test_pooling_of_any_numbers():
    x = DRAW.standard_normal((2, 9, 9, 3)).astype(np.float32)
    for padding in ("SAME", "VALID"):
        for include in (True, False):
            def f(x, padding=padding, include=include):
                return avg_pool(x, (3, 3), (2, 2), padding=padding, count_include_pad=include)

            (got, want), magnitude = jax.jit(lambda x, f=f: ((fuse(f)(x), f(x)), f(jnp.abs(x))))(x)
            # Two sums of 9 terms, in different orders, and a division.
            assert np.all(np.abs(got - want) <= 2 * 10 * 2.0**-24 * magnitude)


def test_pooling_changes_form():
    def windows(f):
        return [e.params["window_dimensions"] for e in equations(f, X) if e.primitive.name.startswith("reduce_window")]

    assert windows(fuse(lambda x: nnx.max_pool(x, (3, 3), (2, 2), padding="SAME"))) == []
    assert windows(fuse(lambda x: nnx.max_pool(x, (2, 2), (2, 2)))) == []
    assert windows(fuse(lambda x: nnx.max_pool(x, (3, 3), padding=((0, 0), (4, 4))))) == [(1, 1, 3, 1)], "many over the edge"
    assert windows(fuse(lambda x: avg_pool(x, (6, 6)))) == [(1, 6, 1, 1), (1, 1, 6, 1)], "too many slices"

    def spread(x):
        return jax.lax.reduce_window(x, -np.inf, jax.lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID", base_dilation=(1, 2, 1, 1))

    assert windows(fuse(spread)) == [(1, 2, 2, 1)]
    agrees(spread, X)


@pytest.fixture
def no_kernel(monkeypatch):
    """As where the native module does not load: dense convolutions stay XLA's."""
    monkeypatch.setattr("sparseflax.conv.ffi.available", False)


def test_pooling_stays_with_the_dense_convolution_that_xla_computes_it_with(no_kernel):
    def windows(f):
        return [e.params["window_dimensions"] for e in equations(fuse(f), X) if e.primitive.name.startswith("reduce_window")]

    def dense(x):
        y = jax.lax.conv_general_dilated(x, jnp.asarray(KERNEL), (1, 1), "SAME", dimension_numbers=NHWC)
        return nnx.relu(y + BIAS.reshape(1, 1, 1, -1))

    def side_by_side(x):
        return nnx.max_pool(x, (2, 2), (2, 2))

    assert windows(lambda x: side_by_side(dense(x))) == [(1, 2, 2, 1)]
    assert windows(lambda x: nnx.max_pool(dense(x), (3, 3), (2, 2))) == [], "XLA computes that one apart"
    assert windows(lambda x: side_by_side(nnx.relu(conv(x)))) == [], "nothing dense before it"
    assert windows(lambda x: side_by_side(jnp.flip(dense(x), 1))) == [], "nor here"
    agrees(lambda x: side_by_side(dense(x)), X)


@pytest.mark.parametrize("before, size, gap", [(2, 5, 0), (0, 2, 0), (1, 3, 1), (3, 4, 0)])
def test_sums_of_neighbouring_channels(before, size, gap):
    """As local response normalization is written with slices; with a gap between them they are no such sum."""
    def f(x):
        x = conv(x)
        padded = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (before, size + gap)))
        starts = [i + gap * (i > 1) for i in range(size)]
        return sum(padded[..., start:start + 8] for start in starts) * x

    agrees(f, X)
    found = [(step.op, step.params) for step in steps(fuse(f), X) if step.op in ("channel_sum", "window")]
    if gap:
        assert [op for op, _ in found] == ["window", "channel_sum", "window"]
    else:
        assert found == [("channel_sum", (size, before))]


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("stride, padding, dilation", [(1, "SAME", 1), (2, ((3, 0),), 1), (1, "VALID", 2)])
def test_rows_are_convolved_in_the_program(groups, stride, padding, dilation):
    kernel, bias = (jnp.asarray(reference.integers(DRAW, *size)) for size in ((3, 8 // groups, 8), (8,)))

    def f(x):
        y = jax.lax.conv_general_dilated(x, kernel, (stride,), padding, rhs_dilation=(dilation,), feature_group_count=groups,
                                         dimension_numbers=("NWC", "WIO", "NWC"))
        return nnx.relu(y + bias.reshape(1, 1, 8))

    rows = X.reshape(2, 36, 8)
    agrees(f, rows)
    made = steps(fuse(f), rows)
    assert made[-1].op == ("depthwise" if groups == 8 else "dense") and made[-1].params[-2:] == ("relu", True)


@given(size=st.tuples(st.integers(1, 9), st.integers(1, 9)), kernel=PAIR, strides=PAIR, dilation=PAIR,
       padding=st.tuples(PADDING, PADDING), groups=st.sampled_from([(4, 4), (8, 8), (8, 2), (8, 4)]))
def test_grouped_convolutions_agree_with_xla(size, kernel, strides, dilation, padding, groups):
    channels, count = groups
    random = np.random.default_rng(0)
    x, weights = reference.integers(random, 2, *size, channels), reference.integers(random, *kernel, channels // count, 8)

    def f(x, weights):
        return jax.lax.conv_general_dilated(x, weights, strides, padding, rhs_dilation=dilation, dimension_numbers=NHWC,
                                            feature_group_count=count)

    agrees(f, jnp.asarray(x), jnp.asarray(weights))


@given(size=st.tuples(st.integers(1, 9), st.integers(1, 9)), strides=PAIR,
       padding=st.sampled_from(["SAME", "VALID", ((1, 0), (0, 2))]))
def test_convolutions_of_pixels_agree_with_xla(size, strides, padding):
    random = np.random.default_rng(0)
    x, weights = reference.integers(random, 2, *size, 5), reference.integers(random, 1, 1, 5, 3)

    def f(x, weights):
        return jax.lax.conv_general_dilated(x, weights, strides, padding, dimension_numbers=NHWC)

    agrees(f, jnp.asarray(x), jnp.asarray(weights))


def test_grouped_convolutions_change_form_without_a_kernel(no_kernel):
    def convolutions(kernel, groups, layout=NHWC, **kwargs):
        def f(x, kernel):
            return jax.lax.conv_general_dilated(x, kernel, **{"window_strides": (1, 1), "padding": "SAME", **kwargs},
                                                dimension_numbers=layout, feature_group_count=groups)

        agrees(f, X, kernel)
        return [e.params["feature_group_count"] for e in equations(fuse(f), X, kernel)
                if e.primitive.name == "conv_general_dilated"]

    def ones(*shape):
        return np.ones(shape, np.float32)

    assert convolutions(ones(3, 3, 8, 4), 1) == [1]
    assert convolutions(ones(1, 1, 8, 4), 1) == []
    assert convolutions(ones(1, 1, 8, 4), 1, window_strides=(2, 3)) == [1]
    assert convolutions(ones(1, 1, 8, 4), 1, padding=((0, 1), (0, 0))) == [1]
    assert convolutions(ones(1, 1, 8, 4), 1, lhs_dilation=(2, 1), padding=((0, 0), (0, 0))) == [1]
    assert convolutions(ones(4, 6, 1, 1), 1, ("NCHW", "OIHW", "NCHW")) == [1], "pixels: NHWC only"
    assert convolutions(ones(3, 3, 4, 4), 2) == [1, 1]
    assert convolutions(ones(3, 3, 1, 8), 8) == []
    assert convolutions(ones(3, 3, 1, 8), 8, window_strides=(2, 2)) == []
    assert convolutions(ones(3, 3, 1, 16), 8) == [1] * 8, "two outputs per channel"
    assert convolutions(ones(6, 2, 3, 3), 3, ("NCHW", "OIHW", "NHWC")) == [1] * 3, "any layout"
    assert convolutions(ones(6, 1, 3, 3), 6, ("NCHW", "OIHW", "NCHW")) == [6], "depthwise: NHWC only"
    assert convolutions(ones(3, 3, 1, 8), 8, lhs_dilation=(2, 2), padding=((0, 0), (0, 0))) == [8]
    assert convolutions(ones(3, 3, 1, 8), 8, padding=((-1, 1), (0, 0))) == [8]
    assert convolutions(ones(9, 9, 1, 8), 8) == [8], "too many taps"


@pytest.mark.parametrize("exponent", [0.25, 0.5, 0.75, -0.25, -0.5, -0.75])
def test_powers_are_square_roots(exponent):
    def f(x):
        return x ** exponent

    x = np.concatenate([[0.0, -0.0, np.inf, -np.inf, np.nan, -1.0, 1.0, 1e-37, 3e38], DRAW.random(99)]).astype(np.float32)
    y = np.asarray(jax.jit(fuse(f))(x))
    assert "pow" not in names(fuse(f), x)
    with np.errstate(all="ignore"):
        exact = np.power(np.float64(x), np.full(x.shape, exponent))
    # At most three roots, a product and a quotient, each rounded, those of inner roots halved.
    np.testing.assert_allclose(y, exact, rtol=4 * 2.0**-24, atol=0)
    np.testing.assert_array_equal(np.signbit(y[~np.isnan(y)]), False)


def test_other_powers_stay():
    for f in (lambda x: x ** 0.3, lambda x: x ** 1.5, lambda x: x ** abs(x), lambda x: 0.5 ** x,
              lambda x: x.astype(jnp.bfloat16) ** 0.5):
        assert names(fuse(f), X)["pow"] == 1


def test_a_number_behind_a_barrier_stays_a_number():
    """An equation of one number that could have had several."""
    def f(x):
        size = conv(x).max() / jax.lax.optimization_barrier(jnp.float32(3))
        return jnp.where(size == 0, 1, size)

    assert fuse(f)(X).shape == ()
    np.testing.assert_allclose(fuse(f)(X), f(X), rtol=1e-6)


def normal(_, shape, dtype):
    return (np.random.default_rng(1).standard_normal(shape) / math.prod(shape[:-1]) ** 0.5).astype(dtype)


class Bottleneck(nnx.Module):
    def __init__(self, rngs):
        def layer(ic, oc, size, strides=1):
            return nnx.Conv(ic, oc, (size, size), strides, use_bias=False, kernel_init=normal, rngs=rngs), nnx.BatchNorm(
                oc, rngs=rngs)

        (self.conv1, self.norm1), (self.conv2, self.norm2) = layer(16, 16, 1), layer(16, 16, 3)
        (self.conv3, self.norm3), (self.shortcut, self.shortcut_norm) = layer(16, 32, 1), layer(16, 32, 1)
        self.calls = nnx.BatchStat(jnp.int32(0))
        self.head = nnx.Linear(32, 4, kernel_init=normal, rngs=rngs)

    def __call__(self, x, count=False):
        if count:
            self.calls[...] += 1
        y = nnx.relu(self.norm1(self.conv1(x)))
        y = nnx.relu(self.norm2(self.conv2(y)))
        y = nnx.relu(self.norm3(self.conv3(y)) + self.shortcut_norm(self.shortcut(x)))
        return self.head(nnx.max_pool(y, (2, 2), (2, 2)).mean((1, 2)))


@pytest.fixture(scope="module")
def packed():
    model, x = Bottleneck(nnx.Rngs(0)), jnp.asarray(DRAW.standard_normal((2, 8, 8, 16)).astype(np.float32))
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, nnx.Conv):
            layer.kernel[...] = np.asarray(layer.kernel[...]) * (DRAW.random(layer.kernel.shape) < 0.08).astype(np.float32)
    planned = plan(model, x, HERE)
    assert sum(row.choice == "sparse" for row in planned.layers) == 4
    return pack_model(model, planned), pack_model(model, planned, fuse=False), x


def test_a_packed_model_is_fused_and_an_ordinary_module(packed):
    fused, plain, x = packed
    wanted = [(True, False, "relu"), (True, False, "relu"), (True, False, None), (True, True, "relu")]
    assert epilogues(lambda m, x: m(x), fused, x) == wanted
    assert epilogues(lambda m, x: m(x), plain, x) == [(True, False, None)] * 4
    assert type(plain) is Bottleneck and isinstance(fused, Bottleneck) and type(fused).__name__ == "Bottleneck"
    y = jax.jit(lambda m, x: m(x))(plain, x)
    graphdef, state = nnx.split(fused)
    for result in (fused(x), jax.jit(lambda m, x: m(x))(fused, x), nnx.jit(lambda m, x: m(x))(fused, x),
                   jax.jit(lambda x: fused(x))(x), jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x),
                   nnx.clone(fused)(x), jax.jit(fuse(fused))(x)):
        # Both add the same float32 numbers, the residual and the bias in another order: a few roundings of a few layers.
        np.testing.assert_allclose(result, y, rtol=0, atol=64 * 2**-23 * float(jnp.abs(y).max()))
    assert epilogues(lambda m, x: m(x), pack_model(fused, plan(fused, x, HERE)), x) == wanted, "packed again"
    layer = sparseflax.nnx.SparseConv.from_dense(nnx.Conv(8, 8, (3, 3), rngs=nnx.Rngs(0)))
    assert type(pack_model(layer, plan(layer, X, HERE))) is type(layer), "a layer alone has nothing to fuse"


def test_what_a_call_writes_is_kept(packed):
    fused, x = nnx.clone(packed[0]), packed[2]
    fused(x, count=True)
    nnx.jit(lambda m, x: m(x, count=True))(fused, x)
    fused(x)
    assert fused.calls[...] == 2

    class Sowing(Bottleneck):
        def __call__(self, x):
            y = self.conv1(x)
            self.sow(nnx.Intermediate, "features", y)
            return y

    model = Sowing(nnx.Rngs(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Flax's, of sow without capture, when the plan traces it
        sowing = pack_model(model, plan(model, x, HERE))
    y, found = nnx.capture(sowing, nnx.Intermediate)(x)
    np.testing.assert_array_equal(found["features"][0], y)


@pytest.mark.skipif(not ffi.available, reason="the native kernel is not available")
def test_a_packed_network_is_one_program(packed):
    """In the compiled program one call holds all layers, and nothing is copied or transposed around it."""
    fused, _, x = packed
    graphdef, state = nnx.split(fused)

    def call(state, x):
        return nnx.merge(graphdef, state)(x)

    assert len(epilogues(call, state, x)) == 4
    text = jax.jit(call).lower(state, x).compile(AS_FOR_USERS).as_text()
    entry = text[text.index("ENTRY"):]
    assert len(re.findall(r"custom-call\([^\n]*" + ffi.PROGRAM, entry)) == 1
    assert ffi.TARGET not in entry
    assert not re.findall(r"= \S+ (transpose|copy)\(", entry)
