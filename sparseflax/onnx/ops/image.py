"""ONNX's operators on neighbouring pixels, with any number of dimensions: convolutions, pools, resizing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparseflax.onnx.value import Unsupported, Value, along, bounded, integers, known, last

Sides = tuple[tuple[int, int], ...]


class Window(NamedTuple):
    """What convolutions and pools have in common, one number for each dimension of an image; padding is a word or sides."""

    size: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    padding: str | Sides

    def sides(self, image: Sequence[int]) -> Sides:
        """Padding before and after each dimension of an image."""
        if isinstance(self.padding, str):
            reach = [(size - 1) * dilation + 1 for size, dilation in zip(self.size, self.dilations, strict=True)]
            return tuple((int(low), int(high)) for low, high in lax.padtype_to_pads(image, reach, self.strides, self.padding))
        return self.padding


def window(kernel_shape: Any, strides: Any = None, dilations: Any = None, pads: Any = None, auto_pad: str = "NOTSET") -> Window:
    """Attributes of a node, with ONNX's defaults.

    Raises:
      Unsupported: they are none of a window.
    """
    rank = len(kernel_shape)
    given = {"kernel_shape": kernel_shape, "strides": strides or (1,) * rank, "dilations": dilations or (1,) * rank,
             "pads": pads or (0,) * 2 * rank}
    for name, least, length in (("kernel_shape", 1, rank), ("strides", 1, rank), ("dilations", 1, rank), ("pads", 0, 2 * rank)):
        given[name] = tuple(given[name])
        if len(given[name]) != length or min(given[name], default=0) < least:
            raise Unsupported(f"{name}={given[name]}, wanted {length} numbers, none below {least}")
    words = {"NOTSET": tuple(zip(given["pads"][:rank], given["pads"][rank:], strict=True)), "VALID": "VALID",
             "SAME_UPPER": "SAME", "SAME_LOWER": "SAME_LOWER"}
    if auto_pad not in words:
        raise Unsupported(f"auto_pad={auto_pad!r}, wanted NOTSET, VALID, SAME_UPPER or SAME_LOWER")
    return Window(given["kernel_shape"], given["strides"], given["dilations"], words[auto_pad])


def conv(x: Value, kernel: Value, bias: Value | None = None, group: int = 1, kernel_shape: Any = None,
         **settings: Any) -> Value:
    """A convolution whose kernel is computed; a constant one makes a layer."""
    array, weights = x.channels_last(), kernel.plain()
    at = window(kernel.shape[2:], **settings)
    y = _convolved(array, weights.transpose(*range(2, kernel.rank), 1, 0), at.strides, at.sides(array.shape[1:-1]),
                   at.dilations, None, group)
    return Value(y if bias is None else y + along(bias.plain(), x.rank), last(x.rank))


def conv_transpose(x: Value, kernel: Value, bias: Value | None = None, group: int = 1, kernel_shape: Any = None,
                   **settings: Any) -> Value:
    """The convolution's transpose: each pixel spread by the kernel, `strides` apart."""
    array, (ic, _, *size) = x.channels_last(), kernel.shape
    at, sides = transposed_window(size, array.shape[1:-1], **settings)
    if group < 1 or ic % group:
        raise Unsupported(f"group={group} with a kernel of shape {kernel.shape}, wanted a divisor of its {ic} input channels")
    y = _convolved(array, transposed_kernel(kernel.plain(), group), None, sides, at.dilations, at.strides, group)
    return Value(y if bias is None else y + along(bias.plain(), x.rank), last(x.rank))


def transposed_kernel(kernel: Any, group: int) -> Any:
    """(ic, oc / group, *size) -> (*size, ic / group, oc), of the convolution that a transposed one is on a spread image."""
    ic, ocg, *size = kernel.shape
    grouped = kernel.reshape(group, ic // group, ocg, *size)
    moved = grouped.transpose(*range(3, kernel.ndim + 1), 1, 0, 2)
    return moved[(slice(None, None, -1),) * len(size)].reshape(*size, ic // group, group * ocg)


def transposed_window(size: Sequence[int], image: Sequence[int] | None, output_shape: Any = None, output_padding: Any = None,
                      pads: Any = None, auto_pad: str = "NOTSET", **settings: Any) -> tuple[Window, Sides]:
    """Of a transposed convolution: its window, and what is added at the sides of the spread image."""
    automatic = auto_pad not in ("NOTSET", "VALID") or bool(output_shape)
    at = window(size, pads=None if automatic else pads, **settings)
    more = tuple(output_padding or (0,) * len(size))
    if len(more) != len(size) or min(more, default=0) < 0:
        raise Unsupported(f"output_padding={more}, wanted {len(size)} numbers, none below 0")
    reach = [(k - 1) * d for k, d in zip(at.size, at.dilations, strict=True)]
    if not automatic:
        sides: Any = at.padding if not isinstance(at.padding, str) else ((0, 0),) * len(size)
    elif image is None:
        raise Unsupported("its padding depends on the image")
    else:
        wanted = tuple(output_shape or (n * s for n, s in zip(image, at.strides, strict=True)))[-len(size):]
        spread = [s * (n - 1) + m + r + 1 for s, n, m, r in zip(at.strides, image, more, reach, strict=True)]
        total = [max(0, there - want) for there, want in zip(spread, wanted, strict=True)]
        more = tuple(m + max(0, want - there) for m, there, want in zip(more, spread, wanted, strict=True))
        halves = [(t // 2, t - t // 2) for t in total]
        sides = [half if auto_pad == "SAME_UPPER" else half[::-1] for half in halves]
    return at, tuple((r - before, r - after + m) for r, (before, after), m in zip(reach, sides, more, strict=True))


def _convolved(x: Any, kernel: Any, strides: Any, padding: Sides, dilations: Any, spread: Any, group: int) -> jax.Array:
    rank = x.ndim - 2
    if kernel.ndim != x.ndim or kernel.shape[-2] * group != x.shape[-1]:
        raise Unsupported(f"its kernel of shape {kernel.shape} takes {kernel.shape[-2] * group} channels, its input has "
                          f"{x.shape[-1]}")
    letters = "".join(str(i) for i in range(rank))
    return lax.conv_general_dilated(x, kernel, strides or (1,) * rank, padding, spread, dilations,
                                    (f"N{letters}C", f"{letters}IO", f"N{letters}C"), group)


def max_pool(x: Value, kernel_shape: Any, ceil_mode: int = 0, storage_order: int = 0, **settings: Any) -> Value:
    """Maximum over windows; padding is never the maximum. `ceil_mode`: whether a last window may hang over the padding's end,
    if it begins before."""
    array, at = x.channels_last(), window(kernel_shape, **settings)
    lowest = -jnp.inf if array.dtype.kind == "f" else np.iinfo(array.dtype).min
    return Value(_reduce(array, lowest, lax.max, at, _sides(array, at, ceil_mode)), last(x.rank))


def average_pool(x: Value, kernel_shape: Any, ceil_mode: int = 0, count_include_pad: int = 0, **settings: Any) -> Value:
    """Mean over windows as in `max_pool`, of the pixels in the image or, with `count_include_pad`, the padding's zeros too."""
    array, at = x.channels_last(), window(kernel_shape, **settings)
    sides = _sides(array, at, ceil_mode)
    taps = [_counts(*sizes, bool(count_include_pad)) for sizes in
            zip(array.shape[1:-1], at.size, at.strides, at.dilations, sides, strict=True)]
    bounded(tuple(map(len, taps)))
    counts = reduce(np.multiply.outer, taps)
    total = _reduce(array, 0.0, lax.add, at, sides)
    one = np.all(counts == counts.flat[0]) if counts.size else True
    return Value(total / (float(counts.flat[0]) if one and counts.size else counts[None, ..., None].astype(array.dtype)),
                 last(x.rank))


def lp_pool(x: Value, kernel_shape: Any, ceil_mode: int = 0, p: int = 2, **settings: Any) -> Value:
    array, at = x.channels_last(), window(kernel_shape, **settings)
    total = _reduce(jnp.abs(array) ** p, 0.0, lax.add, at, _sides(array, at, ceil_mode))
    return Value(total ** (1 / p), last(x.rank))


def whole(function: Callable[..., Any]) -> Callable[..., Value]:
    """A pool over all of an image."""

    def run(x: Value, **settings: Any) -> Value:
        array = x.channels_last()
        return Value(function(array, tuple(range(1, array.ndim - 1)), **settings), last(x.rank))

    return run


def _sides(x: Any, at: Window, ceil_mode: int) -> list[tuple[int, int, int]]:
    """Of each dimension: padding before and after, and what a last window hangs over that."""
    if x.ndim != len(at.size) + 2:
        raise Unsupported(f"kernel_shape={at.size} on an image of {x.ndim - 2} dimensions")
    sides = []
    for length, size, stride, dilation, (low, high) in zip(x.shape[1:-1], at.size, at.strides, at.dilations,
                                                           at.sides(x.shape[1:-1]), strict=True):
        room = length + low + high - (size - 1) * dilation - 1
        hangs = ceil_mode and room % stride and (room // stride + 1) * stride < length + low
        sides.append((low, high, stride - room % stride if hangs else 0))
    return sides


def _reduce(x: jax.Array, start: float, function: Callable, at: Window, sides: Sequence[tuple[int, int, int]]) -> jax.Array:
    padding = [(0, 0), *((low, high + beyond) for low, high, beyond in sides), (0, 0)]
    return lax.reduce_window(x, np.asarray(start, x.dtype), function, (1, *at.size, 1), (1, *at.strides, 1), padding,
                             window_dilation=(1, *at.dilations, 1))


def _counts(length: int, size: int, stride: int, dilation: int, side: tuple[int, int, int], padded: bool) -> np.ndarray:
    """How many taps of each window count."""
    low, high, beyond = side
    first, end = (-low, length + high) if padded else (0, length)
    last = length + high + beyond - (size - 1) * dilation  # before it a window begins
    starts = stride * np.arange(*bounded((max(0, -((-low - last) // stride)),))) - low

    def before(position: int) -> np.ndarray:
        return np.clip(-((starts - position) // dilation), 0, size)

    return before(end) - before(first)


def resize(x: Value, roi: Any = None, scales: Any = None, sizes: Any = None, axes: Any = None, mode: str = "nearest",
           coordinate_transformation_mode: str = "half_pixel", nearest_mode: str = "round_prefer_floor", antialias: int = 0,
           cubic_coeff_a: float = -0.75, exclude_outside: int = 0, extrapolation_value: float = 0.0,
           keep_aspect_ratio_policy: str = "stretch") -> Value:
    """An image of other sizes: along each axis a matrix product, whose rows have few numbers."""
    on = [axis % x.rank for axis in axes] if axes else list(range(x.rank))
    old = [x.shape[axis] for axis in on]
    factors = known(scales, "scales").reshape(-1).tolist() if scales is not None else []
    new = integers(sizes, "sizes")
    if len(factors or new) != len(on):
        raise Unsupported(f"scales {factors} and sizes {new} of an input of shape {x.shape}")
    if factors:
        new = [math.floor(size * factor) for size, factor in zip(old, factors, strict=True)]
    else:
        factors = [size / before for size, before in zip(new, old, strict=True)]
        if keep_aspect_ratio_policy != "stretch":
            one = (min if keep_aspect_ratio_policy == "not_larger" else max)(factors)
            factors, new = [one] * len(on), [math.floor(one * before + 0.5) for before in old]
    if min(factors) <= 0 or min(new) < 1:
        raise Unsupported(f"scales {factors} and sizes {list(new)} of an input of shape {x.shape}")
    region = known(roi, "roi").reshape(-1).tolist() if roi is not None else []
    array, outside = x.array, []
    for i, axis in enumerate(on):
        crop = (region[i], region[i + len(on)]) if len(region) == 2 * len(on) else (0.0, 1.0)
        cropped = coordinate_transformation_mode == "tf_crop_and_resize"
        if new[i] == old[i] and factors[i] == 1 and not (cropped and crop != (0.0, 1.0)):
            continue
        at = _positions(coordinate_transformation_mode, new[i], old[i], factors[i], crop)
        matrix = _weights(at, old[i], factors[i], mode, nearest_mode, bool(antialias), cubic_coeff_a, bool(exclude_outside))
        place = x.order.index(axis)
        array = _along(array, place, matrix)
        if cropped:
            outside.append(along((at < 0) | (at > old[i] - 1), x.rank, place))
    if outside:
        array = jnp.where(reduce(np.logical_or, outside), extrapolation_value, array)
    return Value(array, x.order)


def _positions(mode: str, new: int, old: int, factor: float, crop: tuple[float, float]) -> np.ndarray:
    """Where each new pixel lies among the old."""
    at, length = np.arange(new, dtype=np.float64), factor * old
    if mode == "half_pixel" or (mode == "pytorch_half_pixel" and length > 1):
        return (at + 0.5) / factor - 0.5
    if mode == "pytorch_half_pixel":
        return np.full(new, -0.5)
    if mode == "half_pixel_symmetric":
        return old / 2 * (1 - new / length) + (at + 0.5) / factor - 0.5
    if mode == "asymmetric":
        return at / factor
    if mode == "align_corners":
        return at * (old - 1) / (length - 1) if length != 1 else np.zeros(new)
    if mode == "tf_crop_and_resize":
        start, end = crop
        if new == 1:
            return np.full(1, 0.5 * (start + end) * (old - 1))
        return start * (old - 1) + at * (end - start) * (old - 1) / (new - 1)
    if mode == "tf_half_pixel_for_nn":
        return (at + 0.5) / factor
    raise Unsupported(f"coordinate_transformation_mode={mode!r}")


def _weights(at: np.ndarray, old: int, factor: float, mode: str, nearest: str, antialias: bool, a: float,
             exclude: bool) -> np.ndarray:
    """(new, old): what each old pixel adds to a new one."""
    rows = np.zeros((len(at), old), np.float64)
    if mode == "nearest":
        rounding = {"round_prefer_floor": lambda p: np.ceil(p - 0.5), "round_prefer_ceil": lambda p: np.floor(p + 0.5),
                    "floor": np.floor, "ceil": np.ceil}.get(nearest)
        if rounding is None:
            raise Unsupported(f"nearest_mode={nearest!r}")
        rows[np.arange(len(at)), np.clip(rounding(at), 0, old - 1).astype(int)] = 1
        return rows
    if mode not in ("linear", "cubic"):
        raise Unsupported(f"mode={mode!r}, wanted nearest, linear or cubic")
    wide = max(1.0, 1 / factor) if antialias else 1.0
    reach = math.ceil((1 if mode == "linear" else 2) * wide)
    for offset in range(-reach, reach + 1):
        pixel = np.floor(at).astype(int) + offset
        distance = np.abs(at - pixel) / wide
        if mode == "linear":
            weight = np.maximum(0, 1 - distance)
        else:
            near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
            far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
            weight = np.where(distance < 1, near, np.where(distance < 2, far, 0))
        if exclude:
            weight = np.where((pixel >= 0) & (pixel < old), weight, 0)
        np.add.at(rows, (np.arange(len(at)), np.clip(pixel, 0, old - 1)), weight)
    return rows / rows.sum(1, keepdims=True) if exclude or antialias else rows


def _along(x: Any, place: int, matrix: np.ndarray) -> jax.Array:
    """The product with each row of pixels, by the few numbers of the matrix's rows where these are few."""
    taps = int((matrix != 0).sum(1).max())
    if taps > 4:
        return jnp.moveaxis(jnp.tensordot(x, matrix.astype(np.float32), ((place,), (1,))), -1, place)
    chosen = np.argsort(-np.abs(matrix), axis=1, kind="stable")[:, :taps]
    weights = np.take_along_axis(matrix, chosen, axis=1)
    terms = []
    for pixel, weight in zip(chosen.T, weights.T, strict=True):
        picked = _picked(x, place, pixel)
        terms.append(picked if np.all(weight == 1) else picked * along(weight.astype(np.float32), x.ndim, place))
    return sum(terms[1:], start=terms[0])


def _picked(x: Any, place: int, index: np.ndarray) -> jax.Array:
    """Pixels by index; those that are all repeated as often need no index, which XLA is slow at."""
    old, new = x.shape[place], len(index)
    times = new // old
    if times * old == new and np.array_equal(index, np.repeat(np.arange(old), times)):
        shape = x.shape[:place + 1]
        repeated = jnp.broadcast_to(jnp.expand_dims(x, place + 1), (*shape, times, *x.shape[place + 1:]))
        return repeated.reshape(*x.shape[:place], new, *x.shape[place + 1:])
    return jnp.take(x, index, axis=place)


def upsample(x: Value, scales: Any, mode: str = "nearest") -> Value:
    """`resize` as it was before operator set 11."""
    return resize(x, None, scales, mode={"bilinear": "linear"}.get(mode, mode), coordinate_transformation_mode="asymmetric",
                  nearest_mode="floor")


def _lp(x: Any, axes: tuple[int, ...], p: int = 2) -> Any:
    return (jnp.abs(x) ** p).sum(axes, keepdims=True) ** (1 / p)


OPERATORS: dict[str, Callable[..., Any]] = {
    "AveragePool": average_pool, "Conv": conv, "ConvTranspose": conv_transpose,
    "GlobalAveragePool": whole(lambda x, axes: x.mean(axes, keepdims=True)), "GlobalLpPool": whole(_lp),
    "GlobalMaxPool": whole(lambda x, axes: x.max(axes, keepdims=True)), "LpPool": lp_pool, "MaxPool": max_pool,
    "Resize": resize, "Upsample": upsample,
}
