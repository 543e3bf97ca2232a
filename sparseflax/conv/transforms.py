"""What the primitives of all precisions share: operands under shard_map, and images under vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def vary_together(operands: Sequence[Any]) -> list[Any]:
    """The operands, all of which vary over the same manual mesh axes then, as the output does that looks like the first.

    Under shard_map a sharded weight may meet replicated images: without the cast the output would pass for replicated
    too, and the gradient of the images would lack the sum over the mesh, silently.
    """
    varying = [frozenset(jax.typeof(a).manual_axis_type.varying) for a in operands]
    axes = frozenset().union(*varying)
    return [jax.lax.pcast(a, tuple(axes - v), to="varying") if axes - v else a
            for a, v in zip(operands, varying, strict=True)]


def batch_images(bind: Callable[..., Any], operands: Sequence[Any], dims: Sequence[int | None], images: Sequence[int]) -> Any:
    """The outputs of a batching rule, mapped along their first dimension: mapped images join the batch, others are looped over.

    Args:
      bind: computes images (n, ...), one array or a list of them, from the operands.
      operands, dims: what a batching rule gets.
      images: which operands are images (n, h, w, c).
    """
    size = next(a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None)
    if any(d is not None for i, d in enumerate(dims) if i not in images):
        mapped = [jnp.moveaxis(a, d, 0) if d is not None else a for a, d in zip(operands, dims, strict=True)]

        def one(slices):
            rest = iter(slices)
            return bind(*(next(rest) if d is not None else a for a, d in zip(operands, dims, strict=True)))

        return jax.lax.map(one, tuple(a for a, d in zip(mapped, dims, strict=True) if d is not None))
    merged, n = list(operands), 0
    for i in images:
        a, dim = operands[i], dims[i]
        a = jnp.moveaxis(a, dim, 0) if dim is not None else jnp.broadcast_to(a, (size, *a.shape))
        n = a.shape[1]
        merged[i] = a.reshape(size * n, *a.shape[2:])
    return jax.tree.map(lambda y: y.reshape(size, n, *y.shape[1:]), bind(*merged))
