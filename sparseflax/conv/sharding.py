"""Batches that are sharded over the devices of a mesh: each device runs its own images, with all weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.experimental.custom_partitioning import custom_partitioning
from jax.interpreters import mlir
from jax.sharding import NamedSharding, PartitionSpec


def ask_for_devices() -> Any:
    """A parameter of a primitive that is bound now, because of which its lowering is told the devices; None in a shard_map.

    JAX tells them where a jaxpr has a custom partitioning in it, be it in a jaxpr that is a parameter.
    """
    return None if jax.sharding.get_abstract_mesh().manual_axes else _asking()


def lower_sharded(primitive: Any, lower: Callable[..., Any], images: Callable[..., Iterable[int]]) -> Callable[..., Any]:
    """A lowering rule of a primitive of images with a parameter `devices` from `ask_for_devices`: a sharded batch stays so.

    Args:
      primitive: its results are images (n, ...).
      lower: its rule for one device, without that parameter.
      images: which operands are images (n, ...), from their number and the parameters; the others are weights.
    """

    def rule(ctx, *operands, devices, **params):
        where = ctx.module_context.axis_context
        several = devices is not None and len(getattr(where, "device_assignment", None) or ()) > 1
        # What is exported is partitioned where it is loaded, where this function is not.
        if not several or where.abstract_mesh is None or ctx.module_context.lowering_parameters.for_export:
            return lower(ctx, *operands, **params)
        sharded = set(images(len(operands), **params))
        local = functools.partial(primitive.bind, devices=None, **params)

        def partition(mesh, _, results):
            batch = jax.tree.leaves(results)[0].sharding.spec[0]
            split, whole = NamedSharding(mesh, PartitionSpec(batch)), NamedSharding(mesh, PartitionSpec())
            return (mesh, lambda *a: local(*a), jax.tree.map(lambda _: split, results),
                    tuple(split if i in sharded else whole for i in range(len(operands))))

        count = 0

        def dimensions(aval, is_sharded):
            nonlocal count
            first, count = count, count + aval.ndim - is_sharded
            return " ".join([*["n"] * is_sharded, *(f"d{i}" for i in range(first, count))])

        arguments = ", ".join(dimensions(aval, i in sharded) for i, aval in enumerate(ctx.avals_in))
        rule = f"{arguments} -> {', '.join(dimensions(aval, True) for aval in ctx.avals_out)}"
        partitioned = custom_partitioning(lambda *a: local(*a))
        partitioned.def_partition(partition, sharding_rule=rule, need_replication_factors=tuple(f"d{i}" for i in range(count)))
        return mlir.lower_fun(lambda *a: partitioned(*a), multiple_results=primitive.multiple_results)(ctx, *operands)

    return rule


@functools.cache
def _asking() -> Any:
    same = custom_partitioning(lambda x: x)
    same.def_partition(None)
    return jax.make_jaxpr(same)(np.float32(0))
