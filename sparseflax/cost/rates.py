"""Seconds per count of everything that the sparse kernel and the dense convolution do: what is known of a machine.

The same two tuples hold the counts of a layer (counts.py) and the seconds per count of a machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple


class SparseCounts(NamedTuple):
    """Of the sparse kernel, on the busiest of its threads. The first five are those of a full kernel: times density.

    Attributes:
      fma: multiply-adds, idle lanes included, in cycles of the instruction set's FMA; plain multiply-adds for a machine
        without rates of its own.
      weight: visits of a kept weight: one per register tile.
      wait: cycles in which a small tile's few sums are not ready for the next weight.
      spill: as `fma`, times the part of the panel that the first cache does not hold.
      kernel_bytes: of the dense kernel, once per register tile, that do not stay in the core's own cache.
      visit: visits of an output channel: one per tile and block of input channels.
      accumulate: accumulators loaded and stored at those visits, in cycles of FMAs.
      store: vectors transposed to the output, in cycles of FMAs.
      pack: vectors transposed into the panel, times 1 + the cycles of an FMA.
      input_bytes, output_bytes: that do not stay in the core's own cache.
      memory_bytes: of both, whatever the threads, that do not stay in a quarter of the last cache.
      split: 1 where threads share the work: it is handed out, and the last one to end is awaited.
      call: 1.
    """

    fma: Any
    weight: Any
    wait: Any
    spill: Any
    kernel_bytes: Any
    visit: Any
    accumulate: Any
    store: Any
    pack: Any
    input_bytes: Any
    output_bytes: Any
    memory_bytes: Any
    split: Any
    call: Any


class DenseCounts(NamedTuple):
    """Of the dense convolution: of a row of weights for each input of an output, tiles of pixels by vectors of channels.

    Attributes:
      flop: operations, padding included, and what the tiles leave idle; none of a depthwise convolution.
      deep: the same, times K / (K + 1000) for K inputs of an output: long sums leave the first cache.
      shifted: multiply-adds of a depthwise convolution.
      patches: inputs copied, with a border around them.
      tiles: of sums, once for each part of the taps that is packed at a time.
      kernel_bytes: that do not stay in the core's own cache, once for each image.
      packed_bytes: of the kernel, likewise; none of a single pixel, for which it is read as it lies.
      activation_bytes: of input and output, that do not stay in a quarter of the last cache.
      split: 1 where threads share the work.
      call: 1.
    """

    flop: Any
    deep: Any
    shifted: Any
    patches: Any
    tiles: Any
    kernel_bytes: Any
    packed_bytes: Any
    activation_bytes: Any
    split: Any
    call: Any


FREE_SPARSE = SparseCounts(*[0.0] * len(SparseCounts._fields))
FREE_DENSE = DenseCounts(*[0.0] * len(DenseCounts._fields))


@dataclass(frozen=True)
class Rates:
    """Seconds per count.

    Attributes:
      sparse, dense: in the units of the counts.
      overlap: P of the smooth maximum of arithmetic and traffic. 1 adds them up: nothing overlaps; with 8 the shorter is
        all but hidden.
      int8: as `sparse`, of the kernel in eight bits, in the counts of a layer with a channel for each word; None where that was
        not timed.
    """

    sparse: SparseCounts
    dense: DenseCounts
    overlap: float
    int8: SparseCounts | None = None

    def __post_init__(self):
        parts = [part for part in (self.sparse, self.dense, self.int8) if part is not None]
        wrong = {name: value for part in parts for name, value in part._asdict().items()
                 if not (isinstance(value, (int, float)) and 0 <= value < math.inf)}
        if wrong or not 1 <= self.overlap < math.inf or not min(map(sum, parts)) > 0:
            raise ValueError(f"rates {wrong or self}: seconds per count have to be finite, none negative, not all of them "
                             "zero, and `overlap` at least 1")


def roofline(peak: float, bandwidth: float, alpha: float, beta: float) -> Rates:
    """The paper's machine: arithmetic at `peak` flop/s or traffic at `bandwidth` bytes/s, whichever takes longer.

    A kept weight costs `alpha` times the arithmetic and `beta` times the bytes of a dense one; nothing else costs time.
    """
    byte = 1 / bandwidth
    sparse = FREE_SPARSE._replace(fma=2 * alpha / peak, kernel_bytes=beta * byte, input_bytes=byte, output_bytes=byte)
    dense = FREE_DENSE._replace(flop=1 / peak, kernel_bytes=byte, activation_bytes=byte)
    return Rates(sparse, dense, overlap=8.0)
