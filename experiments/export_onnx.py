"""A network written as ONNX, for the engines that ours is compared with: read from its jaxpr, so that any of ours will do.
Images become NCHW. What an engine wants to see as one operator is written as one: convolutions with their bias, fully
connected layers on flattened images, batch norms, pools, LRN, ReLU6.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import nnx

OPSET = 13
NAMED = ("relu", "relu6", "local_response_norm")  # functions under jit that are one operator


@dataclass(frozen=True)
class Tensor:
    """A value that is computed.

    Attributes:
      name: in the ONNX graph, where images are NCHW.
      shape: in JAX, where they are NHWC.
      image: (h, w, c) of the images where it is flattened ones: here in this order, in ONNX with channels first.
      divisor: what it still has to be divided by to be an average, of a pool whose operator is already written; None for 1.
    """

    name: str
    shape: tuple[int, ...]
    image: tuple[int, int, int] | None = None
    divisor: float | None = None


def to_onnx(model: nnx.Module, x: jax.ShapeDtypeStruct | np.ndarray | jax.Array) -> bytes:
    """A model in evaluation mode as a serialized ONNX model: input "x" (n, c, h, w), output "y".

    Args:
      model: of Flax's dense layers; weights become constants, with their zeros.
      x: its input (n, h, w, c), of the batch that the file is for.

    Raises:
      ValueError: it computes what this cannot write: all of it is named.
    """
    from onnx import TensorProto, helper, numpy_helper

    graphdef, state = nnx.split(model)
    images = jax.ShapeDtypeStruct(x.shape, np.float32)
    traced: Any = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, images)
    writer = _Writer()
    (y,) = writer.run(traced.jaxpr, [*map(np.asarray, jax.tree.leaves(state)), Tensor("x", tuple(x.shape))])
    if writer.unknown:
        raise ValueError(f"cannot write {sorted(writer.unknown)} as ONNX: add them to experiments/export_onnx.py")
    writer.emit("Identity", [y.name], y.shape, "y")
    sizes = {"x": _nchw(tuple(x.shape)), "y": _nchw(y.shape)}
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, sizes[name])] for name in ("x", "y"))
    used = {name for node in writer.nodes for name in node.input}
    weights = [numpy_helper.from_array(value, name) for name, value in writer.constants.items() if name in used]
    graph = helper.make_graph(writer.nodes, "network", inputs, outputs, weights)
    onnx_model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    onnx_model.ir_version = 8
    return onnx_model.SerializeToString()


class _Writer:
    """Walks a jaxpr: what depends on weights alone is computed at once, the rest becomes nodes."""

    def __init__(self):
        self.nodes: list[Any] = []
        self.constants: dict[str, np.ndarray] = {}
        self.unknown: set[str] = set()

    def run(self, jaxpr: Any, values: list[Any]) -> list[Any]:
        """Arrays and Tensors that the jaxpr's variables stand for."""
        env: dict[int, Any] = {id(v): value for v, value in zip(jaxpr.invars, values, strict=True)}

        def get(v):
            return np.asarray(v.val) if hasattr(v, "val") else env[id(v)]

        for equation in jaxpr.eqns:
            arguments, name = [get(v) for v in equation.invars], equation.primitive.name
            inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
            if inner is not None and equation.params.get("name") not in NAMED:
                inner = getattr(inner, "jaxpr", inner)
                outputs = self.run(inner, arguments)
            elif not any(isinstance(argument, Tensor) for argument in arguments):
                outputs = equation.primitive.bind(*arguments, **equation.params)
                outputs = [np.asarray(o) for o in (outputs if equation.primitive.multiple_results else [outputs])]
            else:
                outputs = [self.node(equation, equation.params["name"] if inner is not None else name, arguments)]
            env |= {id(v): value for v, value in zip(equation.outvars, outputs, strict=True)}
        return [get(v) for v in jaxpr.outvars]

    def node(self, equation: Any, name: str, arguments: list[Any]) -> Tensor:
        """Writes one equation."""
        write = getattr(self, f"_{name}", None)
        shape = tuple(equation.outvars[0].aval.shape)
        result = write(equation, arguments, shape) if write else None
        if result is None:
            self.unknown.add(name)
            return Tensor(f"unknown {name}", shape)
        return result

    def emit(self, op: str, inputs: list[str], shape: tuple[int, ...], name: str | None = None, **attributes: Any) -> Tensor:
        from onnx import helper

        name = name or f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return Tensor(name, shape)

    def constant(self, value: Any) -> str:
        name = f"constant_{len(self.constants)}"
        self.constants[name] = np.asarray(value, np.float32, order="C")
        return name

    def _conv_general_dilated(self, equation, arguments, shape):
        (x, kernel), p = arguments, equation.params
        (top, bottom), (left, right) = p["padding"]
        if not isinstance(kernel, np.ndarray) or p["dimension_numbers"].lhs_spec != (0, 3, 1, 2):
            return None
        if p["lhs_dilation"] != (1, 1):
            return self._transposed(x, kernel, p, shape)
        return self.emit("Conv", [x.name, self.constant(kernel.transpose(3, 2, 0, 1))], shape, kernel_shape=kernel.shape[:2],
                         strides=p["window_strides"], dilations=p["rhs_dilation"], group=p["feature_group_count"],
                         pads=[top, left, bottom, right])

    def _transposed(self, x: Tensor, kernel: np.ndarray, p: dict[str, Any], shape: tuple[int, ...]) -> Tensor | None:
        """A convolution of a spread image: ONNX turns its kernels around, and counts what is cut from the full result."""
        kh, kw = kernel.shape[:2]
        (top, bottom), (left, right) = p["padding"]
        if p["window_strides"] != (1, 1) or p["rhs_dilation"] != (1, 1) or p["feature_group_count"] != 1:
            return None
        return self.emit("ConvTranspose", [x.name, self.constant(kernel[::-1, ::-1].transpose(2, 3, 0, 1))], shape,
                         kernel_shape=(kh, kw), strides=p["lhs_dilation"],
                         pads=[kh - 1 - top, kw - 1 - left, kh - 1 - bottom, kw - 1 - right])

    def _dot_general(self, equation, arguments, shape):
        x, kernel = arguments
        if equation.params["dimension_numbers"] != (((1,), (0,)), ((), ())) or not isinstance(kernel, np.ndarray):
            return None
        if x.image is not None:
            h, w, c = x.image
            kernel = kernel.reshape(h, w, c, -1).transpose(2, 0, 1, 3).reshape(kernel.shape)
        return self.emit("Gemm", [x.name, self.constant(kernel)], shape)

    def _add(self, equation, arguments, shape):
        x, y = arguments if isinstance(arguments[0], Tensor) else arguments[::-1]
        last = self.nodes[-1] if self.nodes else None
        bias = isinstance(y, np.ndarray) and y.shape[:-1] == (1,) * (len(shape) - 1)
        if bias and last is not None and last.output[0] == x.name and last.op_type in ("Conv", "ConvTranspose", "Gemm") and (
                len(last.input) == 2):
            last.input.append(self.constant(y.reshape(-1)))
            return x
        return (self._norm(x, y, shape) if bias else None) or self._elementwise("Add", arguments, shape)

    def _norm(self, x: Tensor, shift: np.ndarray, shape: tuple[int, ...]) -> Tensor | None:
        """(z - mean) * scale + shift, if the last two nodes are the beginning of that, as one batch norm of z."""
        *before, minus, times = [None, None, *self.nodes]
        if minus is None or (minus.op_type, times.op_type, times.input[0], x.name) != (
                "Sub", "Mul", minus.output[0], times.output[0]):
            return None
        mean, scale = (self.constants.get(node.input[1]) for node in (minus, times))
        if mean is None or scale is None or not mean.size == scale.size == shift.size:
            return None
        self.nodes = before[2:]
        vectors = [self.constant(value.reshape(-1)) for value in (scale, shift, mean, np.ones(shift.size))]
        return self.emit("BatchNormalization", [minus.input[0], *vectors], shape, epsilon=0.0)

    def _sub(self, equation, arguments, shape):
        return self._elementwise("Sub", arguments, shape)

    def _mul(self, equation, arguments, shape):
        return self._elementwise("Mul", arguments, shape)

    def _div(self, equation, arguments, shape):
        x, y = arguments
        if isinstance(x, Tensor) and x.divisor is not None:
            return replace(x, divisor=None) if np.all(y == x.divisor) else None
        return self._elementwise("Div", arguments, shape)

    def _max(self, equation, arguments, shape):
        x, low = arguments
        return self._relu(equation, arguments, shape) if np.all(low == 0) else self._elementwise("Max", arguments, shape)

    def _relu(self, equation, arguments, shape):
        return replace(self.emit("Relu", [arguments[0].name], shape), image=arguments[0].image)

    def _relu6(self, equation, arguments, shape):
        return self.emit("Clip", [arguments[0].name, self.constant(np.float32(0)), self.constant(np.float32(6))], shape)

    def _local_response_norm(self, equation, arguments, shape):
        x, alpha, bias = arguments
        inner = equation.params["jaxpr"].jaxpr.eqns
        size = max(1, sum(e.primitive.name == "slice" for e in inner))  # one slice for each of the neighbours
        return self.emit("LRN", [x.name], shape, size=size, alpha=float(alpha), beta=0.75, bias=float(bias))

    def _reduce_window_max(self, equation, arguments, shape):
        return self.emit("MaxPool", [arguments[0].name], shape, **_window(equation.params))

    def _reduce_window_sum(self, equation, arguments, shape):
        pool = self.emit("AveragePool", [arguments[0].name], shape, count_include_pad=1, **_window(equation.params))
        return replace(pool, divisor=float(np.prod(equation.params["window_dimensions"])))

    def _reduce_sum(self, equation, arguments, shape):
        (x,) = arguments
        if equation.params["axes"] != (1, 2) or len(x.shape) != 4:
            return None
        pool = self.emit("GlobalAveragePool", [x.name], (x.shape[0], 1, 1, x.shape[3]))
        return replace(self.emit("Flatten", [pool.name], shape), divisor=float(x.shape[1] * x.shape[2]))

    def _reshape(self, equation, arguments, shape):
        (x,) = arguments
        if len(x.shape) != 4 or len(shape) != 2 or shape[0] != x.shape[0]:
            return None
        return replace(self.emit("Flatten", [x.name], shape), image=x.shape[1:])

    def _concatenate(self, equation, arguments, shape):
        if equation.params["dimension"] != 3 or not all(isinstance(argument, Tensor) for argument in arguments):
            return None
        return self.emit("Concat", [argument.name for argument in arguments], shape, axis=1)

    def _elementwise(self, op: str, arguments: list[Any], shape: tuple[int, ...]) -> Tensor | None:
        if any(isinstance(argument, Tensor) and argument.image for argument in arguments):
            return None
        names = [argument.name if isinstance(argument, Tensor) else
                 self.constant(argument.transpose(0, 3, 1, 2) if argument.ndim == 4 else argument) for argument in arguments]
        return self.emit(op, names, shape)


def _window(p: dict[str, Any]) -> dict[str, Any]:
    (top, bottom), (left, right) = p["padding"][1:3]
    return {"kernel_shape": p["window_dimensions"][1:3], "strides": p["window_strides"][1:3],
            "pads": [top, left, bottom, right]}


def _nchw(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], shape[3], *shape[1:3]) if len(shape) == 4 else shape
