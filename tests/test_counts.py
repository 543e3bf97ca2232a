"""What the kernel would do, as counts: against its own schedule, and the cost of a calibrated machine by its properties."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from experiments.layers import layer
from sparseflax.conv import ffi
from sparseflax.cost.counts import DENSITIES, dense_counts, schedule, sparse_counts
from sparseflax.cost.cpu import LANES
from sparseflax.cost.machine import TYPICAL, XEON_E5_2697V4
from sparseflax.cost.model import Work, conv_seconds, dense_seconds, speedup, useful_range
from sparseflax.cost.rates import FREE_DENSE, FREE_SPARSE, DenseCounts, Rates, SparseCounts, roofline
from sparseflax.cost.shape import ConvShape
from sparseflax.network.plan import MARGIN

native = pytest.mark.skipif(not ffi.kernels(), reason="the counts are asked of the native kernel")
# The kernel that every build has.
MACHINE = replace(XEON_E5_2697V4, isa="portable", lanes=4, threads=1, fitted=TYPICAL)
CONV = ConvShape(1, 14, 14, 96, 64, 3, 3, padding=((1, 1), (1, 1)))
ROUNDING = 3e-6

layers = st.builds(
    ConvShape, n=st.sampled_from([1, 3, 16]), ih=st.integers(7, 30), iw=st.integers(7, 30),
    ic=st.sampled_from([4, 20, 64, 512]), oc=st.sampled_from([8, 64, 512]), kh=st.sampled_from([1, 3, 5]),
    kw=st.sampled_from([1, 3, 5]), groups=st.sampled_from([1, 4]), strides=st.sampled_from([(1, 1), (2, 2)]))


def test_a_machine_of_the_paper_counts_operations_and_bytes():
    (counts,) = set(sparse_counts(CONV, XEON_E5_2697V4))
    rates = XEON_E5_2697V4.rates.sparse
    seconds = SparseCounts(*(count * rate for count, rate in zip(counts, rates, strict=True)))
    assert seconds.fma == pytest.approx(3 * CONV.flops / 2150e9)
    assert seconds.kernel_bytes == pytest.approx(2 * CONV.weight_bytes / 122e9)
    assert seconds.input_bytes + seconds.output_bytes == pytest.approx((CONV.input_bytes + CONV.output_bytes) / 122e9)
    assert sum(seconds) == pytest.approx(seconds.fma + seconds.kernel_bytes + seconds.input_bytes + seconds.output_bytes)


@native
@given(layers)
@example(ConvShape(16, 8, 9, 4, 64, 1, 1))  # takes another tile for a second cache of 512 KB than for one of 256
def test_counts_are_those_of_the_schedule(shape):
    for density, counts in zip(DENSITIES, sparse_counts(shape, MACHINE), strict=True):
        chosen = schedule(shape, max(1, round(density * shape.weights)), "portable", 1, (MACHINE.l1_bytes, MACHINE.l2_bytes))
        assert counts.weight == shape.weights * chosen["tiles"]
        assert counts.fma == pytest.approx(shape.weights * chosen["vectors"] * chosen["fma_cycles"])
        assert counts.visit == shape.oc * chosen["blocks"] * chosen["tiles"]
        # Every output has a lane; idle lanes only add.
        assert chosen["vectors"] * chosen["lanes"] >= shape.n * shape.oh * shape.ow
        assert counts.split == 0 and min(counts) >= 0


@native
@given(layers, st.sampled_from([2, 3, 8]))
def test_threads_share_the_work(shape, threads):
    alone, shared = sparse_counts(shape, MACHINE), sparse_counts(shape, replace(MACHINE, threads=threads))
    for one, many in zip(alone, shared, strict=True):
        assert many.call == one.call
        if many == one:  # too short to share
            continue
        assert one.weight / threads * (1 - ROUNDING) <= many.weight < one.weight
        assert one.pack / threads * (1 - ROUNDING) <= many.pack <= one.pack * (1 + ROUNDING)  # each part packs for itself
        assert many.split == 1 and one.split == 0


@native
@given(layers, st.floats(0.005, 1.0), st.floats(1.01, 3.0))
def test_calibrated_time_increases_smoothly_with_density(shape, density, factor):
    more = min(1.0, density * factor)
    assert conv_seconds(shape, density, MACHINE) <= conv_seconds(shape, more, MACHINE) * (1 + ROUNDING)
    seconds, slope = jax.value_and_grad(conv_seconds, argnums=1)(shape, density, MACHINE)
    assert 0 < slope * density <= seconds * (1 + ROUNDING)  # no tile's time falls, or grows faster than its weights
    # A tenth of a percent further the slope has not jumped: tiles take over from each other within percents.
    near = jax.grad(conv_seconds, argnums=1)(shape, min(1.0, density * 1.001), MACHINE)
    assert float(near) == pytest.approx(float(slope), rel=0.05)


@native
def test_layers_at_once():
    shapes = [CONV, CONV.with_batch(4), ConvShape(1, 1, 1, 512, 100, 1, 1)]
    density = jnp.array([0.05, 0.3, 0.9])
    work = Work.stack(shapes, MACHINE)
    each = [float(conv_seconds(shape, float(d), MACHINE)) for shape, d in zip(shapes, density, strict=True)]
    np.testing.assert_allclose(conv_seconds(work, density, MACHINE), each, rtol=ROUNDING)
    np.testing.assert_allclose(jax.jit(jax.vmap(lambda w, d: conv_seconds(w, d, MACHINE)))(work, density), each, rtol=ROUNDING)
    np.testing.assert_allclose(dense_seconds(work, MACHINE), [dense_seconds(shape, MACHINE) for shape in shapes], rtol=ROUNDING)
    found = useful_range(work, MACHINE)
    for i, shape in enumerate(shapes):
        alone = useful_range(shape, MACHINE)
        np.testing.assert_allclose([found.lower[i], found.upper[i]], alone, rtol=1e-5)
        assert 0 < alone.lower <= 1
        if alone.upper < 0.999:
            assert speedup(shape, alone.upper * 0.999, MACHINE) >= 1 - ROUNDING
            assert speedup(shape, alone.upper * 1.001, MACHINE) <= 1 + ROUNDING


@native
def test_useful_range_ends_where_half_of_the_time_is_not_the_weights():
    lower = float(useful_range(CONV, MACHINE).lower)
    seconds, slope = jax.value_and_grad(conv_seconds, argnums=1)(CONV, lower, MACHINE)
    assert 0.4 < slope * lower / seconds < 0.6  # the tile with the least besides the weights is not always the fastest


def test_dense_counts():
    plain = dense_counts(CONV, MACHINE)
    assert plain.shifted == plain.split == 0 and plain.call == 1
    # Rows of 14 pixels are tiles of 4, 5 and 5, of two vectors of 4 channels each: as many cycles as operations ask for.
    assert plain.flop == CONV.flops and 0 < plain.deep < plain.flop
    assert plain.patches == 14 * 14 * 96 and plain.packed_bytes == CONV.weight_bytes
    assert plain.tiles == 14 * 3 * 8 * 4, "three tiles in a row, of 8 channels each; 864 taps in four parts"
    assert plain.kernel_bytes == pytest.approx(CONV.weight_bytes * 0.33, rel=0.05)  # 216 KB beside an own cache of 256 KB
    shifted = dense_counts(replace(CONV, groups=96, oc=192), MACHINE)
    assert shifted.shifted == 14 * 14 * 9 * 192 and shifted.call == 1
    assert shifted.flop == shifted.patches == shifted.packed_bytes == 0
    # A 1x1 window with stride 2 meets a quarter of the pixels.
    skips = dense_counts(ConvShape(4096, 14, 14, 96, 64, 1, 1, strides=(2, 2)), MACHINE)
    assert skips.patches == 0 and skips.tiles == 4096 * 7 * 2 * 8
    # Weights are packed for each image, and for all of them at once where an image is one pixel; a single one needs no packing.
    assert skips.packed_bytes == 4096 * 96 * 64 * 4
    pixel, pixels = (dense_counts(ConvShape(n, 1, 1, 96, 64, 1, 1), MACHINE) for n in (1, 4096))
    assert (pixel.packed_bytes, pixels.packed_bytes) == (0, 96 * 64 * 4) and pixel.kernel_bytes == pixels.kernel_bytes
    assert skips.activation_bytes == pytest.approx(4096 * 7 * 7 * (96 + 64) * 4, rel=0.01)
    small, large = (dense_counts(CONV.with_batch(n), MACHINE) for n in (1, 4096))
    assert small.activation_bytes < 1 and large.activation_bytes > 4096 * 0.99 * (CONV.input_bytes + CONV.output_bytes)
    # Counts beyond 32 bits are numbers like others.
    huge = ConvShape(1024, 224, 224, 64, 64, 3, 3, padding=((1, 1), (1, 1)))
    assert all(isinstance(count, float) for count in dense_counts(huge, MACHINE))
    assert float(useful_range(huge, MACHINE).upper) > 0
    two = replace(MACHINE, threads=2)
    assert [dense_counts(shape, two).split for shape in (CONV, ConvShape(1, 2, 2, 8, 8, 1, 1))] == [1, 0]


@pytest.mark.parametrize("width, channels, cycles", [
    (12, 16, 2 * 6), (7, 16, 4 + 4), (3, 16, 4),  # a tile of three waits for its sums
    (12, 8, 2 * 4), (12, 20, 2 * 6 + 2 * 4), (6, 17, 6 + 4)])  # one vector alone waits too, and lanes are filled up
def test_what_dense_tiles_leave_idle(width, channels, cycles):
    shape = ConvShape(1, 1, width, 32, channels, 1, 3, padding=((0, 0), (1, 1)))
    machine = replace(MACHINE, isa="avx2", lanes=8, fma_cycles=0.5)
    assert dense_counts(shape, machine).flop == pytest.approx(cycles * 2 * 2 * 8 * 32 * 3)
    # Where an FMA takes longer, fewer of them wait for one another.
    slow = replace(machine, fma_cycles=1.0)
    assert dense_counts(ConvShape(1, 1, 12, 32, 8, 1, 1), slow).flop == 2 * 6 * 2 * 8 * 32
    # The pixels of all images are one row where windows are pixels.
    row = ConvShape(3, 2, width, 32, 16, 1, 1)
    assert dense_counts(row, machine).flop == pytest.approx(max(6 * width, 4 * -(-6 * width // 6)) * 2 * 2 * 8 * 32)


def test_no_kernel_of_that_name():
    with pytest.raises(ValueError, match="counts of the 'mmx' kernel are asked of the kernel itself, which is built here for"):
        conv_seconds(CONV, 0.1, replace(MACHINE, isa="mmx"))


@native
def test_a_window_that_the_kernel_does_not_support():
    shape = ConvShape(1, 64, 64, 16, 16, 40, 40)
    with pytest.raises(ValueError, match="n1 16x64x64 -> 16 40x40 does not run in the sparse kernel: its window is too"):
        conv_seconds(shape, 0.1, MACHINE)
    assert dense_seconds(ConvShape(1, 64, 64, 16, 16, 40, 40), XEON_E5_2697V4) > 0


@pytest.mark.parametrize("part, change", [
    ("sparse", {"visit": -1e-9}), ("dense", {"flop": float("nan")}), ("dense", {"call": float("inf")})])
def test_impossible_rates(part, change):
    with pytest.raises(ValueError, match="seconds per count have to be finite, none negative"):
        replace(TYPICAL, **{part: getattr(TYPICAL, part)._replace(**change)})
    with pytest.raises(ValueError, match="not all of them zero"):
        replace(TYPICAL, **{part: FREE_SPARSE if part == "sparse" else FREE_DENSE})
    with pytest.raises(ValueError, match="`overlap` at least 1"):
        Rates(TYPICAL.sparse, TYPICAL.dense, 0.5)


def test_rates_and_counts_are_named_alike():
    rates = roofline(1e11, 1e10, 3.0, 2.0)
    assert rates.sparse._fields == SparseCounts._fields and rates.dense._fields == DenseCounts._fields
    assert rates.overlap > TYPICAL.overlap


# The tile that runs, or "dense", as `plan` chooses at densities 0.02, 0.1, 0.3, 0.6 and 0.9, by the built-in rates on a machine
# with a first cache of 32 KB. What changes here, a change of the model or of the kernel's tiles did.
FMA_CYCLES = {"avx512": 1.11}  # Zen 4's
GOLDEN = {
    "avx2": {
        layer(64, 56, 64, 3): "2x7 2x7 2x7 2x7 dense",
        layer(256, 14, 256, 3): "2x7 2x7 2x7 1x14 dense",
        layer(512, 7, 512, 3): "1x7 1x7 1x7 1x7 1x7",
        layer(1024, 14, 256, 1): "1x13 1x9 1x9 1x9 dense",
        layer(64, 56, 256, 1): "1x11 1x13 1x13 1x14 dense",
        layer(256, 13, 384, 3).with_batch(16): "1x13 1x13 1x13 1x13 1x13",
        layer(128, 56, 128, 3, 2): "2x7 2x7 2x7 1x7 dense",
        layer(16, 14, 16, 1): "1x13 1x13 1x13 1x13 1x13",
        layer(2048, 1, 1000, 1): "1x1 1x1 1x1 dense dense",
        layer(96, 27, 256, 5, groups=2): "2x7 2x7 2x7 2x7 dense",
    },
    "portable": {
        layer(64, 56, 64, 3): "2x7 2x7 dense dense dense",
        layer(1024, 14, 256, 1): "1x10 1x10 dense dense dense",
        layer(256, 13, 384, 3).with_batch(16): "1x13 1x13 dense dense dense",
        layer(2048, 1, 1000, 1): "1x1 1x1 dense dense dense",
    },
}


@pytest.mark.parametrize("isa, shape", [(isa, shape) for isa, shapes in GOLDEN.items() for shape in shapes], ids=str)
def test_golden_choices(isa, shape):
    if isa not in ffi.tables():
        pytest.skip(f"there is no {isa} in this build")
    machine = replace(MACHINE, isa=isa, lanes=LANES[isa], fma_cycles=FMA_CYCLES.get(isa, 0.0))
    found = []
    for density in (0.02, 0.1, 0.3, 0.6, 0.9):
        y, x = schedule(shape, round(density * shape.weights), isa, 1, (32 << 10, 1 << 20), machine.fma_cycles)["tile"]
        found.append(f"{y}x{x}" if speedup(shape, density, machine) >= MARGIN else "dense")
    assert " ".join(found) == GOLDEN[isa][shape]
