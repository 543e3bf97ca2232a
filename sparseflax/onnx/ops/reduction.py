"""ONNX's operators along whole axes: reductions, softmax, norms, products of matrices."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparseflax.onnx.ops.elementwise import elementwise
from sparseflax.onnx.ops.movement import dropped, reshape, reshaped
from sparseflax.onnx.value import Unsupported, Value, along, bounded, integers, last, module, number, value


def reduction(function: Callable[[ModuleType, Any, tuple[int, ...]], Any]) -> Callable[..., Value]:
    """An operator of a function (xp, array, places) that leaves a 1 at these places."""

    def run(x: Value, axes: Any = None, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Value:
        gone = {x.order[x.place(axis)] for axis in integers(axes, "axes")}
        if not gone and noop_with_empty_axes:
            return x
        gone = gone or set(range(x.rank))
        places = tuple(place for place, axis in enumerate(x.order) if axis in gone)
        array = function(module(x), x.array, places).astype(x.array.dtype)
        return Value(array, x.order) if keepdims else dropped(Value(array.squeeze(places), x.order), gone)

    return run


def _named(name: str) -> Callable[..., Value]:
    return reduction(lambda xp, x, axes: getattr(xp, name)(x, axis=axes, keepdims=True))


def _sum(xp: ModuleType, x: Any, axes: tuple[int, ...]) -> Any:
    return xp.sum(x, axis=axes, keepdims=True)


def softmax(function: Callable[..., Any]) -> Callable[..., Value]:
    """An operator of function(array, axis=axes)."""

    def run(x: Value, axis: int = -1, joint: bool = False) -> Value:
        first = x.order[x.place(axis)] if x.rank else 0
        return Value(function(x.array, axis=tuple(map(x.order.index, range(first, x.rank if joint else first + 1)))), x.order)

    return run


def hardmax(x: Value, axis: int = -1, joint: bool = False) -> Value:
    """1 at the first maximum, else 0."""
    first = x.order[x.place(axis)]
    array = x.plain()
    rows = array.reshape(*array.shape[:first], -1) if joint else jnp.moveaxis(array, first, -1)
    hot = jax.nn.one_hot(jnp.argmax(rows, -1), rows.shape[-1], dtype=array.dtype)
    return value(hot.reshape(array.shape) if joint else jnp.moveaxis(hot, -1, first))


def index_of(name: str) -> Callable[..., Value]:
    def run(x: Value, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Value:
        place, xp = x.place(axis), module(x)
        array = xp.flip(x.array, place) if select_last_index else x.array
        found = getattr(xp, name)(array, axis=place, keepdims=True)
        found = x.array.shape[place] - 1 - found if select_last_index else found
        gone = {x.order[place]}
        return Value(found, x.order) if keepdims else dropped(Value(found.squeeze(place), x.order), gone)

    return run


def top_k(x: Value, k: Any, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Value, Value]:
    place, count = x.place(axis), int(number(k, "k"))
    if not 0 <= count <= x.array.shape[place]:
        raise Unsupported(f"k={count} of an axis of {x.array.shape[place]}")
    rows = jnp.moveaxis(x.array, place, -1)
    _, index = jax.lax.top_k(rows if largest else (~rows if rows.dtype.kind in "iub" else -rows), count)
    top = jnp.take_along_axis(rows, index, axis=-1)
    return Value(jnp.moveaxis(top, -1, place), x.order), Value(jnp.moveaxis(index, -1, place), x.order)


def layer_normalization(x: Value, scale: Value, bias: Value | None = None, axis: int = -1, epsilon: float = 1e-5,
                        stash_type: int = 1) -> tuple[Value, ...]:
    """(x - mean) / sqrt(var + epsilon) scale + bias, with the mean and variance over `axis` and all after it."""
    axes = tuple(map(x.order.index, range(x.order[x.place(axis)], x.rank)))
    mean = x.array.mean(axes, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.square(x.array - mean).mean(axes, keepdims=True) + epsilon)
    y = elementwise(lambda xp, x, *more: x * more[0] + (more[1] if len(more) > 1 else 0))(
        Value((x.array - mean) * inverse, x.order), scale, *([bias] if bias else []))
    return y, Value(mean, x.order), Value(inverse, x.order)


def rms_normalization(x: Value, scale: Value, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Value:
    """x / sqrt(mean(x^2) + epsilon) scale"""
    axes = tuple(map(x.order.index, range(x.order[x.place(axis)], x.rank)))
    y = x.array * jax.lax.rsqrt(jnp.square(x.array).mean(axes, keepdims=True) + epsilon)
    return elementwise(lambda xp, x, y: x * y)(Value(y, x.order), scale)


def instance_normalization(x: Value, scale: Value, bias: Value, epsilon: float = 1e-5) -> Value:
    """Of each image and channel: (x - mean) / sqrt(var + epsilon) scale + bias."""
    return group_normalization(x, scale, bias, num_groups=x.shape[1], epsilon=epsilon)


def group_normalization(x: Value, scale: Value, bias: Value, num_groups: int, epsilon: float = 1e-5,
                        stash_type: int = 1) -> Value:
    """As `instance_normalization`, with a mean and variance for `num_groups` groups of channels."""
    array, c = x.channels_last(), x.shape[1]
    if num_groups < 1 or c % num_groups:
        raise Unsupported(f"num_groups={num_groups} of {c} channels, wanted a divisor")
    size = c // num_groups

    def means(array):
        """Of each image and group, for each of its channels: as a packed network computes them."""
        mean = array.reshape(array.shape[0], -1, num_groups, size).mean((1, 3))
        return jnp.repeat(mean, size, -1).reshape(array.shape[0], *(1,) * (x.rank - 2), c)

    centred = array - means(array)
    y = centred * jax.lax.rsqrt(means(jnp.square(centred)) + epsilon)
    factor, more = (jnp.repeat(v.plain(), c // v.shape[0]) for v in (scale, bias))  # of groups before operator set 21
    return Value(y * along(factor, x.rank) + along(more, x.rank), last(x.rank))


def grouped_instance_normalization(x: Value, groups: Any, scale: Value, bias: Value, shape: Any,
                                   epsilon: float = 1e-5) -> Value:
    """`instance_normalization` of a tensor that is reshaped for it and back: of groups of channels, if only these are split."""
    n, count, *rest = *reshaped(x, groups), 0, 0
    if reshaped(x, shape) == list(x.shape) and len(rest) == 3 and n == x.shape[0] and count and x.shape[1] % count == 0:
        return group_normalization(x, scale, bias, count, epsilon)
    return reshape(instance_normalization(reshape(x, groups), scale, bias, epsilon), shape)


def batch_normalization(x: Value, scale: Value, bias: Value, mean: Value, var: Value, epsilon: float = 1e-5,
                        momentum: float = 0.9, training_mode: int = 0, spatial: int = 1, is_test: int = 1) -> Value:
    """(x - mean) / sqrt(var + epsilon) scale + bias with statistics that are computed; constants make a layer."""
    if training_mode or not spatial:
        raise Unsupported("training_mode=1 or spatial=0, wanted a norm per channel with its running statistics")
    factor = along(scale.plain() * jax.lax.rsqrt(var.plain() + epsilon), x.rank)
    array = (x.channels_last() - along(mean.plain(), x.rank)) * factor + along(bias.plain(), x.rank)
    return Value(array, last(x.rank))


def mean_variance_normalization(x: Value, axes: Any = (0, 2, 3)) -> Value:
    places = tuple(map(x.place, axes))
    centred = x.array - x.array.mean(places, keepdims=True)
    return Value(centred / (jnp.sqrt(jnp.square(centred).mean(places, keepdims=True)) + 1e-9), x.order)


def lp_normalization(x: Value, axis: int = -1, p: int = 2) -> Value:
    norm = jnp.linalg.norm(x.array, ord=p, axis=x.place(axis), keepdims=True)
    return Value(x.array / jnp.where(norm == 0, 1, norm), x.order)


def lrn(x: Value, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Value:
    """x / (bias + alpha / size * sum of x^2 over `size` neighbouring channels)^beta"""
    if size < 1:
        raise Unsupported(f"size={size}, wanted 1 or more channels")
    array, before = x.channels_last(), (size - 1) // 2
    before, after = (min(far, array.shape[-1]) for far in (before, size - 1 - before))  # farther ones are none
    squares = jnp.pad(array * array, [(0, 0)] * (x.rank - 1) + [(before, after)])
    scale = bias + alpha / size * sum(squares[..., i:i + array.shape[-1]] for i in range(before + 1 + after))
    if beta == 0.75:  # as in every published network: two square roots take a third of the time of a power
        y = array * jax.lax.rsqrt(scale * jnp.sqrt(scale))
    else:
        y = array * jnp.exp(-beta * jnp.log(scale))
    return Value(y, last(x.rank))


def matmul(x: Value, y: Value) -> Value:
    """The matrix product, of the last two axes."""
    a, b, xp = x.plain(), y.plain(), module(x, y)
    if a.ndim and b.ndim:
        bounded((a.size // max(1, a.shape[-1]), b.size // max(1, b.shape[-min(2, b.ndim)])), xp)
    return value(xp.matmul(a, b))


def gemm(x: Value, y: Value, bias: Value | None = None, alpha: float = 1.0, beta: float = 1.0, transA: int = 0,
         transB: int = 0) -> Value:
    """alpha x y + beta bias"""
    a, b = (v.plain().T if transposed else v.plain() for v, transposed in ((x, transA), (y, transB)))
    if a.ndim != 2 or b.ndim != 2:
        raise Unsupported(f"its inputs have shapes {a.shape} and {b.shape}, wanted matrices")
    product = jnp.matmul(a, b) if alpha == 1 else alpha * jnp.matmul(a, b)
    return value(product) if bias is None else elementwise(lambda xp, x, y: x + beta * y)(value(product), bias)


def einsum(*xs: Value, equation: str) -> Value:
    arrays, equation = [x.plain() for x in xs], equation.replace(" ", "")
    bounded(jax.eval_shape(lambda *arrays: jnp.einsum(equation, *arrays), *arrays).shape, module(*xs))
    return value(jnp.einsum(equation, *arrays))


def det(x: Value) -> Value:
    return value(jnp.linalg.det(x.plain()))


OPERATORS: dict[str, Callable[..., Any]] = {
    "ArgMax": index_of("argmax"), "ArgMin": index_of("argmin"), "BatchNormalization": batch_normalization, "Det": det,
    "Einsum": einsum, "Gemm": gemm, "GroupNormalization": group_normalization,
    "GroupedInstanceNormalization": grouped_instance_normalization, "Hardmax": hardmax,
    "InstanceNormalization": instance_normalization, "LayerNormalization": layer_normalization,
    "LogSoftmax": softmax(jax.nn.log_softmax), "LpNormalization": lp_normalization, "LRN": lrn, "MatMul": matmul,
    "MeanVarianceNormalization": mean_variance_normalization,
    "ReduceL1": reduction(lambda xp, x, axes: _sum(xp, abs(x), axes)),
    "ReduceL2": reduction(lambda xp, x, axes: xp.sqrt(_sum(xp, x * x, axes))),
    "ReduceLogSum": reduction(lambda xp, x, axes: xp.log(_sum(xp, x, axes))),
    "ReduceLogSumExp": reduction(lambda xp, x, axes: jax.nn.logsumexp(x, axis=axes, keepdims=True)),
    "ReduceMax": _named("max"), "ReduceMean": _named("mean"), "ReduceMin": _named("min"), "ReduceProd": _named("prod"),
    "ReduceSum": _named("sum"), "ReduceSumSquare": reduction(lambda xp, x, axes: _sum(xp, x * x, axes)),
    "RMSNormalization": rms_normalization, "Softmax": softmax(nnx.softmax), "TopK": top_k,
}
