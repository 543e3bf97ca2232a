"""OpenVINO's CPU plugin, one stream, inputs and outputs in place: pinned to float32, and by default where that is less."""

from __future__ import annotations

import numpy as np

from experiments.baselines import Rival, nchw, nhwc, oihw
from experiments.layers import Problem
from sparseflax.job.engines import openvino, openvino_package, openvino_request

needs = ("openvino",)


def rivals(problem: Problem, threads: int) -> list[Rival]:
    package = openvino_package()
    ops = package.opset13
    shape = problem.shape
    (top, bottom), (left, right) = shape.padding
    window = list(shape.strides), [top, left], [bottom, right], list(shape.kernel_dilation)
    x = ops.parameter([shape.n, shape.ic, shape.ih, shape.iw], package.Type.f32)
    weights = oihw(problem.kernel)
    if shape.groups == 1:
        conv = ops.convolution(x, ops.constant(weights), *window)
    else:
        conv = ops.group_convolution(x, ops.constant(weights.reshape(shape.groups, -1, *weights.shape[1:])), *window)
    y = ops.relu(ops.add(conv, ops.constant(problem.bias.reshape(1, -1, 1, 1))))
    request = openvino_request(package.Model([y], [x]), nchw(problem.x), threads)
    return [Rival("openvino", lambda: request.infer(share_outputs=True), lambda _: nhwc(request.get_output_tensor().data))]


def network(model: bytes, x: np.ndarray, threads: int) -> list[Rival]:
    run, outputs = openvino(model, nchw(x), threads)
    pinned = Rival("openvino", run, lambda _: outputs()[0])
    return [pinned, *_by_default(model, x, threads)]


def network_int8(model: bytes, x: np.ndarray, threads: int) -> list[Rival]:
    """The same for a file in eight bits, see quantized.py."""
    run, outputs = openvino(model, nchw(x), threads)
    return [Rival("openvino int8", run, lambda _: outputs()[0], exact=False)]


def _by_default(model: bytes, x: np.ndarray, threads: int) -> list[Rival]:
    """In bfloat16 or float16, where this CPU has instructions for it and OpenVINO takes them unasked; else nobody."""
    precision = openvino_package().Core().get_property("CPU", "INFERENCE_PRECISION_HINT").get_type_name()
    if precision in ("f32", "dynamic", "undefined"):
        return []
    run, outputs = openvino(model, nchw(x), threads, precision=precision)
    return [Rival(f"openvino {precision}", run, lambda _: outputs()[0], exact=False)]
