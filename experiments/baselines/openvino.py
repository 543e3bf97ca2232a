"""OpenVINO's CPU plugin, one stream, inputs and outputs in place: pinned to float32, and by default where that is less."""

from __future__ import annotations

import numpy as np

from experiments.baselines import Rival, nchw, nhwc, oihw
from experiments.layers import Problem
from sparseflax.job.engines import openvino, openvino_package, openvino_request, openvino_unasked

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
    taken = {"openvino": "f32"} | {f"openvino {unasked}": unasked for unasked in [openvino_unasked()] if unasked}
    ready = {name: openvino(model, nchw(x), threads, precision) for name, precision in taken.items()}
    return [Rival(name, engine.run, lambda _, outputs=engine.outputs: outputs()[0], exact=engine.exact)
            for name, engine in ready.items()]


def network_int8(model: bytes, x: np.ndarray, threads: int) -> list[Rival]:
    """The same for a file in eight bits, see sparseflax/job/quantized.py."""
    engine = openvino(model, nchw(x), threads)
    return [Rival("openvino int8", engine.run, lambda _: engine.outputs()[0], exact=False)]
