"""How a kernel moves over an image: strides, padding, dilation, checked and made explicit."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from sparseflax.conv.packing import Pattern


class Window(NamedTuple):
    """How the kernel moves: strides, explicit padding and dilation of the two spatial dimensions."""

    strides: tuple[int, int]
    padding: tuple[tuple[int, int], tuple[int, int]]
    dilation: tuple[int, int]

    def output(self, ih: int, iw: int, kh: int, kw: int) -> tuple[int, int]:
        """(oh, ow) for an input of ih x iw; 0 where the kernel does not fit."""
        sizes = ((size + sum(pad) - (k - 1) * d - 1) // s + 1
                 for size, k, s, pad, d in zip((ih, iw), (kh, kw), self.strides, self.padding, self.dilation, strict=True))
        oh, ow = (max(0, size) for size in sizes)
        return oh, ow


def make_window(image: tuple[int, ...], kernel: tuple[int, int], strides, padding, dilation) -> Window:
    """A Window with explicit padding for an image (ih, iw) and a kernel (kh, kw); raises ValueError."""
    strides, dilation = _positive("strides", strides), _positive("kernel_dilation", dilation)
    if isinstance(padding, str):
        if padding not in ("SAME", "VALID"):
            raise ValueError(f'padding={padding!r}, wanted "SAME", "VALID", an int or two of (int or (low, high)): '
                             "pad with jnp.pad first")
        reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
        pads = [tuple(p) for p in jax.lax.padtype_to_pads(image, reach, strides, padding)]
    else:
        try:
            pads = [_two(p) for p in (padding if isinstance(padding, Sequence) else (padding, padding))]
        except TypeError:
            pads = []
        if len(pads) != 2 or any(len(p) != 2 or min(p) < 0 for p in pads):
            raise ValueError(f"padding={padding!r}, wanted an int or two of (int or (low, high)), none negative")
    (top, bottom), (left, right) = pads
    return Window(strides, ((top, bottom), (left, right)), dilation)


def _two(value) -> tuple[int, ...]:
    """An int twice, or a sequence of ints; raises TypeError for anything that is not an exact int."""
    return tuple(map(operator.index, value)) if isinstance(value, Sequence) else (operator.index(value),) * 2


def _positive(name: str, value) -> tuple[int, int]:
    try:
        high, wide = _two(value)
    except (TypeError, ValueError):
        high = wide = 0
    if min(high, wide) < 1:
        raise ValueError(f"{name}={value!r}, wanted one or two positive ints")
    return high, wide


def explicit_padding(padding: Any, image: Sequence[int], kernel: Sequence[int], strides: Sequence[int],
                     dilation: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """((low, high), ...) of each dimension for any `padding` of Flax: a name, an int, or for each (int or (low, high)).

    What fills the border, zeros or a wrapped or reflected image, makes no difference to the sizes.
    """
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    if padding in ("CIRCULAR", "REFLECT"):
        pads: Any = [((r - 1) // 2, r // 2) for r in reach]
    elif isinstance(padding, str):
        pads = jax.lax.padtype_to_pads(image, reach, strides, padding)
    else:
        pads = [(p, p) if isinstance(p, int) else p for p in each(padding, len(reach))]
    return tuple((int(low), int(high)) for low, high in pads)


def each(value: Any, rank: int) -> tuple[Any, ...]:
    """Flax's "one for all dimensions, or one each"; None is its old word for 1."""
    return (1 if value is None else value,) * rank if value is None or isinstance(value, int) else tuple(value)


def addressable(pattern: Pattern, window: Window) -> bool:
    """Whether 16-bit offsets of 8 bytes reach a whole panel of 16 lanes, even for a tile of one output.

    They do not for windows beyond about 22 x 22, dilated ones included: such a convolution runs dense.
    """
    slots = (min(k, s) * (1 + (k - 1) * d // s)  # phases of the stride x inputs between the first and the last tap
             for k, s, d in zip(pattern.shape[:2], window.strides, window.dilation, strict=True))
    return pattern.block * math.prod(slots) * 16 * 4 <= 65536 * 8

