"""What the steps of a program compute element by element, and how some of them move pixels and channels, in plain JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

BINARY = {"add": jnp.add, "sub": jnp.subtract, "mul": jnp.multiply, "div": jnp.divide, "max": jnp.maximum, "min": jnp.minimum,
          "leaky": lambda a, b: jnp.where(a >= 0, a, a * b)}


def _gate(x: jax.Array, p: Any, q: Any, low: Any, high: Any, a: Any, b: Any, s: Any, t: Any) -> jax.Array:
    """HardSwish and its like: s u min(max(p u + q, low), high) + t, u = a x + b."""
    u = a * x + b
    return s * (u * jnp.minimum(jnp.maximum(p * u + q, low), high)) + t


def _cubed(q: np.float32, x: jax.Array) -> jax.Array | float:
    return q * (x * x * x) if q else 0.0


UNARY: dict[str, Any] = {
    "clamp": lambda x, p, q, low, high: jnp.minimum(jnp.maximum(p * x + q, low), high),
    "leaky": lambda x, p, *_: jnp.where(x >= 0, x, p * x),
    "logistic": lambda x, *_: jax.lax.logistic(x), "sqrt": lambda x, *_: jnp.sqrt(x), "rsqrt": lambda x, *_: jax.lax.rsqrt(x),
    "square": lambda x, *_: x * x, "abs": lambda x, *_: jnp.abs(x), "power": lambda x, p, *_: x**p,
    "exp": lambda x, *_: jnp.exp(x), "gate": _gate, "swish": lambda x, p, q, s: s * x * jax.lax.logistic(p * x + _cubed(q, x)),
    "tanh": lambda x, *_: jnp.tanh(x), "erf": lambda x, *_: jax.lax.erf(x),
    "gelu": lambda x, p, q: q * x * (1 + jax.lax.erf(p * x))}


def upsample(x: jax.Array, fh: int, fw: int, channels: int) -> jax.Array:
    """Images (n, h, w, c) to (n, fh h, fw w, channels): pixels repeated, or blocks of pixels if c is fh fw channels."""
    n, h, w, c = x.shape
    y = x.reshape(n, h, 1, w, 1, c) if c == channels else x.reshape(n, h, w, fh, fw, channels).transpose(0, 1, 3, 2, 4, 5)
    return jnp.broadcast_to(y, (n, h, fh, w, fw, channels)).reshape(n, fh * h, fw * w, channels)


def shuffle(x: jax.Array, groups: int) -> jax.Array:
    """Images (n, h, w, c) with the first channel of each group before the second ones."""
    return x.reshape(*x.shape[:3], groups, -1).swapaxes(3, 4).reshape(x.shape)
