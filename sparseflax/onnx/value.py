"""A tensor of an ONNX graph and how it lies in memory, which is the program's business: images lie as NHWC."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import jax.numpy as jnp
import numpy as np

MOST = 2**28  # numbers in a constant that a graph computes


class Unsupported(ValueError):
    """Why a node cannot be run."""


@dataclass(frozen=True)
class Value:
    """A tensor.

    Attributes:
      array: a NumPy array if its numbers are known while tracing, as sizes are; else a jax.Array.
      order: which axis of ONNX's tensor stands at each place of `array`; (0, 2, 3, 1) for an image that lies as NHWC.
    """

    array: Any
    order: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.order)

    @property
    def shape(self) -> tuple[int, ...]:
        """ONNX's."""
        return tuple(self.array.shape[self.order.index(axis)] for axis in range(self.rank))

    @property
    def known(self) -> bool:
        return isinstance(self.array, np.ndarray)

    def place(self, axis: int) -> int:
        """Where an axis of ONNX's, which may count from the end, stands in `array`."""
        if not -self.rank <= axis < self.rank:
            raise Unsupported(f"axis {axis} of a tensor of shape {self.shape}, which has {self.rank}")
        return self.order.index(axis % self.rank)

    def arranged(self, order: tuple[int, ...]) -> Any:
        """The array with its axes in this order."""
        return self.array if order == self.order else self.array.transpose([self.order.index(axis) for axis in order])

    def plain(self) -> Any:
        """The array as ONNX has it."""
        return self.arranged(tuple(range(self.rank)))

    def channels_last(self) -> Any:
        """The array with ONNX's axis 1 at the end, as Flax's layers want it."""
        if self.rank < 2:
            raise Unsupported(f"its input has shape {self.shape}, wanted (n, c, ...)")
        return self.arranged(last(self.rank))


def last(rank: int) -> tuple[int, ...]:
    """The order of a tensor with its channels at the end."""
    return (0, *range(2, rank), 1)


def value(array: Any, order: tuple[int, ...] | None = None) -> Value:
    """A tensor as ONNX has it, or in another order."""
    array = np.asarray(array) if isinstance(array, np.generic) else array
    return Value(array, tuple(range(array.ndim)) if order is None else order)


def along(vector: Any, rank: int, place: int = -1) -> Any:
    """A vector along one of `rank` axes."""
    return vector.reshape([-1 if axis == place % rank else 1 for axis in range(rank)])


def module(*values: Value | None) -> ModuleType:
    """NumPy where all numbers are known, so that sizes stay known; else jax.numpy."""
    return np if all(v is None or v.known for v in values) else jnp


def aligned(values: tuple[Value, ...]) -> tuple[ModuleType, list[Any], tuple[int, ...]]:
    """NumPy or jax.numpy, arrays that broadcast as ONNX's tensors do, and the order that they lie in."""
    rank = max(v.rank for v in values)
    order = next((v.order for v in values if v.rank == rank and v.order != tuple(range(rank))), tuple(range(rank)))
    arrays = []
    for v in values:
        if v.rank not in (0, rank):
            v = value(v.plain().reshape((1,) * (rank - v.rank) + v.shape))
        arrays.append(v.arranged(order) if v.rank == rank else v.array)
    bounded(np.broadcast_shapes(*(array.shape for array in arrays)), module(*values))
    return module(*values), arrays, order


def bounded(shape: tuple[int, ...], xp: ModuleType = np) -> tuple[int, ...]:
    """`shape`, if a constant of that shape may be made."""
    if xp is np and math.prod(shape) > MOST:
        raise Unsupported(f"it makes a constant of shape {tuple(shape)}, wanted {MOST} numbers at most")
    return shape


def known(v: Any, what: str) -> np.ndarray:
    """Numbers that have to be known while tracing: of an input, an attribute or a list."""
    if isinstance(v, Value):
        if not v.known:
            raise Unsupported(f"its {what} is computed from the data, wanted a constant or sizes")
        v = v.array
    return np.asarray(v)


def integers(v: Any, what: str) -> tuple[int, ...]:
    """A list of integers, known while tracing; () for None."""
    array = known(() if v is None else v, what)
    if array.ndim > 1 or (array.size and array.dtype.kind not in "iu"):
        raise Unsupported(f"its {what} is {array.dtype} of shape {array.shape}, wanted a list of int64")
    return tuple(array.reshape(-1).tolist())


def number(v: Any, what: str) -> Any:
    """One number, known while tracing."""
    array = known(v, what)
    if array.size != 1 or array.dtype.kind not in "biuf":
        raise Unsupported(f"its {what} is {array.dtype} of shape {array.shape}, wanted one number")
    return array.item()
