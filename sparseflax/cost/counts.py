"""What a layer asks of a machine: how often the sparse kernel and the dense convolution do each thing that takes time.

The cost model is a sum of counts times seconds per count. The same two tuples hold both: the counts of a layer, and the
seconds per count of a machine (`Rates`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sparseflax.conv import ffi
from sparseflax.conv.packing import Pattern
from sparseflax.conv.window import Window, addressable
from sparseflax.cost.machine import Machine
from sparseflax.cost.rates import FREE_DENSE, FREE_SPARSE, DenseCounts, SparseCounts
from sparseflax.cost.shape import ConvShape

# Densities at which the kernel is asked for its tile; between them it takes one of these tiles or one about as fast.
DENSITIES = (0.02, 0.06, 0.2, 0.6)
KEPT = 1.5  # bytes of a kept weight and its 16-bit offset / bytes of a dense weight
# The tiles of the dense kernel: pixels by vectors of output channels, the sums of which registers hold; taps whose weights are
# packed at a time; multiply-adds from which on threads share them.
DENSE_PIXELS, DENSE_VECTORS, FEW_REGISTERS = 6, (4, 2), ("avx2", "portable")
DENSE_TAPS, ALONE = 256, 1 << 19
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


@functools.lru_cache(maxsize=4096)  # a fit asks eight times, for eight sizes of a cache that the kernel does not go by
def schedule(shape: ConvShape, kept: int, isa: str, threads: int = 1, caches: tuple[int, int] = (0, 0),
             fma_cycles: float = 0.0) -> Mapping[str, Any]:
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
    """Counts of the dense kernel, and of a depthwise convolution; without rates of its own, operations and bytes alone."""
    if machine.fitted is None:
        return FREE_DENSE._replace(flop=float(shape.flops), kernel_bytes=float(shape.weight_bytes), call=1.0,
                                   activation_bytes=float(shape.input_bytes + shape.output_bytes))
    rows, icg = shape.n * shape.oh * shape.ow, shape.ic // shape.groups
    # Each pixel of a transposed convolution's blocks is computed by itself, with the taps that it has.
    taps = shape.kh * shape.kw * shape.weights / (shape.weights + shape.void)
    depthwise, moved = shape.groups > 1 and icg == 1, float(_read_bytes(shape) + shape.output_bytes)
    kernel = float(shape.weight_bytes * (not depthwise) * (shape.n if shape.oh * shape.ow > 1 else 1))
    product, shared = float(not depthwise), machine.threads > 1 and shape.flops >= 2 * ALONE
    tiles = [] if depthwise else _dense_tiles(shape, machine)
    # Lanes without a channel are idle, and a tile of few FMAs waits for the sums of the ones before.
    least = LATENCY / (machine.fma_cycles or ffi.tables().get(machine.isa, 0.5))
    flop = 2.0 * machine.lanes * taps * icg * sum(count * max(pixels * vectors, least) for count, pixels, vectors in tiles)
    return DenseCounts(
        flop=flop,
        deep=flop * taps * icg / (taps * icg + 1000),
        shifted=float(rows * taps * shape.oc * depthwise),
        patches=float(shape.n * shape.ih * shape.iw * shape.ic) * product * any(map(any, shape.padding)),
        tiles=float(sum(count for count, *_ in tiles) * math.ceil(taps * icg / DENSE_TAPS)),
        kernel_bytes=kernel * _beyond(shape.weight_bytes, machine.l2_bytes),
        packed_bytes=kernel * (rows > 1),
        activation_bytes=moved * _beyond(moved, machine.l3_bytes // 4),
        split=float(shared),
        call=1.0)


def _dense_tiles(shape: ConvShape, machine: Machine) -> list[tuple[int, int, int]]:
    """The dense kernel's tiles: (how many, pixels, vectors of output channels)."""
    most, channels = DENSE_VECTORS[machine.isa in FEW_REGISTERS], shape.oc // shape.groups
    rows, pixels = shape.n * shape.oh, shape.ow
    if shape.kh * shape.kw == 1 and shape.strides == (1, 1) and not any(map(any, shape.padding)):
        rows, pixels = 1, rows * pixels
    whole, rest = divmod(-(-channels // machine.lanes), most)
    across = -(-pixels // DENSE_PIXELS)
    few, more = divmod(pixels, across)
    return [(shape.groups * rows * count * panels, tile, vectors)
            for tile, count in ((few, across - more), (few + 1, more)) for panels, vectors in ((whole, most), (1, rest))
            if count * panels * vectors]


def _read_bytes(shape: ConvShape) -> float:
    """Of the input: a stride longer than the kernel leaves pixels out."""
    return shape.input_bytes * min(1, shape.kh / shape.strides[0]) * min(1, shape.kw / shape.strides[1])


def _whole(size: int, step: int) -> int:
    return -(-size // step) * step


def _beyond(size: float, cache: int) -> float:
    """The part of `size` bytes, walked again and again, that a cache does not hold: a half where they are as large as it."""
    return size**4 / (size**4 + cache**4) if size else 0.0
