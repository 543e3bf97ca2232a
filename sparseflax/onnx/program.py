"""What an ONNX graph computes: constants folded, nodes with constant weights made layers, the others left to `ops`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from sparseflax.onnx.flattened import flattened
from sparseflax.onnx.graph import Body, Graph, Node, Shape
from sparseflax.onnx.grouped import grouped
from sparseflax.onnx.integer import RoundsToRange, on_floats
from sparseflax.onnx.layers import FEATURES, Layer, call, layer, with_bias
from sparseflax.onnx.older import CONTRIBUTED, QUANTIZED, SHARED, newer
from sparseflax.onnx.ops import OPERATORS, control, elementwise, movement, quantized, reduction
from sparseflax.onnx.ops.elementwise import dtype_of
from sparseflax.onnx.pairs import joined
from sparseflax.onnx.read import malformed
from sparseflax.onnx.value import MOST, Unsupported, Value, value

FOLDED = {*control.OPERATORS, *elementwise.OPERATORS, *movement.OPERATORS, *quantized.OPERATORS, *reduction.OPERATORS}
UNREAD = {
    **dict.fromkeys(("Compress", "NonMaxSuppression", "Unique"),
                    "how much it returns depends on the data, take its inputs instead"),
    **dict.fromkeys(("Scan", "SequenceMap"), "it holds a graph of its own, which is not read"),
}
MICROSOFT = "DynamicQuantizeLSTM", *CONTRIBUTED  # of ONNX Runtime's own quantization
SIZES = 64  # numbers in a list of sizes: what is longer is a weight


class Step(NamedTuple):
    """One operation: of the layer called `layer`, which takes `channels` in a tensor of `rank`, or of `ops`."""

    node: Node
    layer: str | None = None
    channels: int = 0
    rank: int | None = None


@dataclass(frozen=True, eq=False)
class Program:
    """The network without its weights.

    Attributes:
      inputs: names of what it takes; images of those are NCHW in the graph.
      shapes: of the inputs, ONNX's; None for an open size, or where the file says nothing of the shape.
      images: the inputs, then the outputs: whether one of rank 4 is NHWC outside where the graph has NCHW.
      outputs: their names.
      steps: what is computed, in the order in which it can be.
      known: constants that sizes may be computed from.
    """

    inputs: tuple[str, ...]
    shapes: tuple[Shape | None, ...]
    images: tuple[bool, ...]
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]
    known: Mapping[str, np.ndarray]

    @property
    def shape(self) -> Shape:
        """Of the first input without its batch, (h, w, c) for images; None where the file leaves a size open."""
        _, *sizes = self.shapes[0] or (None,) * 4
        return (*sizes[1:], *sizes[:1]) if len(sizes) == 3 and self.images[0] else tuple(sizes)

    def run(self, layers: Mapping[str, Any], constants: Mapping[str, Any], inputs: Sequence[Any],
            failures: list[str] | None = None) -> list[Value | None]:
        """The outputs.

        Args:
          layers: by name.
          constants: those that are not `known`.
          inputs: arrays as ONNX has them, or (n, h, w, c) for images.
          failures: takes what went wrong, and the outputs that need it are None; without it that is raised.

        Raises:
          ValueError: a node cannot be run.
        """
        values: dict[str, Value | None] = {name: value(array) for name, array in {**self.known, **constants}.items()}
        for name, array, image in zip(self.inputs, inputs, self.images, strict=False):
            values[name] = Value(array, (0, 2, 3, 1)) if image and array.ndim == 4 else value(array)
        unread = Counter(name for names in (*(step.node.inputs for step in self.steps), self.outputs) for name in names)
        for step in self.steps:
            node = step.node
            operands = [values[name] if name else None for name in node.inputs]
            if any(name and operand is None for name, operand in zip(node.inputs, operands, strict=True)):
                results: Sequence[Value | None] = [None] * len(node.outputs)
            elif step.layer is not None:
                x: Any = operands[0]
                results = attempt(node, failures, partial(call, layers[step.layer], step.channels, step.rank,
                                                          node.op in FEATURES, x))
            else:
                results = attempt(node, failures, partial(compute, node, operands))
            values.update((name, result) for name, result in zip(node.outputs, results, strict=True) if name)
            unread.subtract(node.inputs)
            for name in node.inputs:  # outside jit all images of a network would stay, gigabytes of them
                if unread[name] == 0:
                    values.pop(name, None)
        return [values[name] for name in self.outputs]


def compute(node: Node, operands: Sequence[Value | None]) -> Any:
    """What an operator without a layer makes of its inputs; None is one that is left out."""
    if node.op in control.OPERATORS:
        return control.OPERATORS[node.op](compute, *operands, **node.attributes)
    return OPERATORS[node.op](*operands, **node.attributes)


def attempt(node: Node, failures: list[str] | None, run: Any) -> Sequence[Value | None]:
    """The outputs of a node; what it raises, whatever it is, becomes a ValueError that names it, or one of `failures`."""
    try:
        results = run()
        results = results if isinstance(results, tuple) else (results,)
        if len(node.outputs) > len(results):
            raise Unsupported(f"{len(node.outputs)} outputs, wanted {'one' if len(results) == 1 else len(results)}")
        return results[:len(node.outputs)]
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if failures is None:
            raise ValueError(f"{node}: {reason}") from error
        failures.append(f"{node}: {reason}")
        return [None] * len(node.outputs)


class Built(NamedTuple):
    """A graph's program, its layers and its other constants by name, and what of it cannot be run."""

    program: Program
    layers: dict[str, Any]
    constants: dict[str, np.ndarray]
    refused: list[str]


def build(graph: Graph) -> Built:
    """Turns nodes into steps, those with constant weights into layers; goes on after a node that it cannot turn."""
    graph = on_floats(grouped(graph))
    refused = [f"{node}: {UNREAD.get(node.op, 'unknown operator')}" for node in graph.nodes if not _is_known(node)]
    constants, made = dict(graph.constants), 0
    scales = dict[str, tuple[np.ndarray, int]]()  # of weights that were dequantized, and the axis that they are along
    flat = flattened(graph)
    rows = dict(flat)  # as these, but rounded since
    # What is rounded by its range, by the name that it has then: a layer does that itself.
    ranged = {node.outputs[0]: node.inputs[0] for node in graph.nodes if node.op == "RoundedToItsRange"}
    layers, steps, absent = dict[str, Any](), list[Step](), set[str]()
    uses = Counter([*(name for node in graph.nodes for name in node.inputs), *graph.outputs])
    for older in graph.nodes:
        if not _is_known(older):
            absent.update(older.outputs)
            continue
        if reason := malformed(older, graph.opset):
            refused.append(f"{older}: {reason}")
            absent.update(older.outputs)
            continue
        inner = list[str]()
        older = _readied(older, graph.opset, inner)
        if inner:
            refused += inner
            absent.update(older.outputs)
            continue
        for node in newer(older, graph.opset):
            if absent.intersection(filter(None, node.inputs)):
                absent.update(node.outputs)
            elif node.op in FOLDED and all(not name or name in constants for name in node.inputs):
                operands = [value(constants[name]) if name else None for name in node.inputs]
                results = attempt(node, refused, partial(compute, node, operands))
                outputs = dict(zip(node.outputs, results, strict=True))
                absent.update(name for name, result in outputs.items() if result is None)
                folded = {name: np.asarray(result.plain()) for name, result in outputs.items() if result is not None}
                constants |= folded
                if node.op == "DequantizeLinear":
                    scales |= {name: (constants[node.inputs[1]], node.attributes.get("axis", 1)) for name in folded}
                made += sum(array.size for array in folded.values())
                if made > 2 * MOST:
                    raise ValueError(f"the graph computes constants of {made} numbers up to {node}, wanted {2 * MOST} at most: "
                                     "it was damaged, export it again")
            elif (biased := _biased(node, steps, layers, constants, uses)) is not None:
                steps[biased] = steps[biased]._replace(node=steps[biased].node._replace(outputs=node.outputs))
            else:
                if node.op in (*SHARED, "RoundedToItsRange") and node.inputs[0] in rows:
                    rows |= dict.fromkeys(node.outputs, rows[node.inputs[0]])
                try:
                    found = layer(node, constants, rows.get(node.inputs[0]), scales) if node.inputs else None
                except Exception as error:
                    refused.append(f"{older}: {error}")
                    absent.update(node.outputs)
                    continue
                if found is not None and node.inputs[0] in ranged:
                    found = found._replace(module=RoundsToRange(found.module))
                    node = node._replace(inputs=(ranged[node.inputs[0]], *node.inputs[1:]))
                steps.append(_step(node, found, layers, flat))
    taken = {*graph.outputs, *(name for step in steps for name in step.node.inputs)}
    steps = [step for step in steps if step.node.op != "RoundedToItsRange" or taken.intersection(step.node.outputs)]
    steps = joined(steps, constants, graph.outputs)
    program = _program(graph, steps, constants)
    used = {name for step in steps for name in step.node.inputs} | set(graph.outputs)
    left = {name: array for name, array in constants.items() if name in used}
    weights = {name: array for name, array in left.items() if array.dtype.kind == "f" and array.size > SIZES}
    program = replace(program, known={name: array for name, array in left.items() if name not in weights})
    return Built(program, layers, weights, refused)


def _readied(node: Node, opset: int, refused: list[str]) -> Node:
    """The node with the graphs in it in the words of the newest operator set; adds what of them cannot be run to `refused`."""

    def ready(body: Body) -> Body:
        unknown = [f"{inner}: {UNREAD.get(inner.op, 'unknown operator')}" for inner in body.nodes if not _is_known(inner)]
        known = [inner for inner in body.nodes if _is_known(inner)]
        refused.extend([*unknown, *(f"{inner}: {reason}" for inner in known if (reason := malformed(inner, opset)))])
        if unknown:
            return body
        return body._replace(nodes=tuple(_readied(part, opset, refused) for inner in known for part in newer(inner, opset)))

    return node._replace(attributes={name: ready(given) if isinstance(given, Body) else given
                                     for name, given in node.attributes.items()})


def _is_known(node: Node) -> bool:
    if node.domain:
        return node.domain == "com.microsoft" and node.op in (*MICROSOFT, *SHARED)
    return node.op not in MICROSOFT and any(node.op in known for known in (OPERATORS, control.OPERATORS, QUANTIZED))


def _biased(node: Node, steps: Sequence[Step], layers: Mapping[str, Any], constants: Mapping[str, np.ndarray],
            uses: Counter[str]) -> int | None:
    """The number of the step whose layer has taken what an Add adds to its output as its bias; None for another node."""
    if (node.op, node.domain, len(node.inputs)) != ("Add", "", 2):
        return None
    for y, added in (node.inputs, node.inputs[::-1]):
        if added not in constants or uses[y] != 1:
            continue
        for number, (made, name, *_) in enumerate(steps):
            if name is not None and made.outputs == (y,):
                return number if with_bias(layers[name], made.op in FEATURES, constants[added]) else None
    return None


def _step(node: Node, found: Layer | None, layers: dict[str, Any], flat: Mapping[str, int]) -> Step:
    if found is not None:
        layers[node.name] = found.module
        return Step(node._replace(inputs=node.inputs[:1]), node.name, found.channels, found.rank)
    if node.outputs and node.outputs[0] in flat:
        channels = {"channels": flat[node.outputs[0]]}
        return Step(node._replace(op="FlattenChannelsLast", inputs=node.inputs[:1], attributes=channels))
    return Step(node)


def _program(graph: Graph, steps: Sequence[Step], constants: Mapping[str, np.ndarray]) -> Program:
    shapes = tuple(graph.shapes.get(name) for name in graph.inputs)
    images = (*(not graph.channels_last(name) for name in graph.inputs), *map(graph.image, graph.outputs))
    return Program(graph.inputs, shapes, images, graph.outputs, tuple(steps), {})


def check(graph: Graph, program: Program, layers: Mapping[str, Any], constants: Mapping[str, Any]) -> list[str]:
    """What goes wrong with an input of the shapes that the file says, found by tracing; [] if it leaves them open."""
    shapes = [shape and tuple(1 if size is None and not axis else size for axis, size in enumerate(shape))
              for shape in program.shapes]
    if any(shape is None or None in shape for shape in shapes):
        return []
    failures: list[str] = []

    def run(*arrays: Any) -> list[Any]:
        inputs = [array.transpose(0, 2, 3, 1) if image and array.ndim == 4 else array
                  for array, image in zip(arrays, program.images, strict=False)]
        return [output and output.array for output in program.run(layers, constants, inputs, failures)]

    dtypes = [dtype_of(graph.types.get(name, 1), known=False) for name in graph.inputs]
    jax.eval_shape(run, *(jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)))
    return failures
