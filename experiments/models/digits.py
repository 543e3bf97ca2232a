"""The networks for digits: small ones of the VGG and ResNet families, as ordinary Flax modules."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx


class VGG(nnx.Module):
    """3x3 convolutions with batch norm and ReLU, 2x2 max pooling between stages, global average pooling, one linear layer.

    Args:
      widths: output channels of each convolution, one tuple per stage; pooling halves the image between stages.
      channels: of the images.
      classes: number of outputs.
      rngs: source of the initial weights.

    Source:
      Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", 2015; batch norm and
      the pooled head as in later practice.
    """

    def __init__(self, widths: Sequence[Sequence[int]], channels: int, classes: int, *, rngs: nnx.Rngs):
        self.stages = nnx.List()
        for stage in widths:
            blocks = nnx.List()
            for width in stage:
                blocks.append(ConvBlock(channels, width, rngs=rngs))
                channels = width
            self.stages.append(blocks)
        self.head = nnx.Linear(channels, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for index, stage in enumerate(self.stages):
            x = max_pool(x) if index else x
            for block in stage:
                x = block(x)
        return self.head(x.mean(axis=(1, 2)))


class ResNet(nnx.Module):
    """A strided 3x3 stem, then stages of residual blocks of two 3x3 convolutions, global average pooling, one linear layer.

    Args:
      widths: output channels of each residual block, one tuple per stage; every stage but the first halves the image.
      channels: of the images.
      classes: number of outputs.
      rngs: source of the initial weights.

    Source:
      He, Zhang, Ren and Sun, "Deep residual learning for image recognition", 2016.
    """

    def __init__(self, widths: Sequence[Sequence[int]], channels: int, classes: int, *, rngs: nnx.Rngs):
        self.stem = ConvBlock(channels, widths[0][0], strides=2, rngs=rngs)
        channels = widths[0][0]
        self.blocks = nnx.List()
        for index, stage in enumerate(widths):
            for position, width in enumerate(stage):
                strides = 2 if index and not position else 1
                self.blocks.append(ResidualBlock(channels, width, strides, rngs=rngs))
                channels = width
        self.head = nnx.Linear(channels, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(axis=(1, 2)))


class InceptionNet(nnx.Module):
    """A strided 3x3 stem, then stages of inception modules with 2x2 max pooling between them, pooled, one linear layer.

    Args:
      widths: output channels of each inception module, a multiple of 16, one tuple per stage; pooling halves the image
        between stages.
      channels: of the images.
      classes: number of outputs.
      rngs: source of the initial weights.

    Source:
      Szegedy et al., "Going deeper with convolutions", 2015; batch norm as in the authors' next paper, no classifiers on
      the side.
    """

    def __init__(self, widths: Sequence[Sequence[int]], channels: int, classes: int, *, rngs: nnx.Rngs):
        self.stem = ConvBlock(channels, widths[0][0] // 2, strides=2, rngs=rngs)
        channels = widths[0][0] // 2
        self.stages = nnx.List()
        for stage in widths:
            modules = nnx.List()
            for width in stage:
                modules.append(Inception(channels, width, rngs=rngs))
                channels = width
            self.stages.append(modules)
        self.head = nnx.Linear(channels, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.stem(x)
        for index, stage in enumerate(self.stages):
            x = max_pool(x) if index else x
            for module in stage:
                x = module(x)
        return self.head(x.mean(axis=(1, 2)))


class Inception(nnx.Module):
    """1x1, 1x1 then 3x3, 1x1 then 5x5, and 3x3 max pooling then 1x1, side by side; their channels are concatenated.

    Of the `width` output channels 1/4, 1/2, 1/8 and 1/8 come from these, as in the source's inception 3a; so do the 3/8
    before the 3x3, but 1/8 instead of 1/16 go into the 5x5, which would have next to no weights at our widths.
    """

    def __init__(self, channels: int, width: int, *, rngs: nnx.Rngs):
        self.one = ConvBlock(channels, width // 4, size=1, rngs=rngs)
        self.three_reduce = ConvBlock(channels, 3 * width // 8, size=1, rngs=rngs)
        self.three = ConvBlock(3 * width // 8, width // 2, rngs=rngs)
        self.five_reduce = ConvBlock(channels, width // 8, size=1, rngs=rngs)
        self.five = ConvBlock(width // 8, width // 8, size=5, rngs=rngs)
        self.pooled = ConvBlock(channels, width - width // 4 - width // 2 - width // 8, size=1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        branches = (self.one(x), self.three(self.three_reduce(x)), self.five(self.five_reduce(x)),
                    self.pooled(neighbours_max(x)))
        return jnp.concatenate(branches, axis=-1)


class ConvBlock(nnx.Module):
    """relu(norm(conv(x))), of size x size, 3x3 by default."""

    def __init__(self, channels: int, width: int, strides: int = 1, size: int = 3, *, rngs: nnx.Rngs):
        self.conv = _conv(channels, width, size, strides, rngs)
        self.norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.norm(self.conv(x)))


class ResidualBlock(nnx.Module):
    """relu(shortcut(x) + norm2(conv2(relu(norm1(conv1(x)))))), the shortcut 1x1 where the shape changes, else x itself."""

    def __init__(self, channels: int, width: int, strides: int, *, rngs: nnx.Rngs):
        self.conv1 = _conv(channels, width, 3, strides, rngs)
        self.norm1 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.conv2 = _conv(width, width, 3, 1, rngs)
        # Its scale starts at one: from zero, as often advised, so short a training stays on its first plateau for 300 updates.
        self.norm2 = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)
        self.project = channels != width or strides != 1
        if self.project:
            self.shortcut = _conv(channels, width, 1, strides, rngs)
            self.shortcut_norm = nnx.BatchNorm(width, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        return nnx.relu((self.shortcut_norm(self.shortcut(x)) if self.project else x) + y)


def max_pool(x: jax.Array) -> jax.Array:
    """Maximum over 2x2 windows, (n, h, w, c) -> (n, h/2, w/2, c).

    As a reduction of a reshaped array: on CPU, XLA compiles its gradient nine times faster than reduce_window's.
    """
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))


def neighbours_max(x: jax.Array) -> jax.Array:
    """Maximum over each pixel's 3x3 neighbourhood, (n, h, w, c) -> (n, h, w, c): max pooling with stride 1.

    As maxima of shifted arrays, for the reason given in `max_pool`.
    """
    for axis in (1, 2):
        low, high = jax.lax.slice_in_dim(x, 0, 1, axis=axis), jax.lax.slice_in_dim(x, -1, None, axis=axis)
        before = jnp.concatenate([low, jax.lax.slice_in_dim(x, 0, -1, axis=axis)], axis)
        after = jnp.concatenate([jax.lax.slice_in_dim(x, 1, None, axis=axis), high], axis)
        x = jnp.maximum(jnp.maximum(before, x), after)
    return x


def _conv(channels, width, size, strides, rngs):
    he = nnx.initializers.he_normal()
    return nnx.Conv(channels, width, (size, size), strides, use_bias=False, kernel_init=he, rngs=rngs)
