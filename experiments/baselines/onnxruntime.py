"""ONNX Runtime on its CPU provider, with bound inputs and outputs; it fuses the ReLU and blocks the layout itself."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from experiments.baselines import Rival, nchw, nhwc, oihw
from experiments.layers import Problem
from sparseflax.job.engines import onnx_runtime

needs = ("onnx", "onnxruntime")


def rivals(problem: Problem, threads: int) -> list[Rival]:
    engine = onnx_runtime(conv_model(problem), nchw(problem.x), threads)
    return [Rival("onnxruntime", engine.run, lambda _: nhwc(engine.outputs()[0]))]


def network(model: bytes, x: np.ndarray, threads: int) -> list[Rival]:
    engine = onnx_runtime(model, nchw(x), threads)
    return [Rival("onnxruntime", engine.run, lambda _: engine.outputs()[0])]


def network_int8(model: bytes, x: np.ndarray, threads: int) -> list[Rival]:
    """The same for a file in eight bits, see sparseflax/job/quantized.py."""
    return [replace(rival, name="onnxruntime int8", exact=False) for rival in network(model, x, threads)]


def conv_model(problem: Problem) -> bytes:
    """The layer as a serialized ONNX model: x (n, ic, ih, iw) -> y (n, oc, oh, ow)."""
    from onnx import TensorProto, helper, numpy_helper

    shape = problem.shape
    (top, bottom), (left, right) = shape.padding
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["c"], strides=shape.strides, dilations=shape.kernel_dilation,
                              pads=[top, left, bottom, right], group=shape.groups, kernel_shape=[shape.kh, shape.kw]),
             helper.make_node("Relu", ["c"], ["y"])]
    sizes = {"x": [shape.n, shape.ic, shape.ih, shape.iw], "y": [shape.n, shape.oc, shape.oh, shape.ow]}
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, size) for name, size in sizes.items())
    weights = [numpy_helper.from_array(oihw(problem.kernel), "w"), numpy_helper.from_array(problem.bias, "b")]
    model = helper.make_model(helper.make_graph(nodes, "conv", [x], [y], weights), opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    return model.SerializeToString()
