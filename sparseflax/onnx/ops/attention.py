"""ONNX's attention: queries that look at keys, with masks, groups of heads, and keys of before."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparseflax.onnx.value import Unsupported, Value, value


def attention(Q: Value, K: Value, V: Value, attn_mask: Value | None = None, past_key: Value | None = None,
              past_value: Value | None = None, nonpad_kv_seqlen: Value | None = None, is_causal: int = 0,
              q_num_heads: int | None = None, kv_num_heads: int | None = None, scale: float | None = None, softcap: float = 0.0,
              qk_matmul_output_mode: int = 0, left_window_size: int = -1, right_window_size: int = -1,
              softmax_precision: int | None = None) -> tuple[Value, ...]:
    """softmax(scale Q K^T + mask) V of (batch, heads, rows, size) or (batch, rows, heads size), keys, values, and what is asked
    for of the scores. A query that may look at nothing gets zeros."""
    joined = Q.rank == 3
    if joined and not (q_num_heads and kv_num_heads):
        raise Unsupported(f"inputs of shape {Q.shape}, wanted q_num_heads and kv_num_heads with them")
    q, k, v = (_heads(x.plain(), heads) if joined else jnp.asarray(x.plain())
               for x, heads in ((Q, q_num_heads), (K, kv_num_heads), (V, kv_num_heads)))
    before: Any = 0
    if past_key is not None and past_value is not None:
        before = past_key.shape[2]
        k, v = jnp.concatenate([past_key.plain(), k], 2), jnp.concatenate([past_value.plain(), v], 2)
    keys, (batch, heads, rows, size), columns = (k, v), q.shape, k.shape[2]
    if heads % k.shape[1]:
        raise Unsupported(f"{heads} heads of queries and {k.shape[1]} of keys, wanted a multiple")
    k, v = (jnp.repeat(a, heads // a.shape[1], 1) for a in (k, v))

    row, column = np.arange(rows).reshape(1, 1, -1, 1), np.arange(columns).reshape(1, 1, 1, -1)
    allowed: Any = column >= 0
    if nonpad_kv_seqlen is not None:
        lengths = nonpad_kv_seqlen.plain().reshape(-1, 1, 1, 1)
        allowed, before = column < lengths, lengths - rows
    distance = row + before - column  # of a key, back from its query
    allowed = allowed & (distance >= 0) if is_causal else allowed
    allowed = allowed & (distance <= left_window_size) if left_window_size >= 0 else allowed
    allowed = allowed & (distance >= -right_window_size) if right_window_size >= 0 else allowed
    added: Any = 0.0
    if attn_mask is not None:
        mask = jnp.asarray(attn_mask.plain().reshape((1,) * (4 - attn_mask.rank) + attn_mask.shape))
        flag = mask.dtype == jnp.bool_
        sides = [(0, 0)] * (mask.ndim - 1) + [(0, columns - mask.shape[-1])]
        mask = jnp.pad(mask, sides, constant_values=False if flag else -jnp.inf)
        allowed, added = (allowed & mask, added) if flag else (allowed, mask)

    raw = jnp.einsum("bhrd,bhcd->bhrc", q, k) * (1 / math.sqrt(size) if scale is None else scale)
    capped = softcap * jnp.tanh(raw / softcap) if softcap else raw
    masked = jnp.where(allowed, capped + added, -jnp.inf)
    most = masked.max(-1, keepdims=True)
    weights = jnp.exp(masked - jnp.where(jnp.isfinite(most), most, 0))
    total = weights.sum(-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1)
    y = jnp.einsum("bhrc,bhcd->bhrd", weights, v)
    y = y.transpose(0, 2, 1, 3).reshape(batch, rows, -1) if joined else y
    scores = (raw, capped, jnp.broadcast_to(masked, raw.shape), weights)
    if not 0 <= qk_matmul_output_mode < len(scores):
        raise Unsupported(f"qk_matmul_output_mode={qk_matmul_output_mode}, wanted 0 to {len(scores) - 1}")
    return value(y), *map(value, keys), value(scores[qk_matmul_output_mode])


def _heads(x: Any, heads: Any) -> Any:
    """(batch, rows, heads size) -> (batch, heads, rows, size)"""
    return jnp.asarray(x).reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


OPERATORS: dict[str, Callable[..., Any]] = {"Attention": attention}
