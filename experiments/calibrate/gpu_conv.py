"""A direct sparse convolution for GPUs, in Pallas: the paper's loop, with a gather from the image for each kept weight.

    y[k, p] = sum_j values[k, j] * x[columns[k, j] + base[p]]

x is the padded image, flat, channels first; columns say where a weight's channel and tap begin, base where the window of
output position p does. So no matrix of patches is made. Neighbouring positions read neighbouring numbers, and each product
reads one number, which is what bounds it.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from sparseflax.cost.shape import ConvShape

UNROLL = 8  # weights of a row between two tests of whether it ends
BLOCKS = 256, 512, 1024  # positions that one program computes; the best differs by layer


def rows_of(kernel: np.ndarray, shape: ConvShape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The kept weights of each output channel, padded with zeros to a multiple of UNROLL.

    Args:
      kernel: (kh, kw, ic / groups, oc).
      shape: of the layer, with its batch.

    Returns:
      columns: int32 (oc, most), where in the flat padded image the window's first position meets a weight.
      values: float32 (oc, most).
      steps: int32 (oc,), of UNROLL weights.
    """
    padded_h, padded_w = _padded(shape)
    rows = [np.nonzero(kernel[..., k]) for k in range(shape.oc)]
    steps = np.array([-(-len(row[0]) // UNROLL) for row in rows], np.int32)
    most = UNROLL * max(1, int(steps.max()))
    columns, values = np.zeros((shape.oc, most), np.int32), np.zeros((shape.oc, most), np.float32)
    for k, (dy, dx, c) in enumerate(rows):
        channel = c + k // (shape.oc // shape.groups) * (shape.ic // shape.groups)
        columns[k, :len(c)] = (channel * shape.n * padded_h + dy * shape.kernel_dilation[0]) * padded_w \
            + dx * shape.kernel_dilation[1]
        values[k, :len(c)] = kernel[dy, dx, c, k]
    return columns, values, steps


def gather_conv(x: jax.Array, columns: jax.Array, values: jax.Array, steps: jax.Array, shape: ConvShape,
                block: int = BLOCKS[0]) -> jax.Array:
    """The convolution of channels-first images x (ic, n, ih, iw) -> (oc, n, oh, ow) with the weights of `rows_of`."""
    (padded_h, padded_w), positions = _padded(shape), shape.n * shape.oh * shape.ow
    flat = jnp.pad(x, ((0, 0), (0, 0), *shape.padding)).reshape(-1)
    image, row, column = np.ogrid[:shape.n, :shape.oh, :shape.ow]
    base = ((image * padded_h + row * shape.strides[0]) * padded_w + column * shape.strides[1]).reshape(-1).astype(np.int32)
    blocks = pl.cdiv(positions, block)
    base = np.pad(base, (0, blocks * block - positions))  # the positions beyond the last are computed and dropped
    most = columns.shape[1]
    y = pl.pallas_call(
        _rows, grid=(shape.oc, blocks), out_shape=jax.ShapeDtypeStruct((shape.oc, blocks * block), jnp.float32),
        in_specs=[pl.BlockSpec((block,), lambda k, p: (p,)), pl.BlockSpec((None, most), lambda k, p: (k, 0)),
                  pl.BlockSpec((None, most), lambda k, p: (k, 0)), pl.BlockSpec((1,), lambda k, p: (k,)),
                  pl.BlockSpec(flat.shape, lambda k, p: (0,))],
        out_specs=pl.BlockSpec((None, block), lambda k, p: (k, p)), compiler_params=triton.CompilerParams(num_warps=4),
        interpret=jax.default_backend() == "cpu",
    )(base, columns, values, steps, flat)
    return y[:, :positions].reshape(shape.oc, shape.n, shape.oh, shape.ow)


def _rows(base_ref, columns_ref, values_ref, steps_ref, x_ref, y_ref):
    base = base_ref[...]

    def step(i, sums):
        for j in range(UNROLL):
            at = i * UNROLL + j
            sums += values_ref[at] * x_ref[base + columns_ref[at]]
        return sums

    y_ref[...] = jax.lax.fori_loop(0, steps_ref[0], step, jnp.zeros(base.shape, jnp.float32))


def _padded(shape: ConvShape) -> tuple[int, int]:
    (top, bottom), (left, right) = shape.padding
    return shape.ih + top + bottom, shape.iw + left + right


@functools.partial(jax.jit, static_argnames=("shape", "precision"))
def dense_conv(x: jax.Array, kernel: jax.Array, shape: ConvShape, precision: str = "highest") -> jax.Array:
    """The library's dense convolution of images x (n, ih, iw, ic) -> (n, oh, ow, oc)."""
    return jax.lax.conv_general_dilated(
        x, kernel, shape.strides, shape.padding, rhs_dilation=shape.kernel_dilation, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=shape.groups, precision=precision)
