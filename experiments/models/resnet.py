"""ResNet-18 and ResNet-50 for ImageNet."""

from __future__ import annotations

from collections.abc import Sequence

import jax
from flax import nnx

from experiments.models.layers import conv, max_pool, norm, scaled


def resnet18(classes: int = 1000, width: float = 1.0, *, rngs: nnx.Rngs) -> ImageNetResNet:
    """Residual blocks of two 3x3 convolutions, 2 in each stage."""
    return ImageNetResNet(BasicBlock, (2, 2, 2, 2), classes, width, rngs=rngs)


def resnet50(classes: int = 1000, width: float = 1.0, *, rngs: nnx.Rngs) -> ImageNetResNet:
    """Residual blocks of 1x1, 3x3 and 1x1 convolutions, 3, 4, 6 and 3 in the stages."""
    return ImageNetResNet(Bottleneck, (3, 4, 6, 3), classes, width, rngs=rngs)


class ImageNetResNet(nnx.Module):
    """A strided 7x7 convolution, pooling, four stages of residual blocks, global average pooling, one linear layer.

    Names are torchvision's: conv1, bn1, layer1/0/conv1, layer1/0/downsample/0, fc.

    Args:
      block: BasicBlock or Bottleneck.
      depths: residual blocks of each stage.
      classes: number of outputs.
      width: factor of all channels but the classes'.
      rngs: source of the initial weights.

    Source:
      He, Zhang, Ren and Sun, "Deep residual learning for image recognition", 2016; the stride stands in the 3x3
      convolution of a bottleneck, as in torchvision.
    """

    def __init__(self, block: type[BasicBlock | Bottleneck], depths: Sequence[int], classes: int, width: float, *,
                 rngs: nnx.Rngs):
        channels = scaled(64, width)
        self.conv1 = conv(3, channels, 7, 2, use_bias=False, rngs=rngs)
        self.bn1 = norm(channels, rngs=rngs)
        stages = []
        for index, depth in enumerate(depths):
            blocks = nnx.List()
            for position in range(depth):
                blocks.append(block(channels, scaled(64 * 2**index, width), 2 if index and not position else 1, rngs=rngs))
                channels = blocks[-1].features
            stages.append(blocks)
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nnx.Linear(channels, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = max_pool(nnx.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in stage:
                x = block(x)
        return self.fc(x.mean(axis=(1, 2)))


class BasicBlock(nnx.Module):
    """relu(downsample(x) + bn2(conv2(relu(bn1(conv1(x))))))"""

    def __init__(self, channels: int, width: int, strides: int, *, rngs: nnx.Rngs):
        self.features = width
        self.conv1 = conv(channels, width, 3, strides, use_bias=False, rngs=rngs)
        self.bn1 = norm(width, rngs=rngs)
        self.conv2 = conv(width, width, 3, use_bias=False, rngs=rngs)
        self.bn2 = norm(width, rngs=rngs)
        self.downsample = _downsample(channels, width, strides, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.bn2(self.conv2(nnx.relu(self.bn1(self.conv1(x)))))
        return nnx.relu(_through(self.downsample, x) + y)


class Bottleneck(nnx.Module):
    """relu(downsample(x) + bn3(conv3(relu(bn2(conv2(relu(bn1(conv1(x)))))))))"""

    def __init__(self, channels: int, width: int, strides: int, *, rngs: nnx.Rngs):
        self.features = 4 * width
        self.conv1 = conv(channels, width, 1, use_bias=False, rngs=rngs)
        self.bn1 = norm(width, rngs=rngs)
        self.conv2 = conv(width, width, 3, strides, use_bias=False, rngs=rngs)
        self.bn2 = norm(width, rngs=rngs)
        self.conv3 = conv(width, self.features, 1, use_bias=False, rngs=rngs)
        self.bn3 = norm(self.features, rngs=rngs)
        self.downsample = _downsample(channels, self.features, strides, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = nnx.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(nnx.relu(self.bn2(self.conv2(y)))))
        return nnx.relu(_through(self.downsample, x) + y)


def _downsample(channels: int, features: int, strides: int, rngs: nnx.Rngs) -> nnx.List:
    """A 1x1 convolution and its norm where the shape changes, else nothing."""
    if channels == features and strides == 1:
        return nnx.List()
    return nnx.List([conv(channels, features, 1, strides, use_bias=False, rngs=rngs), norm(features, rngs=rngs)])


def _through(layers: nnx.List, x: jax.Array) -> jax.Array:
    for layer in layers:
        x = layer(x)
    return x
