"""GoogLeNet, as published and trained in Caffe, or with torchvision's batch norms."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.layers import conv, local_response_norm, max_pool, norm, scaled

# Output channels of each module: 1x1; 3x3 and the reduction before it; 5x5 and its reduction; the projection after pooling.
INCEPTIONS = {
    "3a": (64, 96, 128, 16, 32, 32), "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64), "4b": (160, 112, 224, 24, 64, 64), "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64), "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128), "5b": (384, 192, 384, 48, 128, 128),
}


class GoogLeNet(nnx.Module):
    """Three convolutions, nine inception modules of four branches, global average pooling, one linear layer.

    Names are torchvision's: conv1/conv, inception3a/branch2/0/conv, fc. The auxiliary classifiers, used in training only,
    are left out, and so is dropout.

    Args:
      classes: number of outputs.
      width: factor of all channels but the classes'.
      batch_norm: torchvision's variant: batch norms instead of biases and local response normalization, and 3x3
        convolutions where the paper has 5x5.
      rngs: source of the initial weights.

    Source:
      Szegedy et al., "Going deeper with convolutions", 2015; BVLC's GoogLeNet, which Park et al. pruned.
    """

    def __init__(self, classes: int = 1000, width: float = 1.0, batch_norm: bool = False, *, rngs: nnx.Rngs):
        self.batch_norm = batch_norm
        c64, c192 = scaled(64, width), scaled(192, width)
        self.conv1 = ConvBlock(3, c64, 7, 2, batch_norm=batch_norm, rngs=rngs)
        self.conv2 = ConvBlock(c64, c64, 1, batch_norm=batch_norm, rngs=rngs)
        self.conv3 = ConvBlock(c64, c192, 3, batch_norm=batch_norm, rngs=rngs)
        channels = c192
        for name, features in INCEPTIONS.items():
            block = Inception(channels, tuple(scaled(size, width) for size in features), batch_norm, rngs=rngs)
            setattr(self, f"inception{name}", block)
            channels = block.features
        self.fc = nnx.Linear(channels, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = max_pool(self.conv1(x), 3, 2, ceil=True)
        x = x if self.batch_norm else _norm(x)
        x = self.conv3(self.conv2(x))
        x = x if self.batch_norm else _norm(x)
        x = max_pool(x, 3, 2, ceil=True)
        for name in INCEPTIONS:
            if name in ("4a", "5a"):
                x = max_pool(x, 3 if name == "4a" or not self.batch_norm else 2, 2, ceil=True)
            x = getattr(self, f"inception{name}")(x)
        return self.fc(x.mean(axis=(1, 2)))


class Inception(nnx.Module):
    """The channels of four branches side by side: 1x1; 1x1 and 3x3; 1x1 and 5x5; pooling and 1x1."""

    def __init__(self, channels: int, features: tuple[int, ...], batch_norm: bool, *, rngs: nnx.Rngs):
        one, reduce3, three, reduce5, five, projection = features
        self.features = one + three + five + projection
        self.branch1 = ConvBlock(channels, one, 1, batch_norm=batch_norm, rngs=rngs)
        self.branch2 = nnx.List([ConvBlock(channels, reduce3, 1, batch_norm=batch_norm, rngs=rngs),
                                 ConvBlock(reduce3, three, 3, batch_norm=batch_norm, rngs=rngs)])
        self.branch3 = nnx.List([ConvBlock(channels, reduce5, 1, batch_norm=batch_norm, rngs=rngs),
                                 ConvBlock(reduce5, five, 3 if batch_norm else 5, batch_norm=batch_norm, rngs=rngs)])
        self.branch4 = nnx.List([_pool, ConvBlock(channels, projection, 1, batch_norm=batch_norm, rngs=rngs)])

    def __call__(self, x: jax.Array) -> jax.Array:
        outputs = [self.branch1(x)]
        for branch in (self.branch2, self.branch3, self.branch4):
            first, second = branch
            outputs.append(second(first(x)))
        return jnp.concatenate(outputs, axis=-1)


class ConvBlock(nnx.Module):
    """relu(conv(x) + bias), or relu(bn(conv(x)))"""

    def __init__(self, channels: int, features: int, size: int, strides: int = 1, *, batch_norm: bool, rngs: nnx.Rngs):
        self.conv = conv(channels, features, size, strides, use_bias=not batch_norm, rngs=rngs)
        if batch_norm:
            self.bn = norm(features, epsilon=1e-3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(x)
        return nnx.relu(self.bn(x) if hasattr(self, "bn") else x)


def _norm(x: jax.Array) -> jax.Array:
    return local_response_norm(x, 5, 1e-4, 1.0)


def _pool(x: jax.Array) -> jax.Array:
    return max_pool(x, 3, 1, 1)
