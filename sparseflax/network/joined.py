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
DTYPES = np.dtype(np.float32), np.dtype(np.int32)  # of what a program reads in parts
ANY = "any"  # device, as it comes


def join(arrays: Sequence[Any]) -> tuple[tuple[Part, ...], list[Any]]:
    """Where each array lies now, and in what: small ones of a dtype, and of one CPU or of none in particular, in one; others in
    their own."""
    parts: list[Part | None] = [None] * len(arrays)
    alike: dict[Any, list[int]] = {}
    for number, array in enumerate(arrays):
        if array.dtype in DTYPES and 0 < array.nbytes <= SMALL and (place := _place(array)) is not None:
            alike.setdefault((array.dtype, place), []).append(number)
    made = list[Any]()
    for (dtype, place), some in alike.items():
        if len(some) == 1:
            continue
        ends = np.cumsum([-(-arrays[number].size // LINE) * LINE for number in some]).tolist()
        whole = np.zeros(ends[-1], dtype)
        for number, first in zip(some, [0, *ends], strict=False):
            whole[first:first + arrays[number].size] = np.asarray(arrays[number]).reshape(-1)
            parts[number] = Part(len(made), first, arrays[number].shape)
        made.append(jnp.asarray(whole) if place is ANY else jax.device_put(whole, place))
    found = list[Part]()
    for array, part in zip(arrays, parts, strict=True):
        found.append(part or Part(len(made)))
        made += [] if part else [array]
    return tuple(found), made


def _place(array: Any) -> Any:
    """The CPU that an array is bound to, ANY for none; None for what lies elsewhere, or on several devices."""
    if not isinstance(array, jax.Array):
        return ANY
    devices = array.devices()
    if len(devices) > 1 or next(iter(devices)).platform != "cpu":
        return None
    return next(iter(devices)) if getattr(array, "committed", True) else ANY
