"""How long a convolution takes in eight bits: as one of a quarter of the channels, which is the same loop over words."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace

from sparseflax.conv.int8 import LANES
from sparseflax.cost.machine import Machine
from sparseflax.cost.model import Work, conv_seconds
from sparseflax.cost.shape import ConvShape

# Cycles of a word over those of a float32 weight where the machine does not say: with AVX2 alone, so that no gain is promised
# that may not be there.
USUAL = 2.3


def int8_seconds(shape: ConvShape, density: float, machine: Machine) -> float:
    """Seconds of the sparse convolution in eight bits, of uint8 inputs and outputs.

        t(layer, density of words) = t_float32(layer with ceil(ic / 4) channels, density)

    at the rates of a calibration in eight bits. Where there was none they are those of float32, but for multiply-adds, which
    take the machine's time for four products, and outputs, of which each is a byte.

    Args:
      shape: the layer.
      density: kept / all words of four neighbouring input channels, in (0, 1].
      machine: where it runs.

    Raises:
      ValueError: as `conv_seconds`.
    """
    return float(conv_seconds(of_words(shape), density, for_words(machine)))


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
    return replace(shape, ic=shape.groups * -(-shape.ic // shape.groups // LANES))


@functools.lru_cache
def for_words(machine: Machine) -> Machine:
    """The machine as the kernel in eight bits finds it; dense layers take their time in float32."""
    known = machine.int8_cycles > 0 and machine.fma_cycles > 0
    ratio = machine.int8_cycles / machine.fma_cycles if known else USUAL
    if machine.fitted is None:
        return replace(machine, alpha=machine.alpha * ratio)
    sparse = machine.fitted.sparse
    if machine.fitted.int8 is not None:
        return replace(machine, fitted=replace(machine.fitted, sparse=machine.fitted.int8))
    output_bytes = sparse.output_bytes / 4  # one for each float32
    sparse = sparse._replace(fma=sparse.fma * ratio, spill=sparse.spill * ratio, output_bytes=output_bytes)
    return replace(machine, fitted=replace(machine.fitted, sparse=sparse))
