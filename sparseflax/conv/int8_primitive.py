"""What runs in eight bits: a primitive of its own, with the kernel on CPUs and the same integers by plain JAX elsewhere.

    y[n,i,j,k] = (float(sum (x - zero_in) w) + bias[k] / unit + (residual - zero_residual) ratio[k]) weight[k] out

with unit = weight[k] unit_in and ratio[k] = unit_residual / unit, clamped, and rounded to uint8 where that is asked for; a step
of a program can round the sum before the residual is added. The ratio has 16 bits, so that its product is exact: whether a
compiler joins products and sums makes no difference.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from sparseflax.conv import ffi
from sparseflax.conv.int8 import LANES, Quantization, QuantizedArray, QuantizedKernel, dense_integers, no_derivative
from sparseflax.conv.packing import Pattern
from sparseflax.conv.sharding import ask_for_devices, lower_sharded
from sparseflax.conv.transforms import batch_images, vary_together
from sparseflax.conv.window import Window, addressable, make_window

BOUNDS = {None: (-math.inf, math.inf), "relu": (0.0, math.inf), "relu6": (0.0, 6.0)}


class Rescale(NamedTuple):
    """The static part of the epilogue, all but what a weight of each channel stands for, and its bias.

    Attributes:
      zero_in, zero, zero_residual: uint8 that stand for 0.
      low, high: bounds of y, whole numbers where it is uint8.
      to_float: whether y is float32.
      unit: what a step of x stands for.
      out: the same over that of y, which is 1 for float32; with `inner` what a step of the rounded sum stands for, over it.
      residual: what a step of the residual stands for; with `inner` the same over that of the rounded sum, 16 bits of it.
      inner: where the sum is rounded before the residual is added: the bounds between which it is, what `residual` has beyond
        16 bits, and `unit` over what a step of it stands for.
    """

    zero_in: int
    zero: int
    zero_residual: int
    low: float
    high: float
    to_float: bool
    unit: float
    out: float
    residual: float = 0.0
    inner: tuple[float, float, float, float] | None = None

    def quantized(self, output: Quantization) -> Rescale:
        """The same with uint8 outputs."""
        steps = (bound / output.scale for bound in (self.low, self.high))
        low, high = (round(min(max(step, -output.zero), 255 - output.zero)) for step in steps)
        out = self.out / output.scale
        return self._replace(zero=output.zero, low=float(low), high=float(high), to_float=False, out=out)

    @property
    def numbers(self) -> list[float]:
        """As the native side takes them: see Scales in xla_ffi/sparse_conv.h."""
        return [self.low, self.high, self.unit, self.out, self.residual, *(self.inner or ())]


def int8_conv(x: Any, packed: QuantizedKernel, bias: Any = None, *, strides: int | Sequence[int] = 1, padding: Any = "SAME",
              kernel_dilation: int | Sequence[int] = 1, feature_group_count: int = 1, activation: str | None = None,
              residual: Any = None, output: Quantization | None = None, kernel: str | None = None) -> Any:
    """What `sparse_conv` does with a QuantizedKernel.

    Args:
      x: float32 (n, ih, iw, ic), quantized first, or a QuantizedArray of the Quantization that `packed` was made for.
      residual: QuantizedArray or float32 (n, oh, ow, oc), or None.
      output: of the result; None for float32.
      bias, strides, padding, kernel_dilation, feature_group_count, activation, kernel: as in `sparse_conv`.

    Returns:
      A QuantizedArray (n, oh, ow, oc), or float32 where `output` is None.

    Raises:
      TypeError, ValueError: as `sparse_conv`, or x has another Quantization than `packed`.
    """
    if not isinstance(x, QuantizedArray):
        x = packed.inputs.quantize(x)
    if x.quantization != packed.inputs:
        raise ValueError(f"x is quantized by {x.quantization}, the kernel was packed for {packed.inputs}: give it float32, or "
                         "pack the kernel for these inputs")
    pattern, (kh, kw, channels, oc), groups = packed.pattern, packed.shape, packed.groups
    size = x.shape
    if len(size) != 4:
        raise ValueError(f"x has shape {x.shape}, wanted 4 dimensions (n, ih, iw, ic): add a batch dimension with x[None]")
    if feature_group_count != groups:
        raise ValueError(f"feature_group_count={feature_group_count}, but the kernel was packed for {groups} groups: "
                         f"call pack_int8(kernel, inputs, feature_group_count={feature_group_count})")
    if x.shape[3] != channels * groups:
        raise ValueError(f"x has {x.shape[3]} channels (shape {x.shape}, NHWC), the kernel {packed.shape} with {groups} groups "
                         f"wants {channels * groups}")
    if activation not in BOUNDS:
        raise ValueError(f"activation={activation!r}, wanted one of {list(BOUNDS)}: apply others after the call")
    if kernel is not None and kernel not in ffi.kernels("int8"):
        raise ValueError(f"kernel={kernel!r} cannot run here, wanted one of {ffi.kernels('int8')} or None for the best")
    window = make_window(x.shape[1:3], (kh, kw), strides, padding, kernel_dilation)
    out = (size[0], *window.output(size[1], size[2], kh, kw), oc)
    bias = jnp.zeros(oc, jnp.float32) if bias is None else jnp.asarray(bias)
    if bias.dtype != jnp.float32 or bias.shape != (oc,):
        raise (TypeError if bias.dtype != jnp.float32 else ValueError)(
            f"bias is {bias.dtype}{list(bias.shape)}, wanted float32[{oc}], one per output channel")
    if residual is not None and residual.shape != out:
        raise ValueError(f"residual has shape {residual.shape}, wanted the output's shape {out}")
    added = residual if isinstance(residual, QuantizedArray) else None
    later: Any = residual if added is None else None  # a float32 residual is added to float32 outputs
    low, high = BOUNDS[activation if later is None else None]
    unit = packed.inputs.scale
    rescale = Rescale(packed.inputs.zero, 0, 0, low, high, True, unit, unit)
    operands = [_padded(x.values, channels, groups), packed.words, packed.sums, packed.scale, bias]
    if added is not None:
        operands.append(added.values)
        rescale = rescale._replace(zero_residual=added.quantization.zero, residual=added.quantization.scale)
    if output is not None and later is None:
        rescale = rescale.quantized(output)
    y = bind_int8(*operands, pattern=pattern, window=window, rescale=rescale, outputs=packed.outputs, kernel=kernel)
    if later is not None:
        y = jnp.clip(y + later, *BOUNDS[activation])
        return y if output is None else output.quantize(y)
    return y if output is None else QuantizedArray(y, output)


def _padded(values: jax.Array, channels: int, groups: int) -> jax.Array:
    """Each group's channels padded to whole words."""
    if channels % LANES == 0:
        return values
    if groups == 1:
        return jax.lax.pad(values, np.uint8(0), [(0, 0, 0)] * 3 + [(0, -channels % LANES, 0)])
    apart = values.reshape(*values.shape[:3], groups, channels)
    apart = jnp.pad(apart, ((0, 0),) * 4 + ((0, -channels % LANES),))
    return apart.reshape(*values.shape[:3], -1)


RESIDUAL = 5  # where the residual stands among the operands

int8_conv_p = Primitive("sparse_conv_int8")
int8_conv_p.def_impl(functools.partial(xla.apply_primitive, int8_conv_p))


def bind_int8(*operands, **params) -> jax.Array:
    """Operands x, words, sums, scale, bias and, where there is one, a residual; empty images are left to XLA."""
    if 0 in (*operands[0].shape, *_output(operands[0], params["pattern"], params["window"])):
        return reference(*operands, **params)
    return int8_conv_p.bind(*vary_together(operands), devices=ask_for_devices(), **params)


def _output(x, pattern: Pattern, window: Window) -> tuple[int, ...]:
    return (x.shape[0], *window.output(x.shape[1], x.shape[2], *pattern.shape[:2]), pattern.shape[3])


@int8_conv_p.def_abstract_eval
def _abstract(x, *_, pattern: Pattern, window: Window, rescale: Rescale, **__):
    dtype = np.dtype(np.float32 if rescale.to_float else np.uint8)
    return x.update(shape=_output(x, pattern, window), dtype=dtype, weak_type=False)


def reference(x, words, sums, scale, bias, *residual, pattern: Pattern, window: Window, rescale: Rescale, **_):
    """What the primitive computes: a sum of integer matrix products, one for each tap, which every platform has."""
    kh, kw, icw, oc = pattern.shape
    groups, (n, oh, ow, _) = pattern.groups, _output(x, pattern, window)
    (sh, sw), (dh, dw) = window.strides, window.dilation
    steps = jnp.pad(x.astype(jnp.int32) - rescale.zero_in, ((0, 0), *window.padding, (0, 0)))
    steps = steps.reshape(*steps.shape[:3], groups, LANES * icw)
    weights = dense_integers(words, pattern).reshape(kh * kw, LANES * icw, groups, oc // groups)

    def add(tap, total):
        corner = (0, tap // kw * dh, tap % kw * dw, 0, 0)
        reach = n, (oh - 1) * sh + 1, (ow - 1) * sw + 1, groups, LANES * icw
        seen = jax.lax.dynamic_slice(steps, corner, reach)[:, ::sh, ::sw]
        return total + jnp.einsum("nijgc,cgk->nijgk", seen, weights[tap], preferred_element_type=jnp.int32)

    empty = 0 in (n, oh, ow)
    total = jnp.zeros((n, oh, ow, groups, oc // groups), jnp.int32)
    total = (total if empty else jax.lax.fori_loop(0, kh * kw, add, total)).reshape(n, oh, ow, oc)
    scale = scale.reshape(1, 1, 1, -1)
    unit, out = scale * np.float32(rescale.unit), np.float32(rescale.out)
    y = total.astype(jnp.float32) + bias.reshape(1, 1, 1, -1) / unit
    if rescale.inner is not None:
        y = jnp.round(_clamped(y * (scale * np.float32(rescale.inner[3])), *rescale.inner[:2]))
    if residual:
        other = (residual[0].astype(jnp.int32) - rescale.zero_residual).astype(jnp.float32)
        ratio = np.float32(rescale.residual)
        y = y + other * (jax.lax.reduce_precision(ratio / unit, 8, 15) if rescale.inner is None else ratio)
        y = y if rescale.inner is None else y + other * np.float32(rescale.inner[2])
    y = y * (scale * out if rescale.inner is None else out)
    if rescale.to_float:
        return jnp.minimum(jnp.maximum(y, np.float32(rescale.low)), np.float32(rescale.high))
    return (jnp.round(_clamped(y, rescale.low, rescale.high)).astype(jnp.int32) + rescale.zero).astype(jnp.uint8)


def _clamped(y, low: float, high: float):
    """Between two bounds; a nan becomes the lower one."""
    return jnp.minimum(jnp.where(y > np.float32(low), y, np.float32(low)), np.float32(high))


def _lower_to_ffi(ctx, *operands, pattern: Pattern, window: Window, rescale: Rescale, kernel, **_):
    if not addressable(pattern, window):
        return _lower_to_xla(ctx, *operands, pattern=pattern, window=window, rescale=rescale)
    (top, bottom), (left, right) = window.padding
    kh, kw, icw, oc = pattern.shape
    return jax.ffi.ffi_lowering(ffi.INT8_TARGET)(
        ctx, *operands, gaps=pattern.gaps, kernel=kernel or "",
        layout=np.asarray([kh, kw, icw, oc, pattern.groups, pattern.block], np.int64),
        window=np.asarray([*window.strides, top, bottom, left, right, *window.dilation], np.int64),
        zeros=np.asarray([rescale.zero_in, rescale.zero, rescale.zero_residual], np.int64),
        numbers=np.asarray(rescale.numbers, np.float32))


def _images(operands: int, **_) -> list[int]:
    return [0, RESIDUAL] if operands > RESIDUAL else [0]


_lower_to_xla = mlir.lower_fun(reference, multiple_results=False)
mlir.register_lowering(int8_conv_p, _lower_to_xla)
if ffi.available:
    mlir.register_lowering(int8_conv_p, lower_sharded(int8_conv_p, _lower_to_ffi, _images), platform="cpu")
ad.primitive_jvps[int8_conv_p] = no_derivative


def _batch(operands, dims, *, devices, **params):
    return batch_images(functools.partial(bind_int8, **params), operands, dims, _images(len(operands))), 0


batching.primitive_batchers[int8_conv_p] = _batch
