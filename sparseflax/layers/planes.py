"""Convolutions of rows, of volumes and transposed ones as 2-D ones: their kernels, images and sizes.

Rows (n, w, c) are images of one row. A volume (n, d, h, w, c) is an image for each depth of its outputs, whose channels are
those of all depths that the kernel meets there:

    kernel'[r, s, (t, c), o] = kernel[t, r, s, c, o]

Transposed convolutions make blocks of pixels, see `transposed.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseflax.conv.window import each, explicit_padding
from sparseflax.cost.shape import ConvShape
from sparseflax.layers.transposed import Blocks

BORDERS = {"CIRCULAR": "wrap", "REFLECT": "reflect"}  # Flax's paddings that do not fill with zeros, in NumPy's words


def size_of(layer: Any) -> tuple[int, ...]:
    """A convolution's kernel size; () of a fully connected layer."""
    size = getattr(layer, "kernel_size", ())
    return (size,) if isinstance(size, int) else tuple(size)


def rank(layer: Any) -> int:
    """Dimensions of a convolution's images; 0 of a fully connected layer."""
    return len(size_of(layer))


def is_transposed(layer: Any) -> bool:
    """Whether a layer is a transposed convolution, Flax's own or sparse."""
    return hasattr(layer, "transpose_kernel")


def not_planar(layer: Any) -> str | None:
    """Why a convolution cannot be written as a 2-D one; None if it can."""
    if not is_transposed(layer):
        if rank(layer) not in (1, 2, 3):
            return f"{rank(layer)}-D convolution: only 1-D, 2-D and 3-D are supported"
        spread = getattr(layer, "input_dilation", 1)
        return f"input_dilation={spread}: only 1 is supported" if set(each(spread, rank(layer))) != {1} else None
    if rank(layer) not in (1, 2):
        return f"{rank(layer)}-D transposed convolution: only 1-D and 2-D are supported"
    if set(each(layer.kernel_dilation, rank(layer))) != {1}:
        return f"kernel_dilation={layer.kernel_dilation} of a transposed convolution: only 1 is supported"
    if layer.transpose_kernel:
        return "transpose_kernel=True: only False is supported"
    if isinstance(layer.padding, str) and layer.padding not in ("SAME", "VALID"):
        return f"padding={layer.padding!r} of a transposed convolution: only SAME, VALID and numbers are supported"
    return None


def blocks(layer: Any) -> Blocks:
    """How a transposed convolution makes its outputs."""
    return Blocks.of(size_of(layer), layer.strides, layer.padding)


def in_plane(layer: Any) -> tuple[Any, Any, Any]:
    """Strides, padding and dilation of a convolution as a 2-D one's, in Flax's words; of a 3-D one those within a depth."""
    strides, padding, dilation = layer.strides or 1, layer.padding, layer.kernel_dilation or 1  # None is Flax's old word for 1
    if rank(layer) == 2:
        return strides, padding, dilation
    if rank(layer) == 3:
        return each(strides, 3)[1:], padding if isinstance(padding, str) else each(padding, 3)[1:], each(dilation, 3)[1:]
    (size,), (stride,), (step,) = size_of(layer), each(strides, 1), each(dilation, 1)
    if padding == "CAUSAL":
        padding = ((size - 1) * step, 0),
    if not isinstance(padding, str):
        padding = (0, 0), *each(padding, 1)
    return (1, stride), padding, (1, step)


def plane(layer: Any, kernel: Any) -> Any:
    """A layer's kernel, of Flax's shape, as (kh, kw, ic / groups, oc) of the 2-D one; a fully connected one as it is."""
    if rank(layer) == 3:
        kd, kh, kw, icg, oc = kernel.shape
        return kernel.transpose(1, 2, 0, 3, 4).reshape(kh, kw, kd * icg, oc)
    kernel = image_kernel(kernel)
    return blocks(layer).merged(kernel) if is_transposed(layer) else kernel


def plane_shape(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of `plane` for a kernel (*size, ic / groups, oc) that is not transposed, and (1, 1, ic, oc) for (ic, oc)."""
    *size, channels, oc = kernel
    return *(1, 1, *size)[-2:], channels * (size[0] if len(size) == 3 else 1), oc


def image_kernel(kernel: Any) -> Any:
    """The kernel (k, ic / groups, oc) of rows as one of images; any other as it is."""
    return kernel[None] if np.ndim(kernel) == 3 else kernel


def unplane(layer: Any, kernel: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `plane`, for a kernel of this shape."""
    if rank(layer) == 3:
        kd, kh, kw, icg, oc = shape
        return kernel.reshape(kh, kw, kd, icg, oc).transpose(2, 0, 1, 3, 4)
    return (blocks(layer).apart(kernel) if is_transposed(layer) else kernel).reshape(shape)


def images(layer: Any, x: Any) -> Any:
    """Inputs (n, *size, ic) of a convolution as (n, ih, iw, ic) of the 2-D one, of a 3-D one (n * od, ih, iw, kd * ic); of a
    transposed one as its blocks read them."""
    if rank(layer) == 3:
        return _depths(layer, x)
    x = x[:, None] if rank(layer) == 1 else x
    return blocks(layer).bordered(x) if is_transposed(layer) else x


def outputs(layer: Any, y: Any, inputs: tuple[Any, ...]) -> Any:
    """What the 2-D convolution makes of `images` of inputs (n, *size, ic) as the layer's outputs (n, *size', oc)."""
    n, *size, _ = inputs
    if is_transposed(layer):
        made = blocks(layer)
        y = made.pixels(y, *made.outputs(*(1, *size)[-2:]))
    if rank(layer) == 3:
        return y.reshape(n, _depth(layer, size[0])[1], *y.shape[1:])
    return y[:, 0] if rank(layer) == 1 else y


def shape_of(layer: Any, inputs: tuple[int, ...], features: int) -> ConvShape:
    """What a convolution with so many output channels computes for inputs (n, *size, ic).

    Raises:
      ValueError: as `ConvShape`.
    """
    n, *size, ic = inputs
    (ih, iw), (kh, kw) = (1, *size)[-2:], (1, *size_of(layer))[-2:]
    if is_transposed(layer):
        made = blocks(layer)
        (h, w), (taps, across) = made.grid(*made.outputs(ih, iw)), made.window
        oc = len(made.rows) * len(made.columns) * features
        return ConvShape(n, h + taps - 1, w + across - 1, ic, oc, taps, across,
                         void=ic * (taps * across * oc - kh * kw * features))
    if rank(layer) == 3:
        n, ic = n * _depth(layer, size[0])[1], size_of(layer)[0] * ic
    strides, padding, dilation = in_plane(layer)
    (sh, sw), (dh, dw) = each(strides, 2), each(dilation, 2)
    (top, bottom), (left, right) = explicit_padding(padding, (ih, iw), (kh, kw), (sh, sw), (dh, dw))
    return ConvShape(n, ih, iw, ic, features, kh, kw, (sh, sw), ((top, bottom), (left, right)), (dh, dw),
                     layer.feature_group_count)


def output_size(layer: Any, size: tuple[int, ...]) -> tuple[int, ...]:
    """Of a convolution's outputs, for inputs of this size."""
    if is_transposed(layer):
        return blocks(layer).outputs(*(1, *size)[-2:])[-rank(layer):]
    shape = shape_of(layer, (1, *size, layer.feature_group_count), layer.feature_group_count)
    return (shape.n, shape.oh, shape.ow)[-rank(layer):]


def _depths(layer: Any, x: Any) -> Any:
    """Volumes (n, d, h, w, ic) as images (n * od, h, w, kd * ic), within each group one depth after the other."""
    (low, high), od = _depth(layer, x.shape[1])
    if low or high:
        x = jnp.pad(x, [(0, 0), (low, high), (0, 0), (0, 0), (0, 0)], mode=BORDERS.get(str(layer.padding), "constant"))
    n, _, h, w, c = x.shape
    step, apart, groups = each(layer.strides, 3)[0], each(layer.kernel_dilation, 3)[0], layer.feature_group_count
    taps = [jax.lax.slice_in_dim(x, first, first + (od - 1) * step + 1, step, 1)
            for first in range(0, size_of(layer)[0] * apart, apart)]
    return jnp.stack([tap.reshape(n * od, h, w, groups, c // groups) for tap in taps], 4).reshape(n * od, h, w, len(taps) * c)


def _depth(layer: Any, size: int) -> tuple[tuple[int, int], int]:
    """The padding of volumes of so many depths, and how many the outputs have."""
    padding = layer.padding if isinstance(layer.padding, str) else each(layer.padding, 3)[:1]
    (taps, *_), (step, *_), (apart, *_) = size_of(layer), each(layer.strides, 3), each(layer.kernel_dilation, 3)
    ((low, high),) = explicit_padding(padding, (size,), (taps,), (step,), (apart,))
    return (low, high), (size + low + high - (taps - 1) * apart - 1) // step + 1
