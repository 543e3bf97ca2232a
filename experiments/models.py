"""The networks, as ordinary Flax modules: nothing here knows about sparsity."""

from collections.abc import Sequence

import jax
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


class ConvBlock(nnx.Module):
    """relu(norm(conv(x))), 3x3."""

    def __init__(self, channels: int, width: int, strides: int = 1, *, rngs: nnx.Rngs):
        self.conv = _conv(channels, width, 3, strides, rngs)
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


def _conv(channels, width, size, strides, rngs):
    he = nnx.initializers.he_normal()
    return nnx.Conv(channels, width, (size, size), strides, use_bias=False, kernel_init=he, rngs=rngs)
