"""Equations of a jaxpr as steps of a program: which of them it knows, and how they join the convolution before them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives

from sparseflax.conv.int8 import quantize_p
from sparseflax.conv.int8_primitive import int8_conv_p
from sparseflax.conv.primitive import conv_p
from sparseflax.conv.window import Window, addressable
from sparseflax.layers.rules import gather, keep_all
from sparseflax.network import int8
from sparseflax.network.region import CONVOLUTIONS, Node, Region, is_number

MAX_PARTS = 1 << 20  # of a window's size, stride, padding or dilation, as program_decode.cc has it


def step(region: Region, equation: Any, operands: Sequence[Any]) -> Node | None:
    """What an equation adds to what waits in a region; None where it is no step."""
    primitive = equation.primitive
    if primitive not in STEPS:
        return None
    if primitive is not quantize_p:
        operands = [region.seen(operand) for operand in operands]
    nodes = [operand for operand in operands if isinstance(operand, Node)]
    dtype = equation.outvars[0].aval.dtype
    if not nodes and primitive not in FIRST:
        return None
    if any(node.uint8 for node in nodes) and primitive not in MOVES and primitive is not int8_conv_p:
        return None
    if dtype not in (jnp.float32, jnp.bool_) and not (dtype == jnp.uint8 and (primitive in FIRST or nodes)):
        return None
    made = STEPS[primitive](region, equation, *operands)
    if made is not None:
        region.is_read(nodes)
    return made


def _sparse(region: Region, equation: Any, x: Any, values: Any, *rest: Any) -> Node | None:
    params = equation.params
    region.kernel = region.kernel or params["kernel"]
    if not addressable(params["pattern"], params["window"]) or params["kernel"] != region.kernel or isinstance(values, Node):
        return None
    bias = rest[0] if params["has_bias"] else None
    residual = rest[-1] if params["has_residual"] else None
    if isinstance(bias, Node):
        return None
    residual = region.viewed(residual) if isinstance(residual, Node) else residual
    return region.node(equation, "conv", [x], [values], [params["window"]], pattern=params["pattern"],
                       activation=params["activation"], bias=bias, residual=residual)


def _add(region: Region, equation: Any, a: Any, b: Any) -> Node | None:
    """Of two convolutions that wait the later takes the sum of the earlier."""
    waiting = [(conv, other) for conv, other in ((a, b), (b, a))
               if region.is_open(conv, *CONVOLUTIONS) and conv.activation is None]
    for conv, other in sorted(waiting, key=lambda pair: -pair[0].number):
        if conv.op == "conv_int8":
            if (joined := int8.with_residual(region, conv, other)) is not None:
                return joined
            continue
        channels = conv.size[2]
        if conv.op == "conv" and conv.residual is None and np.shape(other) == conv.shape:
            if not isinstance(other, Node):
                return replace(conv, residual=jnp.asarray(other).reshape(conv.shape[0], *conv.size))
            if other.size == conv.size and other.number < conv.number:
                return replace(conv, residual=other)
        per_channel = np.shape(other) == (*(1 for _ in conv.shape[1:]), channels) and conv.shape[-1] == channels
        if conv.bias is None and per_channel and not isinstance(other, Node):
            return replace(conv, bias=jnp.reshape(other, channels))
    return _combine(region, equation, a, b)


def _combine(region: Region, equation: Any, a: Any, b: Any) -> Node | None:
    name = equation.primitive.name
    for x, other, swapped in ((a, b, False), (b, a, True)):
        if not isinstance(x, Node) or x.shape != equation.outvars[0].aval.shape:
            continue
        shape, ones = np.shape(other), (1,) * (len(x.shape) - 2)
        if isinstance(other, np.ndarray) and other.size == 1:
            other = other.item()
        if is_number(other):
            line = _line(name, float(other), swapped)
            return _clamped(region, equation, x, **line) if line else region.node(
                equation, "combine", [x], params=(name, "number", swapped), numbers=[other])
        if math.prod(shape) == 1 and not isinstance(other, Node):
            return region.node(equation, "combine", [x], [jnp.reshape(other, 1)], (name, "scalar", swapped))
        if shape == x.shape:
            return region.node(equation, "combine", [x, other], params=(name, "same", swapped))
        if shape == (1, *ones, x.shape[-1]) and not isinstance(other, Node):
            return region.node(equation, "combine", [x], [jnp.reshape(other, -1)], (name, "channel", swapped))
        if ones and shape == (x.shape[0], *ones, x.shape[-1]):
            return region.node(equation, "combine", [x, other], params=(name, "image", swapped))
    return None


def _line(name: str, number: float, swapped: bool) -> dict[str, float] | None:
    """An operation with a number as a line between two bounds; None for what is none, as a quotient by x."""
    if not math.isfinite(number):
        return None
    if name == "div":
        return {"scale": 1 / number} if not swapped and 2.0**-126 <= abs(number) <= 2.0**126 else None
    if name == "sub":
        return {"scale": -1.0, "shift": number} if swapped else {"shift": -number}
    return {{"add": "shift", "mul": "scale", "max": "low", "min": "high"}[name]: number}


def _clamped(region: Region, equation: Any, x: Node, scale: float = 1.0, shift: float = -0.0, low: float = -math.inf,
             high: float = math.inf) -> Node | None:
    """min(max(scale x + shift, low), high); of such a one that waits it makes one, where that adds no number to a number."""
    if region.is_open(x, "map") and x.params == ("clamp",) and scale > 0 and 0 in (shift, x.numbers[1]):
        first, second, below, above = x.numbers
        numbers = scale * first, scale * second + shift, max(scale * below + shift, low), min(scale * above + shift, high)
        if numbers[2] <= numbers[3] and 2.0**-126 <= abs(numbers[0]) <= 2.0**126:
            return replace(x, numbers=numbers)
    return region.node(equation, "map", [x], params=["clamp"], numbers=[scale, shift, low, high])


def _max(region: Region, equation: Any, a: Any, b: Any) -> Node | None:
    for conv, bound in ((a, b), (b, a)):
        if region.is_open(conv, *CONVOLUTIONS) and conv.activation is None and is_number(bound) and bound == 0:
            return replace(conv, activation="relu")
    return _combine(region, equation, a, b)


def _min(region: Region, equation: Any, a: Any, b: Any) -> Node | None:
    for conv, bound in ((a, b), (b, a)):
        if region.is_open(conv, *CONVOLUTIONS) and conv.activation == "relu" and is_number(bound) and bound == 6:
            return replace(conv, activation="relu6")
    return _combine(region, equation, a, b)


def _clamp(region: Region, equation: Any, low: Any, x: Any, high: Any) -> Node | None:
    if not isinstance(x, Node) or not is_number(low) or not is_number(high):
        return None
    if region.is_open(x, *CONVOLUTIONS) and x.activation is None and low == 0 and high == 6:
        return replace(x, activation="relu6")
    return _clamped(region, equation, x, low=float(low), high=float(high))


def _not_negative(region: Region, equation: Any, x: Any, bound: Any) -> Node | None:
    if not isinstance(x, Node) or not is_number(bound) or bound != 0:
        return None
    return Node("negative", x.size, (x,), (), (), (), x.shape, x.number)


def _select(_, equation: Any, which: Any, below: Any, above: Any) -> Node | None:
    """Of x and a multiple of it: a leaky rectifier."""
    if not all(isinstance(value, Node) for value in (which, below, above)):
        return None
    if which.op != "negative" or which.args[0] is not above:
        return None
    if below.params != ("clamp",) or below.numbers[1:] != (0, -math.inf, math.inf) or below.args[0] is not above:
        return None
    return replace(below, params=("leaky",), numbers=(below.numbers[0], 0.0), read=1)


def _map(name: str) -> Callable[..., Node | None]:
    def step(region: Region, equation: Any, x: Node) -> Node | None:
        return region.node(equation, "map", [x], params=(name,), numbers=[0, 0])

    return step


def _power(region: Region, equation: Any, x: Any, exponent: Any) -> Node | None:
    if not isinstance(x, Node) or not is_number(exponent) or abs(exponent) not in (0.25, 0.5, 0.75):
        return None
    return region.node(equation, "map", [x], params=("power",), numbers=[exponent, 0])


def _integer_power(region: Region, equation: Any, x: Node) -> Node | None:
    return _map("square")(region, equation, x) if equation.params["y"] == 2 else None


def _reshape(region: Region, equation: Any, x: Any, *sizes: Any) -> Node | None:
    """Of all images alike: only how the values are looked at."""
    params, shape = equation.params, equation.outvars[0].aval.shape
    if sizes or params.get("dimensions") is not None or params.get("sharding") is not None or shape[:1] != x.shape[:1]:
        return None
    return region.again(x, shape)


def _broadcast(region: Region, equation: Any, x: Any, *sizes: Any) -> Node | None:
    """That adds dimensions of 1, or one that repeats the rows or the columns of images."""
    shape, at = equation.outvars[0].aval.shape, equation.params["broadcast_dimensions"]
    if sizes or at[:1] != (0,) or x.shape[:1] != shape[:1]:
        return None
    before = [1] * len(shape)
    for axis, size in zip(at, x.shape, strict=True):
        before[axis] = size
    repeated = [axis for axis, size in enumerate(shape) if size != before[axis]]
    if not repeated:
        return region.again(x, shape)
    if len(shape) != 5 or repeated not in ([2], [3]):
        return None
    wanted = (*shape[:repeated[0]], *shape[repeated[0] + 1:])
    image = x if x.shape == wanted else region.again(x, wanted)
    return image and _repeat(region, equation, image, repeated[0] - 1, shape[repeated[0]])


def _gather(region: Region, equation: Any, x: Any, index: Any) -> Node | None:
    """Of rows or columns that are repeated: how `jax.image.resize` takes the nearest."""
    params = equation.params
    numbers, taken = params["dimension_numbers"], params["slice_sizes"]
    if not isinstance(x, Node) or len(x.shape) != 4 or not isinstance(index, np.ndarray) or index.shape[1:] != (1,):
        return None
    axes = [axis for axis, size in enumerate(taken) if size != x.shape[axis]]
    if axes not in ([1], [2]) or not numbers.start_index_map == numbers.collapsed_slice_dims == tuple(axes) or (
            numbers.offset_dims != tuple(axis for axis in range(4) if axis != axes[0])):
        return None
    factor, rest = divmod(len(index), x.shape[axes[0]])
    return None if rest or not np.array_equal(index[:, 0], np.arange(len(index)) // max(factor, 1)) else _repeat(
        region, equation, x, axes[0], factor)


def _repeat(region: Region, equation: Any, x: Node, axis: int, factor: int) -> Node | None:
    """Images (n, h, w, c) with their rows (axis 1) or columns (axis 2) repeated."""
    (_, h, w, c), (fh, fw) = x.shape, (factor, 1) if axis == 1 else (1, factor)
    size, source, factors = (fh * h, fw * w, c), x, (fh, fw)
    if region.is_open(x, "upsample") and x.size == x.shape[1:] and np.shape(x.args[0])[-1] == c:
        source, factors = x.args[0], (fh * x.params[0], fw * x.params[1])
    return region.node(equation, "upsample", [source], params=factors, size=size)


def _transpose(region: Region, equation: Any, x: Node) -> Node | None:
    """That only moves dimensions of 1, or makes blocks of pixels of channels: (n, h, w, fh, fw, c) to (n, h, fh, w, fw, c)."""
    order = equation.params["permutation"]
    if order[0] == 0 and (moved := [axis for axis in order if x.shape[axis] != 1]) == sorted(moved):
        return region.again(x, equation.outvars[0].aval.shape)
    if order != (0, 1, 3, 2, 4, 5):
        return None
    n, h, w, fh, fw, c = x.shape
    image = region.again(x, (n, h, w, fh * fw * c))
    return image and region.node(equation, "upsample", [image], params=(fh, fw), size=(fh * h, fw * w, c))


def _squeeze(region: Region, equation: Any, x: Any) -> Node | None:
    if 0 in equation.params["dimensions"]:
        return None
    shape = equation.outvars[0].aval.shape
    return region.again(x, shape)


def _pool(region: Region, equation: Any, x: Any) -> Node | None:
    """Windows over the two dimensions of an image, or a sum over neighbouring channels."""
    params, maximum = equation.params, equation.primitive is primitives.reduce_window_max_p
    dimensions, strides, padding, dilation = (params[name] for name in (
        "window_dimensions", "window_strides", "padding", "window_dilation"))
    if len(x.shape) != 4 or set(params["base_dilation"]) != {1} or min(map(min, padding)) < 0:
        return None
    outside = [axis for axis, what in enumerate(zip(dimensions, strides, padding, dilation, strict=True))
               if what != (1, 1, (0, 0), 1)]
    if outside == [3] and not maximum and strides[3] == dilation[3] == 1:
        size, (low, high) = dimensions[3], padding[3]
        return region.node(equation, "channel_sum", [x], params=(size, low)) if low + high == size - 1 else None
    if not set(outside) <= {1, 2} or max(*dimensions, *strides, *dilation, *sum(padding, ())) >= MAX_PARTS:
        return None
    window = Window(tuple(strides[1:3]), tuple(padding[1:3]), tuple(dilation[1:3]))
    return region.node(equation, "pool", [x], params=(maximum, tuple(dimensions[1:3]), window))


def _reduce(region: Region, equation: Any, x: Any) -> Node | None:
    """Over all positions of an image: one window."""
    if len(x.shape) != 4 or equation.params["axes"] != (1, 2):
        return None
    maximum, taps = equation.primitive is primitives.reduce_max_p, x.shape[1:3]
    if max(taps) >= MAX_PARTS:
        return None
    window = Window((1, 1), ((0, 0), (0, 0)), (1, 1))
    return region.node(equation, "pool", [x], params=(maximum, taps, window), size=(1, 1, x.shape[3]))


def _convolution(region: Region, equation: Any, x: Any, kernel: Any) -> Node | None:
    """A dense one, if it is depthwise or transposed and follows a step."""
    params = equation.params
    layout, groups = params["dimension_numbers"], params["feature_group_count"]
    nhwc = layout.lhs_spec == layout.out_spec == (0, 3, 1, 2) and layout.rhs_spec == (3, 2, 0, 1)
    if not nhwc or not isinstance(x, Node) or isinstance(kernel, Node) or params["batch_group_count"] != 1 or (
            kernel.dtype != jnp.float32):
        return None
    if params["lhs_dilation"] != (1, 1):
        return _transposed(region, equation, x, kernel) if groups == 1 else None
    if not groups == kernel.shape[3] == x.shape[3]:
        return None
    top_bottom, left_right = map(tuple, params["padding"])
    window = Window(tuple(params["window_strides"]), (top_bottom, left_right), tuple(params["rhs_dilation"]))
    if min(map(min, window.padding)) < 0:
        return None
    return region.node(equation, "depthwise", [x], [kernel], (kernel.shape[:2], window))


def _transposed(region: Region, equation: Any, x: Node, kernel: Any) -> Node | None:
    """A transposed convolution whose blocks of outputs do not overlap, as one of single pixels, to blocks of channels:

        y[n, kh i + a, kw j + b, o] = sum_c x[n,i,j,c] kernel[kh - 1 - a, kw - 1 - b, c, o]
    """
    params, (kh, kw, ic, oc) = equation.params, kernel.shape
    if params["lhs_dilation"] != (kh, kw) or params["window_strides"] != (1, 1) or params["rhs_dilation"] != (1, 1) or tuple(
            map(tuple, params["padding"])) != ((kh - 1, kh - 1), (kw - 1, kw - 1)):
        return None
    pattern, window = keep_all((1, 1, ic, kh * kw * oc), 1), Window((1, 1), ((0, 0), (0, 0)), (1, 1))
    if not addressable(pattern, window):
        return None
    values = gather(kernel[::-1, ::-1].transpose(2, 0, 1, 3), pattern)
    (_, h, w, _), (_, *size) = x.shape, equation.outvars[0].aval.shape
    blocks = region.node(equation, "conv", [x], [values], [window], size=(h, w, kh * kw * oc), pattern=pattern)
    if blocks is None:
        return None
    blocks = replace(blocks, shape=(x.shape[0], *blocks.size))
    region.is_read([blocks])
    return region.node(equation, "upsample", [blocks], params=(kh, kw), size=tuple(size))


def _concatenate(region: Region, equation: Any, *operands: Any) -> Node | None:
    rank = len(equation.outvars[0].aval.shape)
    if equation.params["dimension"] != rank - 1 or rank < 2:
        return None
    return region.node(equation, "concat", operands)


def _pad(region: Region, equation: Any, x: Any, value: Any) -> Node | None:
    config = equation.params["padding_config"]
    if not isinstance(x, Node) or not is_number(value) or len(x.shape) != 4:
        return None
    if any(inner for *_, inner in config) or any(config[0]):
        return None
    return region.node(equation, "window", [x], params=tuple(-low for low, *_ in config[1:]), numbers=[value])


def _slice(region: Region, equation: Any, x: Any) -> Node | None:
    params = equation.params
    if len(x.shape) != 4 or set(params["strides"] or (1,)) != {1} or params["start_indices"][0] != 0 or params[
            "limit_indices"][0] != x.shape[0]:
        return None
    return region.node(equation, "window", [x], params=tuple(params["start_indices"][1:]), numbers=[0])


def _convert(region: Region, equation: Any, x: Any) -> Any:
    return x if equation.params["new_dtype"] == jnp.float32 else None


# Those that a region can begin with, and those that only move values about.
FIRST = {conv_p, int8_conv_p, quantize_p}
MOVES = {primitives.reduce_window_max_p, primitives.reduce_max_p, primitives.concatenate_p, primitives.pad_p,
         primitives.slice_p, primitives.reshape_p, primitives.broadcast_in_dim_p, primitives.squeeze_p, primitives.transpose_p,
         primitives.gather_p}
STEPS: dict[Any, Callable[..., Node | None]] = {
    conv_p: _sparse, int8_conv_p: int8.convolution, quantize_p: int8.quantize, primitives.conv_general_dilated_p: _convolution,
    primitives.add_p: _add, primitives.sub_p: _combine, primitives.mul_p: _combine, primitives.div_p: _combine,
    primitives.max_p: _max, primitives.min_p: _min, primitives.clamp_p: _clamp,
    primitives.ge_p: _not_negative, primitives.select_n_p: _select,
    primitives.logistic_p: _map("logistic"), primitives.sqrt_p: _map("sqrt"), primitives.rsqrt_p: _map("rsqrt"),
    primitives.neg_p: _map("neg"), primitives.abs_p: _map("abs"), primitives.square_p: _map("square"),
    primitives.integer_pow_p: _integer_power, primitives.pow_p: _power,
    primitives.reduce_window_max_p: _pool, primitives.reduce_window_sum_p: _pool,
    primitives.reduce_sum_p: _reduce, primitives.reduce_max_p: _reduce,
    primitives.concatenate_p: _concatenate, primitives.pad_p: _pad, primitives.slice_p: _slice,
    primitives.reshape_p: _reshape, primitives.broadcast_in_dim_p: _broadcast, primitives.squeeze_p: _squeeze,
    primitives.transpose_p: _transpose, primitives.gather_p: _gather,
    primitives.convert_element_type_p: _convert}
