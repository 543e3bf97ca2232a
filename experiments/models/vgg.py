"""VGG-16 for ImageNet."""

from __future__ import annotations

import jax
from flax import nnx

from experiments.models.layers import conv, max_pool, scaled

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # output channels


class VGG16(nnx.Module):
    """Thirteen 3x3 convolutions in five stages, each ended by 2x2 max pooling, and three fully connected layers.

    Names and numbers are torchvision's: features/0 to features/28 and classifier/0, 3 and 6; the numbers between them are
    activations, pools, and the dropout that is left out here.

    Args:
      classes: number of outputs.
      width: factor of all channels but the classes'.
      image: rows and columns of the input (n, image, image, 3), a multiple of 32.
      rngs: source of the initial weights.

    Source:
      Simonyan and Zisserman, "Very deep convolutional networks for large-scale image recognition", 2015, configuration D.
    """

    flattened = {"classifier.0": "features.28"}  # takes flattened images with that layer's channels: see experiments/weights.py

    def __init__(self, classes: int = 1000, width: float = 1.0, image: int = 224, *, rngs: nnx.Rngs):
        channels, self.features = 3, nnx.List()
        for stage in STAGES:
            for features in stage:
                self.features.extend([conv(channels, scaled(features, width), 3, rngs=rngs), nnx.relu])
                channels = scaled(features, width)
            self.features.append(_halve)
        hidden, he = scaled(4096, width), nnx.initializers.he_normal()
        self.classifier = nnx.Dict({
            "0": nnx.Linear((image // 32) ** 2 * channels, hidden, kernel_init=he, rngs=rngs),
            "3": nnx.Linear(hidden, hidden, kernel_init=he, rngs=rngs),
            "6": nnx.Linear(hidden, classes, rngs=rngs)})

    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.features:
            x = layer(x)
        x = nnx.relu(self.classifier["0"](x.reshape(x.shape[0], -1)))
        return self.classifier["6"](nnx.relu(self.classifier["3"](x)))


def _halve(x: jax.Array) -> jax.Array:
    return max_pool(x, 2, 2)
