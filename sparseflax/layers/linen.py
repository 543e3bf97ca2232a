"""Sparse layers for Flax Linen: `linen.Conv` and `linen.Dense` whose weights are packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from sparseflax.conv.packing import PackedKernel, Pattern
from sparseflax.conv.primitive import Activation
from sparseflax.layers import rules as sparse
from sparseflax.layers.planes import plane_shape

Initializer = Callable[..., Any]


class SparseConv(nn.Module):
    """A 1-D, 2-D or 3-D convolution with packed sparse weights: `linen.Conv` with a static pattern and a fused epilogue.

    y = act(conv(inputs, kernel) + bias + residual)

    The params are `values` (nnz,) and `bias` (oc,).

    Attributes:
      features, kernel_size, strides, padding, input_dilation, kernel_dilation, feature_group_count, use_bias, dtype,
        param_dtype, kernel_init, bias_init: as in `linen.Conv`; `kernel_init` draws the dense kernel, of which the kept
        weights are taken.
      activation: None, "relu" or "relu6", applied last.
      pattern: the weights to keep, `sparseflax.pack(mask, feature_group_count).pattern` with a float32 mask
        (kh, kw, ic / groups, oc) of zeros and ones, of a 1-D convolution (1, k, ic / groups, oc), of a 3-D one
        (kh, kw, kd * ic / groups, oc); None keeps all.

    Raises:
      TypeError, ValueError: when called, for what only `linen.Conv` can do (4-D, input dilation, other dtypes), or
        a pattern or an activation that does not fit.
    """

    features: int
    kernel_size: int | Sequence[int]
    strides: int | Sequence[int] | None = 1
    padding: str | int | Sequence[int | tuple[int, int]] = "SAME"
    input_dilation: int | Sequence[int] | None = 1
    kernel_dilation: int | Sequence[int] | None = 1
    feature_group_count: int = 1
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    activation: Activation = None
    pattern: Pattern | None = None

    @classmethod
    def from_dense(cls, layer: nn.Conv, params: Mapping[str, Any],
                   activation: Activation = None) -> tuple[SparseConv, dict[str, Any]]:
        """Packs the non-zero weights of a convolution, times its mask.

        Args:
          layer: an unbound `linen.Conv`.
          params: its params {"kernel", "bias"}.
          activation: None, "relu" or "relu6".

        Returns:
          (module, params): the sparse layer and its params {"values", "bias"}.

        Raises:
          TypeError: `layer` is no `linen.Conv`, or its kernel is traced or not float32.
          ValueError: the layer has no sparse form, or its kernel is not finite.
        """
        if not isinstance(layer, nn.Conv):
            raise TypeError(f"layer is a {type(layer).__name__}, wanted a linen.Conv (SparseDense takes a linen.Dense)")
        params = nn.unbox(params)
        packed = sparse.pack_dense(layer, params["kernel"], layer.feature_group_count)
        module = cls(layer.features, layer.kernel_size, layer.strides, layer.padding, layer.input_dilation,
                     layer.kernel_dilation, layer.feature_group_count, layer.use_bias, layer.dtype,
                     activation=activation, pattern=packed.pattern, name=layer.name)
        return module, _packed_params(packed, params)

    @nn.compact
    def __call__(self, inputs: Any, *, residual: Any = None) -> jax.Array:
        """Convolves inputs (*batch, ih, iw, ic) to (*batch, oh, ow, oc), with any number of batch dimensions as in Flax; those
        of a 1-D convolution (*batch, iw, ic) to (*batch, ow, oc), of a 3-D one (*batch, id, ih, iw, ic) to
        (*batch, od, oh, ow, oc).

        Args:
          inputs: what `linen.Conv` takes, computed in float32.
          residual: of the outputs' shape, added before the activation, or None.
        """
        sparse.check(self)
        groups = self.feature_group_count
        packed = _packed(self, (*sparse.size_of(self), jnp.shape(inputs)[-1] // groups, self.features), groups)
        return sparse.convolve(self, packed, _bias(self), inputs, residual)


class SparseDense(nn.Module):
    """A fully connected layer with packed sparse weights: `linen.Dense` with a static pattern and a fused epilogue.

    y = act(inputs @ kernel + bias + residual)

    The params are `values` (nnz,) and `bias` (oc,).

    Attributes:
      features, use_bias, dtype, param_dtype, kernel_init, bias_init: as in `linen.Dense`.
      activation: None, "relu" or "relu6", applied last.
      pattern: the weights to keep, `sparseflax.pack(mask).pattern` with a float32 mask (ic, oc); None keeps all.

    Raises:
      TypeError, ValueError: when called, for another dtype than float32, or a pattern or an activation that does not fit.
    """

    features: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros_init()
    activation: Activation = None
    pattern: Pattern | None = None

    @classmethod
    def from_dense(cls, layer: nn.Dense, params: Mapping[str, Any],
                   activation: Activation = None) -> tuple[SparseDense, dict[str, Any]]:
        """Packs the non-zero weights of a fully connected layer.

        Args:
          layer: an unbound `linen.Dense`.
          params: its params {"kernel", "bias"}.
          activation: None, "relu" or "relu6".

        Returns:
          (module, params): the sparse layer and its params {"values", "bias"}.

        Raises:
          TypeError: `layer` is no `linen.Dense`, or its kernel is traced or not float32.
          ValueError: the layer has no sparse form, or its kernel is not finite.
        """
        if not isinstance(layer, nn.Dense):
            raise TypeError(f"layer is a {type(layer).__name__}, wanted a linen.Dense (SparseConv takes a linen.Conv)")
        params = nn.unbox(params)
        packed = sparse.pack_dense(layer, params["kernel"], 1)
        module = cls(layer.features, layer.use_bias, layer.dtype, activation=activation, pattern=packed.pattern,
                     name=layer.name)
        return module, _packed_params(packed, params)

    @nn.compact
    def __call__(self, inputs: Any, *, residual: Any = None) -> jax.Array:
        """Maps inputs (*batch, ic) to (*batch, oc), with any number of batch dimensions as in Flax.

        Args:
          inputs: what `linen.Dense` takes, computed in float32.
          residual: (*batch, oc), added before the activation, or None.
        """
        sparse.check(self)
        packed = _packed(self, (jnp.shape(inputs)[-1], self.features), 1)
        return sparse.multiply(self, packed, _bias(self), inputs, residual)


def _packed(module: SparseConv | SparseDense, shape: tuple[int, ...], groups: int) -> PackedKernel:
    """The module's kernel of that dense shape; declares the param `values`."""
    pattern = sparse.pattern_for(plane_shape(shape) if len(shape) > 2 else shape, groups, module.pattern)

    def init(key):
        return sparse.gather(sparse.plane(module, module.kernel_init(key, shape, module.param_dtype)), pattern)

    return PackedKernel(module.param("values", init), pattern)


def _bias(module: SparseConv | SparseDense) -> Any:
    """The module's bias (oc,), or None; declares the param."""
    return module.param("bias", module.bias_init, (module.features,), module.param_dtype) if module.use_bias else None


def _packed_params(packed: PackedKernel, params: Mapping[str, Any]) -> dict[str, Any]:
    return {"values": packed.values, **{name: params[name] for name in ("bias",) if name in params}}
