"""The convolutions of real networks that predictions are judged by."""

from __future__ import annotations

from collections import Counter

from experiments.layers import BENCHMARK
from sparseflax.calibration.layers import layer
from sparseflax.cost.shape import ConvShape

STEM = ConvShape(1, 224, 224, 3, 64, 7, 7, (2, 2), ((3, 3), (3, 3)))
# Inception modules of GoogLeNet: image, input channels, 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection.
INCEPTION = (
    (28, 192, 64, 96, 128, 16, 32, 32), (28, 256, 128, 128, 192, 32, 96, 64), (14, 480, 192, 96, 208, 16, 48, 64),
    (14, 512, 160, 112, 224, 24, 64, 64), (14, 512, 128, 128, 256, 24, 64, 64), (14, 512, 112, 144, 288, 32, 64, 64),
    (14, 528, 256, 160, 320, 32, 128, 128), (7, 832, 256, 160, 320, 32, 128, 128), (7, 832, 384, 192, 384, 48, 128, 128))


def resnet50() -> Counter[ConvShape]:
    """Its convolutions and how often each occurs, one image, the stride on the 3x3."""
    shapes, ic, image = [STEM], 64, 56
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(blocks):
            step = stride if block == 0 else 1
            out = image // step
            shapes += [layer(ic, image, width, 1), layer(width, image, width, 3, step), layer(width, out, 4 * width, 1)]
            shapes += [layer(ic, image, 4 * width, 1, step)] if block == 0 else []
            ic, image = 4 * width, out
    return Counter([*shapes, layer(2048, 1, 1000, 1)])


def googlenet() -> Counter[ConvShape]:
    """Its convolutions and how often each occurs, one image, without the auxiliary classifiers."""
    shapes = [STEM, layer(64, 56, 64, 1), layer(64, 56, 192, 3)]
    for image, ic, one, reduce3, three, reduce5, five, pool in INCEPTION:
        shapes += [layer(ic, image, one, 1), layer(ic, image, reduce3, 1), layer(reduce3, image, three, 3),
                   layer(ic, image, reduce5, 1), layer(reduce5, image, five, 5), layer(ic, image, pool, 1)]
    return Counter([*shapes, layer(1024, 1, 1000, 1)])


def held_out() -> list[ConvShape]:
    """The thirteen benchmark layers and all distinct convolutions of both networks, one image."""
    return list(dict.fromkeys((*BENCHMARK, *resnet50(), *googlenet())))
