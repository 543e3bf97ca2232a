"""What a sparse layer computes, for NNX and Linen alike: Flax's rules for batch dimensions, padding and dtypes."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from sparseflax.conv.int8 import QuantizedKernel
from sparseflax.conv.packing import PackedKernel, Pattern, pack
from sparseflax.conv.primitive import ACTIVATIONS, sparse_conv
from sparseflax.conv.window import explicit_padding, make_window
from sparseflax.layers.planes import BORDERS, images, in_plane, is_transposed, not_planar, outputs, plane, rank, size_of
from sparseflax.layers.stack import PackedStack

STOCK = (nnx.Conv, nnx.ConvTranspose, nnx.Linear, linen.Conv, linen.ConvTranspose, linen.Dense)


def unsupported(layer: Any) -> str | None:
    """Why a convolution or fully connected layer, dense or sparse, cannot run as a sparse one; None if it can.

    Args:
      layer: an nnx or Linen module; only its attributes are read.
    """
    kind = type(layer)
    if issubclass(kind, STOCK) and not any(kind.__call__ is stock.__call__ for stock in STOCK):
        return f"{kind.__name__} has a __call__ of its own"
    if hasattr(layer, "kernel_size") and (reason := not_planar(layer)):
        return reason
    if hasattr(layer, "kernel_size") and not is_transposed(layer):
        if not isinstance(layer.padding, str):
            try:
                make_window((1, 1), (1, 1), 1, in_plane(layer)[1], 1)
            except ValueError as error:
                return str(error)
        elif layer.padding not in ("SAME", "SAME_LOWER", "VALID", *BORDERS, *(("CAUSAL",) if rank(layer) == 1 else ())):
            return f"padding={layer.padding!r} is not a {rank(layer)}-D padding"
    for name in ("dtype", "param_dtype", "preferred_element_type"):
        dtype = getattr(layer, name, None)
        if dtype is not None and jnp.dtype(dtype) != jnp.float32:
            return f"{name}={jnp.dtype(dtype).name}: only float32 is supported"
    for name in ("conv_general_dilated", "conv_general_dilated_cls", "dot_general", "dot_general_cls"):
        if getattr(layer, name, None) not in (None, jax.lax.conv_general_dilated, jax.lax.dot_general):
            return f"it has a {name} of its own"
    return None


def is_stack(layer: Any, dimensions: int) -> bool:
    """Whether a layer whose kernel has so many dimensions is a stack of its kind, as `nnx.vmap` and `nn.scan` make them."""
    return dimensions == rank(layer) + 3


def check(layer: Any) -> None:
    """Raises ValueError, with the remedy, for a sparse layer under construction that cannot run."""
    if reason := unsupported(layer):
        raise ValueError(f"{type(layer).__name__}: {reason}; keep Flax's own layer here")
    if layer.activation not in ACTIVATIONS:
        raise ValueError(f"activation={layer.activation!r}, wanted one of {list(ACTIVATIONS)}: apply others after the call")


def pack_dense(layer: Any, kernel: Any, groups: int) -> PackedKernel:
    """Packs the kernel of a dense Flax layer, times its mask."""
    if reason := unsupported(layer):
        raise ValueError(f"{type(layer).__name__} has no sparse form: {reason}; keep it dense")
    return pack(plane(layer, masked(layer, kernel)), groups)


def pack_stack(layer: Any, kernels: Any, groups: int) -> PackedStack:
    """Packs the kernels (layers, ...) of a stack of dense Flax layers, times their mask."""
    return PackedStack.of([pack_dense(layer, kernel, groups) for kernel in np.asarray(kernels)])


def masked(layer: Any, kernel: Any) -> Any:
    """A layer's kernel times its mask, if it has one."""
    mask = getattr(layer, "mask", None)
    return kernel if mask is None else kernel * jnp.asarray(mask, kernel.dtype)


def pattern_for(shape: tuple[int, ...], groups: int, pattern: Pattern | None) -> Pattern:
    """`pattern`, checked against a kernel (kh, kw, ic / groups, oc) or (ic, oc); one that keeps every weight if it is None."""
    if pattern is None:
        return keep_all(shape, groups)
    if not isinstance(pattern, Pattern):
        raise TypeError(f"pattern is a {type(pattern).__name__}, wanted a Pattern: take sparseflax.pack(mask).pattern, "
                        "with a float32 mask of the kernel's shape")
    if (pattern.shape[-len(shape):], pattern.shape[:-len(shape)], pattern.groups) != (shape, (1, 1)[: 4 - len(shape)], groups):
        raise ValueError(f"pattern is for a kernel {pattern.shape} in {pattern.groups} groups, the layer has {shape} in "
                         f"{groups}: pack a mask of that shape")
    return pattern


@functools.lru_cache(maxsize=64)
def keep_all(shape: tuple[int, ...], groups: int) -> Pattern:
    """The pattern that keeps every weight."""
    return pack(np.ones(shape, np.float32), groups).pattern


def gather(kernel: Any, pattern: Pattern) -> jax.Array:
    """The kept values (nnz,) of a dense kernel, in packed order: the inverse of `PackedKernel.unpack`."""
    return jnp.asarray(kernel.reshape(-1)[pattern.index], kernel.dtype)


def convolve(layer: Any, packed: PackedKernel | QuantizedKernel, bias: Any, inputs: Any, residual: Any) -> jax.Array:
    """A sparse convolution layer's output.

    Args:
      layer: gives kernel_size, strides, padding, kernel_dilation, feature_group_count, activation and dtype; of a transposed
        one transpose_kernel, and no dilation or groups.
      packed: the weights (kh, kw, ic / groups, oc) of the 2-D convolution that it is, see `plane`.
      bias: (oc,) or None.
      inputs: (*batch, ih, iw, ic) with any number of batch dimensions, none included; (*batch, iw, ic) of a 1-D convolution,
        (*batch, id, ih, iw, ic) of a 3-D one.
      residual: of the outputs' shape, or None; a transposed convolution takes none.

    Returns:
      float32 (*batch, oh, ow, oc), (*batch, ow, oc) or (*batch, od, oh, ow, oc).
    """
    x, residual = _as_float32(layer, inputs), _as_float32(layer, residual)
    (kh, kw, icg, _), dims = packed.shape, rank(layer)
    if x.ndim <= dims:
        sizes = "".join(("id, ", "ih, ", "iw, ")[3 - dims:])
        ic = icg * packed.groups // (size_of(layer)[0] if dims == 3 else 1)
        raise ValueError(f"inputs have shape {x.shape}, wanted (..., {sizes}{ic})")
    batch, seen = x.shape[:-1 - dims], (math.prod(x.shape[:-1 - dims]), *x.shape[-1 - dims:])
    x = images(layer, x.reshape(seen))
    if is_transposed(layer):
        tiled = bias if bias is None else jnp.tile(bias, packed.shape[3] // len(bias))
        y = sparse_conv(x, packed, tiled, padding="VALID")
    else:
        strides, padding, dilation = in_plane(layer)
        if isinstance(padding, str) and padding not in ("SAME", "VALID"):
            window = make_window(x.shape[1:3], (kh, kw), strides, "VALID", dilation)
            sides = explicit_padding(padding, x.shape[1:3], (kh, kw), window.strides, window.dilation)
            if padding in BORDERS:
                x, sides = jnp.pad(x, ((0, 0), *sides, (0, 0)), mode=BORDERS[padding]), 0
            padding = sides
        if residual is not None and residual.ndim > dims:
            image = (1, *residual.shape[-1 - dims:])[-3:]
            residual = residual.reshape(math.prod(residual.shape[:-2 if dims == 1 else -3]), *image)
        y = sparse_conv(x, packed, bias, strides=strides, padding=padding, kernel_dilation=dilation,
                        feature_group_count=layer.feature_group_count, activation=layer.activation, residual=residual)
    y = outputs(layer, y, seen)
    return y.reshape(*batch, *y.shape[1:])


def multiply(layer: Any, packed: PackedKernel | QuantizedKernel, bias: Any, inputs: Any, residual: Any) -> jax.Array:
    """A sparse fully connected layer's output: a 1x1 convolution of images (n, h, w, ic), of rows (n, w, ic), or of pixels.

    Args:
      layer: gives activation and dtype.
      packed: the weights (1, 1, ic, oc).
      bias: (oc,) or None.
      inputs: (*batch, ic) with any number of batch dimensions, none included.
      residual: (*batch, oc) or None.

    Returns:
      float32 (*batch, oc).
    """
    x, residual = _as_float32(layer, inputs), _as_float32(layer, residual)
    if x.ndim < 1:
        raise ValueError(f"inputs have shape {x.shape}, wanted (..., {packed.shape[2]})")
    batch = x.shape[:-1]
    images = positions(batch)
    if residual is not None and residual.shape[:-1] == batch:
        residual = residual.reshape(*images, residual.shape[-1])
    y = sparse_conv(x.reshape(*images, x.shape[-1]), packed, bias, activation=layer.activation, residual=residual)
    return y.reshape(*batch, y.shape[-1])


def positions(batch: tuple[int, ...]) -> tuple[int, int, int]:
    """(n, h, w) of what a fully connected layer maps for inputs (*batch, ic): images or rows where it can, so that what comes
    before and after runs with it."""
    if len(batch) < 2 or not all(isinstance(size, int) and size > 0 for size in batch[1:]):
        return math.prod(batch), 1, 1
    return batch[0], math.prod(batch[1:-1]), batch[-1]


def _as_float32(layer: Any, x: Any) -> Any:
    """Promotes as Flax does: `dtype` if the layer has one, else what float32 weights make of it; None stays None."""
    if x is None:
        return None
    x = jnp.asarray(x)
    wider = x.dtype == jnp.float64 or jnp.issubdtype(x.dtype, jnp.complexfloating)
    return x if wider and layer.dtype is None else x.astype(jnp.float32)  # a wider one meets sparse_conv's TypeError
