"""The convolutions that a machine is calibrated on."""

from __future__ import annotations

import numpy as np

from sparseflax.cost.shape import ConvShape


def layer(ic: int, image: int | tuple[int, int], oc: int, kernel: int | tuple[int, int], stride: int = 1, groups: int = 1,
          dilation: int = 1) -> ConvShape:
    """A layer of one image, padded by half a kernel on every side."""
    ih, iw = (image, image) if isinstance(image, int) else image
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    ph, pw = kh // 2 * dilation, kw // 2 * dilation
    return ConvShape(1, ih, iw, ic, oc, kh, kw, (stride, stride), ((ph, ph), (pw, pw)), (dilation, dilation), groups)


# Which the random layers seldom have: more input and output than a cache holds, up to 60 MB at 16 images; narrow outputs.
LARGE = ((48, 80, 96, 1), (96, 60, 192, 1), (192, 40, 64, 1), (224, 40, 96, 3, 2), (32, 96, 40, 3), (320, 40, 48, 1),
         (640, 14, 32, 1), (288, 24, 24, 1))
# The same of kernels: more than a core's own cache holds, up to 8 MB.
HEAVY = (layer(448, 7, 448, 3), layer(400, 10, 400, 3), layer(384, 8, 480, 3, 2).with_batch(8), layer(640, 7, 1536, 1),
         layer(1536, 7, 640, 1), layer(896, 14, 2048, 1, 2))
# Long sums for many outputs at many positions, which threads share well; channels in multiples of 16, as networks have them.
LONG = ((176, 14, 176, 3), (208, 10, 416, 3), (112, 28, 160, 3), (416, 14, 416, 1), (736, 7, 736, 1), (352, 14, 736, 1),
        (672, 14, 176, 1), (288, 28, 112, 1))
# What the random layers seldom are.
SPECIAL = (
    layer(3, 160, 32, 7, 2), layer(3, 64, 32, 3), layer(3, 112, 48, 3, 2), layer(1, 28, 32, 3), layer(4, 32, 64, 5),
    layer(512, 1, 1024, 1), layer(1024, 1, 256, 1), layer(3072, 1, 2000, 1), layer(4096, 1, 640, 1),
    layer(512, 1, 1024, 1).with_batch(16), layer(1024, 1, 512, 1).with_batch(6),
    layer(64, 28, 64, 3, groups=2), layer(128, 14, 128, 3, groups=4), layer(64, 24, 96, 5, groups=2),
    layer(256, 12, 256, 1, groups=2), layer(64, 20, 64, 3, groups=2).with_batch(8), layer(96, 16, 96, 3, groups=16),
    *(layer(*sizes).with_batch(16) for sizes in LARGE + LONG),
    layer(64, 28, 64, 3, dilation=2), layer(96, 17, 96, (1, 7)), layer(96, 17, 96, (7, 1)), layer(48, (30, 50), 64, 3))


# Depthwise layers and groups of few channels, for which the sparse kernel is not.
GROUPED = (
    layer(32, 48, 32, 3, groups=32), layer(64, 28, 64, 3, groups=64), layer(144, 24, 144, 3, 2, groups=144),
    layer(240, 14, 240, 5, groups=240), layer(480, 10, 480, 3, groups=480), layer(96, 40, 96, 3, groups=96).with_batch(8),
    layer(320, 20, 320, 3, groups=320).with_batch(16), layer(256, 14, 256, 3, groups=128), layer(512, 7, 512, 3, groups=128),
    layer(384, 10, 384, 3, groups=96).with_batch(4))


def fitting(seed: int = 0) -> list[tuple[ConvShape, tuple[float, ...]]]:
    """Layers to fit on and two densities of each: random ones of convolutional networks' sizes, and special ones."""
    draw = np.random.default_rng(seed)

    def densities() -> tuple[float, ...]:
        return tuple(np.exp(draw.uniform(np.log(0.015), np.log(0.6), 2)).tolist())

    def channels(least: int = 16, most: int = 1024) -> int:
        return int(np.exp(draw.uniform(np.log(least), np.log(most)))) // 8 * 8

    drawn: list[tuple[ConvShape, tuple[float, ...]]] = []
    for n, count in ((1, 28), (4, 5), (16, 20)):
        while count:
            image = int(draw.choice((5, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 56, 64)))
            shape = layer(channels(), image, channels(), int(draw.choice((1, 1, 3, 3, 5))), int(draw.choice((1, 1, 1, 2))))
            shape = shape.with_batch(n)
            if (2e6 < shape.flops < 2e9 and shape.weights < 3e6 and shape.input_bytes + shape.output_bytes < 64 << 20):
                drawn.append((shape, densities()))
                count -= 1
    # Products of few pixels, as most layers of GoogLeNet and ResNet-50 are.
    few = [layer(channels(128), int(draw.choice((7, 10, 14, 20, 28))), channels(16, 512), 1) for _ in range(10)]
    drawn += [(shape, ()) for shape in few]
    return drawn + [(shape, densities()) for shape in SPECIAL + HEAVY] + [(shape, ()) for shape in GROUPED]
