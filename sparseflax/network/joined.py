"""Many small arrays in one: an argument of a compiled call takes JAX some two microseconds, however small it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseflax.network.program import Part

SMALL = 1 << 16  # bytes of an array; to copy a larger one would take more memory than its microseconds are worth
LINE = 16  # elements of four bytes in a cache line, where each begins
DTYPES = jnp.float32, jnp.int32  # of what a program reads in parts


def join(arrays: Sequence[Any]) -> tuple[tuple[Part, ...], list[Any]]:
    """Where each array lies now, and in what: small ones of a dtype in one, larger ones and what is bound to a device in their
    own."""
    parts: list[Part | None] = [None] * len(arrays)
    made = list[Any]()
    for dtype in DTYPES:
        some = [number for number, array in enumerate(arrays) if _is_small(array, dtype)]
        ends = np.cumsum([-(-arrays[number].size // LINE) * LINE for number in some])
        if len(some) < 2:
            continue
        whole = np.zeros(ends[-1], dtype)
        for number, end in zip(some, ends.tolist(), strict=True):
            array = np.asarray(arrays[number]).reshape(-1)
            first = end - -(-array.size // LINE) * LINE
            whole[first:first + array.size] = array
            parts[number] = Part(len(made), first, arrays[number].shape)
        made.append(jnp.asarray(whole))
    found = list[Part]()
    for array, part in zip(arrays, parts, strict=True):
        found.append(part or Part(len(made)))
        made += [] if part else [array]
    return tuple(found), made


def _is_small(array: Any, dtype: Any) -> bool:
    if array.dtype != dtype or not 0 < array.nbytes <= SMALL:
        return False
    return not isinstance(array, jax.Array) or (not getattr(array, "committed", True) and {
        device.platform for device in array.devices()} == {"cpu"})
