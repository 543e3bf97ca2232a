"""Programs of steps: the native ones against plain JAX, which shares no code with them, and what C++ refuses.

Values are small integers wherever equality is asked for: float32 sums of them are exact in any order.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

import sparseflax
from sparseflax.conv import ffi
from sparseflax.conv.int8 import Quantization, pack_int8
from sparseflax.conv.int8_primitive import Rescale
from sparseflax.conv.window import Window
from sparseflax.network.formulas import BINARY
from sparseflax.network.program import Part, Program, Step, run_program
from tests import reference

pytestmark = pytest.mark.skipif(not ffi.available, reason="the native kernel is not available")
SAME = Window((1, 1), ((1, 1), (1, 1)), (1, 1))
PIXELS = Window((1, 1), ((0, 0), (0, 0)), (1, 1))
SHAPES = [(1, 1, 1), (4, 5, 3), (3, 2, 17), (6, 6, 16)]  # odd, below and above the vectors of all instruction sets


def images(seed, n, size, uint8=False):
    draw = np.random.default_rng(seed)
    return draw.integers(0, 256, (n, *size)).astype(np.uint8) if uint8 else reference.integers(draw, n, *size)


def check(*calls, shared=(), rtol=0.0, atol=0.0, first=False):
    """Calls (program, inputs) and what they have to give, in one program of XLA's, which is returned: most of these tests' time
    is compilation, and more of it the wanted values' than ours. For `first`, the first image alone, they are made only once."""
    programs, inputs = zip(*calls, strict=True)
    alone = [[images[:1] for images in some] for some in inputs] if first else []
    arrays = {id(array): array for some in (*inputs, *alone) for array in some}  # what is given twice is computed with once

    @jax.jit
    def both(arrays, shared):
        def run(inputs):
            return [run_program(program, [arrays[id(array)] for array in some], shared)
                    for program, some in zip(programs, inputs, strict=False)]

        return run(inputs), run(alone), [program.compute(*(arrays[id(array)] for array in some), *shared)
                                         for program, some in zip(programs, inputs, strict=True)]

    of_all, of_first, wanted = both(arrays, list(shared))
    of_one = [[want[:1] for want in wants] for wants in wanted] if first else []
    for ys, wants in zip(of_all + of_first, wanted + of_one, strict=True):
        for y, want in zip(ys, wants, strict=True):
            assert y.shape == want.shape
            np.testing.assert_allclose(y, want, rtol=rtol, atol=atol)
    return both


def own(count):
    """Shared operands, each an array of its own."""
    return tuple(map(Part, range(count)))


def one(step, *sizes, chunk=1, uint8=()):
    return Program(sizes, (step,), (len(sizes),), own(len(step.shared)), chunk, uint8=uint8)


STEPS = {
    **{f"{name} same": lambda h, w, c, name=name: (Step("combine", (h, w, c), (0, 1), (), (name, "same", False)), 2, ())
       for name in BINARY if name != "div"},
    "number": lambda h, w, c: (Step("combine", (h, w, c), (0,), (), ("sub", "number", True), (3.0,)), 1, ()),
    "channel": lambda h, w, c: (Step("combine", (h, w, c), (0,), (0,), ("mul", "channel", False)), 1, ((c,),)),
    "shuffle": lambda h, w, c: (Step("shuffle", (h, w, c), (0,), (), (max(g for g in (1, 2, 3, 17) if c % g == 0),)), 1, ()),
    "scalar": lambda h, w, c: (Step("combine", (h, w, c), (0,), (0,), ("sub", "scalar", True)), 1, ((1,),)),
    "repeated": lambda h, w, c: (Step("upsample", (3 * h, 2 * w, c), (0,), (), (3, 2)), 1, ()),
    "blocks": lambda h, w, c: (Step("upsample", (c * h, w, 1), (0,), (), (c, 1)), 1, ()),
    "clamp": lambda h, w, c: (Step("map", (h, w, c), (0,), (), ("clamp",), (0.5, 0.25, -1.0, 2.0)), 1, ()),
    "leaky": lambda h, w, c: (Step("map", (h, w, c), (0,), (), ("leaky",), (0.25, 0.0)), 1, ()),
    "gate": lambda h, w, c: (
        Step("map", (h, w, c), (0,), (), ("gate",), (0.25, 0.5, 0.0, 1.0, 2.0, -1.0, 0.5, 0.125)), 1, ()),
    "square": lambda h, w, c: (Step("map", (h, w, c), (0,), (), ("square",), (0.0, 0.0)), 1, ()),
    "abs": lambda h, w, c: (Step("map", (h, w, c), (0,), (), ("abs",), (0.0, 0.0)), 1, ()),
    "channel sum": lambda h, w, c: (Step("channel_sum", (h, w, c), (0,), (), (5, 2)), 1, ()),
    "largest channel": lambda h, w, c: (Step("reduce", (h, w, 1), (0,), (), (True,)), 1, ()),
    "sum of channels": lambda h, w, c: (Step("reduce", (h, w, 1), (0,), (), (False,)), 1, ()),
    "mean over the image": lambda h, w, c: (
        Step("pool", (1, 1, c), (0,), (), (False, (h, w), Window((1, 1), ((0, 0), (0, 0)), (1, 1)))), 1, ()),
    "depthwise": lambda h, w, c: (Step("depthwise", (h, w, c), (0,), (0, 1), ((3, 3), SAME, None, None, "relu6", True)), 1,
                                  ((3, 3, 1, c), (c,))),
    "dense": lambda h, w, c: (Step("dense", (h, w, 19), (0,), (0, 1), ((1, 1), PIXELS, 1, "relu", True)), 1, ((c, 19), (19,))),
    "concat": lambda h, w, c: (Step("concat", (h, w, 2 * c), (0, 1)), 2, ()),
    "padded": lambda h, w, c: (Step("window", (h + 3, w + 1, c + 2), (0,), (), (-1, 0, -2), (7.0,)), 1, ()),
    "cropped": lambda h, w, c: (Step("window", (h, 1, 1), (0,), (), (0, w - 1, c - 1), (0.0,)), 1, ()),
}


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("make", STEPS.values(), ids=STEPS)
def test_each_step(make, size):
    step, count, shared = make(*size)
    program = one(step, *[size] * count)
    check((program, [images(i, 5, size) for i in range(count)]), first=True,
          shared=[reference.integers(np.random.default_rng(9), *shape) for shape in shared])


@pytest.mark.parametrize("name", [name for name in BINARY if name != "div"])
def test_a_number_for_each_pixel(name):
    check(*((one(Step("combine", size, (0, 1), (), (name, "pixel", swapped)), size, (*size[:2], 1)),
             [images(0, 5, size), images(1, 5, (*size[:2], 1))]) for size in SHAPES for swapped in (False, True)))


@pytest.mark.parametrize("name", [name for name in BINARY if name != "div"])
def test_a_number_for_each_pixel_and_one_for_each_channel(name):
    check(*((one(Step("combine", (h, w, 17), (0,), (0,), (name, "channel", swapped)), (h, w, 1)), [images(0, 5, (h, w, 1))])
            for h, w, _ in SHAPES for swapped in (False, True)), shared=[reference.integers(np.random.default_rng(9), 17)])


BYTES = {
    "max": lambda h, w, c: Step("pool", (h, w, c), (0,), (), (True, (3, 3), SAME), uint8=True),
    "concat": lambda h, w, c: Step("concat", (h, w, 2 * c), (0, 1), uint8=True),
    "padded": lambda h, w, c: Step("window", (h + 3, w + 1, c + 2), (0,), (), (-1, 0, -2), (255.0,), uint8=True),
    "a channel more": lambda h, w, c: Step("window", (h, w, c + 1), (0,), (), (0, 0, 0), (200.0,), uint8=True),
    "shuffle": lambda h, w, c: Step("shuffle", (h, w, c), (0,), (), (2 - c % 2,), uint8=True),
    "dequantize": lambda h, w, c: Step("dequantize", (h, w, c), (0,), (), (Quantization(0.25, 100),)),
}


@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("make", BYTES.values(), ids=BYTES)
def test_each_step_of_bytes(make, size):
    step = make(*size)
    count = len(step.args)
    program = one(step, *[size] * count, uint8=tuple(range(count)))
    check((program, [images(i, 5, size, uint8=True) for i in range(count)]), first=True)


def test_rounding_of_any_numbers():
    odd = [jnp.nan, jnp.inf, -jnp.inf, 0.125, 0.375, -0.0, 1e30, -1e30, 2.0]
    x = jnp.concatenate([jnp.linspace(-30.0, 30.0, 991), jnp.asarray(odd)])
    quantization = Quantization(0.25, 100)
    step = Step("quantize", (10, 10, 10), (0,), (), (quantization,), uint8=True)
    check((one(step, (10, 10, 10)), [x.reshape(1, 10, 10, 10)]))


@pytest.mark.parametrize("name, ulps", [("logistic", 8), ("swish", 8), ("sqrt", 0), ("rsqrt", 4), ("power", 8)])
def test_functions_of_any_numbers(name, ulps):
    x = jnp.abs(jnp.linspace(-30.0, 30.0, 5 * 1000).reshape(5, 10, 10, 10)) + (0 if name in ("logistic", "swish") else 2.0**-20)
    x = x * (jnp.arange(5).reshape(5, 1, 1, 1) % 2 * 2 - 1) if name in ("logistic", "swish") else x
    numbers = (1.0, 0.0, 1.0) if name == "swish" else (-0.75, 0.0)
    check((one(Step("map", (10, 10, 10), (0,), (), (name,), numbers), (10, 10, 10)), [x]), rtol=ulps * 2.0**-24)


SMOOTH = {  # exact, and how many halves of a last place a result may be off, and of its numbers' product with x
    # Of two polynomials of degree d in x^2, all factors positive, a step rounds twice; then a product, a quotient and the fit.
    "tanh": ((0.0, 0.0), lambda x: np.tanh(x), lambda x: (2 * 2 * 4 + 2 * 4 + 4, 0)),
    "erf": ((0.0, 0.0), scipy.special.erf, lambda x: (2 * 2 * 5 + 2 * 5 + 4, 0)),
    # The sum with 1 has an error of its own size; its argument is rounded once, which moves it by less than that again.
    "gelu": ((0.75, 0.5), lambda x: 0.5 * x * scipy.special.erfc(-0.75 * x), lambda x: (2, 2 * 34 + 2)),
    # e^-z is off by as many halves as z has, times z, which is rounded in each of four steps.
    "swish": ((1.5, 0.0625, 0.5), lambda x: 0.5 * x * scipy.special.expit(1.5 * x + 0.0625 * x**3),
              lambda x: (12 + 4 * np.abs(1.5 * x + 0.0625 * x**3), 0)),
    "silu": ((1.0, 0.0, 1.0), lambda x: x * scipy.special.expit(x), lambda x: (12 + 4 * np.abs(x), 0))}


@pytest.mark.parametrize("kernel", ffi.kernels())
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_functions_of_any_numbers(name, kernel):
    numbers, exact, error = SMOOTH[name]
    x = np.concatenate([np.linspace(-12, 12, 970), np.geomspace(2.0**-100, 2.0**-3, 30)]).astype(np.float32)
    step = Step("map", (10, 10, 10), (0,), (), ("swish" if name == "silu" else name,), numbers)
    program = replace(one(step, (10, 10, 10)), kernel=kernel)
    y = np.ravel(run_program(program, [jnp.asarray(x).reshape(1, 10, 10, 10)], [])[0])
    wanted, (relative, of_x) = exact(np.float64(x)), error(np.float64(x))
    factor = np.abs(numbers[-1] * x)  # of what may be 0 where it is no normal number
    assert np.all(np.abs(y - wanted) <= 2.0**-24 * (relative * np.abs(wanted) + of_x * factor) + 2.0**-126 * (1 + factor))


def test_exponentials_of_any_numbers():
    ends = [-np.inf, -1e30, -105, -104, -103.9, -88, -87.4, -87.3, -0.0, 88.7, 88.72283, 88.7229, 89, 1e30, np.inf, np.nan]
    x, size = np.concatenate([np.linspace(-104, 89, 984), ends]).astype(np.float32), (10, 10, 10)
    (y,) = run_program(one(Step("map", size, (0,), (), ("exp",), (0.0, 0.0)), size), [jnp.reshape(x, (1, *size))], [])
    with np.errstate(over="ignore"):
        wanted = np.exp(x.astype(np.float64)).astype(np.float32)
    # The exponent that is left is off by less than a unit of 2^-24, and so is its product in the sum that ends the polynomial,
    # which is rounded itself; what is no normal number may be 0.
    np.testing.assert_allclose(np.ravel(y), wanted, rtol=4 * 2.0**-24, atol=2.0**-126)


FUNCTIONS = {"clamp": (0.5, 1.0, -3.0, 4.0), "leaky": (0.25, 0.0), "gate": (0.25, 0.5, 0.0, 1.0, 2.0, -1.0, 0.5, 0.125),
             "logistic": (0.0, 0.0), "swish": (1.0, 0.0, 1.0), "tanh": (0.0, 0.0), "gelu": (0.75, 0.5)}
# Of a half of the last place: those of SMOOTH, as much again for XLA's; of numbers up to some 500 whose products cancel.
SMOOTHLY = {"logistic": (8, 0), "swish": (8, 0), "tanh": (56, 0), "gelu": (64, 500)}
CONVOLUTIONS = {
    "conv": lambda c, packed: Step("conv", (4, 5, 7), (0,), (0, 1), (SAME, "relu", True, False), pattern=packed.pattern),
    "depthwise": lambda c, packed: Step("depthwise", (4, 5, c), (0,), (0, 1), ((3, 3), SAME, None, None, None, True)),
    "dense": lambda c, packed: Step("dense", (4, 5, 7), (0,), (0, 1), ((1, 1), PIXELS, 1, "relu6", True)),
}


@pytest.mark.parametrize("channels", [1, 5, 37])
@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_that_follows_a_convolution(name, kind, channels):
    """Where nothing else reads the convolution it does so itself, as its trace says, and elsewhere it does not; of pixels side
    by side, and of those with others between."""
    draw = np.random.default_rng(3)
    packed = sparseflax.pack(reference.integers(draw, 3, 3, channels, 7) * (draw.random((3, 3, channels, 7)) < 0.4))
    conv = CONVOLUTIONS[kind](channels, packed)
    weights = {"conv": packed.values, "depthwise": reference.integers(draw, 3, 3, 1, channels),
               "dense": reference.integers(draw, channels, 7)}
    size, out = (4, 5, channels), conv.size
    function = Step("map", out, (1,), (), (name,), FUNCTIONS[name])
    alone = Program((size,), (conv, function), (2,), own(2), 1)
    beside = Program((size,), (conv, function, Step("concat", (*out[:2], 2 * out[2] + channels), (2, 0, 2))), (3,), own(2), 1)
    again = Program((size,), (conv, function, Step("combine", out, (1, 2), (), ("add", "same", False))), (3,), own(2), 1)
    shared = [weights[kind], reference.integers(draw, out[2])]
    x = images(5, 5, size)
    ffi.native.trace(True)
    kept = check(*((program, [x]) for program in (alone, beside, again)), shared=shared, first=True,
                 rtol=SMOOTHLY.get(name, (0, 0))[0] * 2.0**-24, atol=SMOOTHLY.get(name, (0, 0))[1] * 2.0**-24)
    traced = ffi.native.trace(False)  # of the programs that are there
    del kept
    for program in (alone, beside, again):
        encoded = program.encode()["words"].tolist()
        of_all, of_first = [times for words, times in traced if words == encoded and any(times)]
        for times in (of_all, of_first):
            assert (times[1] == 0) == (program is not again) and times[0] > 0


def traced(programs, inputs, shared):
    """Of each program whose outputs are checked: the numbers of the steps that took time of their own."""
    ffi.native.trace(True)
    kept = check(*((program, inputs) for program in programs), shared=shared)
    times = ffi.native.trace(False)  # of the programs that are there
    del kept
    return [{number for words, each in times if words == program.encode()["words"].tolist()
             for number, time in enumerate(each) if time} for program in programs]


@pytest.mark.parametrize("uint8", [False, True], ids=["float32", "bytes"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(1, 1, 1), (4, 5, 5), (5, 9, 37), (9, 8, 64)])
def test_a_function_and_a_rounding_that_follow_a_depthwise_convolution(size, stride, uint8):
    """Nothing in float32 is written then but two rows in turn; where something else reads what lies between, it is."""
    h, w, c = size
    window = Window((stride, stride), ((1, 1), (1, 1)), (1, 1))
    out = (-(-h // stride), -(-w // stride), c)
    conv = Step("depthwise", out, (0,), (0, 1), ((3, 3), window, Quantization(1.0, 100) if uint8 else None, None, None, True))
    function = Step("map", out, (1,), (), ("clamp",), (0.5, 1.0, -30.0, 40.0))
    rounding = Step("quantize", out, (2,), (), (Quantization(0.25, 128),), uint8=True)
    beside = Step("concat", (*out[:2], 2 * c), (3, 3), uint8=True)
    again = Step("combine", out, (1, 2), (), ("add", "same", False)), Step("combine", out, (2, 2), (), ("add", "same", False))
    programs = [Program((size,), (conv, function, rounding, *more), outputs, own(2), 1, uint8=(0,) if uint8 else ())
                for more, outputs in [((), (3,)), ((beside,), (4,)), (again[:1], (3, 4)), (again[1:], (3, 4)), ((), (2, 3))]]
    draw = np.random.default_rng(3)
    shared = [reference.integers(draw, 3, 3, 1, c), reference.integers(draw, c)]
    # The second place of a concatenation is a copy. Steps that run pixel by pixel count as the first of them.
    took = traced(programs, [images(5, 5, size, uint8=uint8)], shared)
    assert took == [{0}, {0, 3}, {0, 1}, {0, 2}, {0, 2}]


@pytest.mark.parametrize("factors", [(1, 2), (2, 1), (2, 2), (3, 5)])
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 4, 5), (4, 3, 300)])
def test_what_is_done_to_an_enlarged_image_pixel_by_pixel(size, factors):
    """Nothing of it is written but a strip; strips of a row begin anywhere in it."""
    (h, w, c), (fh, fw) = size, factors
    large = (fh * h, fw * w, c)
    steps = (Step("upsample", large, (0,), (), factors), Step("combine", large, (2, 1), (), ("add", "same", False)),
             Step("quantize", large, (3,), (), (Quantization(0.5, 128),), uint8=True))
    program = Program((size, large), steps, (4,), (), 1)
    (took,) = traced([program], [images(0, 3, size), images(1, 3, large)], [])
    assert took == {0}


@pytest.mark.parametrize("name", ["max", "min", "add", "mul"])
def test_what_is_not_finite(name):
    odd = np.asarray([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0], np.float32)
    a, b = (array.reshape(1, 1, 6, 6) for array in np.meshgrid(odd, odd))
    window, size = Window((1, 1), ((0, 0), (1, 1)), (1, 1)), (1, 6, 6)
    functions = (("clamp", (1.0, -0.0, 0.5, 6.0)), ("leaky", (0.5, 6.0)), ("power", (0.5, 6.0)),
                 ("gate", (1.0, 3.0, -0.0, 6.0, 1.0, -0.0, 0.5, -0.0)))
    check((one(Step("combine", size, (0, 1), (), (name, "same", False)), size, size), [a, b]),
          (one(Step("pool", size, (0,), (), (name == "max", (1, 3), window)), size), [a]),
          (one(Step("reduce", (1, 6, 1), (0,), (), (name == "max",)), size), [a]),
          *((one(Step("map", size, (0,), (), (function,), numbers), size), [a]) for function, numbers in functions))
    for function, numbers, wanted in (
            ("logistic", (0.0, 0.0), jax.nn.sigmoid), ("swish", (1.0, 0.0, 1.0), jax.nn.silu), ("tanh", (0.0, 0.0), jnp.tanh),
            ("swish", (1.5, 0.125, 1.0), lambda x: x * jax.nn.sigmoid(1.5 * x + 0.125 * x**3)),
            ("erf", (0.0, 0.0), jax.lax.erf), ("gelu", (0.5, 0.5), lambda x: 0.5 * x * (1 + jax.lax.erf(0.5 * x)))):
        y = run_program(one(Step("map", size, (0,), (), (function,), numbers), size), [a], [])[0]
        np.testing.assert_allclose(y, wanted(a), atol=2.0**-24)


PADDING = st.tuples(st.integers(0, 2), st.integers(0, 2))
PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))
SIZE = st.tuples(st.integers(1, 9), st.integers(1, 9), st.sampled_from([1, 5, 8, 33]))


@given(taps=PAIR, strides=PAIR, dilation=PAIR, groups=st.sampled_from([(1, 1, 1), (4, 20, 2), (300, 7, 1), (6, 9, 3)]),
       size=st.tuples(st.integers(1, 13), st.integers(1, 13)), activation=st.sampled_from([None, "relu", "relu6"]),
       bias=st.booleans())
def test_dense(taps, strides, dilation, groups, size, activation, bias):
    (ic, oc, count), window = groups, Window(strides, ((0, 0), (0, 0)), dilation)
    oh, ow = window.output(*size, *taps)
    if 0 in (oh, ow):
        return
    step = Step("dense", (oh, ow, oc), (0,), (0, 1)[:1 + bias], (taps, window, count, activation, bias))
    draw = np.random.default_rng(1)
    shared = [reference.integers(draw, *taps, ic // count, oc), reference.integers(draw, oc)]
    check((one(step, (*size, ic)), [images(0, 3, (*size, ic))]), shared=shared[:1 + bias], first=True)


@given(taps=PAIR, strides=PAIR, dilation=PAIR, padding=st.tuples(PADDING, PADDING),
       op=st.sampled_from(["max", "sum"]), size=SIZE)
def test_windows(taps, strides, dilation, padding, op, size):
    window = Window(strides, padding, dilation)
    oh, ow = window.output(*size[:2], *taps)
    if 0 in (oh, ow):
        return
    check((one(Step("pool", (oh, ow, size[2]), (0,), (), (op == "max", taps, window)), size), [images(0, 2, size)]))


@given(taps=PAIR, strides=PAIR, dilation=PAIR, padding=st.tuples(PADDING, PADDING), size=SIZE,
       inputs=st.sampled_from([None, Quantization(0.25, 100), Quantization(2.0, 0), Quantization(0.5, 255)]),
       outputs=st.sampled_from([None, Quantization(3.0, 17), Quantization(100.0, 0), Quantization(0.7, 255)]),
       activation=st.sampled_from([None, "relu", "relu6"]), bias=st.booleans(), kernel=st.sampled_from(ffi.kernels()))
def test_depthwise(taps, strides, dilation, padding, size, inputs, outputs, activation, bias, kernel):
    """Sums of multiples of a quarter are exact, and quotients are as IEEE has them: nothing may differ."""
    window = Window(strides, padding, dilation)
    oh, ow = window.output(*size[:2], *taps)
    if 0 in (oh, ow):
        return
    step = Step("depthwise", (oh, ow, size[2]), (0,), (0, 1)[:1 + bias], (taps, window, inputs, outputs, activation, bias),
                uint8=outputs is not None)
    draw = np.random.default_rng(1)
    shared = [reference.integers(draw, *taps, 1, size[2]), reference.integers(draw, size[2])]
    program = one(step, size, uint8=(0,) if inputs else ())
    check((replace(program, kernel=kernel), [images(0, 2, size, uint8=inputs is not None)]), shared=shared[:1 + bias])


@pytest.mark.parametrize("inputs", [None, Quantization(0.013, 101)])
@pytest.mark.parametrize("kernel", ffi.kernels())
def test_depthwise_of_any_numbers(kernel, inputs):
    outputs, size, draw = Quantization(0.021, 90), (9, 11, 37), np.random.default_rng(0)
    x = np.asarray(images(0, 2, size, True)) if inputs else draw.standard_normal((2, *size)).astype(np.float32)
    weights, bias = draw.standard_normal((3, 3, 1, 37)).astype(np.float32), draw.standard_normal(37).astype(np.float32)
    wide = np.float64(x) if inputs is None else (np.float64(x) - inputs.zero) * np.float64(np.float32(inputs.scale))
    padded = np.pad(wide, ((0, 0), (1, 1), (1, 1), (0, 0)))
    terms = [padded[:, r:r + 9, s:s + 11] * np.float64(weights[r, s, 0]) for r in range(3) for s in range(3)]
    exact = sum(terms) + np.float64(bias)
    # Nine products and sums, a factor and a bias; a quotient before it is rounded.
    error = 14 * 2.0**-24 * (sum(map(np.abs, terms)) + np.abs(bias))
    for rounded in (None, outputs):
        step = Step("depthwise", size, (0,), (0, 1), ((3, 3), SAME, inputs, rounded, None, True), uint8=rounded is not None)
        program = replace(one(step, size, uint8=(0,) if inputs else ()), kernel=kernel)
        (y,) = run_program(program, [jnp.asarray(x)], [jnp.asarray(weights), jnp.asarray(bias)])
        step_size = np.float64(np.float32(outputs.scale))
        low, high = (bound if rounded is None else np.clip(np.rint(bound / step_size) + outputs.zero, 0, 255)
                     for bound in (exact - error, exact + error))
        assert (np.asarray(y) >= low).all() and (np.asarray(y) <= high).all()


def test_depthwise_of_what_is_not_finite():
    x, one_ = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf, 1e30, -0.0, 3.0]).reshape(1, 1, 6, 1), jnp.ones((1, 1, 1, 1))
    check(*((one(Step("depthwise", (1, 6, 1), (0,), (0,), ((1, 1), PIXELS, None, Quantization(0.5, 3), activation, False),
                      uint8=True), (1, 6, 1)), [x]) for activation in (None, "relu", "relu6")), shared=[one_])


@st.composite
def programs(draw):
    """Steps over images of a few sizes, that read whatever was there before: values that share, hold and outlive each other."""
    inputs = [(3, 4, 5)] * draw(st.integers(1, 2))
    sizes, steps = list(inputs), []
    for _ in range(draw(st.integers(1, 12))):
        x = draw(st.integers(0, len(sizes) - 1))
        h, w, c = sizes[x]
        alike = [i for i, size in enumerate(sizes) if size == (h, w, c)]
        beside = [i for i, size in enumerate(sizes) if size[:2] == (h, w)]
        op = draw(st.sampled_from([
            "combine", "map", "concat", "reshape", "slice", "pool", "image", "conv", "dense", "upsample", "reduce", "pixel",
            "shuffle", "outer"]))
        if op == "combine":
            other = draw(st.sampled_from(alike))
            step = Step("combine", (h, w, c), (x, other), (), (draw(st.sampled_from(["add", "sub", "max"])), "same", False))
        elif op == "map":
            step = Step("map", (h, w, c), (x,), (), ("clamp",), (1.0, -0.0, -9.0, 9.0))
        elif op == "concat":
            args = (x, *draw(st.lists(st.sampled_from(beside), min_size=1, max_size=2)))
            step = Step("concat", (h, w, sum(sizes[arg][2] for arg in args)), args)
        elif op == "reshape":
            step = Step("reshape", draw(st.sampled_from([(1, 1, h * w * c), (h * w, 1, c), (w, h, c)])), (x,))
        elif op == "slice":
            low = draw(st.integers(0, c - 1))
            step = Step("window", (h, w, draw(st.integers(1, c - low))), (x,), (), (0, 0, low), (0.0,))
        elif op == "pool":
            step = Step("pool", (1, 1, c), (x,), (), (True, (h, w), Window((1, 1), ((0, 0), (0, 0)), (1, 1))))
        elif op == "reduce":
            step = Step("reduce", (h, w, 1), (x,), (), (True,))
        elif op == "pixel" and (h, w, 1) in sizes:
            step = Step("combine", (h, w, c), (x, sizes.index((h, w, 1))), (), ("max", "pixel", False))
        elif op == "shuffle":
            step = Step("shuffle", (h, w, c), (x,), (), (draw(st.sampled_from([g for g in range(1, c + 1) if c % g == 0])),))
        elif op == "outer" and c == 1:
            step = Step("combine", (h, w, 5), (x,), (1,), ("max", "channel", False))
        elif op == "upsample":
            fw = draw(st.sampled_from([f for f in (1, 2, 5) if f == 2 or c % f == 0]))
            step = Step("upsample", (h, fw * w, c if fw == 2 else c // fw), (x,), (), (1, fw))
        elif op == "image" and (1, 1, c) in sizes:
            step = Step("combine", (h, w, c), (x, sizes.index((1, 1, c))), (), ("max", "image", False))
        elif op == "conv" and c == 5:
            args = x, draw(st.sampled_from(alike))
            step = Step("conv", (h, w, 5), args, (0, 1), (SAME, "relu6", True, True), (), PACKED.pattern)
        elif op == "dense" and c == 5:
            step = Step("dense", (h, w, 5), (x,), (2, 1), ((1, 1), PIXELS, 1, "relu6", True))
        else:
            continue
        if max(step.size) < 200:
            steps.append(step)
            sizes.append(step.size)
    if not any(step.op == "conv" for step in steps):
        steps.append(Step("conv", (3, 4, 5), (0,), (0, 1), (SAME, None, True, False), (), PACKED.pattern))
    if not any(step.op == "dense" for step in steps):
        steps.append(Step("dense", (3, 4, 5), (0,), (2,), ((1, 1), PIXELS, 1, None, False)))
    known = [len(inputs) + i for i, step in enumerate(steps) if step.op != "reshape"]
    outputs = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
    return Program(tuple(inputs), tuple(steps), tuple(outputs), own(3), draw(st.integers(1, 3)))


DRAW = np.random.default_rng(0)
PACKED = sparseflax.pack(reference.integers(DRAW, 3, 3, 5, 5) * (DRAW.random((3, 3, 5, 5)) < 0.3).astype(np.float32))
SHARED = [PACKED.values, jnp.asarray(reference.integers(DRAW, 5))]
MATRIX = jnp.asarray(reference.integers(DRAW, 5, 5))


@settings(max_examples=60)
@given(program=programs(), n=st.sampled_from([1, 2, 5]))
def test_any_program(program, n):
    check((program, [images(i, n, size) for i, size in enumerate(program.inputs)]), shared=[*SHARED, MATRIX])


@st.composite
def byte_programs(draw):
    """Convolutions in eight bits, maxima, concatenations, ranges of channels and roundings, in any order."""
    known = [((3, 4, 8), False), ((3, 4, 8), True)]
    steps = []
    for _ in range(draw(st.integers(1, 12))):
        x = draw(st.integers(0, len(known) - 1))
        (h, w, c), uint8 = known[x]
        beside = [i for i, (size, kind) in enumerate(known) if size[:2] == (h, w) and kind == uint8]
        alike = [i for i in beside if known[i][0][2] == 8]
        op = draw(st.sampled_from(["conv", "depthwise", "concat", "slice", "pool", "rounding", "add", "map"]))
        if op == "conv" and uint8 and c == 8:
            residual, to_float = draw(st.booleans()), draw(st.booleans())
            inner = draw(st.sampled_from([None, (-30.0, 60.0, 0.001, 0.5)])) if residual else None
            args = (x, draw(st.sampled_from(alike))) if residual else (x,)
            zeros = draw(st.tuples(*[st.integers(0, 255)] * 3))
            bounds = (-9.0, 9.0) if to_float else (-float(zeros[1]), 255.0 - zeros[1])
            rescale = Rescale(*zeros, *bounds, to_float, 0.75, 0.3, 1.25, inner)
            step = Step("conv_int8", (h, w, 8), args, (0, 1, 2, 3), (SAME, rescale), (), INT8.pattern, not to_float)
        elif op == "depthwise" and uint8 and c == 8:
            outputs = draw(st.sampled_from([None, Quantization(5.0, 60)]))
            params = (3, 3), SAME, Quantization(0.5, 30), outputs, "relu", False
            step = Step("depthwise", (h, w, 8), (x,), (4,), params, uint8=outputs is not None)
        elif op == "concat":
            args = (x, *draw(st.lists(st.sampled_from(beside), min_size=1, max_size=2)))
            step = Step("concat", (h, w, sum(known[arg][0][2] for arg in args)), args, uint8=uint8)
        elif op == "slice" and c > 4:
            low, size = draw(st.integers(0, c - 5)), draw(st.sampled_from([3, 4, 5]))
            step = Step("window", (h, w, size), (x,), (), (0, 0, low), (0.0,), uint8=uint8)
        elif op == "pool":
            step = Step("pool", (h, w, c), (x,), (), (True, (3, 3), SAME), uint8=uint8)
        elif op == "rounding":
            step = Step("dequantize" if uint8 else "quantize", (h, w, c), (x,), (), (Quantization(0.5, 30),), uint8=not uint8)
        elif op == "add" and not uint8:
            step = Step("combine", (h, w, c), (x, x), (), ("add", "same", False))
        elif op == "map" and not uint8:
            step = Step("map", (h, w, c), (x,), (), ("clamp",), (0.5, 1.0, -3.0, 400.0))
        else:
            continue
        if step.size[2] < 40:
            steps.append(step)
            known.append((step.size, step.uint8))
    if not any(4 in step.shared for step in steps):  # each operand has to be read
        steps.append(Step("depthwise", (3, 4, 8), (0,), (4,), ((3, 3), SAME, None, None, None, False)))
    if not any(0 in step.shared for step in steps):
        rescale = Rescale(3, 7, 9, -7.0, 248.0, False, 0.75, 0.3, 1.25)
        steps.append(Step("conv_int8", (3, 4, 8), (1, 1), (0, 1, 2, 3), (SAME, rescale), (), INT8.pattern, True))
    outputs = draw(st.lists(st.integers(2, 1 + len(steps)), min_size=1, max_size=3, unique=True))
    return Program(((3, 4, 8),) * 2, tuple(steps), tuple(outputs), own(5), draw(st.integers(1, 3)), uint8=(1,))


KERNEL = reference.integers(DRAW, 3, 3, 8, 8) * np.repeat(DRAW.random((3, 3, 2, 8)) < 0.4, 4, axis=2).astype(np.float32)
INT8 = pack_int8(KERNEL, Quantization(1.0, 0))
SHARED_INT8 = [INT8.words, INT8.sums, INT8.scale, jnp.linspace(-9.0, 9.0, 8),
               jnp.asarray(reference.integers(DRAW, 3, 3, 1, 8))]


@settings(max_examples=60)
@given(program=byte_programs(), n=st.sampled_from([1, 2, 5]), kernel=st.sampled_from([None, *ffi.kernels("int8")]))
def test_any_program_of_bytes(program, n, kernel):
    """Sums are exact and every operation of the epilogue rounds by itself: nothing may differ."""
    inputs = [images(0, n, (3, 4, 8)), images(1, n, (3, 4, 8), uint8=True)]
    check((replace(program, int8=kernel), inputs), shared=SHARED_INT8)


def test_a_row_that_needs_all_rows_before_it():
    """Of a value that is looked at as channels: steps around the reshape must not run row by row together."""
    steps = (Step("map", (2, 3, 1), (0,), (), ("square",), (0.0, 0.0)), Step("reshape", (1, 1, 6), (2,)),
             Step("combine", (2, 3, 6), (1, 3), (), ("add", "image", False)))
    check((Program(((2, 3, 1), (2, 3, 6)), steps, (4,), (), 1), [images(0, 2, (2, 3, 1)), images(1, 2, (2, 3, 6))]))


def network():
    steps = (Step("conv", (3, 4, 5), (0,), (0, 1), (SAME, "relu", True, False), (), PACKED.pattern),
             Step("pool", (1, 1, 5), (1,), (), (True, (3, 4), Window((1, 1), ((0, 0), (0, 0)), (1, 1)))))
    return Program(((3, 4, 5),), steps, (2,), own(2), 1)


def test_transformations():
    program, x = network(), images(0, 6, (3, 4, 5))

    def run(x, *shared):
        return run_program(program, [x], shared)[0]

    want, gradient = jax.jit(lambda x: (program.compute(x, *SHARED)[0], jax.grad(
        lambda x: program.compute(x, *SHARED)[0].sum())(x)))(x)
    np.testing.assert_array_equal(jax.vmap(run, (0, None, None))(x.reshape(3, 2, 3, 4, 5), *SHARED).reshape(want.shape), want)
    twice = jnp.stack([SHARED[0], 2 * SHARED[0]])
    np.testing.assert_array_equal(jax.vmap(run, (None, 0, None))(x, twice, SHARED[1])[0], want)
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda x: run(x, *SHARED).sum()))(x), gradient)
    assert run(x[:0], *SHARED).shape == (0, 1, 1, 5)
    for kernel in ffi.kernels():
        np.testing.assert_array_equal(run_program(replace(program, kernel=kernel), [x], SHARED)[0], want)


def test_shared_operands_may_lie_in_one_array():
    program, x, (values, bias) = network(), images(0, 3, (3, 4, 5)), SHARED
    joined = jnp.concatenate([jnp.full(7, jnp.nan), values.reshape(-1), jnp.full(2, jnp.nan), bias])
    parts = Part(0, 7, values.shape), Part(0, 9 + values.size, bias.shape)
    for where, arrays in ((parts, [joined]), ((Part(1), parts[1]), [joined, values]), ((parts[0], Part(1)), [joined, bias])):
        check((replace(program, shared=where), [x]), shared=arrays)
    wanted = program.compute(x, *SHARED)[0]
    np.testing.assert_array_equal(run_program(replace(program, shared=parts), [x], [joined])[0], wanted)


def call(program, operands, sizes=None, **changed):
    sizes = sizes or [step.size for step in program.results()]
    results = [jax.ShapeDtypeStruct((operands[0].shape[0], *size), jnp.float32) for size in sizes]
    return jax.ffi.ffi_call(ffi.PROGRAM, results)(*operands, **{**program.encode(), **changed})


def lying(*words):
    return np.asarray(words, np.int64)


def test_what_does_not_fit_is_refused():
    program, x = network(), images(0, 2, (3, 4, 5))
    words = program.encode()["words"]
    for what, expected in ((lambda: call(program, [x, *SHARED], words=np.asarray([1, *words[1:]])), "a program of version 1"),
                           (lambda: call(program, [x, *SHARED], words=np.asarray([*words, 0])), "its length does not fit"),
                           (lambda: call(program, [x, *SHARED], gaps=np.asarray([254] * 4, np.uint8)), "step 0: malformed"),
                           (lambda: call(program, [x, SHARED[0]]), "wrong number of operands"),
                           (lambda: call(program, [x[:, 1:], *SHARED]), "operand 0 does not fit"),
                           (lambda: call(program, [x, SHARED[0][1:], SHARED[1]]), "operand 1 does not fit"),
                           (lambda: call(program, [x, *SHARED], [(2, 1, 5)]), "result 0 does not fit"),
                           (lambda: call(program, [x.astype(jnp.uint8), *SHARED]), "operand 0 does not fit"),
                           (lambda: call(program, [x, SHARED[0].astype(jnp.int32), SHARED[1]]), "operand 1 does not fit"),
                           (lambda: call(program, [x, *SHARED], kernel="none"), "kernel 'none' does not run"),
                           (lambda: call(program, [x, *SHARED], parts=lying(0, -1)), "an operand lies nowhere"),
                           (lambda: call(program, [x, *SHARED], parts=lying(2, -1, 1, -1)), "an operand lies in no array"),
                           (lambda: call(program, [x, *SHARED], parts=lying(-1, -1, 1, -1)), "an operand lies in no array"),
                           (lambda: call(program, [x, *SHARED], parts=lying(0, -2, 1, -1)), "an operand lies in no array"),
                           (lambda: call(program, [x, *SHARED], parts=lying(0, -1, 1, 1)), "operand 2 does not fit"),
                           (lambda: call(program, [x, *SHARED], parts=lying(0, 2**62, 1, 0)), "operand 1 does not fit"),
                           (lambda: call(program, [x, *SHARED], parts=lying(0, -1, 0, -1)), "wrong number of operands"),
                           (lambda: call(program, [x, *SHARED], int8="none"), "kernel 'none' does not run")):
        with pytest.raises(Exception, match=expected):
            jax.block_until_ready(what())


def test_depthwise_bytes_that_do_not_fit_are_refused():
    params = (3, 3), SAME, Quantization(0.5, 3), Quantization(2.0, 7), None, False
    step = Step("depthwise", (3, 4, 5), (0,), (0,), params, uint8=True)
    program, x, kernel = one(step, (3, 4, 5), uint8=(0,)), images(0, 2, (3, 4, 5), True), jnp.ones((3, 3, 1, 5))
    words = program.encode()["words"]
    flags = len(words) - 6  # the last of its parameters, before where its numbers and gaps lie and the output
    assert words[flags - 1:flags + 1].tolist() == [1, 1]
    for changed, expected in (({"numbers": np.asarray([0.5, 3, 0, 7], np.float32)}, "its bytes stand for nothing"),
                              ({"numbers": np.asarray([0.5, 3.5, 2, 7], np.float32)}, "its bytes stand for nothing"),
                              ({"numbers": np.asarray([0.5, 3, np.nan, 7], np.float32)}, "its bytes stand for nothing"),
                              ({"words": edited(words, flags - 1, 0)}, "its images have the wrong type"),
                              ({"words": edited(words, flags, 0)}, "its operands do not fit"),  # which has two numbers too many
                              ({"words": edited(words, flags, 2)}, "malformed")):
        with pytest.raises(Exception, match=expected):
            jax.block_until_ready(call(program, [x, kernel], **changed))


def edited(words, at, word):
    return np.asarray([*words[:at], word, *words[at + 1:]])


def test_edited_programs_are_refused_or_run():
    program, x = network(), images(0, 2, (3, 4, 5))
    words, draw = program.encode()["words"], np.random.default_rng(0)
    for _ in range(150):
        edited = words.copy()
        edited[draw.integers(len(words))] = draw.choice([-1, 0, 1, 2, 3, 5, 17, 60, 2**20, 2**31, 2**62])
        try:
            jax.block_until_ready(call(program, [x, *SHARED], words=edited))
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            assert "network program: " in str(error)
