"""OpenVINO's CPU plugin in float32, one stream, inputs and outputs in place."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from experiments.baselines import Rival, nchw, nhwc, oihw
from experiments.layers import Problem

needs = ("openvino",)


def rivals(problem: Problem, threads: int) -> list[Rival]:
    openvino = _package()
    ops = openvino.opset13
    shape = problem.shape
    (top, bottom), (left, right) = shape.padding
    window = list(shape.strides), [top, left], [bottom, right], list(shape.kernel_dilation)
    x = ops.parameter([shape.n, shape.ic, shape.ih, shape.iw], openvino.Type.f32)
    weights = oihw(problem.kernel)
    if shape.groups == 1:
        conv = ops.convolution(x, ops.constant(weights), *window)
    else:
        conv = ops.group_convolution(x, ops.constant(weights.reshape(shape.groups, -1, *weights.shape[1:])), *window)
    y = ops.relu(ops.add(conv, ops.constant(problem.bias.reshape(1, -1, 1, 1))))
    request = _request(openvino.Model([y], [x]), problem.x, threads)
    return [Rival("openvino", lambda: request.infer(share_outputs=True), lambda _: nhwc(request.get_output_tensor().data))]


def network(model: bytes, x: np.ndarray, threads: int) -> list[Rival]:
    request = _request(_package().Core().read_model(model, b""), x, threads)
    return [Rival("openvino", lambda: request.infer(share_outputs=True), lambda _: request.get_output_tensor().data)]


def _request(model: Any, x: np.ndarray, threads: int) -> Any:
    """An inference request for x (n, h, w, c)."""
    # Without the first it would compute in bfloat16 where the CPU can; without the last it would move our threads.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1,
                "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
    openvino = _package()
    request = openvino.compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(nchw(x)))
    return request


def _package() -> Any:  # its stubs lack what it exports
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # importing openvino would report it home
    import openvino
    import openvino.opset13

    return openvino
