"""ONNX's operators that move numbers or count them: shapes, slices, joins. Sizes are computed by these while tracing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseflax.onnx.ops.elementwise import dtype_of
from sparseflax.onnx.value import Unsupported, Value, along, bounded, integers, known, module, number, value


def reshape(x: Value, shape: Any, allowzero: int = 0) -> Value:
    """The same numbers in ONNX's order with other sizes; 0 is the input's own, -1 what is left.

    Sizes that are split or joined alone leave the others where they lie: no image is transposed for its rows and columns to be
    joined.
    """
    old, sizes = x.shape, reshaped(x, shape, allowzero)
    groups = _groups(old, sizes)
    if groups is None:
        return value(x.plain().reshape(sizes))
    groups.sort(key=lambda group: min(map(x.order.index, group[0]), default=x.rank))
    array = x.arranged(tuple(axis for before, _ in groups for axis in before))
    order = tuple(axis for _, after in groups for axis in after)
    return Value(array.reshape([sizes[axis] for axis in order]), order)


def reshaped(x: Value, shape: Any, allowzero: int = 0) -> list[int]:
    """The sizes that a reshape asks for."""
    sizes, old = list(integers(shape, "shape")), x.shape
    if not allowzero:
        if any(size == 0 and axis >= len(old) for axis, size in enumerate(sizes)):
            raise Unsupported(f"shape {sizes} of an input of shape {old}: it has no size to copy for a 0")
        sizes = [old[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    if sizes.count(-1) == 1:
        rest = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = math.prod(old) // rest if rest else 0
    if min(sizes, default=1) < 0 or math.prod(sizes) != math.prod(old):
        raise Unsupported(f"a shape of {sizes} for an input of shape {old}: the network's input has the wrong size, or the "
                          "file was damaged")
    return sizes


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]] | None:
    """The shortest runs of axes, before and after, that hold as many numbers; None of an empty tensor."""
    if 0 in old or not old or not new:
        return None
    groups, i, j = [], 0, 0
    while i < len(old) and j < len(new):
        before, after, left, right = [i], [j], old[i], new[j]
        i, j = i + 1, j + 1
        while left != right:
            if left < right:
                before, left, i = [*before, i], left * old[i], i + 1
            else:
                after, right, j = [*after, j], right * new[j], j + 1
        groups.append((before, after))
    groups[-1] = [*groups[-1][0], *range(i, len(old))], [*groups[-1][1], *range(j, len(new))]  # sizes of 1
    return groups


def flatten(x: Value, axis: int = 1) -> Value:
    """(rows, columns): the sizes before an axis joined, and those from it on."""
    if not -x.rank <= axis <= x.rank:
        raise Unsupported(f"axis {axis} of an input of shape {x.shape}")
    axis = axis + x.rank if axis < 0 else axis
    return reshape(x, [math.prod(x.shape[:axis]), math.prod(x.shape[axis:])], allowzero=1)


def flatten_channels_last(x: Value, channels: int) -> Value:
    """(n, features) in the order in which images lie: of a layer whose weights were put in this order."""
    array = x.channels_last()
    if array.shape[-1] != channels:
        raise Unsupported(f"its input has shape {x.shape}, wanted {channels} channels, as the file says")
    return value(array.reshape(array.shape[0], -1))


def transpose(x: Value, perm: Sequence[int] | None = None) -> Value:
    """Moves nothing: another order."""
    perm = tuple(range(x.rank))[::-1] if perm is None else tuple(perm)
    if sorted(perm) != list(range(x.rank)):
        raise Unsupported(f"perm={perm} of an input of shape {x.shape}")
    return Value(x.array, tuple(perm.index(axis) for axis in x.order))


def squeeze(x: Value, axes: Any = None) -> Value:
    """Without sizes of 1."""
    gone = {x.order[x.place(axis)] for axis in integers(axes, "axes")}
    if axes is None:
        gone = {axis for axis, size in enumerate(x.shape) if size == 1}
    if any(x.shape[axis] != 1 for axis in gone):
        raise Unsupported(f"axes {tuple(sorted(gone))} of an input of shape {x.shape}, wanted sizes of 1: the network's input "
                          "has the wrong size")
    return dropped(Value(x.array.squeeze(tuple(x.order.index(axis) for axis in gone)), x.order), gone)


def dropped(x: Value, gone: set[int]) -> Value:
    """A value whose array has lost these axes already."""
    left = [axis for axis in x.order if axis not in gone]
    return Value(x.array, tuple(sorted(left).index(axis) for axis in left))


def unsqueeze(x: Value, axes: Any) -> Value:
    """With further sizes of 1, which stand at `axes` of the result."""
    axes = integers(axes, "axes")
    rank = x.rank + len(axes)
    added = {axis + rank if axis < 0 else axis for axis in axes}
    if len(added) != len(axes) or not all(0 <= axis < rank for axis in added):
        raise Unsupported(f"axes {axes} of an input of shape {x.shape}")
    old = [axis for axis in range(rank) if axis not in added]
    array, order = x.array, [old[axis] for axis in x.order]
    for axis in sorted(added):
        array = module(x).expand_dims(array, axis)
        order.insert(axis, axis)
    return Value(array, tuple(order))


def shape(x: Value, start: int = 0, end: int | None = None) -> Value:
    return value(np.array(x.shape[start:end], np.int64))


def size(x: Value) -> Value:
    return value(np.array(math.prod(x.shape), np.int64))


def concat(*xs: Value, axis: int = 1) -> Value:
    """The inputs joined along an axis."""
    rank = xs[0].rank
    if any(x.rank != rank for x in xs):
        raise Unsupported(f"inputs of shapes {', '.join(str(x.shape) for x in xs)}, wanted one rank")
    order = next((x.order for x in xs if x.order != tuple(range(rank))), xs[0].order)
    xp, arrays = module(*xs), [x.arranged(order) for x in xs]
    bounded((sum(array.size for array in arrays),), xp)
    return Value(xp.concatenate(arrays, axis=Value(arrays[0], order).place(axis)), order)


def split(x: Value, split: Any = None, axis: int = 0, num_outputs: int = 1) -> tuple[Value, ...]:
    """Parts along an axis, of sizes `split` or `num_outputs` of about one size."""
    place = x.place(axis)
    length = x.array.shape[place]
    part = -(-length // max(1, num_outputs))
    sizes = tuple(min(part, max(0, length - i * part)) for i in range(num_outputs))
    sizes = sizes if split is None else integers(split, "split")
    if sum(sizes) != length or min(sizes) < 0:
        raise Unsupported(f"parts of {sizes} along an axis of {length}")
    ends = np.cumsum(sizes)
    return tuple(_cut(x, place, int(end - size), int(end)) for size, end in zip(sizes, ends, strict=True))


def _cut(x: Value, place: int, *bounds: int | None) -> Value:
    return Value(x.array[(slice(None),) * place + (slice(*bounds),)], x.order)


def slices(x: Value, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Value:
    """Of each axis the numbers from a start to before an end, each step-th."""
    starts, ends = integers(starts, "starts"), integers(ends, "ends")
    axes = integers(axes, "axes") or tuple(range(len(starts)))
    steps = integers(steps, "steps") or (1,) * len(starts)
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise Unsupported(f"starts {starts}, ends {ends}, axes {axes}, steps {steps}: wanted as many of each and no step of 0")
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        place = x.place(axis)
        length = x.array.shape[place]
        start = start + length if start < 0 else start
        end = end + length if end < 0 else end
        if step > 0:
            x = _cut(x, place, min(max(start, 0), length), min(max(end, 0), length), step)
        else:
            end = min(max(end, -1), length - 1)
            x = _cut(x, place, min(max(start, -1), length - 1) if start >= 0 else 0, None if end < 0 else end, step)
    return x


def gather(data: Value, indices: Value, axis: int = 0) -> Value:
    """Numbers of an axis by index, negative ones from the end."""
    place, xp = data.place(axis), module(data, indices)
    length, index = data.array.shape[place], indices.plain()
    if index.dtype.kind not in "iu":
        raise Unsupported(f"its indices are {index.dtype}, wanted int64")
    if indices.known and index.size and not -length <= index.min() <= index.max() < length:
        raise Unsupported(f"indices {index.min()} to {index.max()} into an axis of {length}")
    index = xp.where(index < 0, index + length, index)
    if index.ndim > 1:
        data, place = value(data.plain()), axis % data.rank
    bounded((*data.array.shape[:place], *index.shape, *data.array.shape[place + 1:]), xp)
    array = xp.take(data.array, index, axis=place) if xp is np else jnp.take(data.array, index, axis=place, mode="clip")
    if index.ndim == 0:
        return dropped(Value(np.asarray(array) if xp is np else array, data.order), {axis % data.rank})
    return Value(array, data.order) if index.ndim == 1 else value(array)


def gather_elements(data: Value, indices: Value, axis: int = 0) -> Value:
    xp, x, index = module(data, indices), data.plain(), indices.plain()
    data.place(axis)
    index = xp.where(index < 0, index + x.shape[axis], index)
    x = x[tuple(slice(None) if d == axis % data.rank else slice(size) for d, size in enumerate(index.shape))]
    return value(xp.take_along_axis(x, index, axis=axis))


def gather_nd(data: Value, indices: Value, batch_dims: int = 0) -> Value:
    xp, x, index = module(data, indices), data.plain(), indices.plain()
    grid = tuple(np.arange(size).reshape((-1,) + (1,) * (index.ndim - 2 - d)) for d, size in enumerate(x.shape[:batch_dims]))
    rest = tuple(index[..., i] for i in range(index.shape[-1]))
    return value((x if xp is np else jnp.asarray(x))[(*grid, *rest)])


def scatter_nd(data: Value, indices: Value, updates: Value, reduction: str = "none") -> Value:
    index = tuple(indices.plain()[..., i] for i in range(indices.shape[-1]))
    return value(_scattered(data.plain(), index, updates.plain(), reduction))


def scatter_elements(data: Value, indices: Value, updates: Value, axis: int = 0, reduction: str = "none") -> Value:
    data.place(axis)
    axis, index = axis % data.rank, indices.plain()
    grid = list(np.indices(index.shape, sparse=True))
    grid[axis] = index
    return value(_scattered(data.plain(), tuple(grid), updates.plain(), reduction))


def _scattered(x: Any, index: tuple[Any, ...], updates: Any, reduction: str) -> Any:
    at = jnp.asarray(x).at[index]
    return {"none": at.set, "add": at.add, "mul": at.multiply, "max": at.max, "min": at.min}[reduction](updates)


def constant_of_shape(shape: Any, value: Any = None) -> Value:
    sizes = integers(shape, "shape")
    if min(sizes, default=0) < 0:
        raise Unsupported(f"a shape of {sizes}")
    fill = np.zeros((), np.float32) if value is None else known(value, "value").reshape(-1)[:1].reshape(())
    return Value(np.broadcast_to(fill, bounded(sizes)), tuple(range(len(sizes))))


def arange(start: Any, limit: Any, delta: Any) -> Value:
    dtype = known(start, "start").dtype
    start, limit, delta = number(start, "start"), number(limit, "limit"), number(delta, "delta")
    if delta == 0 or not math.isfinite((limit - start) / delta):
        raise Unsupported(f"a range from {start} to {limit} in steps of {delta}")
    bounded((max(0, math.ceil((limit - start) / delta)),))
    return value(np.arange(start, limit, delta, dtype=dtype))


def tile(x: Value, repeats: Any) -> Value:
    times = integers(repeats, "repeats")
    if len(times) != x.rank or min(times, default=0) < 0:
        raise Unsupported(f"repeats {times} of an input of shape {x.shape}")
    bounded(tuple(size * n for size, n in zip(x.shape, times, strict=True)), module(x))
    return Value(module(x).tile(x.array, tuple(times[axis] for axis in x.order)), x.order)


def pad(x: Value, pads: Any, constant_value: Any = None, axes: Any = None, mode: str = "constant", value: float = 0.0) -> Value:
    """x with numbers added before and after, or taken away where there are fewer than none."""
    sides = integers(pads, "pads")
    on = [x.place(axis) for axis in (integers(axes, "axes") if axes is not None else range(x.rank))]
    if len(sides) != 2 * len(on) or mode not in ("constant", "reflect", "edge", "wrap"):
        raise Unsupported(f"pads {sides} in mode {mode!r} of an input of shape {x.shape}")
    widths = [(0, 0)] * x.rank
    for i, place in enumerate(on):
        widths[place] = sides[i], sides[i + len(on)]
    array, xp = x.array, module(x)
    for place, (before, after) in enumerate(widths):
        length = array.shape[place]
        if min(before, after) < 0:
            array = array[(slice(None),) * place + (slice(max(0, -before), length - max(0, -after)),)]
    widths = [(max(0, before), max(0, after)) for before, after in widths]
    bounded(tuple(length + sum(width) for length, width in zip(array.shape, widths, strict=True)), xp)
    fill = value if constant_value is None else number(constant_value, "value")
    filled = {"constant_values": np.asarray(fill, array.dtype)} if mode == "constant" else {}
    return Value(xp.pad(array, widths, mode, **filled), x.order)


def one_hot(indices: Value, depth: Any, values: Value, axis: int = -1) -> Value:
    count, index = int(number(depth, "depth")), indices.plain()
    bounded((index.size, count))
    hot = jnp.expand_dims(index % count, axis) == along(np.arange(count), index.ndim + 1, axis)
    off, on = values.plain()
    inside = jnp.expand_dims((index >= -count) & (index < count), axis)
    return value(jnp.where(hot & inside, on, off))


def trilu(x: Value, k: Any = None, upper: int = 1) -> Value:
    offset, xp = 0 if k is None else int(number(k, "k")), module(x)
    return value((xp.triu if upper else xp.tril)(x.plain(), offset))


def eye_like(x: Value, dtype: int | None = None, k: int = 0) -> Value:
    rows, columns = bounded(x.shape)
    return value(np.eye(rows, columns, k, x.array.dtype if dtype is None else dtype_of(dtype)))


def depth_to_space(x: Value, blocksize: int, mode: str = "DCR") -> Value:
    """(n, b b c, h, w) -> (n, c, h b, w b)"""
    array, b = x.channels_last(), blocksize
    n, h, w, c = array.shape
    if b < 1 or c % (b * b):
        raise Unsupported(f"blocksize={b} of an input of shape {x.shape}")
    split = (n, h, w, b, b, c // (b * b)) if mode == "DCR" else (n, h, w, c // (b * b), b, b)
    array = array.reshape(split).transpose((0, 1, 3, 2, 4, 5) if mode == "DCR" else (0, 1, 4, 2, 5, 3))
    return Value(array.reshape(n, h * b, w * b, c // (b * b)), (0, 2, 3, 1))


def space_to_depth(x: Value, blocksize: int, mode: str = "DCR") -> Value:
    """(n, c, h b, w b) -> (n, b b c, h, w)"""
    array, b = x.channels_last(), blocksize
    n, h, w, c = array.shape
    if b < 1 or h % b or w % b or mode not in ("DCR", "CRD"):
        raise Unsupported(f"blocksize={b}, mode={mode!r} of an input of shape {x.shape}")
    array = array.reshape(n, h // b, b, w // b, b, c).transpose((0, 1, 3, 2, 4, 5) if mode == "DCR" else (0, 1, 3, 5, 2, 4))
    return Value(array.reshape(n, h // b, w // b, b * b * c), (0, 2, 3, 1))


def reverse_sequence(x: Value, sequence_lens: Value, batch_axis: int = 1, time_axis: int = 0) -> Value:
    array = jnp.moveaxis(x.plain(), (time_axis, batch_axis), (0, 1))
    steps, lengths = jnp.arange(array.shape[0])[:, None], sequence_lens.plain()[None, :]
    index = jnp.where(steps < lengths, lengths - 1 - steps, steps).reshape(array.shape[:2] + (1,) * (array.ndim - 2))
    return value(jnp.moveaxis(jnp.take_along_axis(array, index, axis=0), (0, 1), (time_axis, batch_axis)))


def non_zero(x: Value) -> Value:
    return value(np.array(np.nonzero(known(x, "input")), np.int64))


def cumulative(function: Callable[..., Any]) -> Callable[..., Value]:
    def run(x: Value, axis: Any, exclusive: int = 0, reverse: int = 0) -> Value:
        place, array = x.place(int(number(axis, "axis"))), jnp.asarray(x.array)
        array = jnp.flip(array, place) if reverse else array
        if exclusive:
            first = jnp.full_like(jax.lax.slice_in_dim(array, 0, 1, axis=place), function is jnp.cumprod)
            array = jnp.concatenate([first, jax.lax.slice_in_dim(array, 0, array.shape[place] - 1, axis=place)], place)
        array = function(array, axis=place)
        return Value(jnp.flip(array, place) if reverse else array, x.order)

    return run


def identity(x: Value, *_: Value, **attributes: Any) -> Value:
    return x


def dropout(x: Value, ratio: Any = None, training_mode: Any = None, seed: int = 0, is_test: int = 1) -> tuple[Value, Value]:
    """What it does at inference: nothing."""
    if training_mode is not None and number(training_mode, "training_mode"):
        raise Unsupported("training_mode is true, wanted a network for inference")
    return x, Value(jnp.ones(x.array.shape, bool), x.order)


OPERATORS: dict[str, Callable[..., Any]] = {
    "Concat": concat, "ConstantOfShape": constant_of_shape, "CumProd": cumulative(jnp.cumprod),
    "CumSum": cumulative(jnp.cumsum), "DepthToSpace": depth_to_space, "Dropout": dropout, "EyeLike": eye_like,
    "Flatten": flatten, "FlattenChannelsLast": flatten_channels_last, "Gather": gather,
    "GatherElements": gather_elements, "GatherND": gather_nd, "Identity": identity, "NonZero": non_zero, "OneHot": one_hot,
    "Pad": pad, "Range": arange, "Reshape": reshape, "ReverseSequence": reverse_sequence, "Scatter": scatter_elements,
    "ScatterElements": scatter_elements, "ScatterND": scatter_nd, "Shape": shape, "Size": size, "Slice": slices,
    "SpaceToDepth": space_to_depth, "Split": split, "Squeeze": squeeze, "Tile": tile, "Transpose": transpose, "Trilu": trilu,
    "Unsqueeze": unsqueeze,
}
