"""How long a convolution takes in eight bits: as one of a quarter of the channels, which is the same loops over words."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace

from sparseflax.conv.int8 import LANES
from sparseflax.cost.counts import ALONE
from sparseflax.cost.machine import Machine
from sparseflax.cost.model import Work, conv_seconds, dense_seconds
from sparseflax.cost.shape import ConvShape

# Cycles of a word over those of a float32 weight where the machine does not say: with AVX2 alone, so that no gain is promised
# that may not be there.
USUAL = 2.3
# From this density on the kernel runs all words as a dense convolution, which packs them for so many pixels (nearly_all.h,
# dense_int8.inc).
NEARLY_ALL, FEW_PIXELS = 0.95, 8


def int8_seconds(shape: ConvShape, density: float, machine: Machine) -> float:
    """Seconds of the sparse convolution in eight bits, of uint8 inputs and outputs.

        t(layer, density of words) = t_float32(layer with ceil(ic / 4) channels, density)

    at the rates of a calibration in eight bits. Where there was none they are those of float32, but for multiply-adds, which
    take the machine's time for four products, and outputs, of which each is a byte. Where nearly all words are kept, and it is
    known what four products take, it is the dense convolution of words instead, with the packing and storing of the sparse one:

        t(layer, 1) = t_float32_dense(layer with ceil(ic / 4) channels) + packing of all words + storing of all outputs

    Words of a few pixels are read as they lie and not packed.

    Args:
      shape: the layer.
      density: kept / all words of four neighbouring input channels, in (0, 1].
      machine: where it runs.

    Raises:
      ValueError: as `conv_seconds`.
    """
    words = of_words(shape)
    if density < NEARLY_ALL or not _known(machine) or machine.fitted is None:
        return float(conv_seconds(words, density, for_words(machine)))
    ratio, dense, sparse = machine.int8_cycles / machine.fma_cycles, machine.fitted.dense, for_words(machine).rates.sparse
    dense = dense._replace(flop=ratio * dense.flop, deep=ratio * dense.deep, tiles=ratio * dense.tiles)
    stored = shape.groups * -(-shape.oc // shape.groups // machine.lanes) * shape.n * shape.oh * shape.ow * machine.int8_cycles
    many = shape.n * shape.oh * shape.ow >= FEW_PIXELS
    packed = words.weights / machine.lanes * (1 + machine.int8_cycles) * many
    besides = shape.layers * (stored * sparse.store + packed * sparse.pack)
    threads = machine.threads if words.flops >= 2 * ALONE else 1
    return float(dense_seconds(words, replace(machine, fitted=replace(machine.fitted, dense=dense)))) + besides / threads


def work_in(precision: str, shapes: Iterable[ConvShape], machine: Machine) -> tuple[Work, Machine]:
    """Several layers as one Work, and the machine it is for: sparse kernels in that precision, dense ones in float32.

    Raises:
      ValueError: as `Work.stack`.
    """
    shapes = list(shapes)
    work = Work.stack(shapes, machine)
    if precision == "float32":
        return work, machine
    return Work.stack(map(of_words, shapes), machine)._replace(dense=work.dense), for_words(machine)


def of_words(shape: ConvShape) -> ConvShape:
    """The layer with a channel for each word."""
    ic = shape.groups * -(-shape.ic // shape.groups // LANES)
    return replace(shape, ic=ic, void=shape.void * ic // shape.ic)


@functools.lru_cache
def for_words(machine: Machine) -> Machine:
    """The machine as the kernel in eight bits finds it; dense layers take their time in float32."""
    ratio = machine.int8_cycles / machine.fma_cycles if _known(machine) else USUAL
    if machine.fitted is None:
        return replace(machine, alpha=machine.alpha * ratio)
    sparse = machine.fitted.sparse
    if machine.fitted.int8 is not None:
        return replace(machine, fitted=replace(machine.fitted, sparse=machine.fitted.int8))
    output_bytes = sparse.output_bytes / 4  # one for each float32
    sparse = sparse._replace(fma=sparse.fma * ratio, spill=sparse.spill * ratio, output_bytes=output_bytes)
    return replace(machine, fitted=replace(machine.fitted, sparse=sparse))


def _known(machine: Machine) -> bool:
    """Whether it is known what four products take."""
    return machine.int8_cycles > 0 and machine.fma_cycles > 0
