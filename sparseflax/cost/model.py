"""How long it takes: the time of one convolution, dense or sparse, as a smooth function of its density.

The form is that of Park et al., "Faster CNNs with Direct Sparse Convolutions and Guided Pruning" (ICLR 2017): a layer
is bound by arithmetic or by memory traffic. What each takes is a sum of counts times seconds per count (counts.py):

    t = call + (arithmetic^P + traffic^P)^(1/P)

P says how far the two overlap: 1 adds them up, 8 is all but the paper's maximum. A machine of the paper counts the
operations C of the dense layer, the bytes S_A of its input and output and S_W of its dense weights,

    t_dense  = max(C / F,            (S_A + S_W) / B)
    t_sparse = max(alpha d C / F,    (S_A + beta d S_W) / B)

with d the density, F flop/s and B bytes/s of the machine, alpha the time and beta the bytes of a kept weight relative to a
dense one (the paper gives the dense layer no traffic term, which is too fast for the 1x1 layers that memory binds before
pruning). A calibrated machine counts what the kernel does with the tile it chooses: idle lanes, visits, accumulators,
packing, stores, cache levels, threads. The kernel takes another tile for another density: the time is the smooth minimum
over the tiles that it takes at a few densities.

The same functions guide the pruner, choose between dense and sparse, and stand beside the measurement in reports. What
they cannot see: weights that crowd in a few output channels, other programs on the machine, and whether the layer before
left its output in the cache.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sparseflax.cost.counts import dense_counts, sparse_counts
from sparseflax.cost.machine import Machine
from sparseflax.cost.rates import DenseCounts, SparseCounts
from sparseflax.cost.shape import ConvShape

# Q of the smooth minimum over K tiles (mean t^-Q)^(-1/Q): between the true minimum and K^(1/Q) - 1 = 2.2 % above it.
SHARPNESS = 64.0
LEAST = 2.0**-24  # density that a traced one of 0 counts as: fewer than one weight of nearly any layer


class Work(NamedTuple):
    """What a layer asks of a machine, and how many equal ones there are: numbers, or arrays with an entry per layer."""

    tiles: tuple[SparseCounts, ...]
    dense: DenseCounts
    layers: Any

    @classmethod
    def of(cls, shape: ConvShape | Work, machine: Machine) -> Work:
        """Counts for `machine`; a Work is returned as it is.

        Raises:
          ValueError: the sparse kernel cannot run the layer, or a calibrated machine's kernel does not run here.
        """
        if isinstance(shape, Work):
            return shape
        return cls(sparse_counts(shape.one, machine), dense_counts(shape.one, machine), shape.layers)

    @classmethod
    def stack(cls, shapes: Iterable[ConvShape], machine: Machine) -> Work:
        """Several layers as one Work of float arrays (layers,), to broadcast or vmap over. Raises as `of`."""
        work = [cls.of(shape, machine) for shape in shapes]
        dtype = jnp.result_type(float)
        return jax.tree.map(lambda *numbers: np.asarray(numbers, dtype), *work)


class UsefulRange(NamedTuple):
    """Densities between which pruning a layer pays; empty where `upper <= lower`."""

    lower: jax.Array
    upper: jax.Array

    @property
    def empty(self) -> jax.Array:
        """True for a layer without speedup potential: it should stay dense and unpruned."""
        return self.upper <= self.lower


def conv_seconds(shape: ConvShape | Work, density: Any, machine: Machine) -> jax.Array:
    """Seconds of the sparse convolution.

    Increasing in density, and smooth.

    Args:
      shape: a layer, or its Work for this machine (of arrays, for several layers at once).
      density: kept / all weights in (0, 1], scalar or of the shape of the Work's arrays; may be traced.
      machine: where it runs.

    Raises:
      TypeError: a density that is no number.
      ValueError: a concrete density outside (0, 1], or what `Work.of` raises.
    """
    work, density, rates = Work.of(shape, machine), _checked(density), machine.rates.sparse
    times = []
    for tile in work.tiles:
        per_weight, arithmetic, kernel, traffic = _sparse_terms(tile, rates)
        times.append(tile.call * rates.call + _overlapped(
            density * per_weight + arithmetic, density * kernel + traffic, machine.rates.overlap))
    return work.layers * _smooth_min(times)


def dense_seconds(shape: ConvShape | Work, machine: Machine) -> jax.Array:
    """Seconds of the dense convolution.

    Args:
      shape: a layer, or its Work for this machine.
      machine: where it runs.
    """
    counts = shape.dense if isinstance(shape, Work) else dense_counts(shape.one, machine)
    seconds = DenseCounts(*(jnp.asarray(count * rate, float) for count, rate in zip(counts, machine.rates.dense, strict=True)))
    arithmetic = seconds.flop + seconds.deep + seconds.shifted + seconds.patches + seconds.tiles
    traffic = seconds.kernel_bytes + seconds.packed_bytes + seconds.activation_bytes
    return shape.layers * (seconds.call + seconds.split + _overlapped(arithmetic, traffic, machine.rates.overlap))


def speedup(shape: ConvShape | Work, density: Any, machine: Machine) -> jax.Array:
    """dense_seconds / conv_seconds: above 1 the sparse convolution wins. Arguments as in `conv_seconds`."""
    return dense_seconds(shape, machine) / conv_seconds(shape, density, machine)


def useful_range(shape: ConvShape | Work, machine: Machine) -> UsefulRange:
    """Densities between which pruning pays: above `upper` sparse loses, below `lower` fewer weights save little time.

    upper = the d where conv_seconds = dense_seconds (1 / alpha for a layer of a machine of the paper that is bound by
            arithmetic), so that the range and `speedup` never contradict each other; 1 if sparse always wins
    lower = the d where the arithmetic of the kept weights takes as long as all the rest: what does not depend on density
            and the traffic of the kept weights; but that where the traffic of the kept weights takes as long as what does
            not depend on density, if weights are slower to read than to multiply, as in fully connected layers (both
            agree at the switch). Of the tiles, that which has the least to do besides the weights.

    On a machine of the paper lower = (S_A / B) / (alpha C / F - beta S_W / B), but S_A / (beta S_W) if that is larger.
    Both lie in (0, 1].

    Args:
      shape: a layer, or its Work for this machine (of arrays, for several layers at once).
      machine: where it runs.
    """
    work, rates = Work.of(shape, machine), machine.rates.sparse
    least = lower = jnp.asarray(jnp.inf)
    for tile in work.tiles:
        per_weight, arithmetic, kernel, traffic = _sparse_terms(tile, rates)
        rest = jnp.asarray(arithmetic + traffic + tile.call * rates.call, float)
        lower = jnp.where(rest < least, rest / jnp.maximum(per_weight - kernel, kernel), lower)
        least = jnp.minimum(rest, least)
    return UsefulRange(jnp.minimum(lower, 1.0), _break_even(work, machine))


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


def _sparse_terms(tile: SparseCounts, rates: SparseCounts) -> tuple[Any, Any, Any, Any]:
    """Seconds of arithmetic (per density, at any density) and of traffic (per density, at any density)."""
    seconds = SparseCounts(*(count * rate for count, rate in zip(tile, rates, strict=True)))
    return (seconds.fma + seconds.weight + seconds.wait + seconds.spill,
            seconds.visit + seconds.accumulate + seconds.store + seconds.pack + seconds.split,
            seconds.kernel_bytes,
            seconds.input_bytes + seconds.output_bytes + seconds.memory_bytes)


def _overlapped(a: jax.Array, b: jax.Array, p: float) -> jax.Array:
    """(a^p + b^p)^(1/p) of positive numbers, as the larger one times (1 + r^p)^(1/p), r <= 1: no power overflows, and the
    derivative by either is no difference of large numbers."""
    if p == 1:
        return a + b
    # Not by maximum and minimum: XLA may round a fused sum in another way each time, and then it is neither of the two.
    first = a > b
    larger, smaller = jnp.where(first, a, b), jnp.where(first, b, a)
    return larger * jnp.exp(jnp.log1p((smaller / larger) ** p) / p)


def _smooth_min(times: list[jax.Array]) -> jax.Array:
    least = jax.lax.stop_gradient(functools.reduce(jnp.minimum, times))
    powers = [jnp.exp(-SHARPNESS * jnp.log(time / least)) for time in times]
    return least * jnp.exp(-jnp.log(sum(powers) / len(powers)) / SHARPNESS)


def _checked(density: Any) -> jax.Array:
    if isinstance(density, Tracer):
        density = jnp.asarray(density, float)
        # Where training drives a density to 0 there is still a time, and a gradient that says what a weight costs.
        return density + jax.lax.stop_gradient(jnp.maximum(LEAST - density, 0))
    values = np.asarray(density)
    if not (jnp.issubdtype(values.dtype, jnp.floating) or jnp.issubdtype(values.dtype, jnp.integer)):
        raise TypeError(f"density is {density!r}, wanted a number in (0, 1] or an array of them: kept / all weights")
    if not np.all((values > 0) & (values <= 1)):
        raise ValueError(f"density is {density}, wanted kept / all weights in (0, 1]: for sparsity s pass 1 - s, "
                         "for a kernel without any weight left 1 / shape.weights")
    return jnp.asarray(density, float)
