"""Speed in the loss: the time asked for is met at every step, the thresholds are a minimum, resuming is exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparseflax import prune
from sparseflax.cost.machine import ATOM_C2750, XEON_E5_2697V4
from sparseflax.cost.model import conv_seconds, dense_seconds
from sparseflax.cost.shape import ConvShape

MACHINE = XEON_E5_2697V4


def conv(ic, size, oc, k, n=1):
    return ConvShape(n, size, size, ic, oc, k, k, padding=((k // 2, k // 2),) * 2)


# On the Xeon `thin` has no headroom.
NETWORK = {
    "early": conv(16, 28, 32, 3),
    "thin": conv(32, 28, 16, 1),
    "middle": conv(32, 14, 48, 3),
    "late": conv(48, 14, 64, 3),
}
SCALES = {"early": 0.1, "thin": 1.0, "middle": 10.0, "late": 1e-3}
GUIDE = prune.guided(NETWORK, MACHINE, speedup=2)
STILL = optax.set_to_zero()  # an optimizer that leaves the weights to the pruning
AT_ONCE = prune.budget(STILL, GUIDE, MACHINE, prune.ramp(0, 1))


def make_params(seed=0):
    draw = np.random.default_rng(seed)
    return jax.device_put({name: {
        "kernel": np.float32(SCALES[name]) * draw.standard_normal(shape.kernel_shape, np.float32),
        "bias": np.ones(shape.oc, np.float32)} for name, shape in NETWORK.items()})


def slopes(seed=1):
    """Gradients that go with make_params: as much smaller as the weights are larger."""
    return {name: leaf | {"kernel": leaf["kernel"] / SCALES[name] ** 2} for name, leaf in make_params(seed).items()}


def train(tx, params, steps, state=None, first=0):
    """Every (params, state) of a training with made-up gradients."""
    update = jax.jit(tx.update)
    state = tx.init(params) if state is None else state
    for step in range(first, first + steps):
        updates, state = update(make_params(100 + step), state, params)
        params = optax.apply_updates(params, updates)
        yield params, state


@functools.cache
def seconds_of(name):
    """The layer's time at a density, compiled."""
    return jax.jit(lambda density: conv_seconds(NETWORK[name], density, MACHINE))


def time_of(params, guide=GUIDE):
    """Independent of the state: dense layers as dense, pruned ones at the density of their kernels."""
    return sum(float(seconds_of(name)(np.count_nonzero(params[name]["kernel"]) / NETWORK[name].weights))
               if name in guide.densities else layer.dense_seconds for name, layer in guide.layers.items())


@pytest.mark.parametrize("speedup", [1.3, 2.6])
def test_the_time_is_met_at_every_step_of_the_ramp(speedup):
    guide = prune.guided(NETWORK, MACHINE, speedup=speedup, min_density=0.02)
    tx = prune.budget(optax.sgd(0.01), guide, MACHINE, prune.ramp(2, 20), every=3, min_density=0.02)
    slowest = time_of(jax.tree.map(np.ones_like, make_params()), guide)
    before = make_params()
    for step, (params, state) in enumerate(train(tx, before, 24), start=1):
        if step > 2 and step % 3 == 0 and step <= 20 or step == 20:
            fraction = 1 - (1 - (step - 2) / 18) ** 3
            wanted = slowest + fraction * (guide.seconds - slowest)
            # Down to whole weights: the smallest pruned layer has 4608.
            assert wanted * (1 - 1e-3) <= time_of(params, guide=guide) <= wanted * (1 + 1e-5)
            assert float(state.seconds) == pytest.approx(time_of(params, guide=guide), rel=1e-5)
        for name, mask in prune.masks(state).items():
            np.testing.assert_array_equal(params[name]["kernel"] != 0, mask)
            was, now = np.asarray(before[name]["kernel"]), np.asarray(params[name]["kernel"])  # JAX compiles for each count
            assert np.all(now[was == 0] == 0)
        before = params
    dense = sum(float(dense_seconds(shape, MACHINE)) for shape in NETWORK.values())
    assert dense / time_of(params, guide=guide) == pytest.approx(speedup, rel=0.01)
    for name, density in prune.densities(state).items():
        layer = guide.layers[name]
        assert max(layer.lower, 0.02) - 1 / NETWORK[name].weights <= density <= layer.upper


def test_the_thresholds_are_a_minimum():
    """No exchange of kept weights between two layers at equal time does less damage, by brute force in float64."""
    params = make_params()
    state = AT_ONCE.init(params)
    _, state = jax.jit(AT_ONCE.update)(slopes(), state, params)
    names = list(GUIDE.densities)
    energies = {name: np.sort(np.asarray(params[name]["kernel"], np.float64).ravel() ** 2)[::-1].cumsum() for name in names}
    fisher = {name: np.square(np.asarray(slopes()[name]["kernel"], np.float64)).mean() for name in names}
    density = prune.densities(state)

    def damage(name, d):
        return fisher[name] / 2 * (energies[name][-1] - energies[name][int(d * NETWORK[name].weights) - 1])

    def seconds(name, d):
        return float(seconds_of(name)(d))

    best = sum(damage(name, density[name]) for name in names)
    for a in names:
        for b in set(names) - {a}:
            for change in (0.9, 0.97, 1.03, 1.1):
                if not GUIDE.layers[a].lower <= density[a] * change <= GUIDE.layers[a].upper:
                    continue
                time = seconds(a, density[a]) + seconds(b, density[b]) - seconds(a, density[a] * change)
                options = np.geomspace(max(GUIDE.layers[b].lower, 0.01), GUIDE.layers[b].upper, 2000).astype(np.float32)
                times = np.asarray(jax.vmap(seconds_of(b))(options))
                if not times.min() <= time <= times.max():
                    continue
                other = np.interp(time, times, options)
                rest = sum(damage(name, density[name]) for name in set(names) - {a, b})
                # Worth is interpolated between 128 densities, and damage is second order around the minimum.
                assert rest + damage(a, density[a] * change) + damage(b, other) >= best * (1 - 1e-4)


def test_the_price_is_that_of_the_seconds():
    params = make_params()
    _, state = jax.jit(AT_ONCE.update)(slopes(), AT_ONCE.init(params), params)
    checked = 0
    for name, mask in prune.masks(state).items():
        shape, layer = NETWORK[name], GUIDE.layers[name]
        density = float(jnp.mean(mask))
        if not 1.05 * max(layer.lower, 0.01) < density < 0.95 * layer.upper:
            continue
        kept = np.asarray(params[name]["kernel"], np.float64)[np.asarray(mask)] ** 2
        fisher = np.square(np.asarray(slopes()[name]["kernel"], np.float64)).mean()
        slope = float(jax.grad(seconds_of(name))(density))
        # F theta^2 / 2 = price * (dT/dd) / n, up to the interpolation of the worth
        assert fisher * kept.min() / 2 == pytest.approx(float(state.price) * slope / shape.weights, rel=0.02)
        checked += 1
    assert checked >= 2


def test_layers_may_be_scaled():
    """As batch norm allows, under which gradients shrink as weights grow: powers of two change no mask."""
    params, gradients = make_params(), slopes()
    factor = {name: 2.0 ** (3 * i - 4) for i, name in enumerate(NETWORK)}
    scaled = {name: jax.tree.map(lambda w, s=s: s * w, params[name]) for name, s in factor.items()}
    shrunk = {name: jax.tree.map(lambda g, s=s: g / s, gradients[name]) for name, s in factor.items()}
    masks = []
    for tree, slope in ((params, gradients), (scaled, shrunk)):
        _, state = jax.jit(AT_ONCE.update)(slope, AT_ONCE.init(tree), tree)
        masks.append(prune.masks(state))
    for name in masks[0]:
        np.testing.assert_array_equal(masks[0][name], masks[1][name])


def test_a_layer_without_signal_to_lose_is_pruned_first():
    params = make_params()
    flat = params["middle"]["kernel"]
    spiky = jnp.where(jax.random.uniform(jax.random.key(7), flat.shape) < 0.2, flat, 1e-3 * flat)
    update, kept = jax.jit(AT_ONCE.update), []
    for kernel in (flat, spiky):
        tree = params | {"middle": params["middle"] | {"kernel": kernel}}
        _, state = update(slopes(), AT_ONCE.init(tree), tree)
        kept.append(prune.densities(state))
    assert kept[1]["middle"] < kept[0]["middle"] and kept[1]["late"] >= kept[0]["late"]


def test_the_layer_that_the_loss_does_not_feel_is_pruned_first():
    """Its gradients, over the steps before, are a tenth as large; those of pruned weights do not count."""
    params, tx = make_params(), prune.budget(STILL, GUIDE, MACHINE, prune.ramp(3, 4), keep_zeros=True)
    hole = jax.random.uniform(jax.random.key(9), params["middle"]["kernel"].shape) < 0.1
    params["middle"]["kernel"] = jnp.where(hole, 0, params["middle"]["kernel"])
    kept = []
    for factor, inside in ((1.0, 1.0), (0.1, 1.0), (0.1, 1e6)):
        state = tx.init(params)
        for step in range(1, 5):
            gradient = slopes(step)
            gradient["middle"]["kernel"] = jnp.where(hole, inside, factor * gradient["middle"]["kernel"])
            _, state = jax.jit(tx.update)(gradient, state, params)
        kept.append(prune.densities(state))
    assert kept[1]["middle"] < 0.8 * kept[0]["middle"] and kept[1]["late"] >= kept[0]["late"]
    assert kept[2] == kept[1]
    expected = [np.square(np.asarray(slopes(step)["late"]["kernel"], np.float64)).mean() for step in range(1, 5)]
    assert float(state.fisher["late"]) == pytest.approx(np.dot(0.98 ** np.arange(3, -1, -1), expected), rel=1e-5)


def test_resuming_is_exact_and_nothing_recompiles():
    tx = prune.budget(optax.sgd(0.01, momentum=0.9), GUIDE, MACHINE, prune.ramp(2, 18), every=3)
    *_, (params, state) = train(tx, make_params(), 11)
    saved = jax.tree.map(np.asarray, (params, state))
    *_, through = train(tx, params, 13, state, first=11)
    *_, resumed = train(tx, saved[0], 13, jax.tree.map(jnp.asarray, saved[1]), first=11)
    jax.tree.map(np.testing.assert_array_equal, through, resumed)

    traces = []
    counting = optax.chain(optax.stateless(lambda u, p: traces.append(None) or u), tx)
    for _ in train(counting, make_params(), 24):
        pass
    assert len(traces) == 1


def test_a_pruned_network_is_pruned_further():
    """Its zeros count as pruned: they stay zero, also while nothing else is pruned yet."""
    params = make_params()
    draw = np.random.default_rng(7)
    zero = {name: draw.random(params[name]["kernel"].shape) < 0.5 for name in GUIDE.densities}
    for name, where in zero.items():
        params[name]["kernel"] = jnp.where(where, 0, params[name]["kernel"])
    tx = prune.budget(optax.sgd(0.01), GUIDE, MACHINE, prune.ramp(2, 8), every=2, keep_zeros=True)
    for later, _ in train(tx, params, 8):
        for name, where in zero.items():
            assert not np.any(np.asarray(later[name]["kernel"])[where])
    assert time_of(later) == pytest.approx(GUIDE.seconds, rel=1e-3)


def test_nnx():
    def normal(key, shape, dtype):
        return jax.device_put(np.random.default_rng(0).standard_normal(shape, dtype))

    class Net(nnx.Module):
        def __init__(self, rngs):
            for name, layer in NETWORK.items():
                setattr(self, name, nnx.Conv(layer.ic, layer.oc, (layer.kh, layer.kw), kernel_init=normal, rngs=rngs))

    model = Net(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, prune.budget(optax.sgd(1.0), GUIDE, MACHINE, prune.ramp(0, 2), every=1), wrt=nnx.Param)
    gradient = jax.tree.map(lambda p: np.float32(1e-3) * np.asarray(p), nnx.state(model, nnx.Param))
    update = nnx.jit(lambda m, o, g: o.update(m, g))
    for _ in range(2):
        update(model, optimizer, gradient)
    params = {name: {"kernel": getattr(model, name).kernel[...]} for name in NETWORK}
    assert time_of(params) == pytest.approx(GUIDE.seconds, rel=1e-3)


def test_milliseconds_instead_of_the_guides_time():
    tx = prune.budget(STILL, GUIDE, MACHINE, prune.ramp(0, 3), seconds=1.1 * GUIDE.seconds)
    *_, (params, _) = train(tx, make_params(), 3)
    assert time_of(params) == pytest.approx(1.1 * GUIDE.seconds, rel=1e-3)


def test_a_guide_that_prunes_nothing():
    guide = prune.guided(NETWORK, MACHINE, speedup=1)
    params = make_params()
    tx = prune.budget(optax.identity(), guide, MACHINE, prune.ramp(0, 1))
    updates, state = tx.update(params, tx.init(params), params)
    jax.tree.map(np.testing.assert_array_equal, updates, params)
    assert prune.masks(state) == {}


def test_refusals():
    with pytest.raises(ValueError, match="a speedup of 50 cannot be reached: the highest is"):
        prune.guided(NETWORK, MACHINE, speedup=50)
    with pytest.raises(ValueError, match=r"^1\.0 us cannot be reached: the shortest is \d+\.\d us, \d\.\d\dx as fast as dense, "
                                         r"where the time goes to .*thin \d+% \(dense: no speedup potential"):
        prune.budget(STILL, GUIDE, ATOM_C2750, prune.ramp(0, 1), seconds=1e-6)
    with pytest.raises(ValueError, match=r"no performance model of layers \['a'\]: make it with prune.guided"):
        prune.budget(STILL, prune.constant({"a": 0.1}), MACHINE, prune.ramp(0, 1))
    with pytest.raises(ValueError, match="seconds must be positive and finite, or None for the guide's, got nan"):
        prune.budget(STILL, GUIDE, MACHINE, prune.ramp(0, 1), seconds=float("nan"))
    with pytest.raises(ValueError, match="every must be at least 1 step, got 0"):
        prune.budget(STILL, GUIDE, MACHINE, prune.ramp(0, 1), every=0)
    with pytest.raises(ValueError, match=r"min_density must be in \(0, 1\), got 1"):
        prune.budget(STILL, GUIDE, MACHINE, prune.ramp(0, 1), min_density=1)
    with pytest.raises(ValueError, match="no kernel in the parameters"):
        AT_ONCE.init({"early": {"kernel": jnp.ones(3)}})
