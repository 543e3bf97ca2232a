"""How long it takes: the time of one convolution, dense or sparse, as a smooth function of its density.

The form is that of Park et al., "Faster CNNs with Direct Sparse Convolutions and Guided Pruning" (ICLR 2017): a layer
is bound by arithmetic or by memory traffic,

    t_dense  = max(C / F,            (S_A + S_W) / B)
    t_sparse = max(alpha d C / F,    (S_A + beta d S_W) / B)

with C flops of the dense layer, S_A bytes of its input and output, S_W bytes of its dense weights, d the density, F
flop/s and B bytes/s of the machine, alpha the time and beta the bytes of a kept weight relative to a dense one. The
paper gives the dense layer no traffic term, which is too fast for the 1x1 layers that memory binds before pruning.

The same functions guide the pruner, choose between dense and sparse, and stand beside the measurement in reports. What
they cannot see: caches, lanes left idle by narrow images, small channel counts, packing, and the cost of a call.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sparseflax.machine import Machine
from sparseflax.shapes import ConvShape

# P of the smooth maximum (a^P + b^P)^(1/P): never below max(a, b), at most 2^(1/P) - 1 = 9.1 % above it, where a = b,
# and 0.4 % above it where b = 0.65 a. Its gradient follows the binding term without ever jumping.
SHARPNESS = 8.0


class Work(NamedTuple):
    """What the model needs to know of a layer: three numbers, or three arrays with an entry per layer."""

    flops: Any
    activation_bytes: Any
    weight_bytes: Any

    @classmethod
    def of(cls, shape: ConvShape | Work) -> Work:
        if isinstance(shape, Work):
            return shape
        return cls(float(shape.flops), float(shape.input_bytes + shape.output_bytes), float(shape.weight_bytes))

    @classmethod
    def stack(cls, shapes: Iterable[ConvShape]) -> Work:
        """Several layers as one Work of float arrays (layers,), to broadcast or vmap over."""
        return cls(*(jnp.asarray(numbers, float) for numbers in zip(*map(cls.of, shapes), strict=True)))


class UsefulRange(NamedTuple):
    """Densities between which pruning a layer pays; empty where `upper <= lower`."""

    lower: jax.Array
    upper: jax.Array

    @property
    def empty(self) -> jax.Array:
        """True for a layer without speedup potential: it should stay dense and unpruned."""
        return self.upper <= self.lower


def conv_seconds(shape: ConvShape | Work, density: Any, machine: Machine) -> jax.Array:
    """Seconds of the sparse convolution: smooth maximum of alpha d C / F and (S_A + beta d S_W) / B.

    Increasing and convex in density; never below the true maximum and at most 9.1 % above it (see SHARPNESS).

    Args:
      shape: a layer, or its Work (of arrays, for several layers at once).
      density: kept / all weights in (0, 1], scalar or of the shape of the Work's arrays; may be traced.
      machine: where it runs.

    Raises:
      ValueError: a concrete density outside (0, 1].
    """
    work, density = Work.of(shape), _checked(density)
    arithmetic = machine.alpha * density * work.flops / machine.peak
    traffic = (work.activation_bytes + machine.beta * density * work.weight_bytes) / machine.bandwidth
    return _smooth_max(arithmetic, traffic)


def dense_seconds(shape: ConvShape | Work, machine: Machine) -> jax.Array:
    """Seconds of the dense convolution: smooth maximum of C / F and (S_A + S_W) / B.

    Args:
      shape: a layer, or its Work.
      machine: where it runs.
    """
    work = Work.of(shape)
    traffic = (work.activation_bytes + work.weight_bytes) / machine.bandwidth
    return _smooth_max(jnp.asarray(work.flops / machine.peak, float), traffic)


def speedup(shape: ConvShape | Work, density: Any, machine: Machine) -> jax.Array:
    """dense_seconds / conv_seconds: above 1 the sparse convolution wins. Arguments as in `conv_seconds`."""
    return dense_seconds(shape, machine) / conv_seconds(shape, density, machine)


def useful_range(shape: ConvShape | Work, machine: Machine) -> UsefulRange:
    """Densities between which pruning pays: above `upper` sparse loses, below `lower` fewer weights save little time.

    upper = the d where conv_seconds = dense_seconds (1 / alpha for a layer bound by arithmetic), so that the range and
            `speedup` never contradict each other; 1 if sparse always wins
    lower = (S_A / B) / (alpha C / F - beta S_W / B), where the two terms of the sparse time are equal; but
            S_A / (beta S_W), where weight and activation traffic are equal, if alpha C / F < 2 beta S_W / B: weights
            are slower to read than to multiply, as in fully connected layers (both forms agree at the switch)

    Both lie in (0, 1].

    Args:
      shape: a layer, or its Work (of arrays, for several layers at once).
      machine: where it runs.
    """
    work = Work.of(shape)
    activations = work.activation_bytes / machine.bandwidth
    weights = machine.beta * work.weight_bytes / machine.bandwidth
    arithmetic = machine.alpha * work.flops / machine.peak
    lower = jnp.minimum(activations / jnp.maximum(arithmetic - weights, weights), 1.0)
    return UsefulRange(lower, _break_even(work, machine))


@functools.partial(jax.jit, static_argnames="machine")
def _break_even(work: Work, machine: Machine) -> jax.Array:
    """The largest density in (0, 1] at which sparse is not slower, by bisection."""
    dense = dense_seconds(work, machine)

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        wins = conv_seconds(work, middle, machine) <= dense
        return jnp.where(wins, middle, low), jnp.where(wins, high, middle)

    one = jnp.ones_like(dense)
    low, _ = jax.lax.fori_loop(0, 24, halve, (one * 2.0**-24, one))  # float32 has 24 bits
    return jnp.where(conv_seconds(work, one, machine) <= dense, one, low)


def _smooth_max(a: jax.Array, b: jax.Array) -> jax.Array:
    """(a^P + b^P)^(1/P) of positive numbers, written so that neither power under- nor overflows."""
    return a * jnp.exp(jax.nn.softplus(SHARPNESS * jnp.log(b / a)) / SHARPNESS)


def _checked(density: Any) -> jax.Array:
    if not isinstance(density, Tracer):
        values = np.asarray(density)
        if not np.all((values > 0) & (values <= 1)):
            raise ValueError(f"density is {density}, wanted kept / all weights in (0, 1]: for sparsity s pass 1 - s, "
                             "for a kernel without any weight left 1 / shape.weights")
    return jnp.asarray(density, float)
