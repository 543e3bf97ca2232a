"""What eight bits cost, as float32 layers of words."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from sparseflax.cost.counts import ALONE
from sparseflax.cost.int8 import FEW_PIXELS, NEARLY_ALL, USUAL, for_words, int8_seconds, of_words
from sparseflax.cost.machine import TYPICAL, XEON_E5_2697V4
from sparseflax.cost.model import conv_seconds, dense_seconds
from sparseflax.cost.shape import ConvShape

MACHINE = replace(XEON_E5_2697V4, isa="portable", lanes=4, threads=1, fitted=TYPICAL)


@pytest.mark.parametrize("channels, groups", [(64, 1), (3, 1), (36, 4)])
def test_eight_bits_cost_what_their_words_do(channels, groups):
    """Where a product of four costs as one: the time of a quarter of the channels."""
    shape = ConvShape(1, 14, 14, channels, 64, 3, 3, padding=((1, 1), (1, 1)), groups=groups)
    paper = replace(XEON_E5_2697V4, fma_cycles=0.5, int8_cycles=0.5)
    words = replace(shape, ic=groups * -(-channels // groups // 4))
    assert int8_seconds(shape, 0.1, paper) == pytest.approx(float(conv_seconds(words, 0.1, paper)), rel=1e-6)
    times = [int8_seconds(shape, 0.5, replace(paper, int8_cycles=cycles)) for cycles in (0.5, 1.0, 8.0)]
    assert times == sorted(times) and times[0] < times[2]
    unknown = replace(paper, int8_cycles=0.0)
    assert int8_seconds(shape, 0.5, unknown) == int8_seconds(shape, 0.5, replace(paper, int8_cycles=0.5 * USUAL))


def test_all_words_cost_what_a_dense_convolution_of_words_does():
    """And what only eight bits do: words are transposed, outputs rounded. Products take twice as long as FMAs here."""
    machine = replace(MACHINE, fma_cycles=0.5, int8_cycles=1.0)
    shape = ConvShape(1, 14, 14, 64, 70, 3, 3, padding=((1, 1), (1, 1)))
    words = replace(shape, ic=16)
    rates = machine.fitted.dense
    twice = rates._replace(flop=2 * rates.flop, deep=2 * rates.deep, tiles=2 * rates.tiles)
    dense = dense_seconds(words, replace(machine, fitted=replace(machine.fitted, dense=twice)))
    vectors, cycles = 14 * 14 * -(-70 // machine.lanes), 1.0
    stored, packed = vectors * cycles, 9 * 16 * 70 / machine.lanes * (1 + cycles)
    ours = stored * machine.fitted.sparse.store + packed * machine.fitted.sparse.pack
    assert int8_seconds(shape, 1.0, machine) == pytest.approx(float(dense) + ours, rel=1e-5)
    assert int8_seconds(shape, 1.0, machine) == int8_seconds(shape, 0.95, machine)
    few, fewer = replace(shape, ih=2, iw=2), replace(shape, ih=1, iw=1)
    for other in few, fewer:  # their words are not packed
        dense = dense_seconds(of_words(other), replace(machine, fitted=replace(machine.fitted, dense=twice)))
        ours = stored * other.oh * other.ow / (shape.oh * shape.ow) * machine.fitted.sparse.store
        assert int8_seconds(other, 1.0, machine) == pytest.approx(float(dense) + ours, rel=1e-5)
    unknown = replace(machine, int8_cycles=0.0)
    assert int8_seconds(shape, 1.0, unknown) == pytest.approx(float(conv_seconds(words, 1.0, for_words(unknown))))


def test_the_kernel_runs_as_dense_what_is_predicted_so():
    kernel = Path(__file__).parents[1] / "xla_ffi"
    said = "".join((kernel / name).read_text() for name in ("nearly_all.h", "sparse_conv.h", "dense_int8.cc"))
    assert re.findall(r"(?:kNearlyAll|kFewPixels) = ([0-9.]+);", said) == [str(NEARLY_ALL), str(FEW_PIXELS)]
    assert re.findall(r"kAlone = int64_t\{1\} << (\d+);", said) == [str(ALONE.bit_length() - 1)] and ALONE.bit_count() == 1
