"""Images that may be flattened in our order: only fully connected layers take them, whose rows are put in that order."""

from __future__ import annotations

from typing import Any

import numpy as np

from sparseflax.onnx.graph import Graph, Node, Shape
from sparseflax.onnx.layers import FEATURES
from sparseflax.onnx.older import SHARED

KEEP = "MaxPool", "QLinearAveragePool", "QLinearLeakyRelu", "QLinearSigmoid"  # channels, where ONNX knows no shape


def flattened(graph: Graph) -> dict[str, int]:
    """Images that may be flattened in our order, as nothing but fully connected layers takes them: (name of the result,
    channels)."""
    found = {}
    for node in graph.nodes:
        if node.domain or node.op not in ("Flatten", "Reshape") or len(node.outputs) != 1 or not node.inputs:
            continue
        image, (result,) = _image(graph, node.inputs[0]), node.outputs
        if len(image) != 4 or image[1] is None or result in graph.outputs:
            continue
        if node.op == "Flatten":
            flat = node.attributes.get("axis", 1) == 1
        else:
            given: Any = graph.constants.get(node.inputs[-1], node.attributes.get("shape", ()))
            sizes = np.ravel(given).tolist()
            flat = len(sizes) == 2 and sizes[0] in (0, -1, image[0]) and (sizes[1] > 0 or sizes[0] != -1) and None not in image
        if flat and _only_rows(graph, result):
            found[result] = image[1]
    return found


def _image(graph: Graph, name: str) -> Shape:
    """The shape of a tensor; where nobody tells it, as behind ONNX Runtime's own operators, an image's channels at least."""
    maker = next((node for node in graph.nodes if name in node.outputs), None)
    if name in graph.shapes or maker is None:
        return graph.shapes.get(name, ())
    if maker.op == "QLinearConv":
        weights = graph.constants.get(maker.inputs[3])
        return () if weights is None or weights.ndim != 4 else (None, len(weights), None, None)
    return _image(graph, maker.inputs[0]) if maker.op in KEEP else ()


def _only_rows(graph: Graph, name: str) -> bool:
    """Whether nothing but fully connected layers is sure to take a matrix, as it is or rounded."""
    def takes(user: Node) -> bool:
        if user.inputs[0] != name:
            return False
        if user.op == "RoundedToItsRange":
            return _only_rows(graph, user.outputs[0])
        if user.op not in SHARED:
            return _is_layer(graph, user)
        one = user.inputs[1] in graph.constants and graph.constants[user.inputs[1]].size == 1
        return one and user.outputs[0] not in graph.outputs and _only_rows(graph, user.outputs[0])

    users = graph.users(name)
    return bool(users) and all(map(takes, users))


def _is_layer(graph: Graph, node: Node) -> bool:
    """Whether a node is sure to become a fully connected layer of its first input."""
    if node.attributes.get("transA") or node.domain and node.op != "QGemm":
        return False
    if node.op in FEATURES:
        weights = [_dequantized(graph, name) for name in node.inputs[1:]]
    elif node.op in ("QGemm", "QLinearMatMul") and all(name in graph.constants for name in node.inputs[1:] if name):
        bias = node.inputs[6:7] if node.op == "QGemm" else ()
        weights = [graph.constants[name] for name in (node.inputs[3], *bias) if name]
    else:
        return False
    known = [array.ndim for array in weights if array is not None]
    return known in ([2], [2, 1]) and len(known) == len(weights)


def _dequantized(graph: Graph, name: str) -> np.ndarray | None:
    """A constant of float32, or the integers that are dequantized to it; None for what is no constant."""
    if name in graph.constants:
        return graph.constants[name] if graph.constants[name].dtype == np.float32 else None
    maker = next((node for node in graph.nodes if name in node.outputs), None)
    if maker is None or maker.op != "DequantizeLinear" or any(given and given not in graph.constants for given in maker.inputs):
        return None
    return graph.constants[maker.inputs[0]]
