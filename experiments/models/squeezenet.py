"""SqueezeNet 1.1."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.layers import conv, max_pool, scaled

# Output channels of each fire module: of the 1x1 convolution that squeezes, and of each of the two that expand; between two
# stages is a pooling.
STAGES = (((16, 64), (16, 64)), ((32, 128), (32, 128)), ((48, 192), (48, 192), (64, 256), (64, 256)))


class SqueezeNet(nnx.Module):
    """A strided 3x3 convolution, eight fire modules, a 1x1 convolution to the classes, global average pooling.

    Names are torchvision's: features/0, features/3/squeeze, expand1x1, expand3x3, classifier/1. Dropout is left out.

    Args:
      classes: number of outputs.
      width: factor of all channels but the classes'.
      rngs: source of the initial weights.

    Source:
      Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters and <0.5MB model size", 2016; version 1.1
      of the authors' repository.
    """

    def __init__(self, classes: int = 1000, width: float = 1.0, *, rngs: nnx.Rngs):
        pool, channels = partial(max_pool, size=3, strides=2, ceil=True), scaled(64, width)
        layers = [conv(3, channels, 3, 2, padding=0, rngs=rngs), nnx.relu]
        for stage in STAGES:
            layers.append(pool)
            for squeeze, expand in stage:
                layers.append(Fire(channels, scaled(squeeze, width), scaled(expand, width), rngs=rngs))
                channels = 2 * scaled(expand, width)
        self.features = nnx.List(layers)
        self.classifier = nnx.List([nnx.identity, conv(channels, classes, 1, rngs=rngs), nnx.relu])

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in (*self.features, *self.classifier):
            x = layer(x)
        return x.mean(axis=(1, 2))


class Fire(nnx.Module):
    """A 1x1 convolution to few channels, and a 1x1 and a 3x3 one of these side by side."""

    def __init__(self, channels: int, squeeze: int, expand: int, *, rngs: nnx.Rngs):
        self.squeeze = conv(channels, squeeze, 1, rngs=rngs)
        self.expand1x1 = conv(squeeze, expand, 1, rngs=rngs)
        self.expand3x3 = conv(squeeze, expand, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.squeeze(x))
        return jnp.concatenate([nnx.relu(self.expand1x1(x)), nnx.relu(self.expand3x3(x))], axis=-1)
