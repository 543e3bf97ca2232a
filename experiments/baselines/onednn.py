"""oneDNN, through PyTorch: in both memory formats, and with the weights packed beforehand and the ReLU fused.

The last is TorchScript's `optimize_for_inference`, the only public way to have both.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.baselines import Rival, nchw, nhwc, oihw
from experiments.layers import Problem

needs = ("torch",)


def rivals(problem: Problem, threads: int) -> list[Rival]:
    import torch

    torch.set_num_threads(threads)
    shape = problem.shape
    (top, bottom), (left, right) = shape.padding
    if (top, left) != (bottom, right):
        return []  # PyTorch pads both sides alike; a separate padding would be timed with it

    class Conv(torch.nn.Module):
        def __init__(self, **layout):
            super().__init__()
            self.weight = torch.from_numpy(oihw(problem.kernel)).to(**layout)
            self.bias = torch.from_numpy(problem.bias)

        def forward(self, x):
            y = torch.conv2d(x, self.weight, self.bias, shape.strides, (top, left), shape.kernel_dilation, shape.groups)
            return y.relu_()

    def rival(name, forward, x):
        def run():
            with torch.inference_mode():
                return forward(x)

        return Rival(name, run, lambda y: nhwc(y.numpy()))

    x, last = torch.from_numpy(nchw(problem.x)), {"memory_format": torch.channels_last}
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TorchScript is; its successor needs a compiler to do the same
        fused = torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(Conv().eval(), x)))
    return [rival("onednn nchw", Conv().forward, x), rival("onednn nhwc", Conv(**last).forward, x.contiguous(**last)),
            rival("onednn fused", fused, x)]


def network(model: bytes, x: np.ndarray, threads: int) -> list[Rival]:
    """PyTorch's eager mode, channels-last."""
    return [on_images("torch", load(model, threads), x)]


def load(model: bytes, threads: int) -> Any:
    """An ONNX network as a PyTorch module, channels-last, in evaluation mode."""
    import torch

    from experiments.baselines.torch_graph import torch_graph

    torch.set_num_threads(threads)
    return torch_graph(model).to(memory_format=torch.channels_last).eval()


def on_images(name: str, forward: Callable, x: np.ndarray) -> Rival:
    """Runs `forward` on images (n, h, w, c), channels-last."""
    import torch

    images = torch.from_numpy(nchw(x)).contiguous(memory_format=torch.channels_last)

    def run():
        with torch.inference_mode():
            return forward(images)

    return Rival(name, run, lambda y: y.numpy())
