"""What runs: `sparse_conv` and its JAX primitive.

On CPU the primitive lowers to the C++ kernel through the XLA FFI; everywhere else, and in every derivative, it is plain
JAX on the unpacked kernel: slower, never wrong. The pattern is static, so other values do not recompile.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from sparseflax.conv import ffi
from sparseflax.conv.int8 import Quantization, QuantizedArray, QuantizedKernel
from sparseflax.conv.int8_primitive import int8_conv
from sparseflax.conv.packing import PackedKernel, Pattern, scatter
from sparseflax.conv.sharding import ask_for_devices, lower_sharded
from sparseflax.conv.transforms import batch_images, vary_together
from sparseflax.conv.window import Window, addressable, make_window

Activation = Literal["relu", "relu6"] | None
ACTIVATIONS: dict[str | None, int] = {None: 0, "relu": 1, "relu6": 2}


def sparse_conv(
    x: jax.Array | QuantizedArray,
    packed: PackedKernel | QuantizedKernel,
    bias: jax.Array | None = None,
    *,
    strides: int | Sequence[int] = 1,
    padding: str | int | Sequence[int | tuple[int, int]] = "SAME",
    kernel_dilation: int | Sequence[int] = 1,
    feature_group_count: int = 1,
    activation: Activation = None,
    residual: jax.Array | QuantizedArray | None = None,
    output: Quantization | None = None,
    kernel: str | None = None,
) -> Any:
    """Convolution with packed sparse weights and a fused epilogue.

    y[n,i,j,k] = act(sum_{r,s,c} x[n, i*sh + r*dh - ph, j*sw + s*dw - pw, c] w[r,s,c,k] + bias[k] + residual[n,i,j,k])

    Non-finite inputs propagate as in the dense convolution: a pruned weight counts as 0, and 0 * inf is nan.

    With a kernel from `pack_int8` the sum is one of integers, exact and the same on every platform, and only the rest is
    float32. It has no derivative. A float32 x is quantized first, where a nan becomes the lowest value.

    Args:
      x: float32 (n, ih, iw, ic), or a QuantizedArray where `packed` was made for its Quantization.
      packed: weights (kh, kw, ic / groups, oc) from `pack`, or from `pack_int8`.
      bias: float32 (oc,) or None.
      strides: one or two positive ints.
      padding: "SAME", "VALID", an int, or two of (int or (low, high)).
      kernel_dilation: one or two positive ints.
      feature_group_count: groups; has to be the number the kernel was packed for.
      activation: None, "relu" or "relu6", applied last.
      residual: float32 (n, oh, ow, oc) added before the activation, or None; may be a QuantizedArray with int8.
      output: with int8 the Quantization of the result; None for float32.
      kernel: forces an instruction set ("avx512", "avx2", "neon", "portable"), for tests; None takes the best.

    Returns:
      float32 (n, oh, ow, oc), or a QuantizedArray where `output` is given.

    Raises:
      TypeError: an argument is not float32, or `packed` is not a PackedKernel.
      ValueError: shapes, groups, window, activation or kernel name do not fit.
    """
    if isinstance(packed, QuantizedKernel):
        return int8_conv(x, packed, bias, strides=strides, padding=padding, kernel_dilation=kernel_dilation,
                         feature_group_count=feature_group_count, activation=activation, residual=residual, output=output,
                         kernel=kernel)
    if not isinstance(packed, PackedKernel):
        raise TypeError(f"packed is a {type(packed).__name__}, wanted a PackedKernel: call sparseflax.pack(kernel) first")
    if output is not None or isinstance(x, QuantizedArray) or isinstance(residual, QuantizedArray):
        raise TypeError("x, residual or output is quantized, but packed holds float32: pack the kernel with "
                        "sparseflax.pack_int8")
    operands = {"x": x, "values": packed.values} | {k: a for k, a in (("bias", bias), ("residual", residual)) if a is not None}
    operands = {name: jnp.asarray(a) for name, a in operands.items()}
    for name, a in operands.items():
        if a.dtype != jnp.float32:
            raise TypeError(f"{name} has dtype {a.dtype}, wanted float32: cast it with {name}.astype(jnp.float32)")
    x, pattern = operands["x"], packed.pattern
    kh, kw, icg, oc = pattern.shape
    if x.ndim != 4:
        raise ValueError(f"x has shape {x.shape}, wanted 4 dimensions (n, ih, iw, ic): add a batch dimension with x[None]")
    if feature_group_count != pattern.groups:
        raise ValueError(f"feature_group_count={feature_group_count}, but the kernel was packed for {pattern.groups} groups: "
                         f"call pack(kernel, feature_group_count={feature_group_count})")
    if x.shape[3] != icg * pattern.groups:
        raise ValueError(f"x has {x.shape[3]} channels (shape {x.shape}, NHWC), the kernel {pattern.shape} with "
                         f"{pattern.groups} groups wants {icg * pattern.groups}")
    if operands["values"].shape != (pattern.nnz,):
        raise ValueError(f"packed.values has shape {operands['values'].shape}, its pattern keeps {pattern.nnz} weights: "
                         "pack the dense kernel again")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r}, wanted one of {list(ACTIVATIONS)}: apply others after the call")
    if kernel is not None and kernel not in ffi.kernels():
        raise ValueError(f"kernel={kernel!r} cannot run here, wanted one of {ffi.kernels()} or None for the best")
    window = make_window(x.shape[1:3], (kh, kw), strides, padding, kernel_dilation)
    out = _output_shape(x, pattern, window)
    if bias is not None and operands["bias"].shape != (oc,):
        raise ValueError(f"bias has shape {operands['bias'].shape}, wanted ({oc},), one per output channel")
    if residual is not None and operands["residual"].shape != out:
        raise ValueError(f"residual has shape {operands['residual'].shape}, wanted the output's shape {out}")
    return _bind(*operands.values(), pattern=pattern, window=window, activation=activation,
                 has_bias=bias is not None, has_residual=residual is not None, kernel=kernel)


conv_p = Primitive("sparse_conv")
conv_p.def_impl(functools.partial(xla.apply_primitive, conv_p))


def _output_shape(x, pattern: Pattern, window: Window) -> tuple[int, ...]:
    return (x.shape[0], *window.output(x.shape[1], x.shape[2], *pattern.shape[:2]), pattern.shape[3])


def _bind(*operands, **params):
    """Binds operands that vary together; empty images are left to XLA: the kernel wants something to do."""
    if 0 in (*operands[0].shape, *_output_shape(operands[0], params["pattern"], params["window"])):
        return reference(*operands, **params)
    return conv_p.bind(*vary_together(operands), devices=ask_for_devices(), **params)


def dense_conv(x: jax.Array, dense: jax.Array, window: Window, groups: int) -> jax.Array:
    """XLA's convolution, NHWC x HWIO -> NHWC: what `sparse_conv` has to agree with."""
    return jax.lax.conv_general_dilated(
        x, dense, window.strides, window.padding, rhs_dilation=window.dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups)


def reference(x, values, *rest, pattern: Pattern, window: Window, activation, **_):
    """What the primitive computes, in plain JAX."""
    y = dense_conv(x, scatter(values, pattern), window, pattern.groups)
    for term in rest:  # bias (oc,) and residual (n, oh, ow, oc)
        y = y + (term.reshape(1, 1, 1, -1) if term.ndim == 1 else term)
    if activation is not None:
        y = jnp.maximum(y, 0)
    return jnp.minimum(y, 6) if activation == "relu6" else y


@conv_p.def_abstract_eval
def _abstract(x, values, *rest, pattern: Pattern, window: Window, **_):
    return x.update(shape=_output_shape(x, pattern, window), weak_type=False)  # keeps the sharding and the manual axes


def _lower_to_ffi(ctx, *operands, pattern: Pattern, window: Window, activation, has_bias, has_residual, kernel):
    if not addressable(pattern, window):
        return _lower_to_xla(ctx, *operands, pattern=pattern, window=window, activation=activation)
    (top, bottom), (left, right) = window.padding
    kh, kw, icg, oc = pattern.shape
    return jax.ffi.ffi_lowering(ffi.TARGET)(
        ctx, *operands, gaps=pattern.gaps, kernel=kernel or "",
        layout=np.asarray([kh, kw, icg, oc, pattern.groups, pattern.block], np.int64),
        window=np.asarray([*window.strides, top, bottom, left, right, *window.dilation], np.int64),
        epilogue=np.asarray([ACTIVATIONS[activation], has_bias, has_residual], np.int64))


def _images(operands: int, *, has_residual, **_) -> list[int]:
    return [0, operands - 1] if has_residual else [0]


_lower_to_xla = mlir.lower_fun(reference, multiple_results=False)
mlir.register_lowering(conv_p, _lower_to_xla)
if ffi.available:
    mlir.register_lowering(conv_p, lower_sharded(conv_p, _lower_to_ffi, _images), platform="cpu")


def _jvp(primals, tangents, *, pattern, window, activation, has_bias, has_residual, kernel, **_):
    """The tangent of a fused call: two bare convolutions, the terms added, gated where the activation is flat."""
    bare = functools.partial(_bind, pattern=pattern, window=window, activation=None, has_bias=False, has_residual=False,
                             kernel=kernel)
    y = _bind(*primals, pattern=pattern, window=window, activation=activation, has_bias=has_bias,
              has_residual=has_residual, kernel=kernel)
    (x, values), (dx, dvalues) = primals[:2], tangents[:2]
    terms = []
    if type(dx) is not ad.Zero:
        terms.append(bare(dx, values))
    if type(dvalues) is not ad.Zero:
        terms.append(bare(x, dvalues))
    terms += [jnp.broadcast_to(t, y.shape) for t in tangents[2:] if type(t) is not ad.Zero]
    if not terms:
        return y, ad.Zero(jax.typeof(y).to_tangent_aval())
    dy = functools.reduce(jnp.add, terms)
    if activation is not None:
        flat = y <= 0 if activation == "relu" else (y <= 0) | (y >= 6)
        dy = jnp.where(flat, 0, dy)
    return y, dy


ad.primitive_jvps[conv_p] = _jvp


def _transpose(ct, x, values, *, pattern: Pattern, window: Window, **_):
    """Cotangents of the bare convolution, through XLA: training is dense, only inference is ours."""
    if type(ct) is ad.Zero:
        return None, None
    if ad.is_undefined_primal(x):
        linear = jax.linear_transpose(lambda a: dense_conv(a, scatter(values, pattern), window, pattern.groups), x.aval)
        return *linear(ct), None
    linear = jax.linear_transpose(lambda v: dense_conv(x, scatter(v, pattern), window, pattern.groups), values.aval)
    return None, *linear(ct)


ad.primitive_transposes[conv_p] = _transpose


def _batch(operands, dims, *, devices, **params):
    return batch_images(functools.partial(_bind, **params), operands, dims, _images(len(operands), **params)), 0


batching.primitive_batchers[conv_p] = _batch
