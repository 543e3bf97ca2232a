"""OpenVINO's CPU plugin in float32, one stream, inputs and outputs in place."""

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
    return [Rival("openvino", run, lambda _: outputs()[0])]
