"""Layers in eight bits for Flax NNX: made of `nnx.Conv`, `nnx.ConvTranspose` and `nnx.Linear`, for inference."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseflax.conv.int8 import Quantization, QuantizedKernel, pack_int8
from sparseflax.conv.primitive import Activation
from sparseflax.layers import rules
from sparseflax.layers.planes import blocks, is_transposed


class Sums(nnx.Variable):
    """Each output channel's sum of int8 weights, which follows from the words."""


class Scale(nnx.Variable):
    """What an integer weight of 1 stands for, (oc,): the attribute `kernel_scale` of a layer whose kernel is whole multiples of
    it."""


def integers(layer: Any) -> np.ndarray | None:
    """A layer's kernel divided by its `kernel_scale`, where all quotients are whole numbers; None for other kernels."""
    if not hasattr(layer, "kernel_scale"):
        return None
    steps = np.asarray(rules.masked(layer, layer.kernel[...])) / np.asarray(layer.kernel_scale[...])
    whole = np.rint(steps)
    # A product and a quotient of float32: each is off by at most a part in 2^24, of numbers below 2^9.
    return whole.astype(np.int32) if np.abs(steps - whole).max(initial=0) < 2**-14 else None


class Int8Conv(nnx.Module):
    """A 1-D or 2-D convolution whose inputs are rounded to uint8 and whose weights to int8; sums are exact, outputs float32.

    y = act(conv(quantize(inputs), kernel) + bias + residual)

    Weights that are whole multiples of the layer's `kernel_scale`, up to 127, stay what they are.

    Args:
      layer: what it is made of; it stays as it is.
      inputs: what its uint8 inputs stand for.
      correction: (oc,) added to the bias, or None.
      activation: None, "relu" or "relu6", applied last.
      outputs: by which a network may round its outputs, see `pack_int8`.

    Raises:
      TypeError, ValueError: the layer has no sparse form, or what `pack_int8` refuses.
    """

    dense: Any = nnx.Conv
    kernel_size: tuple[int, ...]
    feature_group_count: int
    wanted = "an nnx.Conv (Int8Dense takes an nnx.Linear)"

    def __init__(self, layer: Any, inputs: Quantization, correction: Any = None, activation: Activation = None,
                 outputs: Quantization | None = None):
        if not isinstance(layer, self.dense):
            raise TypeError(f"layer is a {type(layer).__name__}, wanted {self.wanted}")
        if reason := rules.unsupported(layer):
            raise ValueError(f"{type(layer).__name__} has no sparse form: {reason}; keep it dense")
        for name in ("kernel_size", "strides", "padding", "kernel_dilation", "feature_group_count"):
            value = getattr(layer, name, 1 if name != "kernel_size" else ())
            setattr(self, name, tuple(value) if isinstance(value, list) else value)
        if is_transposed(layer):
            self.transpose_kernel = layer.transpose_kernel
        self.dtype, self.activation = layer.dtype, activation
        kernel = rules.plane(layer, np.asarray(rules.masked(layer, layer.kernel[...])))
        whole = integers(layer)
        own = whole is not None and np.abs(whole).max(initial=0) <= 127
        oc = layer.kernel.shape[-1]
        scale = np.tile(np.asarray(layer.kernel_scale[...]), kernel.shape[-1] // oc) if own else None
        packed = pack_int8(kernel, inputs, self.feature_group_count, scale=scale)
        self.pattern, self.channels, self.inputs, self.outputs = packed.pattern, packed.channels, inputs, outputs
        self.words, self.scale, self.sums = nnx.Variable(packed.words), nnx.Variable(packed.scale), Sums(packed.sums)
        bias = np.zeros(oc, np.float32) if layer.bias is None else np.asarray(layer.bias[...])
        self.bias = nnx.Variable(jnp.asarray(bias if correction is None else bias + np.asarray(correction, np.float32)))

    @property
    def kernel(self) -> QuantizedKernel:
        """The packed kernel (kh, kw, ic / groups, oc)."""
        return QuantizedKernel(self.words[...], self.scale[...], self.sums[...], self.pattern, self.channels, self.inputs,
                               self.outputs)

    @property
    def density(self) -> float:
        """Kept / all words of the layer's kernel."""
        return self.kernel.density

    def __call__(self, inputs: Any, *, residual: Any = None) -> jax.Array:
        """Convolves inputs (*batch, ih, iw, ic) to (*batch, oh, ow, oc), see `SparseConv`."""
        return rules.convolve(self, self.kernel, self.bias[...], inputs, residual)


class Int8ConvTranspose(Int8Conv):
    """A transposed convolution in eight bits: `Int8Conv` of an `nnx.ConvTranspose`, as an ordinary one that makes blocks of
    pixels, see `SparseConvTranspose`."""

    dense = nnx.ConvTranspose
    wanted = "an nnx.ConvTranspose (Int8Conv takes an nnx.Conv)"

    @property
    def density(self) -> float:
        """Kept / all words of the layer's kernel: that of the ordinary convolution has places without weights."""
        made = blocks(self)
        places = math.prod(made.window) * len(made.rows) * len(made.columns)
        return self.kernel.density * places / math.prod(self.kernel_size)

    def __call__(self, inputs: Any) -> jax.Array:
        """Maps inputs (*batch, ih, iw, ic) to (*batch, oh, ow, oc), see `SparseConvTranspose`."""
        return rules.convolve(self, self.kernel, self.bias[...], inputs, None)


class Int8Dense(Int8Conv):
    """A fully connected layer in eight bits: `Int8Conv` of an `nnx.Linear`."""

    dense = nnx.Linear
    wanted = "an nnx.Linear (Int8Conv takes an nnx.Conv)"

    def __call__(self, inputs: Any, *, residual: Any = None) -> jax.Array:
        """Maps inputs (*batch, ic) to (*batch, oc), see `SparseDense`."""
        return rules.multiply(self, self.kernel, self.bias[...], inputs, residual)


def in_int8(layer: Any, inputs: Quantization, correction: Any = None, outputs: Quantization | None = None) -> Int8Conv:
    """The form in eight bits of an `nnx.Conv`, an `nnx.ConvTranspose` or an `nnx.Linear`, see `Int8Conv`."""
    kind = next((kind for kind in (Int8Conv, Int8ConvTranspose) if isinstance(layer, kind.dense)), Int8Dense)
    return kind(layer, inputs, correction, outputs=outputs)
