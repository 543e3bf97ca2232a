"""Equations of a jaxpr as steps of a program: which of them it knows, and how they join the convolution before them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives

from sparseflax.conv.int8 import dequantize_p, quantize_p
from sparseflax.conv.int8_primitive import int8_conv_p
from sparseflax.conv.primitive import Activation, conv_p
from sparseflax.conv.window import addressable
from sparseflax.network import images, int8
from sparseflax.network.gates import gate, is_normal, lined
from sparseflax.network.program import Size
from sparseflax.network.region import CONVOLUTIONS, Node, Region, is_number, plain


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
    if any(node.op == "sign" for node in nodes) and primitive is not primitives.select_n_p:
        return None
    if any(node.uint8 for node in nodes) and primitive not in MOVES and primitive not in (int8_conv_p, dequantize_p):
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
    if (joined := int8.rounded_sum(region, a, b)) is not None:
        return joined
    waiting = [(conv, other) for conv, other in ((a, b), (b, a))
               if region.is_open(conv, *CONVOLUTIONS) and conv.activation is None]
    for conv, other in sorted(waiting, key=lambda pair: -pair[0].number):
        if conv.op == "conv_int8":
            if (joined := int8.with_residual(region, conv, other)) is not None:
                return joined
            continue
        if conv.op == "conv" and conv.residual is None and np.shape(other) == conv.shape:
            if not isinstance(other, Node):
                return replace(conv, residual=jnp.asarray(other).reshape(conv.shape[0], *conv.size))
            if other.size == conv.size and other.number < conv.number:
                return replace(conv, residual=other)
    biased = _biased(region, a, b) or _biased(region, b, a)
    return biased or images.neighbours(region, equation, a, b) or _combine(region, equation, a, b)


def _biased(region: Region, x: Any, bias: Any) -> Node | None:
    """x plus a number for each channel, if a convolution takes that."""
    if not isinstance(x, Node) or isinstance(bias, Node) or not (
            np.shape(bias) == (*(1 for _ in x.shape[1:]), x.size[2]) and x.shape[-1] == x.size[2]):
        return None

    def change(conv: Node) -> Node | None:
        if conv.op == "conv_int8" or conv.activation is not None or conv.bias is not None or conv.size[2] % x.size[2]:
            return None
        flat, times = region.flat(bias), conv.size[2] // x.size[2]
        return replace(conv, bias=flat if times == 1 else jnp.tile(flat, times))

    return _changed(region, x, change)


def _active(region: Region, x: Any, activation: Activation, after: Activation = None) -> Node | None:
    """x bounded by an activation, after another one, if a convolution takes that."""
    return _changed(region, x, lambda conv: replace(conv, activation=activation) if conv.activation == after else None)


def _changed(region: Region, x: Any, change: Callable[[Node], Node | None]) -> Node | None:
    """x with the convolutions that wait changed, of which it is the result, as it is, upsampled, or in blocks of pixels by
    one each, or what is cut out of that; None if there are none."""
    if region.is_open(x, *CONVOLUTIONS):
        return change(x)
    if region.is_open(x, "window") and isinstance(x.args[0], Node) and _cuts(x, x.args[0].size):
        inside = _changed(region, x.args[0], change)
        region.is_read([inside])
        return inside and replace(x, args=(inside,))
    if not region.is_open(x, "upsample"):
        return None
    blocks = x.args[0]
    parts = blocks.args if region.is_open(blocks, "concat") else (blocks,)
    changed = [change(part) if region.is_open(part, *CONVOLUTIONS) else None for part in parts]
    if None in changed:
        return None
    region.is_read(changed)
    if len(parts) == 1:
        return replace(x, args=tuple(changed))
    joined = replace(blocks, args=tuple(changed))
    region.is_read([joined])
    return replace(x, args=(joined,))


def _cuts(window: Node, size: Size) -> bool:
    """Whether it takes rows and columns of an image of this size, with all channels, and nothing from outside."""
    inside = all(0 <= at <= have - wanted for at, have, wanted in zip(window.params, size, window.size, strict=True))
    return inside and window.size[2] == size[2]


def _combine(region: Region, equation: Any, a: Any, b: Any) -> Node | None:
    name, made = equation.primitive.name, equation.outvars[0].aval.shape
    operands: list[tuple[Any, Any, bool]] = [(a, b, False), (b, a, True)]
    for x, other, swapped in operands:
        shape, ones = np.shape(other), (1,) * (len(made) - 2)
        pixels = isinstance(x, Node) and x.shape == (*made[:-1], 1) != made  # that meet a number for each channel
        if not isinstance(x, Node) or not (x.shape == made or (pixels and shape == (1, *ones, made[-1]) != made)):
            continue
        if isinstance(other, np.ndarray) and other.size == 1:
            other = other.item()
        if is_number(other):
            line = _line(name, float(other), swapped)
            return _clamped(region, equation, x, **line) if line else region.node(
                equation, "combine", [x], params=(name, "number", swapped), numbers=[other])
        if math.prod(shape) == 1 and not isinstance(other, Node):
            return region.node(equation, "combine", [x], [region.flat(other)], (name, "scalar", swapped))
        if name == "mul" and (found := gate(region, x, other) or gate(region, other, x)):
            source, function, numbers = found
            return region.node(equation, "map", [source], params=[function], numbers=numbers)
        if shape == x.shape:
            return region.node(equation, "combine", [x, other], params=(name, "same", swapped))
        if shape == (1, *ones, made[-1]) and not isinstance(other, Node):
            return region.node(equation, "combine", [x], [region.flat(other)], (name, "channel", swapped))
        if ones and shape == (x.shape[0], *ones, x.shape[-1]):
            return region.node(equation, "combine", [x, other], params=(name, "image", swapped))
        if len(shape) > 1 and shape == (*x.shape[:-1], 1):
            return region.node(equation, "combine", [x, other], params=(name, "pixel", swapped))
    return None


def _line(name: str, number: float, swapped: bool) -> dict[str, float] | None:
    """An operation with a number as a line between two bounds; None for what is none, as a quotient by x."""
    if not math.isfinite(number):
        return None
    if name == "div":
        return {"scale": 1 / number} if not swapped and is_normal(number) else None
    if name == "sub":
        return {"scale": -1.0, "shift": number} if swapped else {"shift": -number}
    return {{"add": "shift", "mul": "scale", "max": "low", "min": "high"}[name]: number}


def _clamped(region: Region, equation: Any, x: Node, scale: float = 1.0, shift: float = -0.0, low: float = -math.inf,
             high: float = math.inf) -> Node | None:
    """min(max(scale x + shift, low), high); of such a one that waits it makes one, where that adds no number to a number; of
    a gate that waits one with the line, likewise."""
    if region.is_open(x, "map") and (low, high) == (-math.inf, math.inf) and (
            numbers := lined(x.params[0], x.numbers, scale, shift)):
        return replace(x, numbers=numbers)
    if region.is_open(x, "map") and x.params == ("clamp",) and scale > 0 and 0 in (shift, x.numbers[1]):
        first, second, below, above = x.numbers
        numbers = scale * first, scale * second + shift, max(scale * below + shift, low), min(scale * above + shift, high)
        if numbers[2] <= numbers[3] and is_normal(numbers[0]):
            return replace(x, numbers=numbers)
    return region.node(equation, "map", [x], params=["clamp"], numbers=[scale, shift, low, high])


def _max(region: Region, equation: Any, a: Any, b: Any) -> Node | None:
    for conv, bound in ((a, b), (b, a)):
        if isinstance(conv, Node) and is_number(bound) and bound == -math.inf:
            return conv
        if is_number(bound) and bound == 0 and (active := _active(region, conv, "relu")):
            return active
    return _combine(region, equation, a, b)


def _min(region: Region, equation: Any, a: Any, b: Any) -> Node | None:
    for conv, bound in ((a, b), (b, a)):
        if is_number(bound) and bound == 6 and (active := _active(region, conv, "relu6", "relu")):
            return active
    return _combine(region, equation, a, b)


def _clamp(region: Region, equation: Any, low: Any, x: Any, high: Any) -> Node | None:
    if not isinstance(x, Node) or not is_number(low) or not is_number(high):
        return None
    if low == 0 and high == 6 and (active := _active(region, x, "relu6")):
        return active
    return _clamped(region, equation, x, low=float(low), high=float(high))


def _sign(region: Region, equation: Any, x: Any, bound: Any) -> Node | None:
    if not isinstance(x, Node) or not is_number(bound) or bound != 0:
        return None
    return Node("sign", x.size, (x,), (), (equation.primitive.name,), (), x.shape, x.number)


def _select(_, equation: Any, which: Any, *cases: Any) -> Node | None:
    """Of x and a multiple of it: a leaky rectifier, whose slope is a number, an operand, or one for each channel."""
    if not all(isinstance(value, Node) for value in (which, *cases)) or which.op != "sign" or len(cases) != 2:
        return None
    below, above = cases if which.params[0] in ("ge", "gt") else cases[::-1]
    if which.args[0] is not above or not below.args or plain(below.args[0]) is not plain(above):
        return None
    if below.params == ("clamp",) and below.numbers[1:] == (0, -math.inf, math.inf):
        return replace(below, params=("leaky",), numbers=(below.numbers[0], 0.0), read=1)
    if below.op == "combine" and below.params[:2] in (("mul", "channel"), ("mul", "scalar")):
        return replace(below, params=("leaky", below.params[1], False), read=1)
    return None


def _map(name: str) -> Callable[..., Node | None]:
    def step(region: Region, equation: Any, x: Node) -> Node | None:
        return region.node(equation, "map", [x], params=(name,), numbers=[0, 0])

    return step


def _negative(region: Region, equation: Any, x: Node) -> Node | None:
    return _clamped(region, equation, x, scale=-1.0)


def _power(region: Region, equation: Any, x: Any, exponent: Any) -> Node | None:
    if isinstance(x, Node) and is_number(exponent) and exponent in (2, 3):
        return _whole_power(region, equation, x, int(exponent))
    if not isinstance(x, Node) or not is_number(exponent) or abs(exponent) not in (0.25, 0.5, 0.75):
        return None
    return region.node(equation, "map", [x], params=("power",), numbers=[exponent, 0])


def _integer_power(region: Region, equation: Any, x: Node) -> Node | None:
    return _whole_power(region, equation, x, equation.params["y"])


def _whole_power(region: Region, equation: Any, x: Node, exponent: int) -> Node | None:
    square = _map("square")(region, equation, x) if exponent in (2, 3) else None
    if square is None or exponent == 2:
        return square
    region.is_read([square])
    return region.node(equation, "combine", [square, x], params=("mul", "same", False))


def _erfc(region: Region, equation: Any, x: Node) -> Node | None:
    erf = _map("erf")(region, equation, x)
    if erf is not None:
        region.is_read([erf])
    return erf and _clamped(region, equation, erf, scale=-1.0, shift=1.0)


def _same(region: Region, equation: Any, x: Any) -> Any:
    return x


def _convert(region: Region, equation: Any, x: Any) -> Any:
    return x if equation.params["new_dtype"] == jnp.float32 else None


# Those that a region can begin with, and those that only move values about.
FIRST = {conv_p, int8_conv_p, quantize_p, dequantize_p, primitives.conv_general_dilated_p}
MOVES = {primitives.reduce_window_max_p, primitives.reduce_max_p, primitives.concatenate_p, primitives.pad_p,
         primitives.slice_p, primitives.reshape_p, primitives.broadcast_in_dim_p, primitives.squeeze_p, primitives.transpose_p,
         primitives.gather_p}
STEPS: dict[Any, Callable[..., Node | None]] = {
    conv_p: _sparse, int8_conv_p: int8.convolution, quantize_p: int8.quantize, dequantize_p: int8.dequantize,
    primitives.conv_general_dilated_p: images.convolution, primitives.dot_general_p: images.product,
    primitives.add_p: _add, primitives.sub_p: _combine, primitives.mul_p: _combine, primitives.div_p: _combine,
    primitives.max_p: _max, primitives.min_p: _min, primitives.clamp_p: _clamp,
    **{primitive: _sign for primitive in (primitives.ge_p, primitives.gt_p, primitives.le_p, primitives.lt_p)},
    primitives.select_n_p: _select, primitives.tanh_p: _map("tanh"), primitives.erf_p: _map("erf"), primitives.erfc_p: _erfc,
    primitives.logistic_p: _map("logistic"), primitives.sqrt_p: _map("sqrt"), primitives.rsqrt_p: _map("rsqrt"),
    primitives.neg_p: _negative, primitives.abs_p: _map("abs"), primitives.square_p: _map("square"),
    primitives.exp_p: _map("exp"), primitives.integer_pow_p: _integer_power, primitives.pow_p: _power,
    primitives.stop_gradient_p: _same, primitives.copy_p: _same,
    primitives.reduce_window_max_p: images.pool, primitives.reduce_window_sum_p: images.pool,
    primitives.reduce_sum_p: images.reduce, primitives.reduce_max_p: images.reduce,
    primitives.concatenate_p: images.concatenate, primitives.pad_p: images.pad, primitives.slice_p: images.slice,
    primitives.reshape_p: images.reshape, primitives.broadcast_in_dim_p: images.broadcast, primitives.squeeze_p: images.squeeze,
    primitives.transpose_p: images.transpose, primitives.gather_p: images.gather,
    primitives.convert_element_type_p: _convert}
