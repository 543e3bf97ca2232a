"""U-Net, which says of each pixel what it belongs to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.models.layers import conv, max_pool, norm, scaled

CHANNELS = (64, 128, 256, 512, 1024)  # of the convolutions of each scale


class UNet(nnx.Module):
    """Two 3x3 convolutions at each of five scales; on the way back up transposed 2x2 convolutions double the images, which are
    joined to those of the way down.

    Its convolutions are padded and have batch norms, as in every implementation of today, and unlike the paper's.

    Args:
      classes: number of outputs of each pixel.
      width: factor of all channels but the classes'.
      rngs: source of the initial weights.

    Source:
      Ronneberger, Fischer and Brox, "U-Net: convolutional networks for biomedical image segmentation", 2015; batch norms and
      padding as in Alexandre Milesi's Pytorch-UNet.
    """

    def __init__(self, classes: int = 2, width: float = 1.0, *, rngs: nnx.Rngs):
        channels = [scaled(c, width) for c in CHANNELS]
        self.down = nnx.List([Twice(a, b, rngs=rngs) for a, b in zip((3, *channels), channels, strict=False)])
        back = list(zip(channels[:0:-1], channels[-2::-1], strict=True))
        self.up = nnx.List([nnx.ConvTranspose(a, b, (2, 2), 2, kernel_init=nnx.initializers.he_normal(), rngs=rngs)
                            for a, b in back])
        self.joined = nnx.List([Twice(2 * b, b, rngs=rngs) for _, b in back])
        self.head = conv(channels[0], classes, 1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images (n, h, w, 3) to (n, h, w, classes), h and w multiples of 16."""
        seen = [self.down[0](x)]
        for block in self.down[1:]:
            seen.append(block(max_pool(seen[-1], 2, 2)))
        x = seen.pop()
        for up, block in zip(self.up, self.joined, strict=True):
            x = block(jnp.concatenate([seen.pop(), up(x)], axis=-1))
        return self.head(x)


class Twice(nnx.Module):
    """A 3x3 convolution with its norm and ReLU, and another."""

    def __init__(self, channels: int, features: int, *, rngs: nnx.Rngs):
        self.first, self.second = (conv(c, features, 3, use_bias=False, rngs=rngs) for c in (channels, features))
        self.first_norm, self.second_norm = norm(features, rngs=rngs), norm(features, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return nnx.relu(self.second_norm(self.second(nnx.relu(self.first_norm(self.first(x))))))
