"""Sparse layers for Flax NNX: `nnx.Conv` and `nnx.Linear` whose weights are packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx as fnnx

from sparseflax.conv.packing import PackedKernel, Pattern
from sparseflax.conv.primitive import Activation
from sparseflax.layers import rules as sparse
from sparseflax.layers.stack import PackedStack, of_step, steps

Initializer = Callable[..., Any]
KERNEL_INIT, BIAS_INIT = fnnx.initializers.lecun_normal(), fnnx.initializers.zeros_init()  # Flax's defaults


class SparseConv(fnnx.Module):
    """A 1-D, 2-D or 3-D convolution with packed sparse weights: `nnx.Conv` with a static pattern and a fused epilogue.

    y = act(conv(inputs, kernel) + bias + residual)

    `values` (nnz,) and `bias` (oc,) are `nnx.Param`s: gradients, optimizers, `nnx.state` and checkpoints see them. The
    pattern is static: changing it compiles again, changing the values does not.

    Args:
      in_features, out_features, kernel_size, strides, padding, input_dilation, kernel_dilation, feature_group_count,
        use_bias, dtype, param_dtype, kernel_init, bias_init, rngs: as in `nnx.Conv`; `kernel_init` draws the dense
        kernel, of which the kept weights are taken.
      activation: None, "relu" or "relu6", applied last.
      pattern: the weights to keep, `sparseflax.pack(mask, feature_group_count).pattern` with a float32 mask
        (kh, kw, ic / groups, oc) of zeros and ones, of a 1-D convolution (1, k, ic / groups, oc), of a 3-D one
        (kh, kw, kd * ic / groups, oc); None keeps all.

    Raises:
      TypeError, ValueError: what only `nnx.Conv` can do (4-D, input dilation, other dtypes), or a pattern or an
        activation that does not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: str | int | Sequence[int | tuple[int, int]] = "SAME",
        input_dilation: int | Sequence[int] | None = 1,
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer = KERNEL_INIT,
        bias_init: Initializer = BIAS_INIT,
        activation: Activation = None,
        pattern: Pattern | None = None,
        rngs: fnnx.Rngs,
    ):
        self.in_features = in_features
        self.out_features = out_features
        self.kernel_size = _static(kernel_size)
        self.strides = _static(strides)
        self.padding = _static(padding)
        self.input_dilation = _static(input_dilation)
        self.kernel_dilation = _static(kernel_dilation)
        self.feature_group_count = feature_group_count
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.activation: Activation = activation
        sparse.check(self)
        shape = *sparse.size_of(self), in_features // feature_group_count, out_features
        kernel = sparse.plane(self, kernel_init(rngs.params(), shape, param_dtype))
        self.pattern = sparse.pattern_for(kernel.shape, feature_group_count, pattern)
        self.values = fnnx.Param(sparse.gather(kernel, self.pattern))
        self.bias = fnnx.Param(bias_init(rngs.params(), (out_features,), param_dtype)) if use_bias else fnnx.data(None)

    @classmethod
    def from_dense(cls, layer: fnnx.Conv, activation: Activation = None) -> SparseConv:
        """Packs the non-zero weights of a convolution, times its mask; `layer` stays as it is.

        Raises:
          TypeError: `layer` is no `nnx.Conv`, or its kernel is traced or not float32.
          ValueError: the layer has no sparse form, or its kernel is not finite.
        """
        if not isinstance(layer, fnnx.Conv):
            raise TypeError(f"layer is a {type(layer).__name__}, wanted an nnx.Conv (SparseDense takes an nnx.Linear)")
        packed = sparse.pack_dense(layer, layer.kernel[...], layer.feature_group_count)
        empty = cls(
            layer.in_features, layer.out_features, layer.kernel_size, layer.strides, padding=layer.padding,
            input_dilation=layer.input_dilation, kernel_dilation=layer.kernel_dilation,
            feature_group_count=layer.feature_group_count, use_bias=layer.bias is not None, dtype=layer.dtype,
            kernel_init=_zeros, bias_init=_zeros, activation=activation, pattern=packed.pattern, rngs=fnnx.Rngs(0))
        return _filled(empty, packed, layer.bias)

    @property
    def kernel(self) -> PackedKernel:
        """The packed kernel (kh, kw, ic / groups, oc), of a 1-D convolution (1, k, ic / groups, oc), of a 3-D one
        (kh, kw, kd * ic / groups, oc)."""
        return PackedKernel(self.values[...], self.pattern)

    def __call__(self, inputs: Any, *, residual: Any = None) -> jax.Array:
        """Convolves inputs (*batch, ih, iw, ic) to (*batch, oh, ow, oc), with any number of batch dimensions as in Flax; those
        of a 1-D convolution (*batch, iw, ic) to (*batch, ow, oc), of a 3-D one (*batch, id, ih, iw, ic) to
        (*batch, od, oh, ow, oc).

        Args:
          inputs: what `nnx.Conv` takes, computed in float32.
          residual: of the outputs' shape, added before the activation, or None.
        """
        return sparse.convolve(self, self.kernel, None if self.bias is None else self.bias[...], inputs, residual)


class SparseConvTranspose(fnnx.Module):
    """A 1-D or 2-D transposed convolution with packed sparse weights, as an ordinary one that makes blocks of pixels.

    y[n, sh i + a, sw j + b, o] = sum_{t,u,c} x[n, i + first_a + t, j + first_b + u, c]
                                              kernel[sh t + rest_a, sw u + rest_b, c, o] + bias[o]

    `values` (nnz,) and `bias` (oc,) are `nnx.Param`s, as those of `SparseConv`; the pattern is that of the ordinary
    convolution's kernel (taps, across, ic, sh * sw * oc).

    Args:
      layer: an `nnx.ConvTranspose`; it stays as it is. Of its kernel, times its mask, the weights that are not zero are kept.

    Raises:
      TypeError: `layer` is no `nnx.ConvTranspose`, or its kernel is traced or not float32.
      ValueError: the layer has no sparse form, or its kernel is not finite.
    """

    def __init__(self, layer: fnnx.ConvTranspose):
        if not isinstance(layer, fnnx.ConvTranspose):
            raise TypeError(f"layer is a {type(layer).__name__}, wanted an nnx.ConvTranspose (SparseConv takes an nnx.Conv)")
        packed = sparse.pack_dense(layer, layer.kernel[...], 1)
        for name in ("kernel_size", "strides", "padding", "kernel_dilation", "transpose_kernel", "dtype"):
            setattr(self, name, _static(getattr(layer, name)))
        self.pattern, self.values = packed.pattern, fnnx.Param(packed.values)
        self.bias = fnnx.data(None) if layer.bias is None else fnnx.Param(layer.bias[...])

    @property
    def kernel(self) -> PackedKernel:
        """The packed kernel (taps, across, ic, sh * sw * oc) of the ordinary convolution."""
        return PackedKernel(self.values[...], self.pattern)

    def __call__(self, inputs: Any) -> jax.Array:
        """Maps inputs (*batch, ih, iw, ic) to (*batch, oh, ow, oc), with any number of batch dimensions as in Flax; those of a
        1-D convolution (*batch, iw, ic) to (*batch, ow, oc).

        Args:
          inputs: what `nnx.ConvTranspose` takes, computed in float32.
        """
        return sparse.convolve(self, self.kernel, None if self.bias is None else self.bias[...], inputs, None)


class SparseDense(fnnx.Module):
    """A fully connected layer with packed sparse weights: `nnx.Linear` with a static pattern and a fused epilogue.

    y = act(inputs @ kernel + bias + residual)

    Args:
      in_features, out_features, use_bias, dtype, param_dtype, kernel_init, bias_init, rngs: as in `nnx.Linear`.
      activation: None, "relu" or "relu6", applied last.
      pattern: the weights to keep, `sparseflax.pack(mask).pattern` with a float32 mask (ic, oc); None keeps all.

    Raises:
      TypeError, ValueError: another dtype than float32, or a pattern or an activation that does not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer = KERNEL_INIT,
        bias_init: Initializer = BIAS_INIT,
        activation: Activation = None,
        pattern: Pattern | None = None,
        rngs: fnnx.Rngs,
    ):
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.activation: Activation = activation
        sparse.check(self)
        self.pattern = sparse.pattern_for((in_features, out_features), 1, pattern)
        kernel = kernel_init(rngs.params(), (in_features, out_features), param_dtype)
        self.values = fnnx.Param(sparse.gather(kernel, self.pattern))
        self.bias = fnnx.Param(bias_init(rngs.params(), (out_features,), param_dtype)) if use_bias else fnnx.data(None)

    @classmethod
    def from_dense(cls, layer: fnnx.Linear, activation: Activation = None) -> SparseDense:
        """Packs the non-zero weights of a fully connected layer; `layer` stays as it is.

        Raises:
          TypeError: `layer` is no `nnx.Linear`, or its kernel is traced or not float32.
          ValueError: the layer has no sparse form, or its kernel is not finite.
        """
        if not isinstance(layer, fnnx.Linear):
            raise TypeError(f"layer is a {type(layer).__name__}, wanted an nnx.Linear (SparseConv takes an nnx.Conv)")
        packed = sparse.pack_dense(layer, layer.kernel[...], 1)
        empty = cls(layer.in_features, layer.out_features, use_bias=layer.bias is not None, dtype=layer.dtype,
                    kernel_init=_zeros, bias_init=_zeros, activation=activation, pattern=packed.pattern, rngs=fnnx.Rngs(0))
        return _filled(empty, packed, layer.bias)

    @property
    def kernel(self) -> PackedKernel:
        """The packed kernel (1, 1, ic, oc)."""
        return PackedKernel(self.values[...], self.pattern)

    def __call__(self, inputs: Any, *, residual: Any = None) -> jax.Array:
        """Maps inputs (*batch, ic) to (*batch, oc), with any number of batch dimensions as in Flax.

        Args:
          inputs: what `nnx.Linear` takes, computed in float32.
          residual: (*batch, oc), added before the activation, or None.
        """
        return sparse.multiply(self, self.kernel, None if self.bias is None else self.bias[...], inputs, residual)


class SparseStack(fnnx.Module):
    """Equal layers that `nnx.scan` runs one after the other, as `nnx.vmap` makes them: in each step it is one sparse layer.

    y = conv(inputs, kernels[step]) + bias[step]

    `values` (layers, most) and `bias` (layers, oc) are `nnx.Param`s; each layer has a static pattern of its own.

    Args:
      layer: an `nnx.Conv` or `nnx.Linear` whose weights have a leading axis of layers.

    Raises:
      ValueError: the layer has no sparse form, or a kernel is not finite.
    """

    def __init__(self, layer: fnnx.Conv | fnnx.Linear):
        for name in ("kernel_size", "strides", "padding", "kernel_dilation", "feature_group_count"):
            if hasattr(layer, name):
                setattr(self, name, _static(getattr(layer, name)))
        self.dtype, self.activation = layer.dtype, None
        packed = sparse.pack_stack(layer, layer.kernel[...], getattr(layer, "feature_group_count", 1))
        self.patterns, self.values = packed.patterns, fnnx.Param(packed.values)
        self.bias = fnnx.data(None) if layer.bias is None else fnnx.Param(layer.bias[...])
        self.step = fnnx.Variable(steps(len(self.patterns)))

    @property
    def kernel(self) -> PackedStack:
        """All packed kernels; there is none in a step."""
        return PackedStack(self.values[...], self.patterns)

    def __call__(self, inputs: Any, *, residual: Any = None) -> jax.Array:
        """In a step of the scan what `SparseConv` or `SparseDense` does."""
        run = sparse.convolve if sparse.rank(self) else sparse.multiply
        bias = None if self.bias is None else self.bias[...]
        return of_step(self.step[...], self.values[...], self.patterns,
                       lambda kernel: run(self, kernel, bias, inputs, residual))


Sparse = SparseConv | SparseConvTranspose | SparseDense | SparseStack


def _zeros(_, shape, dtype) -> np.ndarray:
    return np.zeros(shape, dtype)


def _filled(layer: Any, packed: PackedKernel, bias: Any) -> Any:
    """`layer` with these weights."""
    layer.values.set_value(packed.values)
    if bias is not None:
        layer.bias.set_value(bias[...])
    return layer


def _static(value: Any) -> Any:
    """Tuples for lists: static attributes have to be hashable."""
    return tuple(map(_static, value)) if isinstance(value, (list, tuple)) else value
