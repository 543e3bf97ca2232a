"""Nodes of older operator sets, and of quantized networks, in the words of the newest: what `ops` computes."""

from __future__ import annotations

from collections.abc import Iterator

from sparseflax.onnx.graph import Node


def newer(node: Node, opset: int) -> Iterator[Node]:
    """Nodes that compute what `node` computes in operator set `opset`; quantized ones on float32 between."""
    attributes = {name: given for name, given in node.attributes.items() if name != "consumed_inputs"}
    node = node._replace(attributes=attributes)
    if node.op in ("Softmax", "LogSoftmax", "Hardmax") and opset < 13:
        node = node._replace(attributes={"axis": 1} | attributes | {"joint": True})
    elif node.op == "Resize" and opset < 11:
        node = node._replace(op="Upsample")
    elif node.op == "Split" and not (len(node.inputs) > 1 or "split" in attributes or "num_outputs" in attributes):
        node = node._replace(attributes=attributes | {"num_outputs": len(node.outputs)})
    elif node.op == "PRelu" and opset < 7:
        node = node._replace(attributes={"axis": 1, "broadcast": 1})
    if node.op in QUANTIZED:
        yield from QUANTIZED[node.op](node)
    else:
        yield node


def _qlinear_conv(node: Node) -> Iterator[Node]:
    x, xs, xz, w, ws, wz, ys, yz, *bias = node.inputs
    yield _part(node, "DequantizeLinear", "x", x, xs, xz)
    yield _part(node, "DequantizeLinear", "w", w, ws, wz, axis=0)
    if bias:
        yield _part(node, "Mul", "s", xs, ws)
        yield _part(node, "DequantizeLinear", "b", bias[0], f"{node.name}.s", axis=0)
    yield node._replace(op="Conv", inputs=tuple(f"{node.name}.{name}" for name in ("x", "w", *("b" for _ in bias))),
                        outputs=(f"{node.name}.y",))
    yield node._replace(op="QuantizeLinear", name=f"{node.name}.q", inputs=(f"{node.name}.y", ys, yz), attributes={})


def _qlinear_matmul(node: Node) -> Iterator[Node]:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = node.inputs
    yield _part(node, "DequantizeLinear", "a", a, a_scale, a_zero, axis=-2)
    yield _part(node, "DequantizeLinear", "b", b, b_scale, b_zero, axis=-1)
    yield node._replace(op="MatMul", inputs=(f"{node.name}.a", f"{node.name}.b"), outputs=(f"{node.name}.y",))
    yield node._replace(op="QuantizeLinear", name=f"{node.name}.q", inputs=(f"{node.name}.y", y_scale, y_zero), attributes={})


def _integer(op: str, x_axis: int, w_axis: int):
    def expand(node: Node) -> Iterator[Node]:
        x, w, x_zero, w_zero = (*node.inputs, "", "")[:4]
        yield _part(node, "Shifted", "x", x, x_zero, axis=x_axis)
        yield _part(node, "Shifted", "w", w, w_zero, axis=w_axis)
        yield node._replace(op=op, inputs=(f"{node.name}.x", f"{node.name}.w"), outputs=(f"{node.name}.y",))
        yield node._replace(op="Rounded", name=f"{node.name}.q", inputs=(f"{node.name}.y",), attributes={})

    return expand


def _part(node: Node, op: str, name: str, *inputs: str, **attributes: int) -> Node:
    return Node(op, "", f"{node.name}.{name}", inputs, (f"{node.name}.{name}",), attributes)


QUANTIZED = {"ConvInteger": _integer("Conv", 1, 0), "MatMulInteger": _integer("MatMul", -2, -1), "QLinearConv": _qlinear_conv,
             "QLinearMatMul": _qlinear_matmul}
