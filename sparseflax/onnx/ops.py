"""What ONNX's operators without weights compute, on images in NHWC: attributes are ONNX's, axes those of NCHW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from sparseflax.conv.window import explicit_padding


def clip(x: jax.Array, low: float, high: float) -> jax.Array:
    """min(max(x, low), high), as Flax's ReLU and ReLU6 where it is one of them."""
    named = {(0.0, np.inf): nnx.relu, (0.0, 6.0): nnx.relu6}.get((low, high))
    return named(x) if named else jnp.clip(x, low, high)


def max_pool(x: jax.Array, **window: Any) -> jax.Array:
    """Maximum over windows; padding is never the maximum.

    Args:
      x: (n, h, w, c).
      **window: kernel_shape, strides, dilations (rows, columns); pads (top, left, bottom, right); auto_pad; ceil_mode, whether
        a last window may hang over the padding's end, if it begins before.
    """
    return _reduce(x, -jnp.inf, lax.max, _sides(x, **window), **window)


def average_pool(x: jax.Array, *, count_include_pad: bool, **window: Any) -> jax.Array:
    """Mean over windows as in `max_pool`, of the pixels in the image or, with `count_include_pad`, the padding's zeros too."""
    sides = _sides(x, **window)
    rows, columns = (
        _counts(length, size, stride, dilation, side, count_include_pad) for length, size, stride, dilation, side in
        zip(x.shape[1:3], window["kernel_shape"], window["strides"], window["dilations"], sides, strict=True))
    counts = np.outer(rows, columns)
    total = _reduce(x, 0.0, lax.add, sides, **window)
    return total / (float(counts[0, 0]) if np.all(counts == counts[0, 0]) else counts[None, :, :, None].astype(x.dtype))


def global_average_pool(x: jax.Array) -> jax.Array:
    """(n, h, w, c) -> (n, 1, 1, c)"""
    return x.mean(axis=(1, 2), keepdims=True)


def reduce_mean(x: jax.Array, *, keepdims: bool) -> jax.Array:
    """The mean of each channel of images (n, h, w, c): (n, 1, 1, c), or (n, c) without `keepdims`."""
    return x.mean(axis=(1, 2), keepdims=keepdims)


def squeeze(x: jax.Array) -> jax.Array:
    """(n, 1, 1, c) -> (n, c)

    Raises:
      ValueError: images of more than a pixel.
    """
    if x.ndim != 4 or x.shape[1:3] != (1, 1):
        raise ValueError(f"Squeeze of shape {x.shape}, wanted (n, 1, 1, c): the network's input has the wrong size")
    return x.reshape(x.shape[0], x.shape[3])


def add(x: jax.Array, y: jax.Array) -> jax.Array:
    """x + y; sizes of 1 are repeated.

    Raises:
      ValueError: of different rank, where NHWC would not repeat what NCHW does.
    """
    _same_rank("Add", x, y)
    return x + y


def mul(x: jax.Array, y: jax.Array) -> jax.Array:
    """x y; else as `add`."""
    _same_rank("Mul", x, y)
    return x * y


def leaky_relu(x: jax.Array, *, alpha: float) -> jax.Array:
    """x where it is not negative, else alpha x."""
    return jnp.where(x >= 0, x, alpha * x)


def hard_sigmoid(x: jax.Array, *, alpha: float, beta: float) -> jax.Array:
    """min(max(alpha x + beta, 0), 1)"""
    return jnp.clip(alpha * x + beta, 0, 1)


def hard_swish(x: jax.Array) -> jax.Array:
    """x min(max(x / 6 + 1/2, 0), 1)"""
    return x * hard_sigmoid(x, alpha=1 / 6, beta=0.5)


def concat(*xs: jax.Array, axis: int) -> jax.Array:
    """The inputs joined along ONNX's axis, 1 for channels."""
    return jnp.concatenate(xs, axis=_axis(axis, xs[0].ndim))


def softmax(x: jax.Array, *, axis: int, joint: bool) -> jax.Array:
    """exp(x) / sum exp(x), over one axis or, as before operator set 13, jointly over it and all after it."""
    axes = range(axis % x.ndim, x.ndim) if joint else (axis % x.ndim,)
    return nnx.softmax(x, axis=tuple(_axis(a, x.ndim) for a in axes))


def lrn(x: jax.Array, *, size: int, alpha: float, beta: float, bias: float) -> jax.Array:
    """x / (bias + alpha / size * sum of x^2 over `size` neighbouring channels)^beta, (n, h, w, c)."""
    before = (size - 1) // 2
    squares = jnp.pad(x * x, [(0, 0)] * (x.ndim - 1) + [(before, size - 1 - before)])
    scale = bias + alpha / size * sum(squares[..., i:i + x.shape[-1]] for i in range(size))
    if beta == 0.75:  # as in every published network: two square roots take a third of the time of a power
        return x * jax.lax.rsqrt(scale * jnp.sqrt(scale))
    return x * jnp.exp(-beta * jnp.log(scale))


def flatten(x: jax.Array, *, image: tuple[int, ...] | None = None, features: int | None = None) -> jax.Array:
    """(n, h, w, c) -> (n, features).

    Args:
      x: images, or (n, features) which stay.
      image: (h, w, c) where what follows takes this order; None gives ONNX's order, channels first.
      features: that the graph wants; None for what there is.

    Raises:
      ValueError: the images have another size.
    """
    if image is None:
        x = x.transpose(0, 3, 1, 2) if x.ndim == 4 else x
    elif x.shape[1:] != image:
        raise ValueError(f"Flatten of images {x.shape[1:]}, wanted {image}: the fully connected layer after it fixes the size "
                         "of the network's input")
    x = x.reshape(x.shape[0], -1)
    if features not in (None, x.shape[1]):
        raise ValueError(f"Reshape of {x.shape[1]} features of an image to {features}: the network's input has the wrong size, "
                         "or this is no flattening of images")
    return x


# By ONNX's name. Flax has the layers with weights.
OPERATORS: dict[str, Callable[..., jax.Array]] = {
    "Add": add, "AveragePool": average_pool, "Clip": clip, "Concat": concat, "Flatten": flatten,
    "GlobalAveragePool": global_average_pool, "HardSigmoid": hard_sigmoid, "HardSwish": hard_swish, "LeakyRelu": leaky_relu,
    "LRN": lrn, "MaxPool": max_pool, "Mul": mul, "ReduceMean": reduce_mean, "Relu": nnx.relu, "Reshape": flatten,
    "Sigmoid": nnx.sigmoid, "Softmax": softmax, "Squeeze": squeeze, "Tanh": jnp.tanh,
}


def _same_rank(name: str, x: jax.Array, y: jax.Array) -> None:
    if x.ndim != y.ndim:
        raise ValueError(f"{name} of shapes {x.shape} and {y.shape}, wanted the same rank: reshape the smaller one in the "
                         "ONNX graph")


def _axis(axis: int, rank: int) -> int:
    """Where an axis of NCHW, or of a rank other than 4, lies here."""
    axis %= rank
    return (0, 3, 1, 2)[axis] if rank == 4 else axis


def _sides(x: jax.Array, *, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode) -> list[tuple[int, int, int]]:
    """Of rows and of columns: padding before and after, and what a last window hangs over that."""
    if auto_pad != "NOTSET":
        word = {"SAME_UPPER": "SAME"}.get(auto_pad, auto_pad)
        padding = explicit_padding(word, (x.shape[1], x.shape[2]), kernel_shape, strides, dilations)
    else:
        top, left, bottom, right = pads
        padding = (top, bottom), (left, right)
    sides = []
    for length, size, stride, dilation, (low, high) in zip(x.shape[1:3], kernel_shape, strides, dilations, padding,
                                                           strict=True):
        room = length + low + high - (size - 1) * dilation - 1
        hangs = ceil_mode and room % stride and (room // stride + 1) * stride < length + low
        sides.append((low, high, stride - room % stride if hangs else 0))
    return sides


def _reduce(x: jax.Array, start: float, function: Callable, sides, *, kernel_shape, strides, dilations, **_: Any) -> jax.Array:
    padding = [(0, 0), *((low, high + beyond) for low, high, beyond in sides), (0, 0)]
    return lax.reduce_window(x, np.asarray(start, x.dtype), function, (1, *kernel_shape, 1), (1, *strides, 1), padding,
                             window_dilation=(1, *dilations, 1))


def _counts(length: int, size: int, stride: int, dilation: int, side: tuple[int, int, int], padded: bool) -> np.ndarray:
    """How many taps of each window count."""
    low, high, beyond = side
    first, last = (-low, length + high) if padded else (0, length)
    starts = np.arange(-low, length + high + beyond - (size - 1) * dilation, stride)
    taps = starts[:, None] + np.arange(size) * dilation
    return ((taps >= first) & (taps < last)).sum(axis=1)
