"""MobileNetV1."""

from __future__ import annotations

import jax
from flax import nnx

from experiments.models.layers import conv, norm, scaled

STAGES = ((64,), (128, 128), (256, 256), (512,) * 6, (1024, 1024))  # output channels; each stage but the first strides


class MobileNetV1(nnx.Module):
    """A strided 3x3 convolution, thirteen depthwise separable ones, global average pooling, one linear layer.

    Names are those of PyTorch Image Models: conv_stem, bn1, blocks/0/0/conv_dw, bn1, conv_pw, bn2, classifier.

    Args:
      classes: number of outputs.
      width: factor of all channels but the classes'.
      rngs: source of the initial weights.

    Source:
      Howard et al., "MobileNets: efficient convolutional neural networks for mobile vision applications", 2017; ReLU6 as
      in the authors' code.
    """

    def __init__(self, classes: int = 1000, width: float = 1.0, *, rngs: nnx.Rngs):
        channels = scaled(32, width)
        self.conv_stem = conv(3, channels, 3, 2, use_bias=False, rngs=rngs)
        self.bn1 = norm(channels, rngs=rngs)
        self.blocks = nnx.List()
        for index, stage in enumerate(STAGES):
            blocks = nnx.List()
            for position, features in enumerate(stage):
                blocks.append(Separable(channels, scaled(features, width), 2 if index and not position else 1, rngs=rngs))
                channels = scaled(features, width)
            self.blocks.append(blocks)
        self.classifier = nnx.Linear(channels, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu6(self.bn1(self.conv_stem(x)))
        for stage in self.blocks:
            for block in stage:
                x = block(x)
        return self.classifier(x.mean(axis=(1, 2)))


class Separable(nnx.Module):
    """A 3x3 convolution of each channel by itself, then a 1x1 convolution over all; a norm and ReLU6 after both."""

    def __init__(self, channels: int, features: int, strides: int, *, rngs: nnx.Rngs):
        self.conv_dw = conv(channels, channels, 3, strides, groups=channels, use_bias=False, rngs=rngs)
        self.bn1 = norm(channels, rngs=rngs)
        self.conv_pw = conv(channels, features, 1, use_bias=False, rngs=rngs)
        self.bn2 = norm(features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu6(self.bn1(self.conv_dw(x)))
        return nnx.relu6(self.bn2(self.conv_pw(x)))
