"""What XLA:CPU compiles badly, written so that it compiles well: pooling, grouped, depthwise and 1x1 convolutions, powers.

Each function takes an equation of a jaxpr and its operands, and returns the same result computed in another way, or None
where the equation is better left as it is. All are for float32, and for the CPU: on other devices XLA has better ways.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import primitives

MAX_GROUPS = 64  # that are a convolution each; beyond, they are too small to gain
MAX_SLICES = 4  # along one dimension of a pooling window, or windows over the edge: more cost more than a loop
MAX_TAPS = 64  # of a depthwise kernel, each of them code
MAX_PADDED_TAPS = 9  # of a strided depthwise kernel: with more, padding each costs more than padding the image once
COMBINE: dict[Any, Any] = {primitives.reduce_window_max_p: jnp.maximum, primitives.reduce_window_min_p: jnp.minimum,
                           primitives.reduce_window_sum_p: jnp.add}


def pool(equation: Any, x: jax.Array) -> jax.Array | None:
    """A maximum, minimum or sum over windows, one dimension after the other.

    Small windows combine strided slices, and the few of them that hang over the edge are computed apart; others keep a
    reduce_window, now of one dimension. Sums round differently.

    Args:
      equation: reduce_window_max, _min or _sum.
      x: its operand, of any shape.
    """
    params, shape, combine = equation.params, equation.outvars[0].aval.shape, COMBINE[equation.primitive]
    windows, strides, padding, dilation = (params[name] for name in (
        "window_dimensions", "window_strides", "padding", "window_dilation"))
    axes = [axis for axis, what in enumerate(zip(windows, strides, padding, strict=True)) if what != (1, 1, (0, 0))]
    if x.dtype != jnp.float32 or set(params["base_dilation"]) != {1}:
        return None
    for axis in axes:
        sliced = _slices(combine, x, axis, windows[axis], strides[axis], dilation[axis], padding[axis][0], shape[axis])
        if sliced is not None:
            x = sliced
        elif len(axes) == 1:
            return None  # it is of one dimension already
        else:
            x = equation.primitive.bind(x, **{name: _only(axis, params[name], neutral) for name, neutral in (
                ("window_dimensions", 1), ("window_strides", 1), ("padding", (0, 0)), ("base_dilation", 1),
                ("window_dilation", 1))})
    return x


def joins(equation: Any) -> bool:
    """Whether XLA would compute an equation as one with the dense convolution before it: pooling of windows side by side.

    With the convolution rewritten apart from it, a 64x56x56 -> 64 layer and its pooling took twice the time on two threads.
    """
    params = equation.params
    return (equation.primitive in COMBINE and params["window_dimensions"] == params["window_strides"]
            and not any(map(any, params["padding"])) and set(params["window_dilation"]) == {1})


def convolve(equation: Any, x: jax.Array, kernel: jax.Array) -> jax.Array | None:
    """A dense grouped convolution as one convolution per group; a depthwise one as a sum of shifted images; one of single
    pixels as a product of matrices.

    depthwise: y[n,i,j,c] = sum_{r,s} x[n, i*sh + r*dh - ph, j*sw + s*dw - pw, c] w[r,s,0,c]
    pixels:    y[n,i,j,k] = sum_c x[n, i*sh, j*sw, c] w[0,0,c,k]

    Args:
      equation: conv_general_dilated.
      x, kernel: its operands; depthwise convolutions and those of pixels are rewritten for NHWC and HWIO only.
    """
    params = equation.params
    groups, layout = params["feature_group_count"], params["dimension_numbers"]
    float32 = x.dtype == kernel.dtype == equation.outvars[0].aval.dtype == jnp.float32
    if params["batch_group_count"] != 1 or not float32:
        return None
    if groups == 1:
        return _pointwise(equation, x, kernel)
    if groups == x.shape[layout.lhs_spec[1]] == kernel.shape[layout.rhs_spec[0]]:
        return _depthwise(equation, x, kernel)
    if groups > MAX_GROUPS:
        return None
    channels, outputs = layout.lhs_spec[1], layout.rhs_spec[0]
    pairs = zip(jnp.split(x, groups, channels), jnp.split(kernel, groups, outputs), strict=True)
    alone = params | {"feature_group_count": 1}
    return jnp.concatenate([equation.primitive.bind(*pair, **alone) for pair in pairs], layout.out_spec[1])


def power(_, x: jax.Array, exponent: Any) -> jax.Array | None:
    """x to the power of a quarter, a half, three quarters, or of minus these, by square roots; local response
    normalization takes most of its time in one.

    Args:
      x: the first operand of pow, of any shape.
      exponent: the second; only a number counts.
    """
    if isinstance(exponent, Tracer) or np.ndim(exponent) or x.dtype != jnp.float32 or abs(exponent) not in (0.25, 0.5, 0.75):
        return None
    x = jnp.where(x == -np.inf, np.float32(np.inf), x)  # what pow makes of it, as the abs is for -0
    root = jnp.abs(jnp.sqrt(x))
    y = {0.25: jnp.sqrt(root), 0.5: root, 0.75: root * jnp.sqrt(root)}[abs(float(exponent))]
    return 1 / y if exponent < 0 else y


def _pointwise(equation: Any, x: jax.Array, kernel: jax.Array) -> jax.Array | None:
    params = equation.params
    if not _nhwc(params["dimension_numbers"]) or kernel.shape[:2] != (1, 1) or params["lhs_dilation"] != (1, 1) or any(
            map(any, params["padding"])):
        return None
    # XLA computes a chain of dense layers as one, which a slice would cut.
    if params["window_strides"] != (1, 1):
        return None
    return jax.lax.dot_general(x, kernel.reshape(kernel.shape[2:]), (((3,), (0,)), ((), ())),
                               precision=params["precision"])


def _nhwc(layout: Any) -> bool:
    """Whether images are NHWC, before and after, and kernels HWIO."""
    return layout.lhs_spec == layout.out_spec == (0, 3, 1, 2) and layout.rhs_spec == (3, 2, 0, 1)


def _depthwise(equation: Any, x: jax.Array, kernel: jax.Array) -> jax.Array | None:
    params = equation.params
    layout, strides, pads, dilation = (params[name] for name in (
        "dimension_numbers", "window_strides", "padding", "rhs_dilation"))
    shape = equation.outvars[0].aval.shape
    if not _nhwc(layout) or params["lhs_dilation"] != (1, 1) or min(min(pad) for pad in pads) < 0:
        return None
    kh, kw, _, channels = kernel.shape
    sizes = (*x.shape[1:3], *shape[1:3])
    if kh * kw > MAX_TAPS or not all(isinstance(size, int) and size > 0 for size in sizes):
        return None
    # Where a strided image is read once per tap, its padded copy would cost more than everything else.
    pad_taps = min(strides) > 1 and kh * kw <= MAX_PADDED_TAPS
    if not pad_taps:
        x, pads = jnp.pad(x, ((0, 0), *pads, (0, 0))), ((0, 0), (0, 0))
    terms = []
    for r in range(kh):
        rows = _padded_tap(x, 1, r * dilation[0] - pads[0][0], strides[0], shape[1])
        for s in range(kw):
            tap = _padded_tap(rows, 2, s * dilation[1] - pads[1][0], strides[1], shape[2])
            terms.append(tap * kernel[r, s].reshape(1, 1, 1, channels))
    return functools.reduce(operator.add, terms)


def _slices(combine: Any, x: jax.Array, axis: int, window: int, stride: int, dilation: int, pad: int,
            count: Any) -> jax.Array | None:
    """`count` windows along one axis, the first at -pad, as slices; None where a loop over the window is better."""
    size = x.shape[axis]
    if not isinstance(size, int) or window > MAX_SLICES:
        return None
    first = -(-pad // stride)  # of the windows inside
    last = min((size - 1 - (window - 1) * dilation + pad) // stride, count - 1)
    if first > last or first + count - 1 - last > MAX_SLICES:
        return None
    parts = []
    over = [(at, 1) for at in range(count) if not first <= at <= last]  # the edge
    for at, number in sorted([*over, (first, last + 1 - first)]):
        starts = [start for i in range(window) if 0 <= (start := at * stride - pad + i * dilation) < size]
        if not starts:
            return None  # a window of nothing but padding
        parts.append(functools.reduce(combine, [_tap(x, axis, start, stride, number) for start in starts]))
    return jnp.concatenate(parts, axis) if len(parts) > 1 else parts[0]


def _only(axis: int, values: Any, neutral: Any) -> tuple[Any, ...]:
    """`values` with all but one of them neutral."""
    return tuple(value if index == axis else neutral for index, value in enumerate(values))


def _tap(x: jax.Array, axis: int, start: int, stride: int, count: int) -> jax.Array:
    """x at start, start + stride, ...: `count` positions along one axis."""
    return jax.lax.slice_in_dim(x, start, start + (count - 1) * stride + 1, stride, axis)


def _padded_tap(x: jax.Array, axis: int, start: int, stride: int, count: int) -> jax.Array:
    """The same with zeros where a position lies outside."""
    first = max(0, -(start // stride))
    last = min(count, (x.shape[axis] - 1 - start) // stride + 1)
    if first >= last:  # all of it does
        return jnp.zeros((*x.shape[:axis], count, *x.shape[axis + 1:]), x.dtype)
    x = _tap(x, axis, start + first * stride, stride, last - first)
    if (first, last) == (0, count):
        return x
    return jax.lax.pad(x, np.float32(0), [(first, count - last, 0) if a == axis else (0, 0, 0) for a in range(x.ndim)])


REWRITES: dict[Any, Callable[..., Any]] = {
    primitives.conv_general_dilated_p: convolve, primitives.pow_p: power, **dict.fromkeys(COMBINE, pool)}
