"""The convolutions that are timed alone: sizes from AlexNet, GoogLeNet and ResNet-50, and corners where kernels stumble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.matrix_market import read_matrix
from sparseflax.calibration.layers import layer
from sparseflax.cost.shape import ConvShape


@dataclass(frozen=True)
class Problem:
    """One convolution with its numbers: relu(conv(x, kernel) + bias), all float32.

    Attributes:
      name: of the layer, without the batch.
      shape: its sizes, with the batch.
      x: (n, ih, iw, ic).
      kernel: (kh, kw, ic / groups, oc), pruned weights are zeros.
      bias: (oc,).
    """

    name: str
    shape: ConvShape
    x: np.ndarray
    kernel: np.ndarray
    bias: np.ndarray

    @property
    def density(self) -> float:
        """Kept weights / all weights."""
        return np.count_nonzero(self.kernel) / self.kernel.size

    @property
    def useful_flops(self) -> float:
        """Operations on kept weights, padding included."""
        return self.shape.flops * self.density


def name_of(shape: ConvShape) -> str:
    """The layer's descriptor without its batch, e.g. "128x56x56->128 3x3 s2"."""
    return str(shape.with_batch(1)).removeprefix("n1 ").replace(" -> ", "->")


BENCHMARK = tuple(layer(*sizes) for sizes in (
    (96, 27, 256, 5, 1, 2),  # AlexNet conv2
    (256, 13, 384, 3),  # conv3
    (384, 13, 384, 3, 1, 2),  # conv4
    (64, 56, 64, 3),  # ResNet
    (128, 28, 128, 3),
    (256, 14, 256, 3),
    (512, 7, 512, 3),
    (64, 56, 256, 1),
    (1024, 14, 256, 1),
    (512, 7, 2048, 1),
    (512, 14, 512, 1),
    (128, 56, 128, 3, 2),
    (96, 28, 128, 3),  # GoogLeNet 3a
))

CORNERS = (
    layer(64, 56, 64, 1, stride=2),
    layer(256, 14, 256, 3, dilation=2),
    layer(128, 17, 128, (1, 7)),
    layer(128, 17, 128, (7, 1)),
    ConvShape(1, 227, 227, 3, 96, 11, 11, (4, 4)),  # AlexNet conv1
    layer(3, 224, 64, 7, stride=2),  # ResNet's first
    layer(64, 224, 64, 3),  # VGG
    layer(64, 28, 10, 3),
    layer(64, 28, 17, 3),
    layer(512, 1, 512, 1),
    layer(4096, 1, 4096, 1),
    layer(64, (40, 64), 96, 3),
    layer(64, 28, 64, 3, groups=4),
)

# The pruned AlexNet: the weights of layers with two groups are in two files.
ALEXNET = {
    "conv2": layer(96, 27, 256, 5, groups=2),
    "conv3": layer(256, 13, 384, 3),
    "conv4": layer(384, 13, 384, 3, groups=2),
    "conv5": layer(384, 13, 256, 3, groups=2),
}


def random_problem(shape: ConvShape, density: float, seed: int = 0) -> Problem:
    """Normal weights, each kept with probability `density`, and normal inputs."""
    draw = np.random.default_rng(seed)
    kernel = draw.standard_normal(shape.kernel_shape, np.float32) * np.float32(0.05)
    kernel *= draw.random(shape.kernel_shape) < density
    return _problem(name_of(shape), shape, kernel, draw)


def alexnet_problem(name: str, folder: Path, n: int, seed: int = 0) -> Problem:
    """A layer of the pruned AlexNet with its real weights.

    Args:
      name: "conv2" to "conv5".
      folder: of MatrixMarket files, `conv3.mtx` or, one for each group, `conv2_1.mtx` and `conv2_2.mtx`: rows are output
        channels, columns (ic / groups, kh, kw) row-major.
      n: images.
      seed: of bias and input.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is damaged or of another layer.
    """
    shape = ALEXNET[name].with_batch(n)
    files = [f"{name}_{g + 1}.mtx" for g in range(shape.groups)] if shape.groups > 1 else [f"{name}.mtx"]
    kh, kw, icg, oc = shape.kernel_shape
    rows = [read_matrix(folder / file, (oc // shape.groups, icg * kh * kw)) for file in files]
    kernel = np.concatenate(rows).reshape(oc, icg, kh, kw).transpose(2, 3, 1, 0)
    return _problem(f"alexnet {name}", shape, np.ascontiguousarray(kernel), np.random.default_rng(seed))


def _problem(name: str, shape: ConvShape, kernel: np.ndarray, draw: np.random.Generator) -> Problem:
    x = draw.standard_normal((shape.n, shape.ih, shape.iw, shape.ic), np.float32)
    return Problem(name, shape, x, kernel, draw.standard_normal(shape.oc, np.float32))


def choose(shapes: Sequence[ConvShape], parts: Sequence[str]) -> list[ConvShape]:
    """The layers whose name contains one of `parts` (all of them for no parts), spaces ignored.

    Raises:
      ValueError: a part that is in no name.
    """
    names = {name_of(shape): shape for shape in shapes}
    for part in parts:
        if not any(part in name for name in names):
            raise ValueError(f"no layer's name contains {part!r}, wanted a part of one of {list(names)}")
    return [shape for name, shape in names.items() if not parts or any(part in name for part in parts)]
