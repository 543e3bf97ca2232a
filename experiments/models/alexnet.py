"""AlexNet, as Caffe's reference network has it: grouped convolutions, pooling before normalization."""

from __future__ import annotations

import jax
from flax import nnx

from experiments.models.layers import conv, local_response_norm, max_pool, scaled


class AlexNet(nnx.Module):
    """Five convolutions, three of them in two groups, and three fully connected layers, with Caffe's names: conv1 to fc8.

    Dropout is left out: these weights come trained. torchvision's AlexNet is another network, ungrouped and narrower.

    Args:
      classes: number of outputs.
      width: factor of all channels but the classes'.
      image: rows and columns of the input (n, image, image, 3).
      rngs: source of the initial weights.

    Source:
      Krizhevsky, Sutskever and Hinton, "ImageNet classification with deep convolutional neural networks", 2012; BVLC's
      reference CaffeNet, which Park et al. pruned, pools before it normalizes.
    """

    flattened = {"fc6": "conv5"}  # takes flattened images with that layer's channels: see experiments/weights.py

    def __init__(self, classes: int = 1000, width: float = 1.0, image: int = 227, *, rngs: nnx.Rngs):
        c96, c256, c384, c4096 = (scaled(channels, width) for channels in (96, 256, 384, 4096))
        self.conv1 = conv(3, c96, 11, 4, padding=0, rngs=rngs)
        self.conv2 = conv(c96, c256, 5, groups=2, rngs=rngs)
        self.conv3 = conv(c256, c384, 3, rngs=rngs)
        self.conv4 = conv(c384, c384, 3, groups=2, rngs=rngs)
        self.conv5 = conv(c384, c256, 3, groups=2, rngs=rngs)
        size = (image - 11) // 4 + 1
        for _ in range(3):
            size = (size - 3) // 2 + 1
        he = nnx.initializers.he_normal()
        self.fc6 = nnx.Linear(size * size * c256, c4096, kernel_init=he, rngs=rngs)
        self.fc7 = nnx.Linear(c4096, c4096, kernel_init=he, rngs=rngs)
        self.fc8 = nnx.Linear(c4096, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = _norm(max_pool(nnx.relu(self.conv1(x)), 3, 2))
        x = _norm(max_pool(nnx.relu(self.conv2(x)), 3, 2))
        x = nnx.relu(self.conv4(nnx.relu(self.conv3(x))))
        x = max_pool(nnx.relu(self.conv5(x)), 3, 2)
        x = nnx.relu(self.fc6(x.reshape(x.shape[0], -1)))
        return self.fc8(nnx.relu(self.fc7(x)))


def _norm(x: jax.Array) -> jax.Array:
    return local_response_norm(x, 5, 1e-4, 1.0)
