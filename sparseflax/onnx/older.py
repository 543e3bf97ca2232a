"""Nodes of older operator sets, and of quantized networks, in the words of the newest: what `ops` computes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sparseflax.onnx.graph import Node


def newer(node: Node, opset: int) -> Iterator[Node]:
    """Nodes that compute what `node` computes in operator set `opset`; quantized ones on float32 between."""
    attributes = {name: given for name, given in node.attributes.items() if name != "consumed_inputs"}
    node = node._replace(attributes=attributes)
    if node.op in SHARED:
        node = node._replace(domain="")
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
    yield from _with_bias(node, "Conv", xs, ws, *bias)
    yield _rounded(node, ys, yz)


def _qgemm(node: Node) -> Iterator[Node]:
    a, a_scale, a_zero, b, b_scale, b_zero, *rest = node.inputs
    bias, y_scale, y_zero = (*rest, "", "", "")[:3]
    attributes = node.attributes | {"beta": node.attributes.get("alpha", 1.0)}  # the bias has the scale of the products
    yield _part(node, "DequantizeLinear", "x", a, a_scale, a_zero)
    yield _part(node, "DequantizeLinear", "w", b, b_scale, b_zero, axis=0 if attributes.get("transB") else 1)
    yield from _with_bias(node._replace(attributes=attributes), "Gemm", a_scale, b_scale, *filter(None, [bias]))
    yield _rounded(node, y_scale, y_zero) if y_scale else _part(node, "Identity", "y")._replace(outputs=node.outputs)


def _with_bias(node: Node, op: str, x_scale: str, w_scale: str, *bias: str) -> Iterator[Node]:
    """The products of "x" and "w" and the sum with a bias of int32."""
    if bias:
        yield _part(node, "Mul", "s", x_scale, w_scale)
        yield _part(node, "DequantizeLinear", "b", bias[0], f"{node.name}.s", axis=0)
    inputs = tuple(f"{node.name}.{name}" for name in ("x", "w", *("b" for _ in bias)))
    yield node._replace(op=op, domain="", inputs=inputs, outputs=(f"{node.name}.y",))


def _on_floats(op: str, count: int = 1):
    """ONNX Runtime's operator on `count` images of 8 bits, each with its scale and zero point, as ONNX's on float32."""
    def expand(node: Node) -> Iterator[Node]:
        y_scale, y_zero = (*node.inputs, "", "")[3 * count:3 * count + 2]
        yield from _dequantized(node, node.inputs[:3 * count])
        inputs = tuple(f"{node.name}.x{i}" for i in range(count))
        attributes = {name: given for name, given in node.attributes.items() if (name, given) != ("channels_last", 0)}
        yield node._replace(op=op, domain="", inputs=inputs, outputs=(f"{node.name}.y",), attributes=attributes)
        yield _rounded(node, y_scale, y_zero)

    return expand


def _qlinear_concat(node: Node) -> Iterator[Node]:
    y_scale, y_zero, *images = node.inputs
    yield from _dequantized(node, images)
    inputs = tuple(f"{node.name}.x{i}" for i in range(len(images[::3])))
    yield node._replace(op="Concat", domain="", inputs=inputs, outputs=(f"{node.name}.y",))
    yield _rounded(node, y_scale, y_zero)


def _dequantized(node: Node, images: Sequence[str]) -> Iterator[Node]:
    """Images, each with its scale and zero point behind it, as float32."""
    for i in range(0, len(images), 3):
        yield _part(node, "DequantizeLinear", f"x{i // 3}", *images[i:i + 3])


def _rounded(node: Node, scale: str, zero: str) -> Node:
    return Node("QuantizeLinear", "", f"{node.name}.q", (f"{node.name}.y", scale, zero), node.outputs, {})


def _qlinear_matmul(node: Node) -> Iterator[Node]:
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = node.inputs
    yield _part(node, "DequantizeLinear", "a", a, a_scale, a_zero, axis=-2)
    yield _part(node, "DequantizeLinear", "b", b, b_scale, b_zero, axis=-1)
    yield node._replace(op="MatMul", inputs=(f"{node.name}.a", f"{node.name}.b"), outputs=(f"{node.name}.y",))
    yield _rounded(node, y_scale, y_zero)


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


SHARED = "QuantizeLinear", "DequantizeLinear"  # which ONNX Runtime has of its own, too, in the domain com.microsoft
# Of ONNX Runtime's own alone, in that domain.
CONTRIBUTED = {
    "QGemm": _qgemm, "QLinearAdd": _on_floats("Add", 2), "QLinearAveragePool": _on_floats("AveragePool"),
    "QLinearConcat": _qlinear_concat, "QLinearGlobalAveragePool": _on_floats("GlobalAveragePool"),
    "QLinearLeakyRelu": _on_floats("LeakyRelu"), "QLinearMul": _on_floats("Mul", 2), "QLinearSigmoid": _on_floats("Sigmoid")}
QUANTIZED = {"ConvInteger": _integer("Conv", 1, 0), "MatMulInteger": _integer("MatMul", -2, -1), "QLinearConv": _qlinear_conv,
             "QLinearMatMul": _qlinear_matmul} | CONTRIBUTED
