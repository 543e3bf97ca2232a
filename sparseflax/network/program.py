"""A network, or a part of one, as a program of steps over images, and the JAX primitive that runs it in one native call.

On CPUs the primitive lowers to xla_ffi/program.cc; everywhere else, and in every derivative, it is the same steps in plain JAX.
What a program does is static, weights are operands. A step knows nothing of the batch: the same program runs any number of
images.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from sparseflax.conv import ffi
from sparseflax.conv.int8 import QuantizedArray
from sparseflax.conv.int8_primitive import reference as int8_reference
from sparseflax.conv.packing import Pattern
from sparseflax.conv.primitive import ACTIVATIONS, Activation, reference
from sparseflax.conv.sharding import ask_for_devices, lower_sharded
from sparseflax.conv.transforms import batch_images, vary_together
from sparseflax.conv.window import Window
from sparseflax.network.formulas import BINARY, UNARY, shuffle, upsample

VERSION = 8
OPS = ("conv", "depthwise", "pool", "channel_sum", "combine", "map", "window", "concat", "reshape", "conv_int8", "quantize",
       "dequantize", "upsample", "dense", "reduce", "shuffle")  # as Op in program.h
OTHERS = "same", "number", "channel", "image", "scalar", "pixel"
Size = tuple[int, int, int]  # (h, w, c) of an image


@dataclass(frozen=True)
class Step:
    """One step of a program.

    Attributes:
      op: one of OPS.
      size: of each image of its result.
      args: numbers of the values that it reads: first the program's inputs, then the results of its steps.
      shared: numbers of the operands that it reads and that are the same for all images.
      params: what it does, see `compute`.
      numbers: likewise.
      pattern: of the weights of a sparse convolution.
      uint8: whether its result is uint8, not float32.
    """

    op: str
    size: Size
    args: tuple[int, ...]
    shared: tuple[int, ...] = ()
    params: tuple[Any, ...] = ()
    numbers: tuple[float, ...] = ()
    pattern: Pattern | None = None
    uint8: bool = False

    def compute(self, args: Sequence[jax.Array], shared: Sequence[jax.Array]) -> jax.Array:
        """The step in plain JAX: images (n, h, w, c) and shared operands to images (n, *size)."""
        x, params = args[0], self.params
        if self.op == "conv":
            window, activation, _, _ = params
            assert self.pattern is not None
            return reference(x, *shared, *args[1:], pattern=self.pattern, window=window, activation=activation)
        if self.op == "conv_int8":
            window, rescale = params
            assert self.pattern is not None
            return int8_reference(x, *shared, *args[1:], pattern=self.pattern, window=window, rescale=rescale)
        if self.op == "quantize":
            return params[0].quantize(x).values
        if self.op == "dequantize":
            return QuantizedArray(x, params[0]).dequantize()
        if self.op == "depthwise":
            _, window, inputs, outputs, activation, has_bias = params
            x = x if inputs is None else QuantizedArray(x, inputs).dequantize()
            y = jax.lax.conv_general_dilated(x, shared[0], window.strides, window.padding, rhs_dilation=window.dilation,
                                             dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=x.shape[3])
            y = _activated(y, shared[1] if has_bias else None, activation)
            return y if outputs is None else outputs.quantize(y).values
        if self.op == "dense":
            taps, window, groups, activation, has_bias = params
            kernel = shared[0].reshape(*taps, x.shape[3] // groups, self.size[2])
            y = jax.lax.conv_general_dilated(x, kernel, window.strides, window.padding, rhs_dilation=window.dilation,
                                             dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups)
            return _activated(y, shared[1] if has_bias else None, activation)
        if self.op == "pool":
            maximum, taps, window = params
            dimensions, strides, dilation = ((1, *pair, 1) for pair in (taps, window.strides, window.dilation))
            initial, combine = (0 if self.uint8 else -np.inf, jax.lax.max) if maximum else (0.0, jax.lax.add)
            return jax.lax.reduce_window(x, np.asarray(initial, x.dtype), combine, dimensions, strides,
                                         ((0, 0), *window.padding, (0, 0)), window_dilation=dilation)
        if self.op == "channel_sum":
            size, low = params
            return jax.lax.reduce_window(x, np.float32(0), jax.lax.add, (1, 1, 1, size), (1, 1, 1, 1),
                                         ((0, 0), (0, 0), (0, 0), (low, size - 1 - low)))
        if self.op == "reduce":
            return (jnp.max if params[0] else jnp.sum)(x, 3, keepdims=True)
        if self.op == "combine":
            name, kind, swapped = params
            other: Any = np.float32(self.numbers[0]) if kind == "number" else args[-1]
            other = shared[0].reshape(1, 1, 1, -1) if kind in ("channel", "scalar") else other
            return BINARY[name](other, x) if swapped else BINARY[name](x, other)
        if self.op == "map":
            return UNARY[params[0]](x, *map(np.float32, self.numbers))
        if self.op == "window":
            pads = [(-at, at + size - have, 0) for at, size, have in zip(params, self.size, x.shape[1:], strict=True)]
            return jax.lax.pad(x, np.asarray(self.numbers[0], x.dtype), [(0, 0, 0), *pads])
        if self.op == "upsample":
            fh, fw = params
            return upsample(x, fh, fw, self.size[2])
        if self.op == "shuffle":
            return shuffle(x, *params)
        if self.op == "concat":
            return jnp.concatenate(args, 3)
        assert self.op == "reshape"
        return x.reshape(x.shape[0], *self.size)

    def words(self) -> tuple[list[int], list[float]]:
        """`params` and `numbers` as program_decode.cc takes them."""
        p = self.params
        if self.op in ("conv", "conv_int8"):
            pattern: Any = self.pattern
            strides, padding, dilation = p[0].strides, sum(p[0].padding, ()), p[0].dilation
            layout = [*pattern.shape, pattern.groups, pattern.block, *strides, *padding, *dilation]
            if self.op == "conv":
                return [*layout, ACTIVATIONS[p[1]], *p[2:]], []
            rescale = p[1]
            flags = rescale.to_float, len(self.args) == 2, rescale.inner is not None
            return [*layout, rescale.zero_in, rescale.zero, rescale.zero_residual, *flags], rescale.numbers
        if self.op in ("quantize", "dequantize"):
            return [], [p[0].scale, p[0].zero]
        if self.op == "depthwise":
            taps, window, inputs, outputs, activation, has_bias = p
            flags = ACTIVATIONS[activation], has_bias, inputs is not None, outputs is not None
            numbers = [(each.scale, each.zero) for each in (inputs, outputs) if each is not None]
            return [*_filter(taps, window), *flags], [*sum(numbers, ())]
        if self.op == "dense":
            taps, window, groups, activation, has_bias = p
            return [*_filter(taps, window), groups, ACTIVATIONS[activation], has_bias], []
        if self.op == "pool":
            maximum, taps, window = p
            return [maximum, *_filter(taps, window)], []
        if self.op == "combine":
            return [list(BINARY).index(p[0]), OTHERS.index(p[1]), p[2]], list(self.numbers)
        if self.op == "map":
            return [list(UNARY).index(p[0])], list(self.numbers)
        return list(p), list(self.numbers)


def _activated(y: jax.Array, bias: jax.Array | None, activation: Activation) -> jax.Array:
    y = y if bias is None else y + bias.reshape(1, 1, 1, -1)
    y = y if activation is None else jnp.maximum(y, 0)
    return jnp.minimum(y, 6) if activation == "relu6" else y


def _filter(taps: tuple[int, int], window: Window) -> list[int]:
    (top, _), (left, _) = window.padding
    return [*taps, *window.strides, top, left, *window.dilation]


class Part(NamedTuple):
    """Where a shared operand lies: in which array, from which element on, and its shape; None is all of the array as it is."""

    array: int
    first: int | None = None
    shape: tuple[int, ...] | None = None

    def of(self, arrays: Sequence[Any]) -> Any:
        """The operand."""
        array = arrays[self.array]
        if self.first is None or self.shape is None:
            return array
        return jax.lax.slice(array, (self.first,), (self.first + math.prod(self.shape),)).reshape(self.shape)


@dataclass(frozen=True)
class Program:
    """Steps in the order in which they run.

    Attributes:
      inputs: sizes of the images that go in.
      steps: each reads inputs and the results of steps before it.
      outputs: numbers of the values that come out, none of them an input or a reshape.
      shared: where each operand lies that all images share; several of them may lie in one array.
      chunk: images that a thread takes through all steps at a time.
      kernel, int8: instruction sets for all convolutions of float32 and in eight bits; None takes the best.
      uint8: which inputs are uint8, not float32.
    """

    inputs: tuple[Size, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    shared: tuple[Part, ...]
    chunk: int
    kernel: str | None = None
    int8: str | None = None
    uint8: tuple[int, ...] = ()

    def results(self) -> list[Step]:
        """The steps whose results are the outputs."""
        return [self.steps[output - len(self.inputs)] for output in self.outputs]

    def compute(self, *operands: jax.Array) -> list[jax.Array]:
        """All steps in plain JAX: (n, h, w, c) for each input, then the shared arrays; to one array for each output."""
        values, arrays = list(operands[:len(self.inputs)]), operands[len(self.inputs):]
        shared = [part.of(arrays) for part in self.shared]
        for step in self.steps:
            values.append(step.compute([values[arg] for arg in step.args], [shared[index] for index in step.shared]))
        return [values[output] for output in self.outputs]

    def encode(self) -> dict[str, Any]:
        """What program_decode.cc decodes: `words`, the `numbers` and `gaps` that they point into, `parts` for shared operands,
        and the instruction sets."""
        words = [VERSION, len(self.inputs), len(self.steps), len(self.outputs), len(self.shared), self.chunk]
        for number, size in enumerate(self.inputs):
            words += [*size, number in self.uint8]
        numbers, gaps, end = list[float](), list[np.ndarray](), 0
        for step in self.steps:
            params, own = step.words()
            gap = step.pattern.gaps if step.pattern is not None else np.zeros(0, np.uint8)
            words += [OPS.index(step.op), *step.size]
            for some in (step.args, step.shared, params):
                words += [len(some), *some]
            words += [len(numbers), len(own), end, end + len(gap)]
            numbers += own
            gaps.append(gap)
            end += len(gap)
        parts = [word for part in self.shared for word in (part.array, -1 if part.first is None else part.first)]
        return {"words": np.asarray([*words, *self.outputs], np.int64), "numbers": np.asarray(numbers, np.float32),
                "gaps": np.concatenate(gaps), "parts": np.asarray(parts, np.int64), "kernel": self.kernel or "",
                "int8": self.int8 or ""}


def run_program(program: Program, images: Sequence[jax.Array], arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The program's outputs (n, h, w, c).

    Args:
      program: what to run.
      images: (n, h, w, c) for each of its inputs, float32 or uint8.
      arrays: float32 or int32, in which the shared operands lie: values, biases, kernels.
    """
    operands = vary_together([*images, *arrays])
    if images[0].shape[0] == 0:
        return program.compute(*operands)
    return _bind(*operands, program=program)


def _bind(*operands, program: Program):
    return program_p.bind(*operands, devices=ask_for_devices(), program=program)


program_p = Primitive("sparse_program")
program_p.multiple_results = True
program_p.def_impl(functools.partial(xla.apply_primitive, program_p))


@program_p.def_abstract_eval
def _abstract(x, *_, program: Program, devices):
    return [x.update(shape=(x.shape[0], *step.size), dtype=np.dtype(np.uint8 if step.uint8 else np.float32), weak_type=False)
            for step in program.results()]


def _compute(*operands, program: Program, devices):
    return program.compute(*operands)


def _lower(ctx, *operands, program: Program):
    return jax.ffi.ffi_lowering(ffi.PROGRAM)(ctx, *operands, **program.encode())


def _images(_, *, program: Program) -> range:
    return range(len(program.inputs))


def _batch(operands, dims, *, program: Program, devices):
    """Mapped images join the batch dimension; mapped weights are looped over."""
    bind = functools.partial(_bind, program=program)
    return batch_images(bind, operands, dims, range(len(program.inputs))), [0] * len(program.outputs)


def _jvp(primals, tangents, *, program: Program, devices):
    return jax.jvp(program.compute, primals, tuple(map(ad.instantiate_zeros, tangents)))


mlir.register_lowering(program_p, mlir.lower_fun(_compute, multiple_results=True))
if ffi.available:
    mlir.register_lowering(program_p, lower_sharded(program_p, _lower, _images), platform="cpu")
batching.primitive_batchers[program_p] = _batch
ad.primitive_jvps[program_p] = _jvp
