"""Steps in eight bits: what will be rounded to uint8 is so as early as it can be, and whoever reads it later reads uint8."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from sparseflax.conv.int8 import Quantization
from sparseflax.conv.int8_primitive import BOUNDS
from sparseflax.conv.window import addressable
from sparseflax.network.region import Node, Region, image


def convolution(region: Region, equation: Any, x: Any, *shared: Any) -> Node | None:
    """A sparse convolution of uint8 images."""
    params, rescale = equation.params, equation.params["rescale"]
    images, operands = [x, *shared[4:]], shared[:4]
    activations = {bounds: name for name, bounds in BOUNDS.items()}
    bounds = (rescale.low, rescale.high) if rescale.to_float else BOUNDS[None]
    region.int8 = region.int8 or params["kernel"]
    pattern, window, activation = params["pattern"], params["window"], activations.get(bounds)
    if not addressable(pattern, window) or params["kernel"] != region.int8 or bounds not in activations or any(
            isinstance(operand, Node) for operand in operands):
        return None
    does = window, rescale, params["outputs"]
    return region.node(equation, "conv_int8", images, operands, does, pattern=pattern, activation=activation)


def with_residual(region: Region, conv: Node, other: Any) -> Node | None:
    """A convolution with float32 results that takes the sum with what uint8 values stand for; None if it cannot.

    Results of another convolution in eight bits, which nothing else reads, are rounded for that.
    """
    if not isinstance(other, Node) or len(conv.args) > 1 or conv.uint8:
        return None
    if other.number < conv.number:
        other = _by_its_range(region, other)
    values = _integers(region, other)
    if values is None:
        return None
    quantization = other.params[0]
    if values.size != conv.size or other.shape != conv.shape or values.number > conv.number:
        return None
    window, rescale, outputs = conv.params
    rescale = rescale._replace(zero_residual=quantization.zero, residual=quantization.scale)
    return replace(conv, args=(*conv.args, values), params=(window, rescale, outputs))


def rounded_sum(region: Region, a: Any, b: Any) -> Node | None:
    """The sum of what two uint8 images stand for, in the convolution that makes one of them for nothing else; or None.

    Its results are rounded before the sum, as they were without it.
    """
    def makes(value: Any) -> bool:
        conv = value.args[0]
        return (conv.op == "conv_int8" and len(conv.args) == 1 and value.shape == conv.shape and region.is_open(value)
                and not region.is_done(conv) and region.readers(conv) == 1)

    if _integers(region, a) is None or _integers(region, b) is None or a is b or a.shape != b.shape or a.size != b.size:
        return None
    terms = sorted(filter(makes, (a, b)), key=lambda value: -value.args[0].number)
    if not terms:
        return None
    conv, quantization = terms[0].args[0], terms[0].params[0]
    other = b if terms[0] is a else a
    window, rescale, outputs = conv.params
    whole = other.params[0].scale / quantization.scale
    first = _of_16_bits(whole)
    rescale = rescale._replace(zero=0, zero_residual=other.params[0].zero, low=-math.inf, high=math.inf, to_float=True,
                               out=quantization.scale, residual=first,
                               inner=(rescale.low, rescale.high, _of_16_bits(whole - first), rescale.out))
    return replace(conv, args=(conv.args[0], other.args[0]), params=(window, rescale, outputs), number=next(region.count),
                   read=1, uint8=False)


def as_bytes(region: Region, x: Any) -> tuple[Any, Quantization | None]:
    """The uint8 that a value is made of, or could be rounded to, and what they stand for; or the value itself, and None."""
    x = _by_its_range(region, x)
    values = _integers(region, x)
    return (x, None) if values is None or values.shape != x.shape else (values, x.params[0])


def _by_its_range(region: Region, x: Any) -> Any:
    """A value; results of a convolution in eight bits that nothing else reads are rounded by the range that it comes with."""
    if not region.is_open(x, "conv_int8") or x.uint8 or x.params[2] is None:
        return x
    _rounded(region, x, x.params[2].between(*BOUNDS[x.activation]), 0)
    return region.seen(x)


def _integers(region: Region, x: Any) -> Node | None:
    """The uint8 values that a value is made of, where they wait; None where they would have to be computed again for that."""
    if not isinstance(x, Node) or x.op != "dequantize" or not isinstance(x.args[0], Node):
        return None
    return x.args[0] if region.is_done(x.args[0]) or not region.is_done(x) else None


def _of_16_bits(number: float) -> float:
    """The nearest number of so many significant bits."""
    fraction, exponent = math.frexp(number)
    return math.ldexp(round(math.ldexp(fraction, 16)), exponent - 16)


def dequantize(region: Region, equation: Any, x: Any) -> Node | None:
    """What uint8 values stand for."""
    return region.node(equation, "dequantize", [x], params=(equation.params["quantization"],))


def quantize(region: Region, equation: Any, x: Any) -> Node | None:
    """The rounding of a value to uint8."""
    if not equation.outvars[0].aval.shape:
        return None
    return _rounded(region, x, equation.params["quantization"], 0)


def _rounded(region: Region, x: Any, quantization: Quantization, readers: int) -> Node:
    """A value as uint8. A convolution, a maximum, or what only moves values, that nobody else has read so far is
    computed as such."""
    x = region.seen(x)
    values = _integers(region, x)
    if values is not None and x.params[0] == quantization:
        uint8 = region.again(values, x.shape) if values.shape != x.shape else values
        if uint8 is not None:
            return uint8
    free = isinstance(x, Node) and not region.is_done(x) and region.readers(x) == readers
    if free and x.op == "conv_int8":
        window, rescale, outputs = x.params
        low, high = BOUNDS[x.activation]
        rescale = rescale._replace(low=low, high=high).quantized(quantization)
        rounded = replace(x, params=(window, rescale, outputs), activation=None, uint8=True)
    elif free and x.op == "depthwise":
        rounded = replace(x, params=(*x.params[:3], quantization), uint8=True)
    elif free and (x.op in ("concat", "shuffle", "upsample") or (x.op == "pool" and x.params[0])):
        args = tuple(_rounded(region, arg, quantization, 1) for arg in x.args)
        rounded = replace(x, args=args, number=next(region.count), uint8=True)
    elif free and x.op == "window" and x.numbers == (0,) and region.is_open(x.args[0]) and region.readers(x.args[0]) == 1:
        args, zero = (_rounded(region, x.args[0], quantization, 1),), (float(quantization.zero),)
        rounded = replace(x, args=args, numbers=zero, number=next(region.count), uint8=True)
    else:
        key = id(x), quantization
        if key not in region.quantized:
            region.is_read([x])
            value: Any = region.viewed(x) if isinstance(x, Node) else image(x)
            size, shape = value.size if isinstance(value, Node) else value.shape[1:], np.shape(x)
            made = Node("quantize", size, (value,), (), (quantization,), (), shape, next(region.count), read=2, uint8=True)
            region.quantized[key] = x, made
        return region.quantized[key][1]
    region.round(x, rounded, quantization)
    return rounded
