"""ONNX Runtime on its CPU provider, with bound inputs and outputs; it fuses the ReLU and blocks the layout itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.baselines import Rival, nchw, nhwc, oihw
from experiments.layers import Problem

needs = ("onnx", "onnxruntime")


def rivals(problem: Problem, threads: int) -> list[Rival]:
    run, output = _bound(conv_model(problem), problem.x, threads)
    return [Rival("onnxruntime", run, lambda _: nhwc(output()))]


def network(model: bytes, x: np.ndarray, threads: int) -> list[Rival]:
    run, output = _bound(model, x, threads)
    return [Rival("onnxruntime", run, lambda _: output())]


def _bound(model: bytes, x: np.ndarray, threads: int) -> tuple[Callable[[], Any], Callable[[], np.ndarray]]:
    """(runs x (n, h, w, c) through the model, returns what it then has in its output)."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or it disturbs whoever is timed next
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    y = onnxruntime.OrtValue.ortvalue_from_shape_and_type(session.get_outputs()[0].shape, "float32")
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(nchw(x)))
    binding.bind_ortvalue_output("y", y)
    return lambda: session.run_with_iobinding(binding), lambda: y.numpy()


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
