"""Equations of a jaxpr that look at images in another way, or move, pool and convolve them, as steps of a program.

Each function takes a region, the equation and its operands; it returns the step, or None where the equation is none.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend.core import primitives

from sparseflax.conv import ffi
from sparseflax.conv.window import Window
from sparseflax.layers.rules import positions
from sparseflax.network import int8
from sparseflax.network.region import PIXELS, Node, Region, is_number, size_of
from sparseflax.network.transposed import transposed

FLOAT32 = np.dtype(np.float32)
# NHWC and NWC, the kernels HWIO and WIO.
LAYOUTS = ((0, 3, 1, 2), (3, 2, 0, 1)), ((0, 2, 1), (2, 1, 0))
MAX_PARTS = 1 << 20  # of a window's size, stride, padding or dilation, as program_decode.cc has it


def reshape(region: Region, equation: Any, x: Any, *sizes: Any) -> Node | None:
    """Of all images alike: only how the values are looked at."""
    params, shape = equation.params, equation.outvars[0].aval.shape
    if sizes or params.get("dimensions") is not None or params.get("sharding") is not None or shape[:1] != x.shape[:1]:
        return None
    return region.again(x, shape)


def broadcast(region: Region, equation: Any, x: Any, *sizes: Any) -> Node | None:
    """That adds dimensions of 1, or one that repeats the rows or the columns of images, or what stands before it."""
    shape, at = equation.outvars[0].aval.shape, equation.params["broadcast_dimensions"]
    if sizes or at[:1] != (0,) or x.shape[:1] != shape[:1]:
        return None
    before = [1] * len(shape)
    for axis, size in zip(at, x.shape, strict=True):
        before[axis] = size
    repeated = [axis for axis, size in enumerate(shape) if size != before[axis]]
    if not repeated:
        return region.again(x, shape)
    if repeated == [len(shape) - 1] and len(shape) > 2:
        row = region.again(x, (shape[0], 1, math.prod(shape[1:-1]), 1))
        return row and _repeat(region, equation, row, 2, shape[-1])
    if len(shape) != 5 or repeated not in ([2], [3]):
        return None
    wanted = (*shape[:repeated[0]], *shape[repeated[0] + 1:])
    image = x if x.shape == wanted else region.again(x, wanted)
    return image and _repeat(region, equation, image, repeated[0] - 1, shape[repeated[0]])


def gather(region: Region, equation: Any, x: Any, index: Any) -> Node | None:
    """Of rows or columns that are repeated: how `jax.image.resize` takes the nearest."""
    params = equation.params
    numbers, taken = params["dimension_numbers"], params["slice_sizes"]
    if not isinstance(x, Node) or len(x.shape) != 4 or not isinstance(index, np.ndarray) or index.shape[1:] != (1,):
        return None
    axes = [axis for axis, size in enumerate(taken) if size != x.shape[axis]]
    if axes not in ([1], [2]) or not numbers.start_index_map == numbers.collapsed_slice_dims == tuple(axes) or (
            numbers.offset_dims != tuple(axis for axis in range(4) if axis != axes[0])):
        return None
    factor, rest = divmod(len(index), x.shape[axes[0]])
    if rest or not np.array_equal(index[:, 0], np.repeat(np.arange(x.shape[axes[0]]), factor)):
        return None
    return _repeat(region, equation, x, axes[0], factor)


def _repeat(region: Region, equation: Any, x: Node, axis: int, factor: int) -> Node | None:
    """Images (n, h, w, c) with their rows (axis 1) or columns (axis 2) repeated; None if nothing is left of them."""
    if factor == 0:
        return None
    (_, h, w, c), (fh, fw) = x.shape, (factor, 1) if axis == 1 else (1, factor)
    size, source, factors = (fh * h, fw * w, c), x, (fh, fw)
    if region.is_open(x, "upsample") and x.size == x.shape[1:] and np.shape(x.args[0])[-1] == c:
        source, factors = x.args[0], (fh * x.params[0], fw * x.params[1])
    return region.node(equation, "upsample", [source], params=factors, size=size)


def transpose(region: Region, equation: Any, x: Node) -> Node | None:
    """That only moves dimensions of 1, or makes blocks of pixels of channels: (n, h, w, fh, fw, c) to (n, h, fh, w, fw, c); or
    that shuffles groups of channels: (n, h, w, groups, c) to (n, h, w, c, groups)."""
    order = equation.params["permutation"]
    if order[0] == 0 and (moved := [axis for axis in order[1:] if x.shape[axis] != 1]) == sorted(moved):
        return region.again(x, equation.outvars[0].aval.shape)
    if order == (0, 1, 2, 4, 3):
        n, h, w, groups, c = x.shape
        image = region.again(x, (n, h, w, groups * c))
        return image and region.node(equation, "shuffle", [image], params=(groups,), size=(h, w, groups * c))
    if order != (0, 1, 3, 2, 4, 5):
        return None
    n, h, w, fh, fw, c = x.shape
    image = region.again(x, (n, h, w, fh * fw * c))
    return image and region.node(equation, "upsample", [image], params=(fh, fw), size=(fh * h, fw * w, c))


def squeeze(region: Region, equation: Any, x: Any) -> Node | None:
    if 0 in equation.params["dimensions"]:
        return None
    shape = equation.outvars[0].aval.shape
    return region.again(x, shape)


def pool(region: Region, equation: Any, x: Any) -> Node | None:
    """Windows over the two dimensions of an image, or a sum over neighbouring channels."""
    params, maximum = equation.params, equation.primitive is primitives.reduce_window_max_p
    dimensions, strides, padding, dilation = (params[name] for name in (
        "window_dimensions", "window_strides", "padding", "window_dilation"))
    if len(x.shape) != 4 or set(params["base_dilation"]) != {1} or min(map(min, padding)) < 0:
        return None
    outside = [axis for axis, what in enumerate(zip(dimensions, strides, padding, dilation, strict=True))
               if what != (1, 1, (0, 0), 1)]
    if outside == [3] and not maximum and strides[3] == dilation[3] == 1:
        size, (low, high) = dimensions[3], padding[3]
        return region.node(equation, "channel_sum", [x], params=(size, low)) if low + high == size - 1 else None
    if not set(outside) <= {1, 2} or max(*dimensions, *strides, *dilation, *sum(padding, ())) >= MAX_PARTS:
        return None
    window = Window(tuple(strides[1:3]), tuple(padding[1:3]), tuple(dilation[1:3]))
    return region.node(equation, "pool", [x], params=(maximum, tuple(dimensions[1:3]), window))


def reduce(region: Region, equation: Any, x: Any) -> Node | None:
    """Over all positions of an image: one window; over the last axis: the channels of a pixel; over both, of groups of channels
    (n, *positions, groups, c): one after the other."""
    maximum, axes = equation.primitive is primitives.reduce_max_p, equation.params["axes"]
    if axes == (len(x.shape) - 1,) and axes != (0,) and (size := size_of(x.shape)):
        return region.node(equation, "reduce", [x], params=(maximum,), size=(*size[:2], 1))
    grouped = len(x.shape) > 3 and axes == (*range(1, len(x.shape) - 2), len(x.shape) - 1)
    if not grouped and (len(x.shape) != 4 or axes != (1, 2)):
        return None
    groups, c = x.shape[-2:] if grouped else (1, x.shape[-1])
    image = region.again(x, (x.shape[0], *positions(x.shape[:-2])[1:], groups * c)) if grouped else x
    if image is None or max(image.shape[1:3]) >= MAX_PARTS:
        return None
    sums = region.node(equation, "pool", [image], params=(maximum, image.shape[1:3], PIXELS), size=(1, 1, groups * c))
    if sums is None or not grouped:
        return sums
    region.is_read([sums])
    sums = replace(sums, shape=(x.shape[0], 1, groups, c))
    return region.node(equation, "reduce", [sums], params=(maximum,), size=(1, groups, 1))


def convolution(region: Region, equation: Any, x: Any, kernel: Any) -> Node | None:
    """A dense one, of images NHWC or rows NWC; a padded one reads the image with its border."""
    params = equation.params
    layout, groups = params["dimension_numbers"], params["feature_group_count"]
    arrays = [array for array in (x, kernel) if not isinstance(array, Node)]
    if (layout.lhs_spec, layout.rhs_spec) not in LAYOUTS or layout.out_spec != layout.lhs_spec or isinstance(kernel, Node) or (
            params["batch_group_count"] != 1 or {array.dtype for array in arrays} != {FLOAT32}):
        return None
    if not isinstance(x, Node) and not ffi.available:  # XLA's own are no slower when rewritten for it
        return None
    if set(params["lhs_dilation"]) != {1}:
        return transposed(region, equation, x, kernel) if groups == 1 and isinstance(x, Node) and kernel.ndim == 4 else None
    spatial: list[Any] = [kernel.shape[:-2], *(params[name] for name in ("window_strides", "rhs_dilation", "padding"))]
    if kernel.ndim == 3:  # a row is an image of one
        spatial = [(one, *sizes) for one, sizes in zip((1, 1, 1, (0, 0)), spatial, strict=True)]
    taps, strides, dilation, ((top, bottom), (left, right)) = map(tuple, spatial)
    window = Window(strides, ((top, bottom), (left, right)), dilation)
    size = size_of(x.shape)
    if size is None or min(top, bottom, left, right) < 0 or (
            max(*taps, *strides, *dilation, top, bottom, left, right) >= MAX_PARTS):
        return None
    h, w, c = size
    if groups == kernel.shape[-1] == c:
        x, inputs = int8.as_bytes(region, x)
        return region.node(equation, "depthwise", [x], [kernel], (taps, window, inputs, None))
    if max(top, bottom, left, right) > 0:
        x = region.border(x, (top, left), (top + h + bottom, left + w + right, c))
    return region.node(equation, "dense", [x], [kernel], (taps, window._replace(padding=PIXELS.padding), groups))


def product(region: Region, equation: Any, x: Any, kernel: Any) -> Node | None:
    """Of each pixel's channels with a matrix: a dense convolution of single pixels, if it follows a step."""
    contract, batch = equation.params["dimension_numbers"]
    if not isinstance(x, Node) or isinstance(kernel, Node) or kernel.ndim != 2 or kernel.dtype != jnp.float32:
        return None
    if len(x.shape) < 2 or tuple(map(tuple, contract)) != ((len(x.shape) - 1,), (0,)) or any(map(len, batch)):
        return None
    return region.node(equation, "dense", [x], [kernel], ((1, 1), PIXELS, 1))


def neighbours(region: Region, equation: Any, a: Any, b: Any) -> Node | None:
    """A sum of ranges of channels of one image, each a channel further, as one of neighbouring channels: how local response
    normalization is written where XLA knows no such sum."""
    first, second = _range(a), _range(b)
    if first is None or second is None or first[0] is not second[0]:
        return None
    (image, start, size), (_, after, more) = first, second
    if a.size != image.size or after != start + size or start > 0:
        return None
    return region.node(equation, "channel_sum", [image], params=(size + more, -start), size=image.size)


def _range(x: Any) -> tuple[Node, int, int] | None:
    """(image, start, size) where each channel c of x is the sum of the image's from c + start on, zeros outside; or None."""
    if not isinstance(x, Node):
        return None
    if x.op == "channel_sum":
        return x.args[0], -x.params[1], x.params[0]
    if x.op == "map" and x.params == ("clamp",) and x.numbers == (1, 0, -math.inf, math.inf):  # 0 + x, where a sum begins
        return _range(x.args[0])
    if x.op != "window" or any(x.params[:2]):
        return None
    image, start = x.args[0], int(x.params[2])
    if isinstance(image, Node) and image.op == "window" and image.numbers == (0,) and not any(image.params[:2]):
        padded, before = image, -int(image.params[2])
        image = padded.args[0]
        # Of the border all that this range reads is there.
        if isinstance(image, Node) and before >= 0 and start >= 0 and start + x.size[2] <= padded.size[2] and (
                padded.size[:2] == image.size[:2] == x.size[:2]):
            return image, start - before, 1
    return None


def concatenate(region: Region, equation: Any, *operands: Any) -> Node | None:
    rank = len(equation.outvars[0].aval.shape)
    if equation.params["dimension"] != rank - 1 or rank < 2:
        return None
    return region.node(equation, "concat", operands)


def pad(region: Region, equation: Any, x: Any, value: Any) -> Node | None:
    config = equation.params["padding_config"]
    if not isinstance(x, Node) or not is_number(value) or len(x.shape) != 4:
        return None
    if any(inner for *_, inner in config) or any(config[0]):
        return None
    return region.node(equation, "window", [x], params=tuple(-low for low, *_ in config[1:]), numbers=[value])


def slice(region: Region, equation: Any, x: Any) -> Node | None:
    """Of images, or of the last axis of anything."""
    params, start = equation.params, equation.params["start_indices"]
    ends = zip(start, params["limit_indices"], x.shape, strict=True)
    cut = [axis for axis, (low, high, size) in enumerate(ends) if (low, high) != (0, size)]
    if set(params["strides"] or (1,)) != {1} or 0 in cut or (len(x.shape) != 4 and cut != [len(x.shape) - 1]):
        return None
    return region.node(equation, "window", [x], params=start[1:] if len(x.shape) == 4 else (0, 0, start[-1]), numbers=[0])
