"""Equations of a jaxpr as steps of a program: which of them it knows, and how they join the convolution before them.

A step is not computed where it stands: it waits, as a `Node`, for what is done with its result. A bias, a residual or an
activation joins a convolution, other steps follow it, and anything that is no step makes all that wait run, as one program.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import primitives

from sparseflax.conv.packing import Pattern
from sparseflax.conv.primitive import Activation, conv_p
from sparseflax.conv.window import Window, addressable
from sparseflax.network.program import Program, Size, Step, run_program

MAX_PARTS = 1 << 20  # of a window's size, stride, padding or dilation, as program.cc has it
CONVOLUTIONS = "conv", "depthwise"


@dataclass(eq=False)
class Node:
    """The result of a step that waits: images (n, *size), looked at as an array of another shape.

    Attributes:
      op: of the step; or "negative", which is no step: whether args[0] >= 0.
      size, params, numbers, pattern: of the step, but for its epilogue.
      args: images that it reads, other nodes or arrays (n, h, w, c).
      shared: arrays that all images share.
      shape: (n, ...), the same values, row-major.
      number: counts up along the trace.
      activation, bias, residual: of a convolution or a depthwise one, the last of the former only.
      read: how often it will be read, at least.
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

    @property
    def images(self) -> tuple[Any, ...]:
        """All images that it reads."""
        return self.args if self.residual is None else (*self.args, self.residual)

    def step(self, value: Callable[[Any], int], operand: Callable[[Any], int]) -> Step:
        """As a step, with the numbers of what it reads."""
        shared, params = self.shared if self.bias is None else (*self.shared, self.bias), self.params
        if self.op in CONVOLUTIONS:
            params = (*params, self.activation, self.bias is not None)
        if self.op == "conv":
            params = (*params, self.residual is not None)
        return Step(self.op, self.size, tuple(map(value, self.images)), tuple(map(operand, shared)), params, self.numbers,
                    self.pattern)


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
      kernel: instruction set of all convolutions in it.
    """

    def __init__(self, chunk: int):
        self.chunk, self.kernel = chunk, None
        self._count = itertools.count()
        self._done: dict[int, tuple[Node, jax.Array]] = {}  # nodes are kept, so that no other gets their id

    def step(self, equation: Any, operands: Sequence[Any]) -> Node | None:
        """What an equation adds to what waits; None where it is no step."""
        if equation.primitive is not conv_p and not any(isinstance(operand, Node) for operand in operands):
            return None
        aval = equation.outvars[0].aval
        step = STEPS.get(equation.primitive)
        return step(self, equation, *operands) if step and aval.dtype in (jnp.float32, jnp.bool_) else None

    def will_be_read(self, value: Any, times: int) -> None:
        """Says how often a value is read from here on."""
        if isinstance(value, Node):
            value.read = max(value.read, times)

    def is_open(self, value: Any, *ops: str) -> bool:
        """Whether a value waits, in one of these steps, and nothing else will read it."""
        return isinstance(value, Node) and value.read == 1 and id(value) not in self._done and (not ops or value.op in ops)

    def now(self, value: Any, waiting: Iterable[Any] = ()) -> Any:
        """The value as an array; what else waits and will be read is computed with it."""
        if not isinstance(value, Node):
            return value
        if value.op == "negative":
            return self.now(value.args[0], waiting) >= 0
        if id(value) not in self._done:
            self._run([value, *(node for node in waiting if isinstance(node, Node) and node.op != "negative")])
        return self._done[id(value)][1].reshape(value.shape)

    def node(self, equation: Any, op: str, args: Sequence[Any], shared: Sequence[Any] = (), params: Sequence[Any] = (),
             numbers: Sequence[Any] = (), size: Size | None = None, **epilogue: Any) -> Node | None:
        """A step with the result of an equation; None if its arguments are no images of one batch."""
        shape = equation.outvars[0].aval.shape
        size = size or size_of(shape)
        arrays = [array for array in (*args, *shared) if not isinstance(array, Node)]
        if size is None or any(jnp.result_type(array) != jnp.float32 for array in arrays):
            return None
        if any(np.shape(arg)[:1] != shape[:1] or size_of(np.shape(arg)) is None for arg in args):
            return None
        images = [self.viewed(arg) if isinstance(arg, Node) else _image(arg) for arg in args]
        return Node(op, size, tuple(images), tuple(map(jnp.asarray, shared)), tuple(params), tuple(map(float, numbers)), shape,
                    next(self._count), **epilogue)

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
        return Node("reshape", size, (x,), (), (), (), shape, next(self._count))

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
        shared: dict[int, Any] = {}

        def operand(array: Any) -> int:
            shared[id(array)] = array
            return list(shared).index(id(array))

        made = tuple(node.step(lambda value: values[id(value)], operand) for node in steps)
        outputs = list({id(source): source for source in sources if id(source) in needed}.values())
        if outputs:
            sizes: Any = tuple(image.shape[1:] for image in images)
            program = Program(sizes, made, tuple(values[id(node)] for node in outputs), len(shared), self.chunk, self.kernel)
            for node, array in zip(outputs, run_program(program, images, list(shared.values())), strict=True):
                self._done[id(node)] = node, array
        for node, source in zip(wanted, sources, strict=True):
            self._done[id(node)] = node, self._done[id(source)][1].reshape(node.shape[0], *node.size)


def _image(array: Any) -> jax.Array:
    array = jnp.asarray(array)
    return array if array.ndim == 4 else array.reshape(array.shape[0], *(size_of(array.shape) or ()))


def _source(node: Any) -> Any:
    """What a reshape is a reshape of: the reshape itself costs XLA nothing."""
    while isinstance(node, Node) and node.op == "reshape":
        node = node.args[0]
    return node


def is_number(value: Any) -> bool:
    """Whether a value is one number, known now."""
    return not isinstance(value, Node | Tracer) and np.ndim(value) == 0


def _sparse(region: Region, equation: Any, x: Any, values: Any, *rest: Any) -> Node | None:
    params = equation.params
    region.kernel = region.kernel or params["kernel"]
    if not addressable(params["pattern"], params["window"]) or params["kernel"] != region.kernel or isinstance(values, Node):
        return None
    bias = rest[0] if params["has_bias"] else None
    residual = rest[-1] if params["has_residual"] else None
    if isinstance(bias, Node):
        return None
    residual = region.viewed(residual) if isinstance(residual, Node) else residual
    return region.node(equation, "conv", [x], [values], [params["window"]], pattern=params["pattern"],
                       activation=params["activation"], bias=bias, residual=residual)


def _add(region: Region, equation: Any, a: Any, b: Any) -> Node | None:
    """Of two convolutions that wait the later takes the sum of the earlier."""
    waiting = [(conv, other) for conv, other in ((a, b), (b, a))
               if region.is_open(conv, *CONVOLUTIONS) and conv.activation is None]
    for conv, other in sorted(waiting, key=lambda pair: -pair[0].number):
        channels = conv.size[2]
        if conv.op == "conv" and conv.residual is None and np.shape(other) == conv.shape:
            if not isinstance(other, Node):
                return replace(conv, residual=jnp.asarray(other).reshape(conv.shape[0], *conv.size))
            if other.size == conv.size and other.number < conv.number:
                return replace(conv, residual=other)
        per_channel = np.shape(other) == (*(1 for _ in conv.shape[1:]), channels) and conv.shape[-1] == channels
        if conv.bias is None and per_channel and not isinstance(other, Node):
            return replace(conv, bias=jnp.reshape(other, channels))
    return _combine(region, equation, a, b)


def _combine(region: Region, equation: Any, a: Any, b: Any) -> Node | None:
    name = equation.primitive.name
    for x, other, swapped in ((a, b, False), (b, a, True)):
        if not isinstance(x, Node) or x.shape != equation.outvars[0].aval.shape:
            continue
        shape, ones = np.shape(other), (1,) * (len(x.shape) - 2)
        if is_number(other):
            return region.node(equation, "combine", [x], params=(name, "number", swapped), numbers=[other])
        if shape == x.shape:
            return region.node(equation, "combine", [x, other], params=(name, "same", swapped))
        if shape == (1, *ones, x.shape[-1]) and not isinstance(other, Node):
            return region.node(equation, "combine", [x], [jnp.reshape(other, -1)], (name, "channel", swapped))
        if ones and shape == (x.shape[0], *ones, x.shape[-1]):
            return region.node(equation, "combine", [x, other], params=(name, "image", swapped))
    return None


def _max(region: Region, equation: Any, a: Any, b: Any) -> Node | None:
    for conv, bound in ((a, b), (b, a)):
        if region.is_open(conv, *CONVOLUTIONS) and conv.activation is None and is_number(bound) and bound == 0:
            return replace(conv, activation="relu")
    return _combine(region, equation, a, b)


def _min(region: Region, equation: Any, a: Any, b: Any) -> Node | None:
    for conv, bound in ((a, b), (b, a)):
        if region.is_open(conv, *CONVOLUTIONS) and conv.activation == "relu" and is_number(bound) and bound == 6:
            return replace(conv, activation="relu6")
    return _combine(region, equation, a, b)


def _clamp(region: Region, equation: Any, low: Any, x: Any, high: Any) -> Node | None:
    if not isinstance(x, Node) or not is_number(low) or not is_number(high):
        return None
    if region.is_open(x, *CONVOLUTIONS) and x.activation is None and low == 0 and high == 6:
        return replace(x, activation="relu6")
    return region.node(equation, "map", [x], params=["clamp"], numbers=[low, high])


def _not_negative(region: Region, equation: Any, x: Any, bound: Any) -> Node | None:
    if not isinstance(x, Node) or not is_number(bound) or bound != 0:
        return None
    return Node("negative", x.size, (x,), (), (), (), x.shape, x.number)


def _select(_, equation: Any, which: Any, below: Any, above: Any) -> Node | None:
    """Of x and a multiple of it: a leaky rectifier."""
    if not all(isinstance(value, Node) for value in (which, below, above)):
        return None
    if which.op != "negative" or which.args[0] is not above:
        return None
    if below.op != "combine" or below.params[:2] != ("mul", "number") or below.args[0] is not above:
        return None
    return replace(below, op="map", params=("leaky",), numbers=(below.numbers[0], 0.0), read=1)


def _map(name: str) -> Callable[..., Node | None]:
    def step(region: Region, equation: Any, x: Node) -> Node | None:
        return region.node(equation, "map", [x], params=(name,), numbers=[0, 0])

    return step


def _power(region: Region, equation: Any, x: Any, exponent: Any) -> Node | None:
    if not isinstance(x, Node) or not is_number(exponent) or abs(exponent) not in (0.25, 0.5, 0.75):
        return None
    return region.node(equation, "map", [x], params=("power",), numbers=[exponent, 0])


def _integer_power(region: Region, equation: Any, x: Node) -> Node | None:
    return _map("square")(region, equation, x) if equation.params["y"] == 2 else None


def _reshape(region: Region, equation: Any, x: Any, *sizes: Any) -> Node | None:
    """Of all images alike: only how the values are looked at."""
    params, shape = equation.params, equation.outvars[0].aval.shape
    if sizes or params.get("dimensions") is not None or params.get("sharding") is not None or shape[:1] != x.shape[:1]:
        return None
    return region.again(x, shape)


def _broadcast(region: Region, equation: Any, x: Any, *sizes: Any) -> Node | None:
    """That adds dimensions of 1 and nothing else."""
    shape, at = equation.outvars[0].aval.shape, equation.params["broadcast_dimensions"]
    added = [size for axis, size in enumerate(shape) if axis not in at]
    if sizes or set(added) > {1} or tuple(shape[axis] for axis in at) != x.shape or at[:1] != (0,):
        return None
    return region.again(x, shape)


def _squeeze(region: Region, equation: Any, x: Any) -> Node | None:
    if 0 in equation.params["dimensions"]:
        return None
    shape = equation.outvars[0].aval.shape
    return region.again(x, shape)


def _pool(region: Region, equation: Any, x: Any) -> Node | None:
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


def _reduce(region: Region, equation: Any, x: Any) -> Node | None:
    """Over all positions of an image: one window."""
    if len(x.shape) != 4 or equation.params["axes"] != (1, 2):
        return None
    maximum, taps = equation.primitive is primitives.reduce_max_p, x.shape[1:3]
    if max(taps) >= MAX_PARTS:
        return None
    window = Window((1, 1), ((0, 0), (0, 0)), (1, 1))
    return region.node(equation, "pool", [x], params=(maximum, taps, window), size=(1, 1, x.shape[3]))


def _depthwise(region: Region, equation: Any, x: Any, kernel: Any) -> Node | None:
    params = equation.params
    layout, groups = params["dimension_numbers"], params["feature_group_count"]
    nhwc = layout.lhs_spec == layout.out_spec == (0, 3, 1, 2) and layout.rhs_spec == (3, 2, 0, 1)
    if not nhwc or not isinstance(x, Node) or isinstance(kernel, Node) or params["batch_group_count"] != 1 or params[
            "lhs_dilation"] != (1, 1) or not groups == kernel.shape[3] == x.shape[3] or kernel.dtype != jnp.float32:
        return None
    top_bottom, left_right = map(tuple, params["padding"])
    window = Window(tuple(params["window_strides"]), (top_bottom, left_right), tuple(params["rhs_dilation"]))
    if min(map(min, window.padding)) < 0:
        return None
    return region.node(equation, "depthwise", [x], [kernel], (kernel.shape[:2], window))


def _concatenate(region: Region, equation: Any, *operands: Any) -> Node | None:
    rank = len(equation.outvars[0].aval.shape)
    if equation.params["dimension"] != rank - 1 or rank < 2:
        return None
    return region.node(equation, "concat", operands)


def _pad(region: Region, equation: Any, x: Any, value: Any) -> Node | None:
    config = equation.params["padding_config"]
    if not isinstance(x, Node) or not is_number(value) or len(x.shape) != 4:
        return None
    if any(inner for *_, inner in config) or any(config[0]):
        return None
    return region.node(equation, "window", [x], params=tuple(-low for low, *_ in config[1:]), numbers=[value])


def _slice(region: Region, equation: Any, x: Any) -> Node | None:
    params = equation.params
    if len(x.shape) != 4 or set(params["strides"] or (1,)) != {1} or params["start_indices"][0] != 0 or params[
            "limit_indices"][0] != x.shape[0]:
        return None
    return region.node(equation, "window", [x], params=tuple(params["start_indices"][1:]), numbers=[0])


def _convert(region: Region, equation: Any, x: Any) -> Any:
    return x if equation.params["new_dtype"] == jnp.float32 else None


STEPS: dict[Any, Callable[..., Node | None]] = {
    conv_p: _sparse, primitives.conv_general_dilated_p: _depthwise,
    primitives.add_p: _add, primitives.sub_p: _combine, primitives.mul_p: _combine, primitives.div_p: _combine,
    primitives.max_p: _max, primitives.min_p: _min, primitives.clamp_p: _clamp,
    primitives.ge_p: _not_negative, primitives.select_n_p: _select,
    primitives.logistic_p: _map("logistic"), primitives.sqrt_p: _map("sqrt"), primitives.rsqrt_p: _map("rsqrt"),
    primitives.neg_p: _map("neg"), primitives.abs_p: _map("abs"), primitives.square_p: _map("square"),
    primitives.integer_pow_p: _integer_power, primitives.pow_p: _power,
    primitives.reduce_window_max_p: _pool, primitives.reduce_window_sum_p: _pool,
    primitives.reduce_sum_p: _reduce, primitives.reduce_max_p: _reduce,
    primitives.concatenate_p: _concatenate, primitives.pad_p: _pad, primitives.slice_p: _slice,
    primitives.reshape_p: _reshape, primitives.broadcast_in_dim_p: _broadcast, primitives.squeeze_p: _squeeze,
    primitives.convert_element_type_p: _convert}
