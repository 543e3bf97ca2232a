"""Blocks of neighbouring input channels, kept or pruned together: four of them are a word of an int8 kernel.

A kernel (..., ic, oc) has ceil(ic / block) of them for each tap and output channel; the last one is smaller where block does
not divide ic, and a word like any other. A block w counts by its norm |w| = sqrt(sum of w_i^2), and shrinks along its direction
w / |w|. Blocks of one are the weights themselves, with |w| and sign(w).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def grid(shape: tuple[int, ...], block: int) -> tuple[int, ...]:
    """(..., ceil(ic / block), oc): the shape of a kernel's blocks.

    Raises:
      ValueError: for a block smaller than 1, or of a kernel with less than two dimensions.
    """
    if block < 1 or (block > 1 and len(shape) < 2):
        raise ValueError(f"block={block} of a kernel of shape {shape}, wanted at least 1, and (..., ic, oc) for blocks")
    return shape if block == 1 else (*shape[:-2], -(-shape[-2] // block), shape[-1])


def norms(kernel: jax.Array, block: int) -> jax.Array:
    """The norm of each block, float32 where it is one of several weights."""
    return jnp.abs(kernel) if block == 1 else jnp.sqrt(sums(jnp.square(kernel.astype(jnp.float32)), block))


def directions(kernel: jax.Array, block: int) -> jax.Array:
    """Each weight over the norm of its block, in the kernel's dtype; 0 in blocks of zeros."""
    if block == 1:
        return jnp.sign(kernel)
    size = norms(kernel, block)
    return (kernel / spread(jnp.where(size == 0, 1, size), kernel.shape, block)).astype(kernel.dtype)


def capped(kernel: jax.Array, most: jax.Array, block: int) -> jax.Array:
    """Blocks of a larger norm than `most` shortened to that, the others as they are, in the kernel's dtype."""
    if block == 1:
        return jnp.clip(kernel, -most, most)
    size = norms(kernel, block)
    return (kernel * spread(jnp.where(size > most, most / size, 1), kernel.shape, block)).astype(kernel.dtype)


def sums(values: jax.Array, block: int) -> jax.Array:
    """The sum over each block, of values like the kernel's."""
    return values if block == 1 else _apart(values, block).sum(-2)


def kept(mask: jax.Array, block: int) -> jax.Array:
    """Which blocks keep something, bool."""
    return mask if block == 1 else _apart(mask, block).any(-2)


def spread(values: jax.Array, shape: tuple[int, ...], block: int) -> jax.Array:
    """A kernel of this shape whose weights have each the value of its block."""
    return values if block == 1 else jnp.repeat(values, block, axis=-2)[..., : shape[-2], :]


def _apart(values: jax.Array, block: int) -> jax.Array:
    """(..., ic, oc) as (..., blocks, block, oc), with zeros behind the last channel."""
    *taps, blocks, oc = grid(values.shape, block)
    padding = [(0, 0)] * len(taps) + [(0, blocks * block - values.shape[-2]), (0, 0)]
    return jnp.pad(values, padding).reshape(*taps, blocks, block, oc)
