"""Steps that wait for what is done with their results, and run as one program once something else needs them.

An equation of a jaxpr becomes a `Node` (equations.py); a bias, a residual, an activation or the rounding to uint8 joins the
convolution before it, other steps follow it, and anything that is no step makes all that wait run.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import primitives

from sparseflax.conv.int8 import Quantization
from sparseflax.conv.int8_primitive import BOUNDS
from sparseflax.conv.packing import Pattern
from sparseflax.conv.primitive import Activation
from sparseflax.conv.window import Window
from sparseflax.network.program import Part, Program, Size, Step, run_program

PIXELS = Window((1, 1), ((0, 0), (0, 0)), (1, 1))  # of single pixels
CONVOLUTIONS = "conv", "dense", "depthwise", "conv_int8"
ALIKE = "same", "number", "scalar"  # second operands that say nothing of where a value stands
COMPARE: dict[str, Any] = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}


@dataclass(eq=False)
class Node:
    """The result of a step that waits: images (n, *size), looked at as an array of another shape.

    Attributes:
      op: of the step; or "sign", which is no step: how args[0] compares with 0.
      size, params, numbers, pattern: of the step, but for its epilogue.
      args: images that it reads, other nodes or arrays (n, h, w, c).
      shared: arrays that all images share.
      shape: (n, ...), the same values, row-major.
      number: counts up along the trace.
      activation, bias, residual: of a convolution; a bias of float32 ones, a residual of sparse ones only.
      read: how often it will be read, at least.
      uint8: whether its values are uint8, not float32.
    """

    op: str
    size: Size
    args: tuple[Any, ...]
    shared: tuple[Any, ...]
    params: tuple[Any, ...]
    numbers: tuple[float, ...]
    shape: tuple[Any, ...]
    number: int
    pattern: Pattern | None = None
    activation: Activation = None
    bias: Any = None
    residual: Any = None
    read: int = 1
    uint8: bool = False

    @property
    def images(self) -> tuple[Any, ...]:
        """All images that it reads."""
        return self.args if self.residual is None else (*self.args, self.residual)

    def step(self, value: Callable[[Any], int], operand: Callable[[Any], int]) -> Step:
        """As a step, with the numbers of what it reads."""
        shared, params = self.shared if self.bias is None else (*self.shared, self.bias), self.params
        if self.op == "conv_int8":
            window, rescale, _ = params
            bounds = dict(zip(("low", "high"), BOUNDS[self.activation], strict=True)) if not self.uint8 else {}
            params = window, rescale._replace(**bounds)
        elif self.op in CONVOLUTIONS:
            params = (*params, self.activation, self.bias is not None)
        if self.op == "conv":
            params = (*params, self.residual is not None)
        return Step(self.op, self.size, tuple(map(value, self.images)), tuple(map(operand, shared)), params, self.numbers,
                    self.pattern, self.uint8)


def size_of(shape: Sequence[Any]) -> Size | None:
    """(h, w, c) of an array (n, ...); None where a size is not known or empty."""
    *outer, w, c = (1, 1, *shape[1:])
    if not shape or not all(isinstance(size, int) and size > 0 for size in shape[1:]):
        return None
    return math.prod(outer), w, c


class Region:
    """The steps that wait, and what was computed of them.

    Attributes:
      chunk: images that a thread takes through a program at a time.
      kernel, int8: instruction sets of all convolutions in it, of float32 and in eight bits.
      quantized: by the id of a value, which is kept, its uint8, where that is a step of its own.
    """

    def __init__(self, chunk: int):
        self.chunk, self.kernel, self.int8 = chunk, None, None
        self.count = itertools.count()
        # By the id of a node, which is kept, so that no other gets it: its array, its readers so far, what is computed instead.
        self._done: dict[int, tuple[Node, jax.Array]] = {}
        self._readers: dict[int, tuple[Node, int]] = {}
        self._rounded: dict[int, tuple[Node, Node]] = {}
        self.quantized: dict[tuple[int, Quantization], tuple[Any, Node]] = {}
        self._parts: dict[int, tuple[Any, Any, int]] = {}  # arrays that lie in others: itself, the other, from where on

    def lies_in(self, equation: Any, operand: Any, array: Any) -> None:
        """Says of an equation's result, if it is a part of a 1-D array, that it is: a program reads it there."""
        params = equation.params
        if equation.primitive is primitives.slice_p and np.ndim(operand) == 1 and params["strides"] is None:
            self._parts[id(array)] = array, operand, params["start_indices"][0]
        elif equation.primitive is primitives.reshape_p and params["dimensions"] is None and id(operand) in self._parts:
            self._parts[id(array)] = array, *self._parts[id(operand)][1:]

    def flat(self, array: Any) -> jax.Array:
        """An array as one of one dimension, which lies where it lies."""
        flat = jnp.reshape(array, -1)
        if id(array) in self._parts:
            self._parts[id(flat)] = flat, *self._parts[id(array)][1:]
        return flat

    def is_read(self, values: Iterable[Any]) -> None:
        """Says that a step that waits reads these values."""
        for value in values:
            if isinstance(value, Node):
                self._readers[id(value)] = value, self.readers(value) + 1

    def readers(self, value: Node) -> int:
        """How many steps that wait read a value so far."""
        return self._readers.get(id(value), (value, 0))[1]

    def is_done(self, value: Any) -> bool:
        """Whether a value was computed already."""
        return id(value) in self._done

    def round(self, value: Node, rounded: Node, quantization: Quantization) -> None:
        """From here on a value is computed as its uint8 only; who reads it in float32 reads what these stand for."""
        rounded.read = 2
        floats = Node("dequantize", rounded.size, (rounded,), (), (quantization,), (), value.shape, next(self.count), read=2)
        self._rounded[id(value)] = value, floats

    def seen(self, value: Any) -> Any:
        """A value as it is computed now."""
        return self._rounded[id(value)][1] if id(value) in self._rounded else value

    def will_be_read(self, value: Any, times: int) -> None:
        """Says how often a value is read from here on."""
        if isinstance(value, Node):
            value.read = max(value.read, times)

    def is_open(self, value: Any, *ops: str) -> bool:
        """Whether a value waits, in one of these steps, and nothing else will read it."""
        return isinstance(value, Node) and value.read == 1 and id(value) not in self._done and (not ops or value.op in ops)

    def now(self, value: Any, waiting: Iterable[Any] = ()) -> Any:
        """The value as an array; what else waits and will be read is computed with it."""
        value = self.seen(value)
        if not isinstance(value, Node):
            return value
        if value.op == "sign":
            return COMPARE[value.params[0]](self.now(value.args[0], waiting), 0)
        if id(value) not in self._done:
            others = map(self.seen, waiting)
            self._run([value, *(node for node in others if isinstance(node, Node) and node.op != "sign")])
        return self._done[id(value)][1].reshape(value.shape)

    def node(self, equation: Any, op: str, args: Sequence[Any], shared: Sequence[Any] = (), params: Sequence[Any] = (),
             numbers: Sequence[Any] = (), size: Size | None = None, **epilogue: Any) -> Node | None:
        """A step with the result of an equation; None if its arguments are no images of one batch."""
        shape = equation.outvars[0].aval.shape
        arrays = [jnp.result_type(array) for array in (*args, *shared) if not isinstance(array, Node)]
        size = size if size is not None else size_of(shape)
        if size is None or not set(arrays) <= {jnp.dtype(jnp.float32), jnp.dtype(jnp.uint8), jnp.dtype(jnp.int32)}:
            return None
        if any(np.shape(arg)[:1] != shape[:1] or size_of(np.shape(arg)) is None for arg in args):
            return None
        stored: list[Node] = [plain(arg) for arg in args if isinstance(arg, Node)]
        alike = len(stored) == len(args) and len({each.size for each in stored}) == 1
        if alike and (op == "map" or op == "combine" and params[1] in ALIKE):  # however they are looked at
            images, size = stored, stored[0].size
        else:
            images = [plain(self.viewed(arg)) if isinstance(arg, Node) else image(arg) for arg in args]
        return Node(op, size, tuple(images), tuple(map(jnp.asarray, shared)), tuple(params), tuple(map(float, numbers)), shape,
                    next(self.count), uint8=equation.outvars[0].aval.dtype == jnp.uint8, **epilogue)

    def border(self, x: Any, at: tuple[int, int], size: Size) -> Node:
        """Images (n, h, w, c) within larger ones of zeros, from the pixel `at` on."""
        border = Node("window", size, (self.viewed(x) if isinstance(x, Node) else image(x),), (), (-at[0], -at[1], 0), (0.0,),
                      (x.shape[0], *size), next(self.count))
        self.is_read([border])
        return border

    def viewed(self, x: Node) -> Node:
        """The node as its shape says: reshaped, if it is stored as something else."""
        return x if size_of(x.shape) == x.size else self.again(x, x.shape) or x

    def again(self, x: Node, shape: tuple[Any, ...]) -> Node | None:
        """The values of a node in another shape; None if that has no size."""
        size = size_of(shape)
        if size is None or shape[0] != x.shape[0]:
            return None
        if self.is_open(x) and shape != x.shape:
            return replace(x, shape=shape)
        return Node("reshape", size, (x,), (), (), (), shape, next(self.count), uint8=x.uint8)

    def _run(self, wanted: Sequence[Node]) -> None:
        """Computes nodes, and all that they need, as one program."""
        wanted = [node for node in wanted if id(node) not in self._done]
        sources = [_source(node) for node in wanted]
        stack, needed, inputs = list(sources), dict[int, Node](), dict[int, Any]()
        while stack:
            value = stack.pop()
            if id(value) in self._done or not isinstance(value, Node):
                inputs[id(value)] = value
            elif id(value) not in needed:
                needed[id(value)] = value
                stack += value.images
        steps = sorted(needed.values(), key=lambda node: node.number)
        values = {key: index for index, key in enumerate((*inputs, *map(id, steps)))}
        images = [self._done[key][1] if key in self._done else value for key, value in inputs.items()]
        arrays: dict[int, Any] = {}
        shared: dict[Part, int] = {}

        def operand(array: Any) -> int:
            _, whole, first = self._parts.get(id(array), (None, array, None))
            arrays[id(whole)] = whole
            shape = None if first is None else array.shape
            return shared.setdefault(Part(list(arrays).index(id(whole)), first, shape), len(shared))

        made = tuple(node.step(lambda value: values[id(value)], operand) for node in steps)
        outputs = list({id(source): source for source in sources if id(source) in needed}.values())
        if outputs:
            sizes: Any = tuple(image.shape[1:] for image in images)
            uint8 = tuple(number for number, image in enumerate(images) if image.dtype == jnp.uint8)
            results = tuple(values[id(node)] for node in outputs)
            program = Program(sizes, made, results, tuple(shared), self.chunk, self.kernel, self.int8, uint8)
            for node, array in zip(outputs, run_program(program, images, list(arrays.values())), strict=True):
                self._done[id(node)] = node, array
        for node, source in zip(wanted, sources, strict=True):
            self._done[id(node)] = node, self._done[id(source)][1].reshape(node.shape[0], *node.size)


def image(array: Any) -> jax.Array:
    """An array (n, ...) as images (n, h, w, c)."""
    array = jnp.asarray(array)
    return array if array.ndim == 4 else array.reshape(array.shape[0], *(size_of(array.shape) or ()))


def plain(value: Any) -> Any:
    """A value without reshapes to the size that it has."""
    while isinstance(value, Node) and value.op == "reshape" and _stored(value.args[0]) == value.size:
        value = value.args[0]
    return value


def _stored(image: Any) -> Size:
    return image.size if isinstance(image, Node) else image.shape[1:]


def _source(node: Any) -> Any:
    """What a reshape is a reshape of: the reshape itself costs XLA nothing."""
    while isinstance(node, Node) and node.op == "reshape":
        node = node.args[0]
    return node


def is_number(value: Any) -> bool:
    """Whether a value is one number, known now."""
    return not isinstance(value, Node | Tracer) and np.ndim(value) == 0
