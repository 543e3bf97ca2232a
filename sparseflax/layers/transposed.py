"""A transposed convolution as an ordinary one, which makes blocks of pixels: sh x sw of them for strides (sh, sw).

    y[n, sh i + a, sw j + b, o] = sum_{t,u,c} x[n, i + first_a + t, j + first_b + u, c]
                                              kernel[sh t + rest_a, sw u + rest_b, c, o]

As one convolution its output channels are (a, b, o), and its kernel has zeros where a pixel of the block does not meet a pixel
of x that others do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparseflax.conv.window import each


class Phase(NamedTuple):
    """The outputs at one position modulo the stride: the first tap that meets a pixel, which pixel that is, how many do."""

    rest: int
    first: int
    taps: int
    stride: int


def phases(taps: int, stride: int, low: int) -> list[Phase]:
    """Of so many taps on images spread `stride` apart, with `low` zeros before them."""
    rests = [(low - phase) % stride for phase in range(stride)]
    return [Phase(rest, (phase - low + rest) // stride, len(range(rest, taps, stride)), stride)
            for phase, rest in enumerate(rests)]


def together(phases: Sequence[Phase]) -> tuple[int, int]:
    """The first pixel that one of them meets, and how many from there on."""
    first = min(phase.first for phase in phases)
    return first, max(phase.first + phase.taps for phase in phases) - first


class Blocks(NamedTuple):
    """How a transposed convolution makes its outputs.

    Attributes:
      rows, columns: their phases.
      sides: zeros before and after the spread image: of its rows, of its columns.
      taps: (kh, kw).
    """

    rows: list[Phase]
    columns: list[Phase]
    sides: list[tuple[int, int]]
    taps: tuple[int, int]

    @classmethod
    def of(cls, taps: tuple[int, ...], strides: Any, padding: Any) -> Blocks:
        """Of a layer, of rows or images, in Flax's words; "SAME" and "VALID" as `jax.lax.conv_transpose` has them."""
        strides = each(strides, len(taps))
        if isinstance(padding, str):
            sides = [_sides(padding, k, s) for k, s in zip(taps, strides, strict=True)]
        else:
            sides = [(pad, pad) if isinstance(pad, int) else (pad[0], pad[1]) for pad in each(padding, len(taps))]
        (kh, kw), strides, sides = (1, *taps)[-2:], (1, *strides)[-2:], [(0, 0), *sides][-2:]
        rows, columns = (phases(*each) for each in zip((kh, kw), strides, [low for low, _ in sides], strict=True))
        return cls(rows, columns, sides, (kh, kw))

    def outputs(self, ih: int, iw: int) -> tuple[int, int]:
        """(oh, ow) for images (ih, iw)."""
        oh, ow = ((n - 1) * len(phases) + 2 + low + high - k for n, phases, (low, high), k in zip(
            (ih, iw), self[:2], self.sides, self.taps, strict=True))
        return oh, ow

    def grid(self, oh: int, ow: int) -> tuple[int, int]:
        """Blocks that outputs (oh, ow) are cut from."""
        return -(-oh // len(self.rows)), -(-ow // len(self.columns))

    @property
    def window(self) -> tuple[int, int]:
        """(kh, kw) of the ordinary convolution."""
        return together(self.rows)[1], together(self.columns)[1]

    def merged(self, kernel: Any) -> Any:
        """The ordinary convolution's kernel (*window, ic, sh * sw * oc) of (kh, kw, ic, oc)."""
        numpy = np if isinstance(kernel, np.ndarray) else jnp
        taps, across = self.window
        return numpy.concatenate([numpy.pad(kernel[mine], [
            (down.start, taps - down.stop), (right.start, across - right.stop), (0, 0), (0, 0)])
            for mine, (down, right) in self._parts()], 3)

    def apart(self, kernel: np.ndarray) -> np.ndarray:
        """The inverse of `merged`."""
        ic, oc = kernel.shape[2], kernel.shape[3] // (len(self.rows) * len(self.columns))
        whole = np.zeros((*self.taps, ic, oc), kernel.dtype)
        for number, (mine, there) in enumerate(self._parts()):
            whole[mine] = kernel[there][..., number * oc:(number + 1) * oc]
        return whole

    def bordered(self, x: Any) -> Any:
        """Images (n, ih, iw, c) as the ordinary convolution reads them, without padding: with zeros around them, or cut."""
        size = zip(self.grid(*self.outputs(*x.shape[1:3])), self.window, x.shape[1:3], self[:2], strict=True)
        border = [(-together(phases)[0], count + taps - 1 + together(phases)[0] - n, 0) for count, taps, n, phases in size]
        return jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *border, (0, 0, 0)]) if any(map(any, border)) else x

    def dense(self, x: Any, kernel: Any) -> Any:
        """All blocks' pixels (n, sh * h, sw * w, oc) of `bordered` images and the transposed convolution's own kernel."""
        sides = []
        for n, k, phases, (low, _) in zip(x.shape[1:3], self.taps, self[:2], self.sides, strict=True):
            (first, taps), stride = together(phases), len(phases)
            before, spread = low + stride * first, (n - 1) * stride + 1
            sides.append((before, stride * (n - taps + 1) + k - 1 - spread - before))
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), sides, (len(self.rows), len(self.columns)),
                                            dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def pixels(self, y: Any, oh: int, ow: int) -> Any:
        """Blocks (n, h, w, sh * sw * oc) as outputs (n, oh, ow, oc)."""
        (n, h, w, channels), sh, sw = y.shape, len(self.rows), len(self.columns)
        oc = channels // (sh * sw)
        y = y.reshape(n, h, w, sh, sw, oc).transpose(0, 1, 3, 2, 4, 5).reshape(n, sh * h, sw * w, oc)
        return y[:, :oh, :ow]

    def _parts(self) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
        """For each pixel of a block: where its taps stand in the transposed convolution's kernel, and where in the other."""
        (top, _), (left, _) = together(self.rows), together(self.columns)
        for r in self.rows:
            for c in self.columns:
                yield ((slice(r.rest, None, r.stride), slice(c.rest, None, c.stride)),
                       (slice(r.first - top, r.first - top + r.taps), slice(c.first - left, c.first - left + c.taps)))


def _sides(padding: str, taps: int, stride: int) -> tuple[int, int]:
    total = taps + stride - 2 + (max(taps - stride, 0) if padding == "VALID" else 0)
    low = taps - 1 if padding == "VALID" or stride > taps - 1 else -(-total // 2)
    return low, total - low
