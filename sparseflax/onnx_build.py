"""An ONNX graph turned into Flax's layers and the steps that connect them."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from sparseflax.onnx_graph import Graph, Node, malformed
from sparseflax.onnx_nodes import BUILDERS, ZEROS, Unsupported, filled


class Step(NamedTuple):
    """One operation: of the layer called `layer`, or ONNX's operator `op` with `settings`."""

    op: str
    layer: str | None
    inputs: tuple[str, ...]
    output: str
    settings: tuple[tuple[str, Any], ...]


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
            builder.add(node)
        except Unsupported as reason:
            builder.refused.append(f"{node}: {reason}")
    return Network(builder.layers, builder.steps, tuple(builder.renamed.get(name, name) for name in graph.outputs),
                   builder.refused)


class Builder:
    """The network as far as it is built."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self.layers: dict[str, Any] = {}
        self.steps: list[Step] = []
        self.refused: list[str] = []
        self.images: dict[str, tuple[int, int, int]] = {}  # a tensor flattened in our order: (h, w, c) of its images
        self.renamed: dict[str, str] = {}  # the output of an addition that became a bias: the layer's output
        self.makers = {node.outputs[0]: node for node in graph.nodes if node.outputs}
        self.uses = Counter([*graph.outputs, *(name for node in graph.nodes for name in node.inputs)])

    def add(self, node: Node) -> None:
        if node.domain or node.op not in BUILDERS:
            raise Unsupported("unknown operator")
        if len(node.outputs) != 1:
            raise Unsupported(f"{len(node.outputs)} outputs, wanted one")
        if reason := malformed(node, self.graph.opset):
            raise Unsupported(reason)
        if node.op == "Add" and self._as_bias(node):
            return
        built = BUILDERS[node.op](self, node)
        layer, settings = (None, built) if isinstance(built, dict) else (built, {})
        inputs = node.inputs if node.op in ("Add", "Concat", "Mul") else node.inputs[:1]  # the others are weights and settings
        if constant := [name for name in inputs if name in self.graph.constants]:
            raise Unsupported(f"its input {constant[0]!r} is a constant, wanted a tensor that is computed")
        if layer is not None:
            self.layers[node.name] = layer
        names = tuple(self.renamed.get(name, name) for name in inputs)
        self.steps.append(Step(node.op, None if layer is None else node.name, names, node.outputs[0],
                               tuple(sorted(settings.items()))))

    def constant(self, node: Node, index: int, what: str, rank: int | None = None) -> np.ndarray:
        """The node's input `index`, which has to be a constant; weights have a rank and are float32."""
        value = self.graph.constants.get(node.inputs[index]) if index < len(node.inputs) else None
        if value is None:
            raise Unsupported(f"its {what} is computed, wanted a constant")
        if rank is not None and value.dtype != np.float32:
            raise Unsupported(f"its {what} is {value.dtype}, wanted float32")
        if rank is not None and value.ndim != rank:
            raise Unsupported(f"its {what} has shape {value.shape}, wanted {rank} dimensions")
        return value

    def bias(self, node: Node, index: int, features: int) -> np.ndarray | None:
        """The node's input `index` as (features,); None where there is none."""
        if index >= len(node.inputs) or not node.inputs[index]:
            return None
        value = self.constant(node, index, "bias")
        if value.dtype != np.float32 or value.size not in (1, features) or value.shape[-1:] not in ((), (1,), (features,)):
            raise Unsupported(f"its bias is {value.dtype} of shape {value.shape}, wanted float32 ({features},)")
        return np.broadcast_to(value.reshape(-1), (features,))

    def linear(self, node: Node, kernel: np.ndarray, bias: np.ndarray | None) -> nnx.Linear:
        """A fully connected layer (ic, oc); its rows put in our order where it takes flattened images."""
        if 0 in kernel.shape:
            raise Unsupported(f"its weights have shape {kernel.shape}, wanted no size of 0")
        if (image := self.images.get(node.inputs[0])) is not None:
            h, w, c = image
            if h * w * c != len(kernel):
                raise Unsupported(f"its weights take {len(kernel)} features, its input has {h} x {w} x {c}")
            kernel = kernel.reshape(c, h, w, -1).transpose(1, 2, 0, 3).reshape(kernel.shape)
        self.channels(node, len(kernel))
        layer = nnx.Linear(*kernel.shape, use_bias=bias is not None, kernel_init=ZEROS, rngs=nnx.Rngs(0))
        return filled(layer, kernel=kernel, bias=bias)

    def channels(self, node: Node, wanted: int) -> None:
        """Refuses an input that is known to have other channels, or features, than the node's weights take."""
        found = self.graph.shapes.get(node.inputs[0], ())[1:2]
        if found not in ((), (None,), (wanted,)):
            raise Unsupported(f"its weights take {wanted} channels, its input has {found[0]}")

    def axes(self, node: Node) -> tuple[int, ...]:
        """Of a node that wants some, in an attribute or, since operator set 13 or 18, as its second input; in order."""
        rank = len(self.graph.shapes.get(node.inputs[0], (0,) * 4))
        axes = node.attributes.get("axes") or self.constant(node, 1, "list of axes")
        if np.asarray(axes).dtype.kind != "i":
            raise Unsupported(f"its axes are {np.asarray(axes).dtype}, wanted int64")
        return tuple(sorted(axis % rank for axis in np.ravel(axes).tolist())) if rank == 4 else ()

    def _as_bias(self, node: Node) -> bool:
        """Puts a constant that is added to a layer's output into the layer, if it has no bias yet."""
        for tensor, constant in (node.inputs, node.inputs[::-1]):
            maker = self.makers.get(tensor)
            layer = self.layers.get(maker.name) if maker else None
            value = self.graph.constants.get(constant)
            if not isinstance(layer, nnx.Conv | nnx.Linear) or value is None or layer.bias is not None:
                continue
            trailing = (1, 1) if isinstance(layer, nnx.Conv) else ()
            vector = value.reshape(value.shape[:-2]) if trailing and value.shape[-2:] == trailing else value
            if trailing and vector is value and value.size > 1:
                continue
            if (self.uses[tensor] == 1 and value.dtype == np.float32 and vector.size in (1, layer.out_features)
                    and vector.shape[-1:] in ((), (1,), (layer.out_features,)) and vector.ndim <= 2):
                layer.use_bias = True
                filled(layer, bias=np.broadcast_to(vector.reshape(-1), (layer.out_features,)))
                self.renamed[node.outputs[0]] = tensor
                return True
        return False
