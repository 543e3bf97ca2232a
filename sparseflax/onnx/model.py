"""ONNX networks as nnx modules: ordinary dense models of Flax's own layers, to be planned and packed like any other."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import Any

import jax
from flax import nnx

from sparseflax.onnx.build import Network, build
from sparseflax.onnx.builder import Step
from sparseflax.onnx.ops import OPERATORS
from sparseflax.onnx.read import read


@dataclass(frozen=True)
class Program:
    """The network without its weights.

    Attributes:
      input: name of the input.
      shape: of the input without its batch, (h, w, c) for images; None where the file leaves a size open.
      outputs: names.
      steps: what is computed, in the order in which it can be.
    """

    input: str
    shape: tuple[int | None, ...]
    outputs: tuple[str, ...]
    steps: tuple[Step, ...]


class OnnxModel(nnx.Module):
    """A network that `load_onnx` has read; `layers` holds an nnx.Conv, nnx.Linear or nnx.BatchNorm by the name of its node."""

    def __init__(self, program: Program, network: Network):
        self.program = program
        self.layers = nnx.Dict(network.layers)

    def __call__(self, x: jax.Array) -> Any:
        """Runs the network at inference.

        Args:
          x: float32 images (n, h, w, c): NHWC, where ONNX has NCHW. What is no image is (n, features).

        Returns:
          The output, images again NHWC, or a tuple of them if the graph has several.

        Raises:
          ValueError: x has other channels or features than the network wants.
        """
        shape = self.program.shape
        if x.ndim != len(shape) + 1 or (shape and shape[-1] not in (None, x.shape[-1])):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise ValueError(f"the input has shape {x.shape}, wanted (n, {wanted}): images go in as NHWC, "
                             "x.transpose(0, 2, 3, 1) makes them from ONNX's NCHW")
        values = {self.program.input: x}
        for step in self.program.steps:
            run: Any = OPERATORS[step.op] if step.layer is None else self.layers[step.layer]
            values[step.output] = run(*(values[name] for name in step.inputs), **dict(step.settings))
        outputs = tuple(values[name] for name in self.program.outputs)
        return outputs[0] if len(outputs) == 1 else outputs


def load_onnx(path: str | PathLike[str]) -> OnnxModel:
    """Reads a float32 CNN, dense or sparse, from an ONNX file, for inference.

    Zeros in its weights stay zeros, so that `plan` and `pack_model` find them; batch norms stay modules that these fold.
    Images are NHWC, inside and outside. Known are the operators Add, AveragePool, BatchNormalization, Clip, Concat, Constant,
    Conv, Dropout, Flatten, Gemm, GlobalAveragePool, HardSigmoid, HardSwish, Identity, LeakyRelu, LRN, MatMul, MaxPool, Mul,
    ReduceMean and Squeeze of rows and columns, Relu, Reshape to (n, features), Sigmoid, Softmax, Tanh; sizes computed by Shape,
    Gather, Concat and their like; weights may be sparse initializers, or lie in external files beside `path`.

    Args:
      path: an .onnx file with one input, of operator set 7 or later.

    Returns:
      A module, to be called with x (n, h, w, c).

    Raises:
      ImportError: the package onnx is not installed (`pip install 'sparseflax[onnx]'`).
      FileNotFoundError: no such file.
      ValueError: it is no ONNX model, it is incomplete or has a cycle, or it needs what is not known here: all that is named.
    """
    graph = read(path)
    network = build(graph)
    if network.refused:
        raise ValueError(f"{path} needs what sparseflax does not have: {'; '.join(network.refused)}. Replace these nodes in "
                         "the graph, or cut them off and run them by other means")
    _, *sizes = graph.shapes.get(graph.input, (None,) * 4)
    program = Program(graph.input, tuple(sizes[1:] + sizes[:1]), network.outputs, tuple(network.steps))
    model = OnnxModel(program, network)
    model.eval()
    return model
