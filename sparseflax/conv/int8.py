"""Eight bits: what stands for a float32, and convolution kernels of int8 words.

An activation is x = scale * (q - zero) with q uint8, a weight w = scale[k] * q with q int8 from -127 to 127, one scale for
each output channel k, and exactly 0 where it is pruned. Four weights of neighbouring input channels of a tap make one 32-bit
word, the first in its lowest byte; a word is kept where one of them is not 0. Words are stored as float32 weights are (see
packing.py), of a kernel with a quarter of the input channels. So weights pay where they are pruned in blocks of four.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir, xla

from sparseflax.conv.packing import PackedKernel, Pattern, pack, scatter

LANES = 4  # int8 weights in a word


@dataclass(frozen=True)
class Quantization:
    """x = scale * (q - zero), q uint8: static and hashable.

    Raises:
      ValueError: scale is not positive and finite, or zero not in 0 .. 255.
    """

    scale: float
    zero: int

    def __post_init__(self):
        if not (math.isfinite(self.scale) and self.scale > 0 and 2**-100 < self.scale < 2**100):
            raise ValueError(f"scale={self.scale}, wanted one between 2**-100 and 2**100: take "
                             "Quantization.of_range(low, high)")
        if not 0 <= self.zero <= 255:
            raise ValueError(f"zero={self.zero}, wanted 0 to 255: take Quantization.of_range(low, high)")

    @classmethod
    def of_range(cls, low: float, high: float) -> Quantization:
        """The finest that holds low to high, and 0 exactly.

        Raises:
          ValueError: the range is not finite, or holds 0 only.
        """
        low, high = min(float(low), 0.0), max(float(high), 0.0)
        if not (math.isfinite(low) and math.isfinite(high) and high > low):
            raise ValueError(f"the range {low} to {high} has no steps: give examples that are finite and not all zero")
        scale = float(np.float32((high - low) / 255))
        return cls(scale, min(255, max(0, round(-low / scale))))

    def between(self, low: float, high: float) -> Quantization:
        """The finest for what this one holds between two bounds; itself where that is 0 alone."""
        low, high = max(low, self.scale * -self.zero), min(high, self.scale * (255 - self.zero))
        return Quantization.of_range(low, high) if low < high else self

    def quantize(self, x: Any) -> QuantizedArray:
        """The nearest steps, ties to even, clamped to 0 .. 255; a nan becomes q = 0. It has no derivative.

        Raises:
          TypeError: x is not float32.
        """
        x = jnp.asarray(x)
        if x.dtype != jnp.float32:
            raise TypeError(f"x has dtype {x.dtype}, wanted float32: cast it with x.astype(jnp.float32)")
        return QuantizedArray(quantize_p.bind(x, quantization=self), self)


@jax.tree_util.register_pytree_node_class
class QuantizedArray:
    """uint8 values and the static Quantization that says what they stand for: a pytree with one leaf, `values`."""

    def __init__(self, values: jax.Array, quantization: Quantization):
        self.values = values
        self.quantization = quantization

    def tree_flatten(self):
        return (self.values,), self.quantization

    @classmethod
    def tree_unflatten(cls, quantization, children):
        return cls(children[0], quantization)

    def __repr__(self) -> str:
        return f"QuantizedArray({self.values!r}, {self.quantization})"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def dequantize(self) -> jax.Array:
        """The float32 that the values stand for."""
        return dequantize_p.bind(self.values, quantization=self.quantization)


def no_derivative(*_, **__):
    """The derivative rule of what has none."""
    raise TypeError("an int8 convolution has no derivative: train the float32 model (for training with quantization see qwix) "
                    "and pack it for int8 afterwards")


def _quantize(x, *, quantization: Quantization):
    # A quotient as IEEE has it: XLA would multiply by the reciprocal of a number that it knows, and ties would go elsewhere.
    steps = x / jax.lax.optimization_barrier(jnp.broadcast_to(np.float32(quantization.scale), x.shape))
    low, high = np.float32(-quantization.zero), np.float32(255 - quantization.zero)
    steps = jnp.minimum(jnp.where(steps > low, steps, low), high)
    return (jnp.round(steps).astype(jnp.int32) + quantization.zero).astype(jnp.uint8)


def _dequantize(x, *, quantization: Quantization):
    return (x.astype(jnp.int32) - quantization.zero).astype(jnp.float32) * np.float32(quantization.scale)


def _primitive(name: str, dtype: Any, compute: Any) -> Primitive:
    """What is done to each value by itself, given a Quantization."""
    made = Primitive(f"sparseflax_{name}")
    made.def_impl(functools.partial(xla.apply_primitive, made))
    made.def_abstract_eval(lambda x, *, quantization: x.update(dtype=np.dtype(dtype), weak_type=False))
    mlir.register_lowering(made, mlir.lower_fun(compute, multiple_results=False))
    ad.primitive_jvps[made] = no_derivative
    batching.primitive_batchers[made] = lambda operands, dims, **params: (made.bind(*operands, **params), dims[0])
    return made


quantize_p = _primitive("quantize", np.uint8, _quantize)
dequantize_p = _primitive("dequantize", np.float32, _dequantize)


@jax.tree_util.register_pytree_node_class
class QuantizedKernel:
    """A convolution kernel of int8 words without those that are zero, for inputs of one Quantization.

    A pytree with the leaves `words` int32 (nnz,), `scale` float32 (oc,) and `sums` int32 (oc,), each output channel's sum of
    int8 weights. Static are `pattern`, of words, `channels`, the input channels of a group, `inputs`, and `outputs`, by which a
    network may round its results where that saves time, or None.
    """

    def __init__(self, words: jax.Array, scale: jax.Array, sums: jax.Array, pattern: Pattern, channels: int,
                 inputs: Quantization, outputs: Quantization | None = None):
        self.words, self.scale, self.sums = words, scale, sums
        self.pattern, self.channels, self.inputs, self.outputs = pattern, channels, inputs, outputs

    def tree_flatten(self):
        return (self.words, self.scale, self.sums), (self.pattern, self.channels, self.inputs, self.outputs)

    @classmethod
    def tree_unflatten(cls, static, children):
        return cls(*children, *static)

    def __repr__(self) -> str:
        return f"QuantizedKernel(shape={self.shape}, groups={self.groups}, density={self.density:.3f}, nbytes={self.nbytes})"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(kh, kw, ic / groups, oc) of the dense kernel."""
        kh, kw, _, oc = self.pattern.shape
        return kh, kw, self.channels, oc

    @property
    def groups(self) -> int:
        return self.pattern.groups

    @property
    def density(self) -> float:
        """Kept words / all words."""
        return self.pattern.nnz / max(1, math.prod(self.pattern.shape))

    @property
    def nbytes(self) -> int:
        """Bytes stored: words, gap codes, and a scale and a sum for each output channel."""
        return 4 * self.pattern.nnz + self.pattern.gaps.nbytes + 8 * self.shape[3]

    def unpack(self) -> jax.Array:
        """The dense float32 kernel (kh, kw, ic / groups, oc) that the int8 weights stand for."""
        integers = dense_integers(self.words, self.pattern)[:, :, :self.channels]
        return integers.astype(jnp.float32) * self.scale.reshape(1, 1, 1, -1)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays that `np.savez(path, **arrays)` stores; `from_arrays` is the inverse."""
        return {"words": np.asarray(self.words), "scale": np.asarray(self.scale), "gaps": self.pattern.gaps,
                "layout": np.asarray([*self.pattern.shape, self.groups, self.pattern.block, self.channels], np.int64),
                "inputs": _numbers(self.inputs), "outputs": _numbers(self.outputs)}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Any]) -> QuantizedKernel:
        """A QuantizedKernel from what `to_arrays` returned, checked.

        Raises:
          ValueError: arrays are missing, disagree with each other, or could overflow.
        """
        wanted = {"words": np.int32, "scale": np.float32, "gaps": np.uint8, "layout": np.int64, "inputs": np.float64,
                  "outputs": np.float64}
        found = {name: np.asarray(arrays[name]) for name in wanted if name in arrays}
        dtypes = {name: a.dtype for name, a in found.items()}
        if dtypes != wanted or found["layout"].shape != (7,) or found["inputs"].shape != (2,) or found[
                "outputs"].shape not in ((0,), (2,)):
            raise ValueError(f"packed arrays are {({name: str(dtype) for name, dtype in dtypes.items()})}, wanted those of "
                             "QuantizedKernel.to_arrays()")
        *layout, channels = map(int, found["layout"])
        words, scale = found["words"].flatten(), found["scale"].flatten()  # copies: JAX may keep the memory it is given
        pattern = PackedKernel.from_arrays({"values": np.ones(words.shape, np.float32), "gaps": found["gaps"],
                                            "layout": np.asarray(layout, np.int64)}).pattern
        if scale.shape != (layout[3],) or not 0 < channels <= LANES * layout[2] < channels + LANES:
            raise ValueError(f"packed scale has shape {scale.shape} and the layout is {found['layout'].tolist()}: they are "
                             "no int8 kernel's; pack the dense kernel again")
        rounding = [Quantization(float(step), int(zero)) for step, zero in (found["inputs"], *found["outputs"].reshape(-1, 2))]
        words, scale, sums = jax.device_put((words, scale, _sums(words, pattern)))
        return cls(words, scale, sums, pattern, channels, *rounding)


def _numbers(quantization: Quantization | None) -> np.ndarray:
    return np.asarray([] if quantization is None else [quantization.scale, quantization.zero], np.float64)


def pack_int8(kernel: Any, inputs: Quantization, feature_group_count: int = 1, outputs: Quantization | None = None,
              scale: Any = None) -> QuantizedKernel:
    """Rounds a convolution kernel to int8 and packs the words that hold a weight other than 0.

    Args:
      kernel: concrete float32 array (kh, kw, ic / groups, oc), HWIO, or (ic, oc) of a fully connected layer.
      inputs: what the uint8 inputs stand for.
      feature_group_count: groups, as in `jax.lax.conv_general_dilated`.
      outputs: by which a network may round the results where that saves time, as of a shortcut; None keeps them float32.
      scale: (oc,) what an int8 weight of 1 stands for, which larger weights than 127 of are clamped by; None takes the finest.

    Raises:
      TypeError: `kernel` is traced or not float32, `inputs` is no Quantization.
      ValueError: what `pack` refuses, or so many weights for an output channel that an int32 could overflow.
    """
    if not isinstance(inputs, Quantization):
        raise TypeError(f"inputs is a {type(inputs).__name__}, wanted a Quantization: take Quantization.of_range(low, high)")
    if isinstance(kernel, Tracer):
        raise TypeError("pack_int8() got a traced kernel: the pattern is static, so pack outside jit")
    dense = np.asarray(kernel)
    pack(dense, feature_group_count)  # refuses what cannot be packed
    *_, channels, oc = dense.shape
    if scale is None:
        largest = np.abs(dense).max(axis=tuple(range(dense.ndim - 1)))
        scale = np.maximum(np.where(largest > 0, largest, 1) / np.float32(127), np.float32(2**-100))
    scale = np.array(scale, np.float32)  # a copy: JAX may keep the memory it is given
    if scale.shape != (oc,) or not (np.isfinite(scale) & (scale > 0)).all():
        raise ValueError(f"scale has shape {scale.shape} and is at least {scale.min(initial=np.inf)}, wanted ({oc},), finite "
                         "and positive: None takes what fits the kernel")
    integers = np.clip(np.rint(dense / scale), -127, 127).astype(np.int32)
    padding = [(0, 0)] * (dense.ndim - 2) + [(0, -channels % LANES), (0, 0)]
    lanes = np.pad(integers, padding).reshape(*dense.shape[:-2], -1, LANES, oc)
    places = 8 * np.arange(LANES, dtype=np.uint32).reshape(-1, 1)
    words = np.bitwise_or.reduce((lanes.astype(np.uint32) & 255) << places, axis=-2).view(np.int32)
    pattern = pack((words != 0).astype(np.float32), feature_group_count).pattern
    kept = words.reshape(-1)[pattern.index]
    words, scale, sums = jax.device_put((kept, scale, _sums(kept, pattern)))
    return QuantizedKernel(words, scale, sums, pattern, channels, inputs, outputs)


def _sums(words: np.ndarray, pattern: Pattern) -> np.ndarray:
    """Sums of int8 weights of each output channel; raises ValueError where a sum of products could leave int32."""
    lanes = words.astype("<i4").view(np.int8).reshape(-1, LANES).astype(np.int64)
    if lanes.size and lanes.min() < -127:
        raise ValueError("a packed int8 weight is -128, wanted -127 to 127: the file is damaged; pack the dense kernel again")
    k, oc = pattern.index % pattern.shape[3], pattern.shape[3]
    most = np.bincount(k, np.abs(lanes).sum(1), oc).max(initial=0)
    if most * 255 >= 2**31:
        raise ValueError(f"the int8 weights of an output channel add up to {int(most)}, at most {2**31 // 255} cannot overflow "
                         "an int32: keep fewer, or stay with float32")
    return np.bincount(k, lanes.sum(1), oc).astype(np.int32)


def dense_integers(words: jax.Array, pattern: Pattern) -> jax.Array:
    """The dense int8 weights as int32 (kh, kw, 4 * words of a group, oc)."""
    return _lanes(scatter(words, pattern))


@functools.partial(jax.jit, inline=True)
def _lanes(words: jax.Array) -> jax.Array:
    kh, kw, icw, oc = words.shape
    lanes = [(words << (24 - 8 * lane)) >> 24 for lane in range(LANES)]
    return jnp.stack(lanes, axis=3).reshape(kh, kw, LANES * icw, oc)
