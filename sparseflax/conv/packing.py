"""How sparse convolution weights are stored: the only writer and reader of the packed format.

The kept weights stand in the order in which the kernel reads them. With groups g, channel blocks b of
`block` input channels, output channels k and taps t = (c * kh + r) * kw + s inside a block, the weight at
(g, b, k, t) has the position

    p = ((g * blocks + b) * (oc / groups) + k) * taps + t,        taps = block * kh * kw

and the pattern is the sequence of gaps between kept positions, one byte each: a byte v < 255 skips v positions and
keeps the next one, 255 skips 255 positions and keeps nothing. At density 0.1 a kept weight costs 5 bytes, value included.
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

SKIP = 255  # the gap byte that keeps nothing
MAX_WEIGHTS = 1 << 40  # of a dense kernel: far beyond any real one, far below where positions overflow


def channel_block(kh: int, kw: int) -> int:
    """Input channels per block: the panel of a block should stay in L1, and a visit should find a dozen kept weights."""
    return max(16, 128 // (kh * kw) // 16 * 16)


# Of a fully connected layer: it meets every weight once, so only long visits pay, and its panel is narrow.
DENSE_BLOCK = 1024


@dataclass(frozen=True, eq=False)
class Pattern:
    """Which weights are kept: static, hashable, equal by digest.

    Attributes:
      shape: (kh, kw, ic / groups, oc) of the dense kernel.
      groups: feature groups.
      block: input channels per block.
      gaps: uint8 array, the gap code of the kept positions (see the module's docstring).
    """

    shape: tuple[int, int, int, int]
    groups: int
    block: int
    gaps: np.ndarray

    def __post_init__(self):
        self.gaps.setflags(write=False)  # the digest is computed once

    def __reduce__(self):
        return Pattern, (self.shape, self.groups, self.block, self.gaps)  # read-only again, and without what is cached

    @functools.cached_property
    def digest(self) -> bytes:
        head = np.asarray([*self.shape, self.groups, self.block], np.int64).tobytes()
        return hashlib.blake2b(head + self.gaps.tobytes(), digest_size=16).digest()

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and self.digest == other.digest

    def __repr__(self) -> str:
        return f"Pattern({'x'.join(map(str, self.shape))}, groups={self.groups}, nnz={self.nnz})"

    @functools.cached_property
    def nnz(self) -> int:
        return int(np.count_nonzero(self.gaps != SKIP))

    @functools.cached_property
    def index(self) -> np.ndarray:
        """Index of each kept weight in the flattened dense kernel, int64 (nnz,); raises ValueError if out of range."""
        kh, kw, icg, oc = self.shape
        keeps = self.gaps != SKIP
        position = np.cumsum(np.where(keeps, self.gaps.astype(np.int64) + 1, SKIP))[keeps] - 1
        taps = self.block * kh * kw
        rest, tap = np.divmod(position, taps)
        rest, k = np.divmod(rest, oc // self.groups)
        g, b = np.divmod(rest, -(-icg // self.block))
        c, rs = np.divmod(tap, kh * kw)
        c = b * self.block + c
        if position.size and (g[-1] >= self.groups or c.max() >= icg):
            raise ValueError(
                f"the packed pattern points outside its kernel {self.shape}: group {int(g[-1])} of {self.groups}, "
                f"channel {int(c.max())} of {icg}; the file is damaged or was edited: pack the dense kernel again")
        return (rs * icg + c) * oc + g * (oc // self.groups) + k


@jax.tree_util.register_pytree_with_keys_class
class PackedKernel:
    """A convolution kernel without its zeros: a pytree with one leaf, `values`, and a static `pattern`."""

    def __init__(self, values: jax.Array, pattern: Pattern):
        self.values = values
        self.pattern = pattern

    def tree_flatten_with_keys(self):
        return ((jax.tree_util.GetAttrKey("values"), self.values),), self.pattern

    def tree_flatten(self):
        return (self.values,), self.pattern

    @classmethod
    def tree_unflatten(cls, pattern, children):
        return cls(children[0], pattern)

    def __repr__(self) -> str:
        return f"PackedKernel(shape={self.shape}, groups={self.groups}, density={self.density:.3f}, nbytes={self.nbytes})"

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(kh, kw, ic / groups, oc) of the dense kernel."""
        return self.pattern.shape

    @property
    def groups(self) -> int:
        return self.pattern.groups

    @property
    def nnz(self) -> int:
        return self.pattern.nnz

    @property
    def density(self) -> float:
        """Kept weights / all weights."""
        return self.nnz / max(1, int(np.prod(self.shape)))

    @property
    def nbytes(self) -> int:
        """Bytes stored: float32 values and gap codes."""
        return 4 * self.nnz + self.pattern.gaps.nbytes

    def unpack(self) -> jax.Array:
        """The dense kernel (kh, kw, ic / groups, oc), exact to the bit (a packed -0.0 is a zero and comes back as 0.0)."""
        return scatter(self.values, self.pattern)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays that `np.savez(path, **arrays)` and orbax store; `from_arrays` is the inverse."""
        return {"values": np.asarray(self.values), "gaps": self.pattern.gaps,
                "layout": np.asarray([*self.shape, self.groups, self.pattern.block], np.int64)}

    @classmethod
    def from_arrays(cls, arrays) -> PackedKernel:
        """A PackedKernel from what `to_arrays` returned, checked.

        Raises:
          ValueError: arrays are missing, disagree with each other, or point outside the kernel.
        """
        missing = [name for name in ("values", "gaps", "layout") if name not in arrays]
        if missing:
            raise ValueError(f"packed arrays lack {missing}, got {sorted(arrays)}: save what PackedKernel.to_arrays() returns")
        values, gaps = np.array(arrays["values"]), np.asarray(arrays["gaps"])  # a copy: JAX may keep the memory it is given
        layout = np.asarray(arrays["layout"]).ravel()
        if values.dtype != np.float32 or gaps.dtype != np.uint8 or layout.dtype.kind not in "iu" or layout.size != 6:
            raise ValueError("packed arrays should be float32 values, uint8 gaps and 6 integers of layout, got "
                             f"{values.dtype}, {gaps.dtype} and {layout}: save what PackedKernel.to_arrays() returns")
        kh, kw, icg, oc, groups, block = map(int, layout)
        if min(kh, kw, icg, oc, groups, block) < 1 or kh * kw * icg * oc > MAX_WEIGHTS or oc % groups or block > icg:
            raise ValueError(f"packed layout {layout.tolist()} (kh, kw, ic / groups, oc, groups, block) is no kernel's: the "
                             "file is damaged or was edited; pack the dense kernel again")
        pattern = Pattern((kh, kw, icg, oc), groups, block, gaps.flatten())
        if values.shape != (pattern.nnz,):
            raise ValueError(f"packed values have shape {values.shape}, the pattern keeps {pattern.nnz}: the file is cut or "
                             "was edited; pack the dense kernel again")
        _ = pattern.index  # raises where a gap points outside
        return cls(jnp.asarray(values, jnp.float32), pattern)


def pack(kernel, feature_group_count: int = 1) -> PackedKernel:
    """Packs the non-zeros of a convolution kernel.

    Args:
      kernel: concrete float32 array (kh, kw, ic / groups, oc), HWIO, or (ic, oc) of a fully connected layer.
      feature_group_count: groups, as in `jax.lax.conv_general_dilated`.

    Returns:
      A PackedKernel whose `unpack()` is `kernel`, of a fully connected layer as (1, 1, ic, oc).

    Raises:
      TypeError: `kernel` is traced or not float32.
      ValueError: wrong rank, empty or non-finite kernel, or groups that do not divide oc.
    """
    if isinstance(kernel, Tracer):
        raise TypeError("pack() got a traced kernel: the pattern is static, so pack outside jit and pass the PackedKernel in")
    dense = np.asarray(kernel)
    if dense.dtype != np.float32:
        raise TypeError(f"kernel has dtype {dense.dtype}, wanted float32: cast it with kernel.astype(jnp.float32)")
    if dense.ndim not in (2, 4):
        raise ValueError(f"kernel has shape {dense.shape}, wanted 4 dimensions (kh, kw, ic / groups, oc) of a convolution or "
                         "2 (ic, oc) of a fully connected layer")
    connected = dense.ndim == 2
    dense = dense.reshape(1, 1, *dense.shape) if connected else dense
    kh, kw, icg, oc = dense.shape
    if not dense.size:
        raise ValueError(f"kernel has shape {dense.shape}, wanted no empty dimension")
    if feature_group_count < 1 or oc % feature_group_count:
        raise ValueError(f"feature_group_count={feature_group_count} does not divide the kernel's {oc} output channels")
    if not np.isfinite(dense).all():
        raise ValueError(f"kernel holds {np.count_nonzero(~np.isfinite(dense))} non-finite weights: training diverged; "
                         "restore a checkpoint from before")
    block = min(DENSE_BLOCK if connected else channel_block(kh, kw), icg)
    blocks = -(-icg // block)
    # (kh, kw, c, g, k) -> (g, b, k, c, kh, kw), the last block padded with zeros
    groups = feature_group_count
    full = np.zeros((blocks * block, oc, kh, kw), np.float32)
    full[:icg] = dense.transpose(2, 3, 0, 1)
    order = full.reshape(blocks, block, groups, oc // groups, kh, kw).transpose(2, 0, 3, 1, 4, 5).reshape(-1)
    position = np.flatnonzero(order)
    gap = np.diff(position, prepend=-1) - 1
    ends = np.cumsum(gap // SKIP + 1)
    gaps = np.full(ends[-1] if ends.size else 0, SKIP, np.uint8)
    gaps[ends - 1] = gap % SKIP
    values = jnp.asarray(order[position], jnp.float32)  # without a dtype JAX compiles a program for each shape
    return PackedKernel(values, Pattern((kh, kw, icg, oc), groups, block, gaps))


def scatter(values: jax.Array, pattern: Pattern) -> jax.Array:
    """The dense kernel (kh, kw, ic / groups, oc) with `values` (nnz,) where the pattern keeps, linear in `values`."""
    return _scatter(values, pattern.index, pattern.shape)


@functools.partial(jax.jit, static_argnames="shape", inline=True)
def _scatter(values: jax.Array, index: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    flat = jnp.zeros(math.prod(shape), values.dtype)
    return flat.at[index].set(values, unique_indices=True, mode="promise_in_bounds").reshape(shape)
