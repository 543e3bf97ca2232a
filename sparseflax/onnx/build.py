"""An ONNX graph turned into Flax's layers and the steps that connect them."""

from __future__ import annotations

from typing import Any, NamedTuple

from sparseflax.onnx.builder import Builder, Step, Unsupported
from sparseflax.onnx.graph import Graph, Node
from sparseflax.onnx.nodes import BUILDERS
from sparseflax.onnx.read import malformed


class Network(NamedTuple):
    """What became of a graph.

    Attributes:
      layers: nnx.Conv, nnx.Linear and nnx.BatchNorm, by name of their nodes.
      steps: in the order in which they run.
      outputs: names of tensors.
      refused: nodes that cannot be run, and why.
    """

    layers: dict[str, Any]
    steps: list[Step]
    outputs: tuple[str, ...]
    refused: list[str]


def build(graph: Graph) -> Network:
    """Turns all nodes into steps, those with weights into layers; goes on after a node that it cannot turn."""
    builder = Builder(graph)
    for node in graph.nodes:
        try:
            _add(builder, node)
        except Unsupported as reason:
            builder.refused.append(f"{node}: {reason}")
    return Network(builder.layers, builder.steps, tuple(builder.renamed.get(name, name) for name in graph.outputs),
                   builder.refused)


def _add(builder: Builder, node: Node) -> None:
    if node.domain or node.op not in BUILDERS:
        raise Unsupported("unknown operator")
    if len(node.outputs) != 1:
        raise Unsupported(f"{len(node.outputs)} outputs, wanted one")
    if reason := malformed(node, builder.graph.opset):
        raise Unsupported(reason)
    if node.op == "Add" and builder.as_bias(node):
        return
    built = BUILDERS[node.op](builder, node)
    layer, settings = (None, built) if isinstance(built, dict) else (built, {})
    inputs = node.inputs if node.op in ("Add", "Concat", "Mul") else node.inputs[:1]  # the others are weights and settings
    if constant := [name for name in inputs if name in builder.graph.constants]:
        raise Unsupported(f"its input {constant[0]!r} is a constant, wanted a tensor that is computed")
    if layer is not None:
        builder.layers[node.name] = layer
    names = tuple(builder.renamed.get(name, name) for name in inputs)
    builder.steps.append(Step(node.op, None if layer is None else node.name, names, node.outputs[0],
                           tuple(sorted(settings.items()))))
