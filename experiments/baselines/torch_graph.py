"""PyTorch's form of the ONNX networks that experiments/export_onnx.py writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F


def torch_graph(model: bytes) -> torch.fx.GraphModule:
    """The network as straight-line PyTorch code, as a module written by hand would run: (n, c, h, w) -> (n, classes).

    Raises:
      ValueError: an operator that is not known here.
    """
    import onnx

    graph, built, values, root = onnx.load_from_string(model).graph, torch.fx.Graph(), {}, torch.nn.Module()
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    values[graph.input[0].name] = built.placeholder("x")
    for node in graph.node:
        for name in node.input:
            if name not in values:
                root.register_buffer(name, torch.from_numpy(np.array(constants[name])))
                values[name] = built.get_attr(name)
        attributes = {entry.name: onnx.helper.get_attribute_value(entry) for entry in node.attribute}
        function, arguments = _call(node.op_type, [values[name] for name in node.input], attributes,
                                    [constants.get(name) for name in node.input])
        values[node.output[0]] = built.call_function(function, arguments[0], arguments[1]) if function else arguments[0][0]
    built.output(values[graph.output[0].name])
    return torch.fx.GraphModule(root, built)


def _call(op: str, inputs: list[Any], attributes: dict[str, Any], constants: list[Any]) -> tuple[Any, tuple[tuple, dict]]:
    """(function or None for nothing to do, (its arguments, its keyword arguments))."""
    if op == "Conv":
        x, weight, *bias = inputs
        return F.conv2d, ((x, weight, bias[0] if bias else None, tuple(attributes["strides"]), _padding(attributes),
                           tuple(attributes["dilations"]), attributes["group"]), {})
    if op == "ConvTranspose":
        x, weight, *bias = inputs
        return F.conv_transpose2d, ((x, weight, bias[0] if bias else None, tuple(attributes["strides"]),
                                     _padding(attributes)), {})
    if op == "Gemm":
        x, weight, *bias = inputs
        return _linear, ((x, weight, *bias), {})
    if op == "BatchNormalization":
        x, scale, shift, mean, var = inputs
        return F.batch_norm, ((x, mean, var, scale, shift), {"eps": attributes["epsilon"]})
    if op == "MaxPool":
        pads = attributes["pads"]
        return F.max_pool2d, ((inputs[0], tuple(attributes["kernel_shape"]), tuple(attributes["strides"]), tuple(pads[:2])),
                              {"ceil_mode": pads[:2] != pads[2:]})  # a last window hangs over: PyTorch's way to pad there
    if op == "AveragePool":
        return F.avg_pool2d, ((inputs[0], tuple(attributes["kernel_shape"]), tuple(attributes["strides"]),
                               _padding(attributes)), {})
    if op == "LRN":
        return F.local_response_norm, ((inputs[0], attributes["size"], attributes["alpha"], attributes["beta"],
                                        attributes["bias"]), {})
    if op == "Clip":
        return F.hardtanh, ((inputs[0], float(constants[1]), float(constants[2])), {})
    if op == "Concat":
        return torch.cat, ((inputs, 1), {})
    simple = {"Relu": F.relu, "Add": torch.add, "Sub": torch.sub, "Mul": torch.mul, "Flatten": _flatten,
              "GlobalAveragePool": _pool}
    if op in simple:
        return simple[op], (tuple(inputs), {})
    if op == "Identity":
        return None, ((inputs[0],), {})
    raise ValueError(f"{op} has no form in PyTorch here: add it to experiments/baselines/torch_graph.py")


def _padding(attributes: dict[str, Any]) -> tuple[int, ...]:
    pads = tuple(attributes["pads"])
    if pads[:2] != pads[2:]:
        raise ValueError(f"pads={pads}, wanted the same on both sides: PyTorch pads both alike")
    return pads[:2]


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.addmm(bias, x, weight)


def _flatten(x: torch.Tensor) -> torch.Tensor:
    return torch.flatten(x, 1)


def _pool(x: torch.Tensor) -> torch.Tensor:
    return F.adaptive_avg_pool2d(x, 1)
