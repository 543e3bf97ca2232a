"""The guide: the speedup asked for is met, at the least damage, by the paper's rules; and it says why, or why not."""

import itertools
import math
import re
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflax import prune
from sparseflax.cost.int8 import int8_seconds
from sparseflax.cost.machine import ATOM_C2750, XEON_E5_2697V4, XEON_PHI_7250
from sparseflax.cost.model import conv_seconds, dense_seconds, useful_range
from sparseflax.cost.shape import ConvShape

MACHINES = [ATOM_C2750, XEON_E5_2697V4, XEON_PHI_7250]
# One whose dense convolutions are bad enough that some layers are faster sparse without a single zero.
SLOW_DENSE = replace(ATOM_C2750, name="slow when dense", alpha=0.7)


def conv(ic, size, oc, k, n=1):
    return ConvShape(n, size, size, ic, oc, k, k, padding=((k // 2, k // 2),) * 2)


# A little VGG with two 1x1 layers, the first of which no machine with the Xeon's balance can speed up.
NETWORK = {
    "stem": conv(3, 56, 64, 3),
    "thin": conv(64, 56, 64, 1),
    "early": conv(64, 56, 128, 3),
    "middle": conv(128, 28, 256, 3),
    "reduce": conv(256, 14, 256, 1),
    "late": conv(256, 14, 256, 3),
    "head": ConvShape(1, 1, 1, 256, 10, 1, 1),
}


def whole(machine, other=0.0, scale=1.0, shapes=NETWORK):
    """A network that takes what is predicted of its layers, times a scale, and something else."""
    layers = scale * sum(float(dense_seconds(shape, machine)) for shape in shapes.values())
    return prune.Whole(other + layers, other, scale)


def damage(shape, density):
    return 1 / (shape.kh * shape.kw * shape.ic / shape.groups * density)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
@pytest.mark.parametrize("speedup", [1.1, 1.5, 2.0, 2.5])
def test_meets_the_speedup_and_balances_the_layers(machine, speedup):
    other = 1e-6
    guide = prune.guided(NETWORK, machine, speedup=speedup, exclude=["stem"], whole=whole(machine, other))
    seconds, dense, worth = other, other, []
    for name, shape in NETWORK.items():
        layer, useful = guide.layers[name], useful_range(shape, machine)
        dense += float(dense_seconds(shape, machine))
        if name not in guide.densities:
            seconds += float(dense_seconds(shape, machine))
            assert layer.density == 1 and layer.reason.startswith("dense: ")
            continue
        seconds += float(conv_seconds(shape, layer.density, machine))
        assert useful.lower * 0.999 <= layer.density < useful.upper
        if layer.density > 1.01 * max(useful.lower, 0.01):
            slope = jax.grad(lambda d, shape=shape: conv_seconds(shape, d, machine))(layer.density)
            worth.append(float(slope) * layer.density / damage(shape, layer.density))
    assert "stem" not in guide.densities and guide.densities
    # Between grid points time is taken as linear in the logarithm of density, which is never below the convex model.
    assert speedup * (1 - 1e-5) <= dense / seconds <= speedup * 1.002
    assert guide.speedup == pytest.approx(dense / seconds, rel=1e-5)
    assert max(worth) <= min(worth) * 1.02  # the multiplier's one price, interpolated on the grid


@pytest.fixture(scope="module")
def choices():
    """Two layers on the Xeon, and (seconds, damage) of each of them, dense or at any of 400 densities."""
    shapes, options = {"wide": conv(256, 14, 256, 3), "narrow": conv(64, 28, 96, 3)}, []
    for shape in shapes.values():
        lower = max(0.01, float(useful_range(shape, XEON_E5_2697V4).lower))
        densities = np.exp(np.linspace(np.log(lower), -1e-3, 400)).astype(np.float32)
        sparse = jax.jit(jax.vmap(lambda d, s=shape: conv_seconds(s, d, XEON_E5_2697V4)))(densities)
        seconds = np.array([float(dense_seconds(shape, XEON_E5_2697V4)), *np.asarray(sparse)])
        options.append((seconds, damage(shape, np.array([1.0, *densities]))))
    return shapes, options


@pytest.mark.parametrize("speedup", [1.2, 1.6, 2.4])
def test_against_all_choices_of_two_layers(choices, speedup):
    """Nothing fast enough does less damage."""
    shapes, ((t0, damage0), (t1, damage1)) = choices
    fast_enough = t0[:, None] + t1 <= (t0[0] + t1[0]) / speedup
    least = np.where(fast_enough, damage0[:, None] + damage1, np.inf).min()
    guide = prune.guided(shapes, XEON_E5_2697V4, speedup=speedup)
    found = sum(damage(shape, guide.layers[name].density) for name, shape in shapes.items())
    assert found <= least * 1.005


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
@pytest.mark.parametrize("speedup", [1.2, 2.0, 3.0])
def test_leaving_out_other_layers_is_no_better(machine, speedup):
    def cost(guide):
        return sum(damage(shape, guide.layers[name].density) - damage(shape, 1) for name, shape in NETWORK.items())

    own = cost(prune.guided(NETWORK, machine, speedup=speedup))
    convs = ("early", "middle", "reduce", "late")
    for some in itertools.chain(*(itertools.combinations(convs, count) for count in range(1, len(convs)))):
        try:
            other = cost(prune.guided(NETWORK, machine, speedup=speedup, exclude=some))
        except ValueError:
            continue  # not fast enough without those
        assert own <= other * 1.01, some


@pytest.mark.parametrize("speedup", [1.2, 1.42, 1.5, 3.0])
def test_a_pruned_layer_has_a_zero_and_a_dense_one_is_dense(speedup):
    """Where the sparse kernel is faster at any density, one zero is enough: without any, `plan` leaves a layer dense."""
    guide = prune.guided(NETWORK, SLOW_DENSE, speedup=speedup)
    seconds = [float(conv_seconds(shape, guide.densities[name], SLOW_DENSE) if name in guide.densities
                     else dense_seconds(shape, SLOW_DENSE)) for name, shape in NETWORK.items()]
    assert guide.seconds == pytest.approx(sum(seconds), rel=1e-5)
    assert all(layer.density == 1 or layer.density <= 1 - 1 / NETWORK[name].weights for name, layer in guide.layers.items())
    if speedup > 1.43:
        assert guide.speedup == pytest.approx(speedup, rel=2e-3)
    else:
        assert speedup <= guide.speedup < 1 / 0.7 and max(guide.densities.values()) > 0.999


def test_a_measured_dense_time_is_what_speedups_count_from():
    predicted = prune.guided(NETWORK, ATOM_C2750, speedup=1)
    measured = 1.25 * predicted.dense_seconds
    guide = prune.guided(NETWORK, ATOM_C2750, speedup=2.5, whole=prune.Whole(measured))
    assert guide.seconds == pytest.approx(measured / 2.5, rel=2e-3) and guide.speedup == pytest.approx(2.5, rel=2e-3)


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.name)
@pytest.mark.parametrize("speedup", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("points", [(), ((0.2, 0.05), (0.8, 0.2))])
def test_the_rows_of_the_table_add_up_to_its_total(machine, speedup, points):
    """Dense and pruned, whatever the network was measured to take."""
    predicted = prune.guided(NETWORK, machine, speedup=1).dense_seconds
    measured = prune.Whole(2 * predicted, 0.1 * predicted, 1.3, 1.7 if points else None,
                           tuple((2 * predicted * seconds, predicted * other) for seconds, other in points))
    guide = prune.guided(NETWORK, machine, speedup=speedup, whole=measured, best_effort=True)
    rows = [line.split("  ") for line in str(guide).splitlines()[1:]]
    rows = [[cell.strip() for cell in row if cell.strip()] for row in rows if row[0] != guide.shortfall]
    dense, pruned = np.array([[float(cell) for cell in row if re.fullmatch(r"[0-9]+[.][0-9]", cell)][:2] for row in rows]).T
    for column in (dense, pruned):
        assert column[:-1].sum() == pytest.approx(column[-1], abs=0.05 * len(rows))
    assert guide.other_seconds == pytest.approx(measured.other(guide.seconds), rel=1e-3, abs=1e-9)


def test_best_effort_takes_what_can_be_reached_and_says_so():
    for wish in ({"speedup": 99}, {"speedup": math.inf}, {"seconds": 1e-9}):
        guide = prune.guided(NETWORK, ATOM_C2750, **wish, best_effort=True)
        highest = float(re.search(r"the highest is ([0-9.]+)", str(refusal(NETWORK, ATOM_C2750, 99)))[1])
        assert guide.speedup == pytest.approx(0.97 * highest, rel=5e-3)
        assert re.search(r"asked for (as much as there is|\d\S*( ms)?), "
                         r"this machine allows \S+( ms)?: \d+ % of the time is in \w+", guide.shortfall)
        assert str(guide).endswith(guide.shortfall)
    assert prune.guided(NETWORK, ATOM_C2750, speedup=2, best_effort=True).shortfall == ""
    assert prune.guided(NETWORK, replace(ATOM_C2750, alpha=1e3, beta=1e3), speedup=2, best_effort=True).densities == {}
    with pytest.raises(ValueError, match="finite, got inf; for as much as there is, pass best_effort=True with"):
        prune.guided(NETWORK, ATOM_C2750, speedup=math.inf)


def test_a_network_that_takes_longer_than_its_layers_are_predicted_to():
    """All seconds are times the scale, so that the densities for a speedup stay and those for a time do not."""
    plain, slow = (prune.guided(NETWORK, ATOM_C2750, speedup=2, whole=whole(ATOM_C2750, 1e-3 * s, s)) for s in (1.0, 1.5))
    assert slow.densities == pytest.approx(plain.densities, rel=1e-3)
    for field in ("seconds", "dense_seconds"):
        assert getattr(slow, field) == pytest.approx(1.5 * getattr(plain, field), rel=1e-3)
    for name, layer in slow.layers.items():
        other = plain.layers[name]
        for field in ("dense_seconds", "seconds", "slope"):
            assert getattr(layer, field) == pytest.approx(1.5 * getattr(other, field), rel=1e-3), field
    assert slow.strengths == pytest.approx(plain.strengths, rel=1e-3)
    timed = prune.guided(NETWORK, ATOM_C2750, seconds=slow.seconds, whole=slow.whole)
    assert timed.densities == pytest.approx(slow.densities, rel=1e-3)


def test_the_papers_rules():
    guide = prune.guided(NETWORK, XEON_E5_2697V4, speedup=3, exclude={"stem"})
    assert guide.layers["stem"].reason == "dense: excluded"
    assert guide.layers["thin"].reason.startswith("dense: no speedup potential, at best 0.")
    assert re.fullmatch(r"dense: given back, would be slower at density 0\.\d\d", guide.layers["reduce"].reason)
    assert guide.densities["middle"] < guide.densities["early"]  # as long, but with more inputs per output


def test_no_layer_goes_below_min_density():
    shapes = {"late": NETWORK["late"]}
    highest = re.search(r"the highest is ([\d.]+)", str(refusal(shapes, ATOM_C2750, 100, min_density=0.03)))
    guide = prune.guided(shapes, ATOM_C2750, speedup=float(highest[1]), min_density=0.03)
    assert guide.densities["late"] == pytest.approx(0.03, rel=1e-3)
    assert guide.layers["late"].reason.endswith("stopped at min_density")


def test_below_its_useful_range_only_for_the_speedup_asked_for():
    """The 1x1 layer's time is flat below its range: more zeros help little, until nothing else is left."""
    shapes = {"plain": conv(256, 14, 256, 3), "flat": conv(256, 14, 256, 1)}
    lower = {name: float(useful_range(shape, XEON_E5_2697V4).lower) for name, shape in shapes.items()}
    within = sum(float(conv_seconds(shape, lower[name], XEON_E5_2697V4)) for name, shape in shapes.items())
    dense = sum(float(dense_seconds(shape, XEON_E5_2697V4)) for shape in shapes.values())
    guide = prune.guided(shapes, XEON_E5_2697V4, speedup=0.999 * dense / within)
    assert all(guide.densities[name] >= 0.999 * lower[name] for name in shapes)
    assert all(guide.layers[name].lower == pytest.approx(lower[name]) for name in shapes)
    guide = prune.guided(shapes, XEON_E5_2697V4, speedup=1.1 * dense / within)
    assert guide.densities["flat"] < 0.99 * lower["flat"]
    assert ", pruned further for the speedup asked for" in guide.layers["flat"].reason
    assert all(layer.lower <= layer.density for layer in guide.layers.values())
    highest = re.search(r"the highest is ([\d.]+)", str(refusal(shapes, XEON_E5_2697V4, 100)))
    guide = prune.guided(shapes, XEON_E5_2697V4, speedup=float(highest[1]))
    assert min(guide.densities.values()) == pytest.approx(0.01, rel=0.2)


def test_a_layer_that_runs_sparse_with_nearly_all_weights_says_so():
    machine, stem = replace(SLOW_DENSE, alpha=0.4), conv(2, 48, 32, 3)
    guide = prune.guided({"stem": stem}, machine, speedup=1.5)
    assert guide.densities["stem"] == 1 - 1 / stem.weights
    assert guide.layers["stem"].reason == "runs sparse, though fewer weights hardly save time"
    guide = prune.guided({"stem": stem}, machine, speedup=2)
    assert guide.densities["stem"] < 0.95
    assert guide.layers["stem"].reason == ("runs sparse, though fewer weights hardly save time, pruned further for the "
                                           "speedup asked for")


def test_a_time_instead_of_a_speedup():
    dense = prune.guided(NETWORK, ATOM_C2750, speedup=1).dense_seconds
    guide = prune.guided(NETWORK, ATOM_C2750, seconds=dense / 2)
    assert guide.densities == pytest.approx(prune.guided(NETWORK, ATOM_C2750, speedup=2).densities)
    assert guide.machine == ATOM_C2750
    assert prune.guided(NETWORK, ATOM_C2750, seconds=2 * dense).densities == {}
    with pytest.raises(ValueError, match=r"^\S+ ms cannot be reached: the least is \S+ ms, a speedup of \d+\.\d\d, where the"):
        prune.guided(NETWORK, ATOM_C2750, seconds=dense / 1000)
    with pytest.raises(ValueError, match="^seconds must be positive and finite, or None, got nan"):
        prune.guided(NETWORK, ATOM_C2750, seconds=float("nan"))
    for wrong, message in ((prune.Whole(0.0), "dense_seconds of the whole network must be positive and finite, got 0.0"),
                           (prune.Whole(1.0, -1), "other_seconds of the whole network must be at least 0 and finite, got -1"),
                           (prune.Whole(1.0, 0.1, float("inf")), "scale of the whole network must be positive and finite"),
                           (prune.Whole(1.0, 0.1, 1.0, 0.0), "dense_scale of the whole network must be None or positive"),
                           (prune.Whole(1.0, 1.5), "other_seconds of the whole network must be at most the 1.0 of")):
        with pytest.raises(ValueError, match=message):
            prune.guided(NETWORK, ATOM_C2750, whole=wrong)


def test_layers_are_excluded_by_name_pattern_or_predicate():
    for exclude in (["stem", "thin"], "[st][!a]*", lambda name: name in ("stem", "thin")):
        guide = prune.guided(NETWORK, ATOM_C2750, speedup=1.5, exclude=exclude)
        assert {name for name, layer in guide.layers.items() if layer.reason == "dense: excluded"} == {"stem", "thin"}
    with pytest.raises(ValueError, match=r"cannot exclude layers \['\*/conv'\]: the network has \['stem'"):
        prune.guided(NETWORK, ATOM_C2750, exclude=["stem", "*/conv"])


def refusal(shapes, machine, speedup, **options):
    with pytest.raises(ValueError) as error:
        prune.guided(shapes, machine, speedup=speedup, **options)
    return error.value


LAYERS = st.builds(conv, *(st.sampled_from(sizes) for sizes in ([3, 16, 64, 256], [7, 14, 28], [16, 64, 256], [1, 3, 5])))


@settings(max_examples=40, deadline=None)
@given(st.lists(LAYERS, min_size=5, max_size=5), st.sampled_from([*MACHINES, SLOW_DENSE]), st.floats(1.0, 6.0))
def test_any_network_is_as_fast_as_asked_or_refused(layers, machine, speedup):
    shapes = {f"layer{i}": layer for i, layer in enumerate(layers)}
    try:
        guide = prune.guided(shapes, machine, speedup=speedup)
    except ValueError as error:
        highest = float(re.search(r"cannot be reached: the highest is ([\d.]+)", str(error))[1])
        assert highest <= speedup
        guide, speedup = prune.guided(shapes, machine, speedup=highest), highest
    assert guide.speedup >= speedup * (1 - 1e-4)
    for name, density in guide.densities.items():
        useful, reason = useful_range(shapes[name], machine), guide.layers[name].reason
        assert 0.01 * 0.999 <= density < useful.upper
        most = 1 - 1 / shapes[name].weights
        assert density >= 0.99 * min(useful.lower, most) or ", pruned further for the speedup asked for" in reason
    assert prune.guided(shapes, machine, speedup=speedup) == guide  # deterministic


def test_prints_as_a_table():
    guide = prune.guided(NETWORK, XEON_E5_2697V4, speedup=1.5, exclude=["stem"], whole=whole(XEON_E5_2697V4, 5e-6))
    lines = str(guide).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", *NETWORK, "(other)", "total"]
    assert lines[0].split() == ["layer", "shape", "density", "dense", "us", "us", "why"]
    assert lines[-1].endswith("1.50x as fast as dense")
    assert str(prune.constant({"a": 0.1})).splitlines()[1].split() == ["a", "0.100", "as", "given"]


def test_dense_is_no_speedup():
    guide = prune.guided(NETWORK, ATOM_C2750, speedup=1)
    assert guide.densities == {} and guide.speedup == 1
    assert guide.layers["late"].reason == "dense: no speedup asked for"
    # Also of a network that nothing makes faster: all that is no layer takes as long as it does dense.
    slow = whole(ATOM_C2750)._replace(other_seconds=whole(ATOM_C2750).dense_seconds)
    assert prune.guided(NETWORK, ATOM_C2750, speedup=1, whole=slow).densities == {}
    assert "the highest is 1.00" in str(refusal(NETWORK, ATOM_C2750, 1.1, whole=slow))


def test_what_is_fast_enough_packed_is_not_pruned():
    layers = whole(ATOM_C2750).dense_seconds
    slow = prune.Whole(2 * layers, dense_scale=1.0)  # dense it takes twice what it takes packed and unpruned
    guide = prune.guided(NETWORK, ATOM_C2750, speedup=1.9, whole=slow)
    assert guide.densities == {} and guide.speedup == pytest.approx(2)
    assert guide.layers["late"].reason == "dense: packed it is 2x faster unpruned"
    guide = prune.guided(NETWORK, ATOM_C2750, speedup=2.2, whole=slow)
    assert guide.densities and guide.speedup == pytest.approx(2.2, rel=1e-3)


def test_refusals():
    message = str(refusal(NETWORK, XEON_E5_2697V4, 50, exclude=["stem"], whole=whole(XEON_E5_2697V4, 20e-6)))
    assert re.match(r"a speedup of 50 cannot be reached: the highest is \d\.\d\d, where the time goes to \w+ \d+% \(", message)
    assert "thin 18% (dense: no speedup potential, at best 1.06x)" in message
    assert re.search(r"everything else \d+%$", message)
    assert str(refusal(NETWORK, ATOM_C2750, 0.5)) == "speedup must be at least 1 (the dense network) and finite, got 0.5"
    assert str(refusal(NETWORK, ATOM_C2750, float("nan"))).endswith("got nan")
    assert str(refusal(NETWORK, ATOM_C2750, 2, min_density=0)) == "min_density must be in (0, 1), got 0"
    assert str(refusal(NETWORK, ATOM_C2750, 2, exclude=["conw"])).startswith("cannot exclude layers ['conw']: the network")
    assert str(refusal({}, ATOM_C2750, 2)).startswith("there is no layer to prune")
    with pytest.raises(ValueError, match=r"density of layer 'a' must be in \(0, 1\], got 1.5"):
        prune.constant({"a": 1.5})


@pytest.mark.parametrize("machine", [*MACHINES, replace(XEON_E5_2697V4, fma_cycles=0.5, int8_cycles=0.5)],
                         ids=["atom", "xeon", "phi", "xeon with dot products"])
def test_a_guide_for_eight_bits_goes_by_what_words_cost(machine):
    guide, single = (prune.guided(NETWORK, machine, speedup=2, precision=precision) for precision in ("int8", "float32"))
    dense = {name: float(dense_seconds(shape, machine)) for name, shape in NETWORK.items()}
    times = {name: int8_seconds(NETWORK[name], guide.densities[name], machine) if name in guide.densities else
             min(dense[name], int8_seconds(NETWORK[name], 1.0, machine)) for name in NETWORK}
    assert guide.precision == "int8" and guide.machine == machine
    assert guide.dense_seconds == pytest.approx(sum(dense.values()), rel=1e-5) == single.dense_seconds
    for name, seconds in times.items():
        assert guide.layers[name].seconds == pytest.approx(seconds, rel=1e-4)
        assert guide.layers[name].dense_seconds == single.layers[name].dense_seconds
    assert sum(times.values()) == pytest.approx(guide.dense_seconds / 2, rel=1e-3)
    kept = [sum(g.layers[name].density * shape.weights for name, shape in NETWORK.items()) for g in (guide, single)]
    assert kept[0] > kept[1]  # a word of four costs 2.3 times a weight at most


def test_what_eight_bits_give_unpruned_is_not_pruned_for():
    machine = replace(XEON_E5_2697V4, fma_cycles=0.5, int8_cycles=0.5)
    dense = {name: float(dense_seconds(shape, machine)) for name, shape in NETWORK.items()}
    rounded = sum(min(dense[name], int8_seconds(shape, 1.0, machine)) for name, shape in NETWORK.items())
    most = sum(dense.values()) / rounded
    assert most > 1.1
    assert prune.guided(NETWORK, machine, speedup=0.99 * most, precision="int8").densities == {}
    assert prune.guided(NETWORK, machine, speedup=1.1 * most, precision="int8").densities


def test_a_precision_that_there_is_not():
    with pytest.raises(ValueError, match="precision='int4', wanted 'float32' or 'int8'"):
        prune.guided(NETWORK, ATOM_C2750, precision="int4")  # type: ignore[arg-type]
