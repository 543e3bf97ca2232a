"""What a guide decides on many machines, none of them this one: each is data, and so is what a network takes on it."""

from dataclasses import replace
from functools import cache

import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.configs import digits, digits_resnet
from sparseflax import prune
from sparseflax.conv import ffi
from sparseflax.cost.cpu import LANES
from sparseflax.cost.machine import TYPICAL, Machine
from sparseflax.cost.model import dense_seconds
from sparseflax.network.shapes import conv_shapes
from sparseflax.prune.aim import aimed

pytestmark = pytest.mark.skipif(not ffi.kernels(), reason="the counts are asked of the native kernel")


def scaled(dense, sparse):
    return replace(TYPICAL, dense=TYPICAL.dense._make(dense * rate for rate in TYPICAL.dense),
                   sparse=TYPICAL.sparse._make(sparse * rate for rate in TYPICAL.sparse))


USUAL = Machine("invented", "portable", 4, 2, 2, 32 << 10, 1 << 20, 32 << 20, 1e11, 2e10, 2.5, 1.5, "invented", TYPICAL)
MACHINES = {
    "usual": USUAL,
    "one thread": replace(USUAL, cores=1, threads=1),
    "64 cores": replace(USUAL, cores=64, threads=64, l3_bytes=256 << 20),
    "tiny caches": replace(USUAL, l1_bytes=8 << 10, l2_bytes=64 << 10, l3_bytes=0),
    "the last cache of a whole host": replace(USUAL, l2_bytes=2 << 20, l3_bytes=480 << 20),
    "another's dense constants": replace(USUAL, fitted=scaled(1 / 3, 1)),
    "another's sparse constants": replace(USUAL, fitted=scaled(1, 4)),
} | {  # of this architecture, whether they run here or not
    f"{isa}, {cycles:.2g} cycles": replace(USUAL, isa=isa, lanes=LANES[isa], l1_bytes=48 << 10, l2_bytes=2 << 20,
                                           fma_cycles=cycles)
    for isa, cycles in (("avx512", 0.5), ("avx512", 1.11), ("avx2", 0.54), ("neon", 0.5)) if isa in ffi.tables()
}
CONFIGS = {"digits": digits.config, "digits_resnet": digits_resnet.config}


@cache
def shapes(name):
    config = replace(CONFIGS[name], train_images=8, test_images=8)
    return conv_shapes(config.network(config.widths, 1, config.classes, rngs=nnx.Rngs(0)), config.data().test_images[:1])


def check(name, machine, speedup, other, scale):
    """A guide comes out, never slower than dense; its parts are its total; what was asked is predicted, or else it says so."""
    predicted = sum(float(dense_seconds(shape, machine)) for shape in shapes(name).values())
    whole = prune.Whole(predicted / (1 - other), other * predicted / (1 - other), scale)
    guide = prune.guided(shapes(name), machine, speedup=speedup, whole=whole, best_effort=True)
    rows = guide.layers.values()
    assert guide.speedup >= 1 - 1e-6 and all(0 < layer.density <= 1 for layer in rows)
    assert all(layer.seconds <= layer.dense_seconds * (1 + 1e-6) for layer in rows)
    assert sum(layer.seconds for layer in rows) + whole.other_seconds == pytest.approx(guide.seconds, rel=1e-6)
    assert sum(layer.dense_seconds for layer in rows) + whole.other_seconds == pytest.approx(guide.dense_seconds, rel=1e-6)
    assert guide.shortfall or guide.speedup >= speedup * 0.999
    if guide.shortfall:
        with pytest.raises(ValueError, match="cannot be reached: the highest is "):
            prune.guided(shapes(name), machine, speedup=speedup, whole=whole)
    elif guide.densities and max(guide.densities.values()) < 0.9:
        assert guide.speedup == pytest.approx(speedup, rel=0.02)


@pytest.mark.parametrize("other", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_on_every_machine(name, machine, other):
    check(name, MACHINES[machine], CONFIGS[name].speedup, other, 1.0)


@settings(max_examples=12)
@given(st.floats(0.1, 10), st.floats(0.1, 10), st.integers(1, 64), st.floats(1, 20), st.floats(0, 0.95), st.floats(0.3, 3))
def test_on_any_machine(dense, sparse, threads, speedup, other, scale):
    check("digits", replace(USUAL, threads=threads, cores=threads, fitted=scaled(dense, sparse)), speedup, other, scale)


@pytest.mark.parametrize("busy", [0.5, 2.0])
@pytest.mark.parametrize("speedup", [1.0, 2.0, 100.0])
@pytest.mark.parametrize("machine", MACHINES)
def test_an_aim_predicts_what_is_measured(machine, speedup, busy):
    """Of a dense network that was timed on a busy machine, or is now: as asked, or the most there is."""
    dense = sum(float(dense_seconds(shape, MACHINES[machine])) for shape in shapes("digits").values())
    true = prune.Whole(dense, dense_scale=1.0)

    def guide(whole):
        return prune.guided(shapes("digits"), MACHINES[machine], speedup=speedup, whole=whole, best_effort=True)

    def measured(guide):
        return true.dense_seconds / guide.seconds

    found = guide(aimed(true._replace(dense_seconds=busy * dense), speedup, guide, measured))
    assert found.speedup == pytest.approx(measured(found), rel=0.05)
    assert measured(found) >= 0.95 * speedup or found.shortfall
