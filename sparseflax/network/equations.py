"""Equations of a jaxpr as steps of a program: which of them it knows, and how they join the convolution before them."""

from __future__ import annotations

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
        if is_number(other):
            return region.node(equation, "combine", [x], params=(name, "number", swapped), numbers=[other])
        if shape == x.shape:
            return region.node(equation, "combine", [x, other], params=(name, "same", swapped))
        if shape == (1, *ones, x.shape[-1]) and not isinstance(other, Node):
            return region.node(equation, "combine", [x], [jnp.reshape(other, -1)], (name, "channel", swapped))
        if ones and shape == (x.shape[0], *ones, x.shape[-1]):
            return region.node(equation, "combine", [x, other], params=(name, "image", swapped))
    return None


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
    return region.node(equation, "map", [x], params=["clamp"], numbers=[low, high])


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
    if below.op != "combine" or below.params[:2] != ("mul", "number") or below.args[0] is not above:
        return None
    return replace(below, op="map", params=("leaky",), numbers=(below.numbers[0], 0.0), read=1)


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
    """That adds dimensions of 1 and nothing else."""
    shape, at = equation.outvars[0].aval.shape, equation.params["broadcast_dimensions"]
    added = [size for axis, size in enumerate(shape) if axis not in at]
    if sizes or set(added) > {1} or tuple(shape[axis] for axis in at) != x.shape or at[:1] != (0,):
        return None
    return region.again(x, shape)


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


def _depthwise(region: Region, equation: Any, x: Any, kernel: Any) -> Node | None:
    params = equation.params
    layout, groups = params["dimension_numbers"], params["feature_group_count"]
    nhwc = layout.lhs_spec == layout.out_spec == (0, 3, 1, 2) and layout.rhs_spec == (3, 2, 0, 1)
    if not nhwc or not isinstance(x, Node) or isinstance(kernel, Node) or params["batch_group_count"] != 1 or params[
            "lhs_dilation"] != (1, 1) or not groups == kernel.shape[3] == x.shape[3] or kernel.dtype != jnp.float32:
        return None
    top_bottom, left_right = map(tuple, params["padding"])
    window = Window(tuple(params["window_strides"]), (top_bottom, left_right), tuple(params["rhs_dilation"]))
    if min(map(min, window.padding)) < 0:
        return None
    return region.node(equation, "depthwise", [x], [kernel], (kernel.shape[:2], window))


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
         primitives.slice_p, primitives.reshape_p, primitives.broadcast_in_dim_p, primitives.squeeze_p}
STEPS: dict[Any, Callable[..., Node | None]] = {
    conv_p: _sparse, int8_conv_p: int8.convolution, quantize_p: int8.quantize, primitives.conv_general_dilated_p: _depthwise,
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
    primitives.convert_element_type_p: _convert}
