"""ONNX networks as nnx modules: ordinary dense models of Flax's own layers, to be planned and packed like any other."""

from __future__ import annotations

from os import PathLike
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparseflax.onnx.program import Built, build, check
from sparseflax.onnx.read import read


class Constant(nnx.Variable):
    """Numbers of the graph that are no layer's."""


class OnnxModel(nnx.Module):
    """A network that `load_onnx` has read; `layers` holds an nnx.Conv, ConvTranspose, Linear or BatchNorm by the name of its
    node, in a RoundsToRange where the file rounds its input by the range that it has, `constants` what else the graph has."""

    def __init__(self, built: Built):
        self.program = built.program
        self.layers = nnx.Dict(built.layers)
        # As in layers, a "/" is kept for paths.
        self.keys = tuple((name, f"{name.replace('/', '.')}.{i}") for i, name in enumerate(built.constants))
        self.constants = nnx.Dict({key: Constant(jnp.asarray(built.constants[name])) for name, key in self.keys})

    def __call__(self, *inputs: jax.Array) -> Any:
        """Runs the network at inference.

        Args:
          *inputs: as ONNX has them, but images are (n, h, w, c): NHWC, where ONNX has NCHW.

        Returns:
          The output, images again NHWC, or a tuple of them if the graph has several.

        Raises:
          ValueError: an input has other sizes than the network wants, or it needs what is known only when it runs.
        """
        program = self.program
        if len(inputs) != len(program.inputs):
            raise ValueError(f"{len(inputs)} inputs, wanted {len(program.inputs)}: {', '.join(program.inputs)}")
        arrays = [jnp.asarray(x) for x in inputs]
        for name, x, shape, image in zip(program.inputs, arrays, program.shapes, program.images, strict=False):
            if shape is None:
                continue
            turned = image and len(shape) == 4
            wanted = (*shape[2:], shape[1]) if turned else shape[1:]
            # Sizes other than channels may be those of a training: what does not take others says so itself.
            if x.ndim != len(shape) or (wanted and wanted[-1] not in (None, x.shape[-1])):
                sizes = ", ".join("any" if size is None else str(size) for size in wanted)
                raise ValueError(f"the input has shape {x.shape}, wanted (n, {sizes}): images go in as NHWC, "
                                 f"x.transpose(0, 2, 3, 1) makes them from ONNX's NCHW; it is {name!r}")
        constants = {name: self.constants[key][...] for name, key in self.keys}
        values: Any = program.run(self.layers, constants, arrays)
        outputs = tuple(jnp.asarray(v.channels_last() if image and v.rank == 4 else v.plain())
                        for v, image in zip(values, program.images[len(arrays):], strict=True))
        return outputs[0] if len(outputs) == 1 else outputs


def load_onnx(path: str | PathLike[str]) -> OnnxModel:
    """Reads a CNN, dense or sparse, from an ONNX file, for inference in float32.

    Operators are ONNX's own, of sets 6 to the newest. Convolutions, matrix products and batch norms whose weights are constants
    become Flax's layers; zeros stay zeros, so that `plan` and `pack_model` find them. Images are NHWC outside, and inside
    wherever convolutions are; sizes that the graph computes are known once it is traced for an input, so that a network that
    takes images of any size does so here. Half precision is read as float32, quantized numbers are rounded as the file says and
    computed with in float32, or in eight bits by a plan that says so. Weights may be sparse initializers, or lie in external
    files beside `path`.

    Args:
      path: an .onnx file.

    Returns:
      A module, to be called with x (n, h, w, c), or with all its inputs.

    Raises:
      ImportError: the package onnx is not installed (`pip install 'sparseflax[onnx]'`).
      FileNotFoundError: no such file.
      ValueError: it is no ONNX model, it is incomplete, damaged or has a cycle, or it needs what is not known here: all that is
        named.
    """
    try:
        graph = read(path)
        built = build(graph)
        model = OnnxModel(built)
        refused = built.refused or check(graph, built.program, model.layers, built.constants)
    except (ImportError, OSError, ValueError):
        raise
    except Exception as error:  # whatever damage makes of names, types and sizes
        raise ValueError(f"{path} cannot be decoded ({type(error).__name__}: {error}): it was damaged, export it "
                         "again") from error
    if refused:
        raise ValueError(f"{path} needs what sparseflax does not have: {'; '.join(refused)}. Replace these nodes in "
                         "the graph, or cut them off with onnx.utils.extract_model and run them by other means")
    model.eval()
    return model
