"""Layers of integers with the scales around them, in the words of float32 ones: what ONNX Runtime's `quantize_dynamic` writes.

    q, s, z = DynamicQuantizeLinear(x)            or   q = QuantizeLinear(x, s, z)
    y = Cast(ConvInteger(q, w, z, w_zero)) * (s * w_scale)

is Conv(x, DequantizeLinear(w, w_scale, w_zero)) of an x that is rounded by the range that it has, or by s and z.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from sparseflax.layers.int8 import Int8Conv
from sparseflax.onnx.graph import Graph, Node
from sparseflax.onnx.ops.quantized import rounded_to_its_range
from sparseflax.onnx.value import value

FLOATS = {"ConvInteger": ("Conv", 0), "MatMulInteger": ("MatMul", -1)}  # and the axis of the output channels of weights
QUANTIZES = "DynamicQuantizeLinear", "QuantizeLinear"
FLOAT = 1  # ONNX's number of float32


class RoundsToRange(nnx.Module):
    """A layer whose input is rounded to uint8 by the range that it has; one in eight bits rounds it by a range of its own."""

    def __init__(self, layer: Any):
        self.layer = layer

    def __call__(self, x: Any) -> Any:
        return self.layer(x if isinstance(self.layer, Int8Conv) else rounded_to_its_range(value(x)).array)


def on_floats(graph: Graph) -> Graph:
    """The graph with such layers as those of float32; layers of integers without these scales stay as they are."""
    makers = {name: node for node in graph.nodes if not node.domain for name in node.outputs if name}
    uses = Counter([*(name for node in graph.nodes for name in node.inputs), *graph.outputs])
    constants, nodes, replaced = dict(graph.constants), list[Node](), set[str]()
    for node in graph.nodes:
        found = _layer(node, makers, uses, constants)
        if found is None:
            nodes.append(node)
        else:
            nodes += found[0]
            replaced |= found[1]
    wanted, kept = set(graph.outputs), list[Node]()  # others may still take what layers were made of
    for node in reversed(nodes):
        if not replaced.intersection(node.outputs) or wanted.intersection(node.outputs):
            wanted.update(node.inputs)
            kept.append(node)
    return graph._replace(nodes=tuple(kept[::-1]), constants=constants)


def _layer(scaled: Node, makers: Mapping[str, Node], uses: Counter[str], constants: dict[str, np.ndarray]
           ) -> tuple[list[Node], set[str]] | None:
    """A layer on float32 whose last operation is this one, and the outputs of nodes that it stands for; None for another node.

    Args:
      scaled: multiplies sums of integers by their scales.
      makers: of tensors, by their names.
      uses: how often a tensor is taken.
      constants: by name; a layer may need another.
    """
    if scaled.op != "Mul" or scaled.domain or len(scaled.inputs) != 2:
        return None
    for product, scales in (scaled.inputs, scaled.inputs[::-1]):
        cast = makers.get(product)
        layer = makers.get(cast.inputs[0]) if cast and cast.op == "Cast" and cast.attributes.get("to") == FLOAT else None
        if cast is None or layer is None or layer.op not in FLOATS or uses[product] > 1 or uses[cast.inputs[0]] > 1:
            continue
        x, w, x_zero, w_zero = (*layer.inputs, "", "")[:4]
        quantize = makers.get(x)
        if quantize is None or quantize.op not in QUANTIZES or x != quantize.outputs[0]:
            continue
        dynamic = quantize.op == "DynamicQuantizeLinear"
        x_scale, zero = (*(quantize.outputs if dynamic else quantize.inputs), "", "")[1:3]
        if zero != x_zero or dynamic and not zero:
            continue
        w_scale = _weight_scale(scales, x_scale, makers, constants, layer)
        if w_scale is None:
            continue
        op, axis = FLOATS[layer.op]
        rounded, weights = f"{layer.name}.rounded", f"{layer.name}.w"
        if dynamic:
            first = Node("RoundedToItsRange", "", rounded, quantize.inputs, (rounded,), {})
        else:
            first = Node("DequantizeLinear", "", rounded, (x, x_scale, x_zero), (rounded,), {})
        made = [first, Node("DequantizeLinear", "", weights, (w, w_scale, w_zero), (weights,), {"axis": axis}),
                layer._replace(op=op, inputs=(rounded, weights), outputs=scaled.outputs)]
        maker = makers.get(scales)
        return made, {name for node in (quantize, layer, cast, maker) if node is not None for name in node.outputs if name}
    return None


def _weight_scale(scales: str, x_scale: str, makers: Mapping[str, Node], constants: dict[str, np.ndarray], layer: Node
                  ) -> str | None:
    """The constant that is the scale of a layer's weights, one or one for each feature; None where there is none."""
    maker, own = makers.get(scales), f"{layer.name}.scale"
    if scales == x_scale:
        constants[own] = np.ones((), np.float32)
    elif maker is not None and maker.op == "Mul" and x_scale in maker.inputs:
        own = next((name for name in maker.inputs if name != x_scale), "")
    elif scales in constants and x_scale in constants and constants[x_scale].size == 1 and constants[x_scale].item():
        constants[own] = constants[scales] / constants[x_scale].reshape(())
    scale, weights = constants.get(own), constants.get(layer.inputs[1])
    if scale is None or weights is None or scale.dtype != np.float32:
        return None
    if layer.op == "MatMulInteger":
        return own if scale.shape in ((), (1,), weights.shape[1:]) and weights.ndim == 2 else None
    return own if scale.size == 1 and scale.ndim <= weights.ndim else None
