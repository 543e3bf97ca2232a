"""What a layer is: the sizes of one convolution."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sparseflax.conv.packing import DENSE_BLOCK, PackedKernel, channel_block, pack

FLOAT32 = 4  # bytes
LARGEST = 1 << 31  # size of anything: beyond it, products would not be numbers any more


@dataclass(frozen=True)
class ConvShape:
    """The sizes of one 2-D convolution, NHWC x HWIO -> NHWC, in the letters of the kernel and of the cost model.

    A fully connected layer is a 1x1 convolution on 1x1 images.

    Attributes:
      n, ih, iw, ic: images in the batch, rows, columns and channels of the input.
      oc, kh, kw: output channels, kernel rows and columns.
      strides: (rows, columns).
      padding: ((top, bottom), (left, right)), explicit.
      kernel_dilation: (rows, columns).
      groups: feature groups; each sees ic / groups channels.
      layers: how many equal ones run one after the other, each with weights of its own, as in a stack that is scanned.
      void: places of the kernel that never hold a weight, as a transposed convolution has when it is written as this one.

    Raises:
      ValueError: a size below 1 or beyond 2^31, groups that do not divide the channels, or a kernel larger than the padded
        image.
    """

    n: int
    ih: int
    iw: int
    ic: int
    oc: int
    kh: int
    kw: int
    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    kernel_dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    layers: int = 1
    void: int = 0

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ("n", "ih", "iw", "ic", "oc", "kh", "kw", "groups", "layers")}
        sizes |= {"strides": min(self.strides), "kernel_dilation": min(self.kernel_dilation)}
        small = {name: size for name, size in sizes.items() if size < 1}
        if small:
            raise ValueError(f"a convolution with {small}, wanted at least 1: is the batch or the image empty?")
        sizes |= {"padding": max(map(abs, (*self.padding[0], *self.padding[1]))), "strides": max(self.strides),
                  "kernel_dilation": max(self.kernel_dilation)}
        large = {name: size for name, size in sizes.items() if size > LARGEST}
        if large:
            raise ValueError(f"a convolution with {str(large)[:200]}, wanted at most 2^31")
        if self.ic % self.groups or self.oc % self.groups:
            raise ValueError(f"groups={self.groups} has to divide both ic={self.ic} and oc={self.oc}")
        places = self.layers * math.prod(self.kernel_shape)
        if not 0 <= self.void < places:
            raise ValueError(f"void={self.void}, wanted fewer than the {places} places of its kernels")
        if min(self.oh, self.ow) < 1:
            raise ValueError(f"a {self.kh}x{self.kw} kernel with dilation {self.kernel_dilation} does not fit into a "
                             f"{self.ih}x{self.iw} image padded by {self.padding}: use a larger image or more padding")

    @property
    def oh(self) -> int:
        return (self.ih + sum(self.padding[0]) - (self.kh - 1) * self.kernel_dilation[0] - 1) // self.strides[0] + 1

    @property
    def ow(self) -> int:
        return (self.iw + sum(self.padding[1]) - (self.kw - 1) * self.kernel_dilation[1] - 1) // self.strides[1] + 1

    @property
    def kernel_shape(self) -> tuple[int, int, int, int]:
        """(kh, kw, ic / groups, oc) of one layer: what a fully connected one reshapes to, too."""
        return self.kh, self.kw, self.ic // self.groups, self.oc

    @property
    def connected(self) -> bool:
        """Whether it is a fully connected layer, or as good as one."""
        return self.ih == self.iw == self.kh == self.kw == self.groups == 1

    @property
    def depthwise(self) -> bool:
        """Whether each output channel sees one input channel of several."""
        return self.groups > 1 and self.groups == self.ic

    @property
    def block(self) -> int:
        """Input channels per block of its packed kernel."""
        return min(DENSE_BLOCK if self.connected else channel_block(self.kh, self.kw), self.ic // self.groups)

    def pack(self, kernel: Any) -> PackedKernel:
        """Packs a dense kernel of this layer, of `kernel_shape` or (ic, oc). Raises as `sparseflax.pack`."""
        kernel = np.asarray(kernel, np.float32)
        return pack(kernel.reshape((self.ic, self.oc) if self.connected else self.kernel_shape), self.groups)

    @property
    def weights(self) -> int:
        """Number of weights of all layers, kept or not."""
        return self.layers * math.prod(self.kernel_shape) - self.void

    @property
    def flops(self) -> int:
        """Operations of the dense convolutions, a multiplication and an addition counted as two, padding included."""
        return 2 * self.n * self.oh * self.ow * self.weights

    @property
    def input_bytes(self) -> int:
        return FLOAT32 * self.n * self.ih * self.iw * self.ic

    @property
    def output_bytes(self) -> int:
        return FLOAT32 * self.n * self.oh * self.ow * self.oc

    @property
    def weight_bytes(self) -> int:
        """Bytes of the dense float32 kernel."""
        return FLOAT32 * self.weights

    def with_batch(self, n: int) -> ConvShape:
        return replace(self, n=n)

    @property
    def one(self) -> ConvShape:
        """A single layer of them."""
        return replace(self, layers=1)

    def __str__(self) -> str:
        extras = "".join(f" {letter}{a}" if a == b else f" {letter}{a}x{b}"
                         for letter, (a, b) in (("s", self.strides), ("d", self.kernel_dilation)) if (a, b) != (1, 1))
        groups = f" g{self.groups}" if self.groups > 1 else ""
        layers = f" {self.layers} layers" if self.layers > 1 else ""
        return f"n{self.n} {self.ic}x{self.ih}x{self.iw} -> {self.oc} {self.kh}x{self.kw}{extras}{groups}{layers}"
