"""A network half built from an ONNX graph: what the nodes so far became, and what a node may ask of the rest."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseflax.onnx.graph import Graph, Node

ZEROS = nnx.initializers.zeros_init()


class Step(NamedTuple):
    """One operation: of the layer called `layer`, or ONNX's operator `op` with `settings`."""

    op: str
    layer: str | None
    inputs: tuple[str, ...]
    output: str
    settings: tuple[tuple[str, Any], ...]


class Unsupported(ValueError):
    """Why a node cannot be run."""


def filled(layer: Any, **arrays: np.ndarray | None) -> Any:
    """`layer` with these weights."""
    for name, array in arrays.items():
        if array is not None:
            kind = nnx.BatchStat if name in ("mean", "var") else nnx.Param
            setattr(layer, name, kind(jnp.asarray(np.ascontiguousarray(array))))
    return layer


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

    def as_bias(self, node: Node) -> bool:
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
