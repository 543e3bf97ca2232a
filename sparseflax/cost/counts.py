"""What a layer asks of a machine: how often the sparse kernel and the dense convolution do each thing that takes time.

The cost model is a sum of counts times seconds per count. The same two tuples hold both: the counts of a layer, and the
seconds per count of a machine (`Rates`).
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from sparseflax.conv import ffi
from sparseflax.conv.packing import Pattern
from sparseflax.conv.window import Window, addressable
from sparseflax.cost.machine import Machine
from sparseflax.cost.rates import FREE_DENSE, FREE_SPARSE, DenseCounts, SparseCounts
from sparseflax.cost.shape import ConvShape

MAX_GROUPS = 64  # that a packed network runs as a convolution each; beyond, they are too small to gain
# Densities at which the kernel is asked for its tile; between them it takes one of these tiles or one about as fast.
DENSITIES = (0.02, 0.06, 0.2, 0.6)
KEPT = 1.5  # bytes of a kept weight and its 16-bit offset / bytes of a dense weight
SHARED = 3e7  # operations from which on XLA's threads share a product, about a millisecond of one
# What XLA's threads share of other convolutions than 1x1 is blocks of output channels: of as many weights as this part of the
# core's own cache holds, and of no fewer channels.
BLOCK, BLOCK_CHANNELS = 0.43, 64
LATENCY = 4  # cycles until the sum of an FMA is ready: every recent core's


def sparse_counts(shape: ConvShape, machine: Machine) -> tuple[SparseCounts, ...]:
    """Counts for each tile that the kernel might choose, one per entry of DENSITIES.

    A machine without rates of its own is the paper's: no lanes, tiles or caches, every byte comes from memory.

    Raises:
      ValueError: the kernel cannot run the layer, or not here.
    """
    return _tiles(shape, machine) if machine.fitted else (_ideal(shape),) * len(DENSITIES)


def _ideal(shape: ConvShape) -> SparseCounts:
    return FREE_SPARSE._replace(fma=shape.flops / 2, kernel_bytes=float(shape.weight_bytes), call=1.0,
                                input_bytes=float(shape.input_bytes), output_bytes=float(shape.output_bytes))


@functools.lru_cache(maxsize=4096)
def _tiles(shape: ConvShape, machine: Machine) -> tuple[SparseCounts, ...]:
    return tuple(tile_counts(shape, density, machine) for density in DENSITIES)


def schedule(shape: ConvShape, kept: int, isa: str, threads: int = 1, caches: tuple[int, int] = (0, 0),
             fma_cycles: float = 0.0) -> dict[str, Any]:
    """What the kernel would do for a layer with `kept` weights: the tile it chooses and the counts of it.

    Args:
      shape: the layer.
      kept: number of weights.
      isa: instruction set; the best that runs here stands for all that do, and one that does not run here for all that a
        processor with it has.
      threads: that may share it. Of the chosen tiles the busiest of them visits `work`, and packs `panels`.
      caches: bytes of a core's first and second data cache, which the choice goes by; 0 for this machine's.
      fma_cycles: of the instruction set's FMA with a memory operand; 0 for what is known of it.

    Raises:
      ValueError: the native module is missing, does not know `isa`, or cannot run the layer.
    """
    if isa not in ffi.tables():
        raise ValueError(f"the counts of the {isa!r} kernel are asked of the kernel itself, which is built here for "
                         f"{list(ffi.tables())}: plan on a machine of that kind, or for a Machine without rates")
    kh, kw, icg, oc = shape.kernel_shape
    (top, bottom), (left, right) = shape.padding
    pattern = Pattern(shape.kernel_shape, shape.groups, shape.block, np.zeros(0, np.uint8))
    if not addressable(pattern, Window(shape.strides, shape.padding, shape.kernel_dilation)):
        raise ValueError(f"{shape} does not run in the sparse kernel: its window is too large; leave it dense")
    assert ffi.native is not None
    return ffi.native.schedule(
        [shape.n, shape.ih, shape.iw, shape.oh, shape.ow], [kh, kw, icg, oc, shape.groups, shape.block],
        [*shape.strides, top, bottom, left, right, *shape.kernel_dilation], kept, "" if isa == ffi.isa() else isa, threads,
        caches, fma_cycles)


def tile_counts(shape: ConvShape, density: float, machine: Machine) -> SparseCounts:
    """Counts of the tile that the kernel chooses at a density. Raises as `schedule`."""
    chosen = schedule(shape, max(1, round(density * shape.weights)), machine.isa, machine.threads,
                      (machine.l1_bytes, machine.l2_bytes), machine.fma_cycles)
    cycles, tiles, vectors, oc = chosen["fma_cycles"], chosen["tiles"], chosen["vectors"], shape.oc
    rows = oc * chosen["blocks"]
    share = chosen["work"] / (shape.groups * tiles)  # of the work, for the busiest thread
    packed = shape.groups * sum(_whole(min(shape.block, shape.ic // shape.groups - first), chosen["lanes"])
                                for first in range(0, shape.ic // shape.groups, shape.block))
    stored = shape.groups * _whole(oc // shape.groups, chosen["lanes"])
    read = _read_bytes(shape)
    moved = read + shape.output_bytes
    far = share * _beyond(share * moved, machine.l2_bytes)
    return SparseCounts(
        fma=share * shape.weights * vectors * cycles,
        weight=share * shape.weights * tiles,
        wait=share * shape.weights * max(0.0, LATENCY / chosen["chains"] * tiles - vectors * cycles),
        spill=share * shape.weights * vectors * cycles * _beyond(chosen["panel_bytes"], machine.l1_bytes),
        kernel_bytes=share * tiles * shape.weight_bytes * _beyond(density * KEPT * shape.weight_bytes, machine.l2_bytes),
        visit=share * rows * tiles,
        accumulate=share * rows * vectors * cycles,
        store=share * stored * vectors * cycles,
        pack=packed * chosen["packed"] * chosen["panels"] / shape.groups * (1 + cycles),
        input_bytes=far * read,
        output_bytes=far * shape.output_bytes,
        memory_bytes=moved * _beyond(moved, machine.l3_bytes // 4),
        split=float(chosen["threads"] > 1),
        call=1.0)


def dense_counts(shape: ConvShape, machine: Machine) -> DenseCounts:
    """Counts of the dense convolution as `fuse` leaves it to XLA; without rates of its own, operations and bytes alone."""
    if machine.fitted is None:
        return FREE_DENSE._replace(flop=float(shape.flops), kernel_bytes=float(shape.weight_bytes), call=1.0,
                                   activation_bytes=float(shape.input_bytes + shape.output_bytes))
    rows, taps, icg = shape.n * shape.oh * shape.ow, shape.kh * shape.kw, shape.ic // shape.groups
    depthwise = shape.groups > 1 and icg == 1
    loop, product = shape.groups > MAX_GROUPS and not depthwise, rows > 1
    lowered = product and not depthwise  # to a product of matrices
    flop, moved = float(shape.flops * (lowered and not loop)), float(_read_bytes(shape) + shape.output_bytes)
    # A kernel that is packed first is there twice.
    outside = _beyond(shape.weight_bytes / shape.groups, 2 * machine.l2_bytes)
    call = 1.0 if depthwise or loop else float(shape.groups)
    return DenseCounts(
        flop=flop,
        deep=flop * taps * icg / (taps * icg + 1000),
        far=flop * (taps > 1) * outside,
        lone=flop * (taps > 1) * (_busiest(shape, machine) - 1 / machine.threads),
        shifted=float(rows * taps * shape.oc * depthwise),
        group_taps=float(rows * taps * shape.groups * loop),
        odd=rows * taps * (icg > 1 and icg % 2) * (shape.oc % 64) / 64,
        patches=float(rows * taps * shape.ic * lowered * (taps > 1)),
        pixels=float(rows * shape.ic * lowered * (taps == 1)),
        outputs=float(rows * shape.oc * product),
        kernel_bytes=shape.weight_bytes * (not product) * (1 + _beyond(shape.weight_bytes, machine.l2_bytes)),
        packed_bytes=shape.weight_bytes * lowered * (1 + outside),
        activation_bytes=moved * _beyond(moved, machine.l3_bytes // 4),
        split=call * (machine.threads > 1) * flop / (flop + SHARED * call),
        call=call)


def _busiest(shape: ConvShape, machine: Machine) -> float:
    """The part of a dense convolution's output channels that one thread takes, if it takes whole blocks of them."""
    channels = shape.oc // shape.groups
    block = max(BLOCK_CHANNELS, BLOCK * machine.l2_bytes * shape.oc / shape.weight_bytes)
    taken = math.ceil(channels / block / machine.threads) * block
    return max(min(1, taken / channels), 1 / machine.threads)


def _read_bytes(shape: ConvShape) -> float:
    """Of the input: a stride longer than the kernel leaves pixels out."""
    return shape.input_bytes * min(1, shape.kh / shape.strides[0]) * min(1, shape.kw / shape.strides[1])


def _whole(size: int, step: int) -> int:
    return -(-size // step) * step


def _beyond(size: float, cache: int) -> float:
    """The part of `size` bytes, walked again and again, that a cache does not hold: a half where they are as large as it."""
    return size**4 / (size**4 + cache**4) if size else 0.0
