"""ONNX's operators that act on each number, with its rules of broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseflax.onnx.value import Unsupported, Value, aligned, bounded, known, module, number, value

Function = Callable[..., Value]


def elementwise(function: Callable[..., Any]) -> Function:
    """An operator of `function(xp, *arrays, **attributes)`."""

    def run(*values: Value, axis: int | None = None, broadcast: int = 0, **attributes: Any) -> Value:
        if broadcast and axis is not None:  # before operator set 7: where the second input's axes begin
            x, y = values
            ones = (1,) * (x.rank - axis % x.rank - y.rank)
            values = x, value(y.plain().reshape(y.shape + ones))
        xp, arrays, order = aligned(values)
        return _ordered(function(xp, *arrays, **attributes), order)

    return run


def folded(function: Callable[..., Any]) -> Function:
    """An operator of any number of inputs of a function of two."""

    def every(xp: ModuleType, *arrays: Any) -> Any:
        total = arrays[0]
        for array in arrays[1:]:
            total = function(xp, total, array)
        return total

    return elementwise(every)


def clip(x: Value, min: Any = None, max: Any = None) -> Value:
    """min(max(x, low), high), as Flax's ReLU and ReLU6 where it is one of them."""
    if any(isinstance(bound, Value) and not bound.known for bound in (min, max)):
        x = x if min is None else OPERATORS["Max"](x, min)
        return x if max is None else OPERATORS["Min"](x, max)
    integer = x.array.dtype.kind in "iu"
    low = -np.inf if min is None else number(min, "min")
    high = np.inf if max is None else number(max, "max")
    named = {(0.0, np.inf): nnx.relu, (0.0, 6.0): nnx.relu6}.get((low, high))
    if named and not x.known and not integer:
        return Value(named(x.array), x.order)
    y, xp = x.array, module(x)
    y = y if low == -np.inf else xp.maximum(y, np.asarray(low, y.dtype))
    return _ordered(y if high == np.inf else xp.minimum(y, np.asarray(high, y.dtype)), x.order)


def cast(x: Value, to: int, saturate: int = 1, round_mode: str = "up") -> Value:
    """Numbers of another type; floating point of 16 bits or more is float32, what is not known while tracing has 32 at most."""
    return Value(converted(x.array, dtype_of(to, x.known), bool(saturate)), x.order)


def cast_like(x: Value, target: Value, saturate: int = 1, round_mode: str = "up") -> Value:
    """`cast` to the type of another tensor."""
    return Value(converted(x.array, target.array.dtype, bool(saturate)), x.order)


def converted(array: Any, dtype: np.dtype, saturate: bool = True) -> Any:
    """An array as another type: small floating point takes its largest number where it overflows, small integers wrap."""
    if dtype.itemsize == 1 and jnp.issubdtype(dtype, jnp.floating):
        most = float(jnp.finfo(dtype).max)
        array = array.astype(np.float32)
        return (array.clip(-most, most) if saturate else array).astype(dtype)
    if dtype.name in SMALL:
        return array.astype(np.int32).astype(dtype)
    return array.astype(dtype)


def dtype_of(code: int, known: bool = True) -> np.dtype:
    """NumPy's type of one of ONNX's."""
    if code not in DTYPES:
        raise Unsupported(f"data type {code}, wanted floating point, an integer or bool")
    return np.dtype(DTYPES[code] if known else DTYPES[code].replace("int64", "int32"))


SMALL = "int4", "uint4", "int2", "uint2"
DTYPES = {1: "float32", 2: "uint8", 3: "int8", 4: "uint16", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float32",
          11: "float32", 12: "uint32", 13: "uint64", 16: "float32", 17: "float8_e4m3fn", 18: "float8_e4m3fnuz",
          19: "float8_e5m2", 20: "float8_e5m2fnuz", 21: "uint4", 22: "int4", 23: "float4_e2m1fn", 25: "uint2", 26: "int2"}


def where(condition: Value, x: Value, y: Value) -> Value:
    return elementwise(lambda xp, condition, x, y: xp.where(condition.astype(bool), x, y))(condition, x, y)


def expand(x: Value, shape: Any) -> Value:
    """x, sizes of 1 repeated to `shape`."""
    sizes = tuple(known(shape, "shape").reshape(-1).tolist())
    rank = max(x.rank, len(sizes))
    array = x.array if rank == x.rank else x.plain().reshape((1,) * (rank - x.rank) + x.shape)
    order = x.order if rank == x.rank else tuple(range(rank))
    sizes = (1,) * (rank - len(sizes)) + sizes
    wanted = np.broadcast_shapes(array.shape, tuple(sizes[axis] for axis in order))
    return Value(module(x).broadcast_to(array, bounded(wanted, module(x))), order)


def _ordered(array: Any, order: tuple[int, ...]) -> Value:
    return Value(np.asarray(array) if isinstance(array, np.generic) else array, order)


def _divide(xp: ModuleType, x: Any, y: Any) -> Any:
    """The quotient; of integers without its fraction."""
    if x.dtype.kind not in "iu":
        return x / y
    if xp is np and not np.all(y):
        raise Unsupported("it divides sizes by 0")
    quotient = x // y
    return quotient + ((quotient < 0) & (quotient * y != x)).astype(quotient.dtype) if x.dtype.kind == "i" else quotient


def _power(xp: ModuleType, x: Any, y: Any) -> Any:
    if isinstance(y, np.ndarray) and y.size == 1 and xp is jnp:
        exponent = y.item()
        if exponent == 0.5:
            return jnp.sqrt(x)
        if exponent == int(exponent) and y.ndim <= x.ndim and abs(exponent) <= 64 and x.dtype.kind == "f":
            return x ** int(exponent)
    integer = x.dtype.kind in "iu"
    return xp.power(x.astype(np.float32) if integer and y.dtype.kind == "f" else x, y).astype(x.dtype)


def _modulo(xp: ModuleType, x: Any, y: Any, fmod: int = 0) -> Any:
    if xp is np and x.dtype.kind in "iu" and not np.all(y):
        raise Unsupported("it divides sizes by 0")
    return xp.fmod(x, y) if fmod else xp.mod(x, y)


def _gelu(xp: ModuleType, x: Any, approximate: str = "none") -> Any:
    return jax.nn.gelu(x, approximate=approximate == "tanh")


def _is_inf(xp: ModuleType, x: Any, detect_negative: int = 1, detect_positive: int = 1) -> Any:
    return (xp.isposinf(x) if detect_positive else False) | (xp.isneginf(x) if detect_negative else xp.zeros(x.shape, bool))


def _shift(xp: ModuleType, x: Any, y: Any, direction: str) -> Any:
    return xp.left_shift(x, y) if direction == "LEFT" else xp.right_shift(x, y)


def _mean(*values: Value) -> Value:
    total = OPERATORS["Sum"](*values)
    return Value(total.array / np.float32(len(values)), total.order)


def _hard_sigmoid(xp: ModuleType, x: Any, alpha: float = 0.2, beta: float = 0.5) -> Any:
    """min(max(alpha x + beta, 0), 1)"""
    return jnp.clip(alpha * x + beta, 0, 1)


def _celu(xp: ModuleType, x: Any, alpha: float = 1.0) -> Any:
    return jnp.maximum(x, 0) + jnp.minimum(alpha * jnp.expm1(x / alpha), 0)


def _elu(xp: ModuleType, x: Any, alpha: float = 1.0) -> Any:
    return jnp.where(x >= 0, x, alpha * jnp.expm1(jnp.minimum(x, 0)))


def _selu(xp: ModuleType, x: Any, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Any:
    return gamma * _elu(xp, x, alpha)


def _shrink(xp: ModuleType, x: Any, bias: float = 0.0, lambd: float = 0.5) -> Any:
    return xp.where(x < -lambd, x + bias, xp.where(x > lambd, x - bias, 0)).astype(x.dtype)


def _leaky_relu(xp: ModuleType, x: Any, alpha: float = 0.01) -> Any:
    """x where it is not negative, else alpha x."""
    return xp.where(x >= 0, x, alpha * x)


def _p_relu(xp: ModuleType, x: Any, slope: Any) -> Any:
    """x where it is not negative, else slope x."""
    return xp.where(x >= 0, x, slope * x)


def _thresholded(xp: ModuleType, x: Any, alpha: float = 1.0) -> Any:
    return xp.where(x > alpha, x, 0).astype(x.dtype)


def _swish(xp: ModuleType, x: Any, alpha: float = 1.0) -> Any:
    return x * nnx.sigmoid(alpha * x)


def _named(*names: str) -> dict[str, Function]:
    """Functions that NumPy and jax.numpy call by these names, ONNX as title."""
    return {name.title(): elementwise(lambda xp, x, name=name: getattr(xp, name)(x)) for name in names}


def _two(name: str) -> Function:
    return elementwise(lambda xp, x, y: getattr(xp, name)(x, y))


def _jax(function: Callable[..., Any]) -> Function:
    return elementwise(lambda _, x: function(x))


OPERATORS: dict[str, Function] = {
    **_named("abs", "ceil", "cos", "cosh", "exp", "floor", "log", "sign", "sin", "sinh", "sqrt", "tan", "tanh"),
    "Acos": elementwise(lambda xp, x: xp.arccos(x)), "Acosh": elementwise(lambda xp, x: xp.arccosh(x)),
    "Add": elementwise(lambda xp, x, y: x + y), "And": _two("logical_and"), "Asin": elementwise(lambda xp, x: xp.arcsin(x)),
    "Asinh": elementwise(lambda xp, x: xp.arcsinh(x)), "Atan": elementwise(lambda xp, x: xp.arctan(x)),
    "Atanh": elementwise(lambda xp, x: xp.arctanh(x)), "BitShift": elementwise(_shift), "BitwiseAnd": _two("bitwise_and"),
    "BitwiseNot": elementwise(lambda xp, x: ~x), "BitwiseOr": _two("bitwise_or"), "BitwiseXor": _two("bitwise_xor"),
    "Cast": cast, "CastLike": cast_like, "Celu": elementwise(_celu), "Clip": clip, "Div": elementwise(_divide),
    "Elu": elementwise(_elu), "Equal": _two("equal"), "Erf": _jax(jax.scipy.special.erf), "Expand": expand,
    "Gelu": elementwise(_gelu), "Greater": _two("greater"), "GreaterOrEqual": _two("greater_equal"),
    "HardSigmoid": elementwise(_hard_sigmoid), "HardSwish": elementwise(lambda xp, x: x * _hard_sigmoid(xp, x, 1 / 6, 0.5)),
    "IsInf": elementwise(_is_inf), "IsNaN": elementwise(lambda xp, x: xp.isnan(x)), "LeakyRelu": elementwise(_leaky_relu),
    "Less": _two("less"), "LessOrEqual": _two("less_equal"), "Max": folded(lambda xp, x, y: xp.maximum(x, y)), "Mean": _mean,
    "Min": folded(lambda xp, x, y: xp.minimum(x, y)), "Mish": _jax(lambda x: x * jnp.tanh(jax.nn.softplus(x))),
    "Mod": elementwise(_modulo), "Mul": elementwise(lambda xp, x, y: x * y), "Neg": elementwise(lambda xp, x: -x),
    "Not": elementwise(lambda xp, x: xp.logical_not(x)), "Or": _two("logical_or"), "Pow": elementwise(_power),
    "PRelu": elementwise(_p_relu),
    "Reciprocal": elementwise(lambda xp, x: 1 / x), "Relu": _jax(nnx.relu), "Round": elementwise(lambda xp, x: xp.round(x)),
    "Selu": elementwise(_selu), "Shrink": elementwise(_shrink), "Sigmoid": _jax(nnx.sigmoid),
    "Softplus": _jax(jax.nn.softplus), "Softsign": elementwise(lambda xp, x: x / (1 + abs(x))),
    "Sub": elementwise(lambda xp, x, y: x - y), "Sum": folded(lambda xp, x, y: x + y), "Swish": elementwise(_swish),
    "ThresholdedRelu": elementwise(_thresholded), "Where": where, "Xor": _two("logical_xor"),
}
