"""OpenVINO's CPU plugin in float32, one stream, inputs and outputs in place."""

from __future__ import annotations

import sys
from typing import Any

from experiments.baselines import Rival, nchw, nhwc, oihw
from experiments.layers import Problem

needs = ("openvino",)


def rivals(problem: Problem, threads: int) -> list[Rival]:
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # importing openvino would report it home
    import openvino as package
    from openvino import opset13 as ops  # type: ignore[attr-defined]

    openvino: Any = package  # its stubs lack what it exports

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
    # Without the first it would compute in bfloat16 where the CPU can; without the last it would move our threads.
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1,
                "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False}
    request = openvino.compile_model(openvino.Model([y], [x]), "CPU", settings).create_infer_request()
    request.set_input_tensor(openvino.Tensor(nchw(problem.x)))
    return [Rival("openvino", lambda: request.infer(share_outputs=True), lambda _: nhwc(request.get_output_tensor().data))]
