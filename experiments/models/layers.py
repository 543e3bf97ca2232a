"""What the published networks are made of besides Flax's own layers: padding in PyTorch's way, ceiled pooling, LRN."""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx


def scaled(channels: int, width: float) -> int:
    """Channels of a narrower or wider network, a multiple of 8 so that groups and vectors still divide them."""
    return max(8, 8 * round(channels * width / 8))


def conv(channels: int, features: int, size: int, strides: int = 1, *, padding: int | None = None, groups: int = 1,
         use_bias: bool = True, rngs: nnx.Rngs) -> nnx.Conv:
    """A square convolution padded alike on all four sides, by half its kernel if not told; He's initial weights."""
    padding = size // 2 if padding is None else padding
    return nnx.Conv(channels, features, (size, size), strides, padding=((padding, padding), (padding, padding)),
                    feature_group_count=groups, use_bias=use_bias, kernel_init=nnx.initializers.he_normal(), rngs=rngs)


def norm(features: int, epsilon: float = 1e-5, *, rngs: nnx.Rngs) -> nnx.BatchNorm:
    """Batch norm with PyTorch's constants."""
    return nnx.BatchNorm(features, momentum=0.9, epsilon=epsilon, rngs=rngs)


def max_pool(x: jax.Array, size: int, strides: int, padding: int = 0, *, ceil: bool = False) -> jax.Array:
    """Maximum over square windows, (n, h, w, c) -> (n, oh, ow, c).

    Args:
      padding: on all four sides, never the maximum.
      ceil: whether a last window may hang over the end, as in Caffe: oh = ceil((h + 2 padding - size) / strides) + 1, less
        one where that window would begin beyond the image.
    """
    sides = []
    for length in x.shape[1:3]:
        over = (length + 2 * padding - size) % strides
        hangs = ceil and over > 0 and (length + 2 * padding - size) // strides * strides + strides < length + padding
        sides.append((padding, padding + (strides - over if hangs else 0)))
    return nnx.max_pool(x, (size, size), (strides, strides), cast(Any, tuple(sides)))


@functools.partial(jax.jit, static_argnames="size", inline=False)
def local_response_norm(x: jax.Array, size: int, alpha: float, bias: float) -> jax.Array:
    """x / (bias + alpha / size * sum of x^2 over `size` neighbouring channels)^(3/4), (n, h, w, c).

    A function with a name of its own under jit, by which experiments/export_onnx.py knows it.

    Source:
      Krizhevsky, Sutskever and Hinton, "ImageNet classification with deep convolutional neural networks", 2012; alpha is
      divided by `size` as in Caffe, PyTorch and ONNX. The exponent is that of every published network, and two square roots
      take a third of the time of a power.
    """
    before = (size - 1) // 2
    squares = jnp.pad(x * x, ((0, 0), (0, 0), (0, 0), (before, size - 1 - before)))
    scale = bias + alpha / size * sum(squares[..., i:i + x.shape[-1]] for i in range(size))
    return x * jax.lax.rsqrt(scale * jnp.sqrt(scale))
