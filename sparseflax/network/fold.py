"""Batch norm at inference is a scale and a shift per channel: how it goes into the weights of the layer before it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseflax.layers.rules import masked


class Folded(nnx.Module):
    """What stands where a batch norm was folded into the layer before it: the identity, called like a batch norm."""

    def __call__(self, x: jax.Array, use_running_average: bool | None = None, *, mask: Any = None) -> jax.Array:
        return x

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Lets `nnx.view` set what it sets on a batch norm; without effect.

        Args:
          use_running_average: ignored, the statistics are folded.
        """


def fold(kernel: Any, bias: Any, norm: Any) -> tuple[np.ndarray, np.ndarray]:
    """The kernel and bias that do a layer's work and the norm's, computed in float64.

    scale (conv(x) + bias - mean) / sqrt(var + epsilon) + shift = conv'(x) + bias'
    kernel' = m kernel,   bias' = m (bias - mean) + shift,   m = scale / sqrt(var + epsilon)

    Args:
      kernel: (..., oc), zeros stay zeros; (layers, ..., oc) of a stack.
      bias: (oc,), of a stack (layers, oc), or None.
      norm: with `mean`, `var`, `scale`, `bias` like the bias, the last two or None, and `epsilon`.

    Returns:
      float32 kernel' like the kernel and bias' like the bias.
    """
    mean, var = (np.asarray(stat[...], np.float64) for stat in (norm.mean, norm.var))
    scale = 1.0 if norm.scale is None else np.asarray(norm.scale[...], np.float64)
    shift = 0.0 if norm.bias is None else np.asarray(norm.bias[...], np.float64)
    multiplier = scale / np.sqrt(var + norm.epsilon)
    bias = 0.0 if bias is None else np.asarray(bias, np.float64)
    *stack, channels = multiplier.shape
    over_kernel = multiplier.reshape(*stack, *[1] * (np.ndim(kernel) - multiplier.ndim), channels)
    return ((np.asarray(kernel, np.float64) * over_kernel).astype(np.float32),
            ((bias - mean) * multiplier + shift).astype(np.float32))


def is_float32(layer: Any) -> bool:
    """Whether a layer or norm, nnx or Linen, computes in float32."""
    dtypes = (layer.dtype, layer.param_dtype, getattr(layer, "preferred_element_type", None))
    return all(dtype is None or jnp.dtype(dtype) == jnp.float32 for dtype in dtypes)


def with_norm(layer: Any, norm: nnx.BatchNorm) -> Any:
    """A copy of a convolution or linear layer that does its batch norm's work, with Params of its own."""
    copy = nnx.clone(layer)
    kernel, bias = fold(masked(copy, copy.kernel[...]), None if copy.bias is None else copy.bias[...], norm)
    copy.kernel, copy.bias = nnx.Param(jnp.asarray(kernel, jnp.float32)), nnx.Param(jnp.asarray(bias, jnp.float32))
    copy.use_bias = True
    return copy
