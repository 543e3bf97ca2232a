"""ONNX's quantized numbers: integers between, float32 where anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseflax.conv.int8 import Quantization
from sparseflax.onnx.ops.elementwise import converted, dtype_of
from sparseflax.onnx.value import Unsupported, Value, along, module, value


def quantize_linear(x: Value, y_scale: Value, y_zero_point: Value | None = None, axis: int = 1, saturate: int = 1,
                    block_size: int = 0, output_dtype: int = 0, precision: int = 0) -> Value:
    """The nearest integer to x / y_scale + y_zero_point, even on ties, that the type holds."""
    dtype = y_zero_point.array.dtype if y_zero_point else dtype_of(output_dtype) if output_dtype else np.dtype(np.uint8)
    scale, zero = _along(x, y_scale, axis, block_size), 0 if y_zero_point is None else _along(x, y_zero_point, axis, block_size)
    return Value(_rounded(_quotient(x.array, scale), zero, dtype, bool(saturate)), x.order)


def dequantize_linear(x: Value, x_scale: Value, x_zero_point: Value | None = None, axis: int = 1, block_size: int = 0,
                      output_dtype: int = 0) -> Value:
    """(x - x_zero_point) x_scale"""
    zero = 0 if x_zero_point is None else _along(x, x_zero_point, axis, block_size).astype(np.float32)
    return Value((x.array.astype(np.float32) - zero) * _along(x, x_scale, axis, block_size), x.order)


def rounded_to(x: Value, quantization: Quantization) -> Value:
    """What is left of x when it is quantized and dequantized."""
    return Value(quantization.quantize(jnp.asarray(x.array, jnp.float32)).dequantize(), x.order)


def dynamic_quantize_linear(x: Value) -> tuple[Value, Value, Value]:
    """x as uint8 over the range that it has, with its scale and zero point."""
    low, high = jnp.minimum(x.array.min(), 0), jnp.maximum(x.array.max(), 0)
    scale = _quotient(high - low, np.float32(255))
    scale = jnp.where(scale == 0, 1, scale)
    zero = jnp.clip(jnp.round(_quotient(-low, scale)), 0, 255)
    return (Value(_rounded(_quotient(x.array, scale), zero, np.dtype(np.uint8)), x.order), value(scale),
            value(zero.astype(np.uint8)))


def rounded_to_its_range(x: Value) -> Value:
    """What is left of x when it is quantized over the range that it has and dequantized."""
    return dequantize_linear(*dynamic_quantize_linear(x))


def shifted(x: Value, zero_point: Value | None = None, axis: int = 1) -> Value:
    """x - zero_point as float32."""
    array = x.array.astype(np.float32)
    return Value(array if zero_point is None else array - _along(x, zero_point, axis, 0).astype(np.float32), x.order)


def rounded(x: Value) -> Value:
    """The nearest integers."""
    return Value(jnp.round(x.array).astype(np.int32), x.order)


def _rounded(x: Any, zero: Any, dtype: np.dtype, saturate: bool = True) -> Any:
    zero = zero if isinstance(zero, int) else zero.astype(np.float32)
    if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 1:
        return converted(x + zero, dtype, saturate)
    if not jnp.issubdtype(dtype, jnp.integer) or dtype.itemsize > 2:
        raise Unsupported(f"quantized numbers of {dtype}, wanted integers of 16 bits or fewer or floating point of 8")
    limits = jnp.iinfo(dtype)
    return converted((x.round() + zero).clip(int(limits.min), int(limits.max)), dtype)


def _quotient(x: Any, divisor: Any) -> Any:
    """x / divisor as IEEE has it: XLA would multiply by the reciprocal of one number, and ties would be rounded otherwise."""
    if isinstance(x, np.ndarray) and isinstance(divisor, np.ndarray):
        return x / divisor
    return x / jax.lax.optimization_barrier(jnp.broadcast_to(divisor, x.shape))


def _along(x: Value, v: Value, axis: int, block: int) -> Any:
    """A scale or zero point, of the tensor, of an axis or of blocks along one, so that it broadcasts against x.array."""
    array = v.plain()
    if array.size == 1:
        return array.reshape(())
    place, xp = x.place(axis), module(v)
    if block:
        array = xp.repeat(array, block, axis=axis)
        array = array[tuple(slice(size) for size in x.shape)]
        return value(array).arranged(x.order)
    if array.ndim != 1 or array.size != x.array.shape[place]:
        raise Unsupported(f"a scale or zero point of shape {array.shape} along axis {axis} of an input of shape {x.shape}")
    return along(array, x.rank, place)


OPERATORS: dict[str, Callable[..., Any]] = {
    "DequantizeLinear": dequantize_linear, "DynamicQuantizeLinear": dynamic_quantize_linear, "QuantizeLinear": quantize_linear,
    "RoundedTo": rounded_to, "RoundedToItsRange": rounded_to_its_range,  # both of these, one after the other
    "Rounded": rounded, "Shifted": shifted,  # of ConvInteger and MatMulInteger
}
