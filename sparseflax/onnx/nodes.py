"""What becomes of one ONNX node: a layer of Flax with its weights, or the settings of one of sparseflax.onnx_ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from flax import nnx

from sparseflax.onnx.builder import ZEROS, Builder, Unsupported, filled
from sparseflax.onnx.graph import Node

LINEAR = ("Gemm", "MatMul")


def _conv(builder: Builder, node: Node) -> nnx.Conv:
    kernel, groups = builder.constant(node, 1, "kernel", 4), node.attributes.get("group", 1)
    oc, icg, *size = kernel.shape
    window = _window(node, size)
    if 0 in kernel.shape or groups < 1 or oc % groups:
        raise Unsupported(f"group={groups} with a kernel of shape {kernel.shape}, wanted a divisor of its {oc} output channels")
    if tuple(window["kernel_shape"]) != tuple(size):
        raise Unsupported(f"its kernel_shape is {window['kernel_shape']}, its kernel {kernel.shape}")
    top, left, bottom, right = window["pads"]
    padding: Any = {"NOTSET": ((top, bottom), (left, right)), "SAME_UPPER": "SAME"}.get(window["auto_pad"], window["auto_pad"])
    builder.channels(node, icg * groups)
    bias = builder.bias(node, 2, oc)
    layer = nnx.Conv(icg * groups, oc, size, window["strides"], padding=padding, kernel_dilation=window["dilations"],
                     feature_group_count=groups, use_bias=bias is not None, kernel_init=ZEROS, rngs=nnx.Rngs(0))
    return filled(layer, kernel=kernel.transpose(2, 3, 1, 0), bias=bias)


def _gemm(builder: Builder, node: Node) -> nnx.Linear:
    if node.attributes.get("transA", 0):
        raise Unsupported("transA=1, wanted 0")
    kernel = builder.constant(node, 1, "B", 2)
    kernel = np.float32(node.attributes.get("alpha", 1.0)) * (kernel.T if node.attributes.get("transB", 0) else kernel)
    bias = builder.bias(node, 2, kernel.shape[1])
    return builder.linear(node, kernel, None if bias is None else np.float32(node.attributes.get("beta", 1.0)) * bias)


def _matmul(builder: Builder, node: Node) -> nnx.Linear:
    if len(builder.graph.shapes.get(node.inputs[0], (0, 0))) != 2:
        raise Unsupported(f"its input has shape {builder.graph.shapes[node.inputs[0]]}, wanted (n, features)")
    return builder.linear(node, builder.constant(node, 1, "right side", 2), None)


def _norm(builder: Builder, node: Node) -> nnx.BatchNorm:
    if node.attributes.get("training_mode", 0) or not node.attributes.get("spatial", 1):
        raise Unsupported("training_mode=1 or spatial=0, wanted a norm per channel with its running statistics")
    scale, bias, mean, var = (builder.constant(node, i, name, 1) for i, name in enumerate(("scale", "B", "mean", "var"), 1))
    if len({array.shape for array in (scale, bias, mean, var)}) > 1:
        raise Unsupported(f"its scale, B, mean and var have {scale.size}, {bias.size}, {mean.size} and {var.size} channels, "
                          "wanted the same")
    builder.channels(node, scale.size)
    layer = nnx.BatchNorm(scale.size, use_running_average=True, epsilon=node.attributes.get("epsilon", 1e-5), rngs=nnx.Rngs(0))
    return filled(layer, scale=scale, bias=bias, mean=mean, var=var)


def _none(builder: Builder, node: Node) -> dict[str, Any]:
    return {}


def _numbers(**defaults: float) -> Callable[[Builder, Node], dict[str, Any]]:
    """Attributes as they are, or what ONNX takes for them."""
    return lambda builder, node: {name: float(node.attributes.get(name, default)) for name, default in defaults.items()}


def _pixels(builder: Builder, node: Node) -> None:
    if (axes := builder.axes(node)) != (2, 3):
        raise Unsupported(f"axes {axes} of its input of shape {builder.graph.shapes.get(node.inputs[0])}, wanted rows and "
                          "columns of images, (2, 3)")


def _reduce_mean(builder: Builder, node: Node) -> dict[str, Any]:
    _pixels(builder, node)
    return {"keepdims": bool(node.attributes.get("keepdims", 1))}


def _squeeze(builder: Builder, node: Node) -> dict[str, Any]:
    _pixels(builder, node)
    return {}


def _clip(builder: Builder, node: Node) -> dict[str, Any]:
    bounds = {name: node.attributes.get(name, default) for name, default in (("min", -np.inf), ("max", np.inf))}
    for index, name in enumerate(bounds, 1):
        if index < len(node.inputs) and node.inputs[index]:
            bound = builder.constant(node, index, name)
            if bound.size != 1 or bound.dtype != np.float32:
                raise Unsupported(f"its {name} is {bound.dtype} of shape {bound.shape}, wanted one float32 number")
            bounds[name] = bound.item()
    return {"low": float(bounds["min"]), "high": float(bounds["max"])}


def _max_pool(builder: Builder, node: Node) -> dict[str, Any]:
    return _window(node) | {"ceil_mode": bool(node.attributes.get("ceil_mode", 0))}


def _average_pool(builder: Builder, node: Node) -> dict[str, Any]:
    return _max_pool(builder, node) | {"count_include_pad": bool(node.attributes.get("count_include_pad", 0))}


def _window(node: Node, size: Any = ()) -> dict[str, Any]:
    """What convolutions and pools have in common, with ONNX's defaults."""
    given = {"kernel_shape": size, "strides": (1, 1), "dilations": (1, 1), "pads": (0, 0, 0, 0)} | node.attributes
    window = {name: tuple(given[name]) for name in ("kernel_shape", "strides", "dilations", "pads")}
    if len(window["kernel_shape"]) != 2:
        raise Unsupported(f"kernel_shape={window['kernel_shape']}, wanted two dimensions")
    for name, least, length in (("kernel_shape", 1, 2), ("strides", 1, 2), ("dilations", 1, 2), ("pads", 0, 4)):
        if len(window[name]) != length or min(window[name]) < least:
            raise Unsupported(f"{name}={window[name]}, wanted {length} numbers, none below {least}")
    if node.attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise Unsupported(f"auto_pad={node.attributes['auto_pad']!r}, wanted NOTSET, VALID, SAME_UPPER or SAME_LOWER")
    return window | {"auto_pad": node.attributes.get("auto_pad", "NOTSET")}


def _concat(builder: Builder, node: Node) -> dict[str, Any]:
    return {"axis": node.attributes["axis"]}


def _flatten(builder: Builder, node: Node) -> dict[str, Any]:
    if node.attributes.get("axis", 1) != 1:
        raise Unsupported(f"axis={node.attributes['axis']}, wanted 1: (n, features)")
    return _image(builder, node)


def _reshape(builder: Builder, node: Node) -> dict[str, Any]:
    sizes = builder.constant(node, 1, "shape")
    if sizes.dtype != np.int64 or sizes.ndim != 1:
        raise Unsupported(f"its shape is {sizes.dtype} of shape {sizes.shape}, wanted a list of int64")
    shape = sizes.tolist()
    batch = builder.graph.shapes.get(node.inputs[0], (None,))[0]
    if len(shape) != 2 or shape[0] not in (0, -1, batch) or min(shape[0], shape[1]) < -1 or shape[1] == 0:
        raise Unsupported(f"shape={shape}, wanted (n, features): [0, -1]")
    return _image(builder, node) | ({"features": shape[1]} if shape[1] > 0 else {})


def _image(builder: Builder, node: Node) -> dict[str, Any]:
    """Leaves images in our order if nothing but fully connected layers takes them: their rows are put in this order too."""
    users = [user for user in builder.graph.nodes if node.outputs[0] in user.inputs]
    _, *image = builder.graph.shapes.get(node.inputs[0], (None,))
    if len(image) != 3 or None in image or node.outputs[0] in builder.graph.outputs or any(
            user.domain or user.op not in LINEAR or user.inputs[0] != node.outputs[0] for user in users):
        return {}
    c, h, w = image
    builder.images[node.outputs[0]] = h, w, c  # type: ignore[assignment]
    return {"image": (h, w, c)}


def _softmax(builder: Builder, node: Node) -> dict[str, Any]:
    joint = builder.graph.opset < 13
    return {"axis": node.attributes.get("axis", 1 if joint else -1), "joint": joint}


def _lrn(builder: Builder, node: Node) -> dict[str, Any]:
    if node.attributes["size"] < 1:
        raise Unsupported(f"size={node.attributes['size']}, wanted 1 or more channels")
    return {"alpha": 1e-4, "beta": 0.75, "bias": 1.0} | node.attributes


# By ONNX's name: a layer, or settings of one of sparseflax.onnx_ops.
BUILDERS: dict[str, Callable[[Builder, Node], Any]] = {
    "Add": _none, "AveragePool": _average_pool, "BatchNormalization": _norm, "Clip": _clip, "Concat": _concat, "Conv": _conv,
    "Flatten": _flatten, "Gemm": _gemm, "GlobalAveragePool": _none, "HardSigmoid": _numbers(alpha=0.2, beta=0.5),
    "HardSwish": _none, "LeakyRelu": _numbers(alpha=0.01), "LRN": _lrn, "MatMul": _matmul, "MaxPool": _max_pool, "Mul": _none,
    "ReduceMean": _reduce_mean, "Relu": _none, "Reshape": _reshape, "Sigmoid": _none, "Softmax": _softmax, "Squeeze": _squeeze,
    "Tanh": _none,
}
