"""Guided sparsity learning over lasso and surgery: against a NumPy simulation, rule by rule, and through a kill."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from gsl_reference import SHAPES, kernel, make_params, simulate

from sparseflax import prune
from sparseflax.cost.machine import XEON_E5_2697V4
from sparseflax.cost.model import conv_seconds
from sparseflax.cost.shape import ConvShape

RATE, STEPS, RAMP = 0.05, 60, (4, 44)
# "c" gives way late, and a useful range that ends at 0.4 is hard to get into; "b" may not go below 0.3.
GUIDE = prune.Guidance({
    "a": prune.LayerGuide(0.2, "", 0.12, 0.9, dense_seconds=9e-6, seconds=3e-6, slope=9e-6),
    "b": prune.LayerGuide(0.1, "", 0.3, 0.8, dense_seconds=5e-6, seconds=2e-6, slope=6e-6),
    "c": prune.LayerGuide(0.25, "", 0.0, 0.4, dense_seconds=1.5e-6, seconds=1e-6, slope=1e-6),
})
START = {"lasso": 0.01, "surgery": 0.1}  # the strength of one, the threshold of the other


def make(method, guide, *, start=None, ramp=RAMP, **how):
    """SGD and the method, at a pressure that begins at `start`."""
    start, ramp = start or START[method], prune.ramp(*ramp)
    pruning = (prune.lasso(guide, start, ramp, **how) if method == "lasso"
               else prune.surgery(guide, ramp, threshold=start, **how))
    return optax.chain(optax.sgd(RATE), pruning)


each_method = pytest.mark.parametrize("method", START)


def train(tx, steps, params=None, state=None, first=0):
    """Every (params, state) of a training with made-up gradients."""
    update = jax.jit(tx.update)
    params = make_params() if params is None else params
    state = tx.init(params) if state is None else state
    for step in range(first + 1, first + steps + 1):
        updates, state = update(make_params(100 + step), state, params)
        params = optax.apply_updates(params, updates)
        yield params, state


@functools.cache
def guided(method, patience):
    """The training that several tests look at."""
    return list(train(make(method, GUIDE, patience=patience), STEPS))


def numbers(guide):
    return {name: {"density": layer.density, "lower": layer.lower, "upper": layer.upper,
                   "strength": guide.strengths[name], "slope": np.nan_to_num(layer.slope),
                   "saves": np.nan_to_num(layer.dense_seconds - layer.seconds)}
            for name, layer in guide.layers.items() if layer.density < 1}


@each_method
@pytest.mark.parametrize("guide", [GUIDE, prune.constant({"a": 0.2, "b": 0.1, "c": 1.0})], ids=["guided", "constant"])
@pytest.mark.parametrize("patience", [None, 20])
def test_against_a_simulation(method, guide, patience):
    reference = simulate(method, numbers(guide), STEPS, learning_rate=RATE, ramp=RAMP, patience=patience,
                         start=START[method])
    history = guided(method, patience) if guide is GUIDE else train(make(method, guide, patience=patience), STEPS)
    returned = 0
    before = {name: np.ones(math.prod(SHAPES[name]), bool) for name in numbers(guide)}
    for (params, state), (weights, masks, pressure, left) in zip(history, reference, strict=True):
        for name, mask in masks.items():
            np.testing.assert_array_equal(np.asarray(prune.masks(state)[name]).reshape(-1), mask)
            # 60 additions of numbers below 8, each rounded to float32; zeros are exact.
            np.testing.assert_allclose(kernel(params, name), weights[name], rtol=0, atol=60 * 8 * np.finfo(np.float32).eps)
            assert not kernel(params, name)[~mask].any()
            returned += np.sum(mask & ~before[name])
        before = masks
        assert float(state[1].loop.pressure) == pytest.approx(pressure, rel=1e-5)
        assert [name for name, gone in zip(numbers(guide), state[1].loop.left, strict=True) if gone] == sorted(left)
    assert returned > 10  # the simulation and we have seen weights come back
    if guide is GUIDE:
        assert left == {"c"}  # at the first review or at the last
        assert prune.densities(state)["b"] == round(0.3 * 63) / 63
    else:
        assert prune.densities(state) == {"a": 36 / 180, "b": round(6.3) / 63}


@each_method
def test_a_layer_that_leaves_gets_its_dense_weights_and_the_others_make_up_for_it(method):
    plain, history = list(train(optax.sgd(RATE), STEPS)), guided(method, 20)
    gone = next(i for i, (_, state) in enumerate(history) if state[1].loop.left.any())  # 0-based: of 4 + 20 updates the last
    assert gone == RAMP[0] + 20 - 1
    back = kernel(history[gone][0], "c")
    if method == "lasso":  # as when pruning began
        np.testing.assert_allclose(back, kernel(plain[RAMP[0] - 1][0], "c"), rtol=0, atol=4 * np.finfo(np.float32).eps)
    else:  # as the shadow has them: it has seen all gradients
        np.testing.assert_allclose(back, kernel(plain[gone][0], "c"), rtol=0, atol=24 * 4 * np.finfo(np.float32).eps)
    assert not np.array_equal(kernel(history[gone - 1][0], "c"), kernel(plain[gone - 1][0], "c"))
    for (params, state), (before, _) in zip(history[gone + 1 :], history[gone:], strict=False):
        assert prune.densities(state)["c"] == 1
        moved = kernel(params, "c") - kernel(before, "c")
        assert np.all(moved != 0)
    # 0.5 us too many: "b" is at its lower end already, and in first order "a" comes down by 0.5 / (9 * 0.2).
    factor = 1 - 0.5 / 1.8
    assert prune.densities(history[-1][1]) == {"a": round(0.2 * factor * 180) / 180, "b": 19 / 63, "c": 1}


@each_method
def test_a_layer_on_its_plateau_feels_no_pressure(method):
    """From lower on a layer has no l1: its kept weights move as under the optimizer alone."""
    tx = make(method, prune.Guidance({"a": prune.LayerGuide(0.05, "", lower=0.5)}), patience=5)
    before = None
    for params, state in train(tx, STEPS):
        step, mask = int(state[1].loop.count), np.asarray(prune.masks(state)["a"]).reshape(-1)
        assert mask.sum() >= 90
        if before is not None:
            expected = before + np.float32(-RATE) * kernel(make_params(100 + step), "a")[mask]
            np.testing.assert_allclose(kernel(params, "a")[mask], expected, rtol=0, atol=16 * np.finfo(np.float32).eps)
        if mask.sum() == 90:
            before = kernel(params, "a")[mask]
    assert before is not None and step > RAMP[1]


def test_strengths_follow_the_time_saved():
    shapes = {"wide": ConvShape(1, 56, 56, 64, 128, 3, 3, padding=((1, 1), (1, 1))),
              "late": ConvShape(1, 14, 14, 256, 256, 3, 3, padding=((1, 1), (1, 1))),
              "flat": ConvShape(1, 14, 14, 256, 256, 1, 1)}  # bound by memory before it is pruned
    guide = prune.guided(shapes, XEON_E5_2697V4, speedup=2.5)
    assert set(guide.strengths) == set(guide.densities) == {"wide", "late"}
    slopes = {name: float(jax.jit(jax.grad(lambda d, s=shapes[name]: conv_seconds(s, d, XEON_E5_2697V4)))(density))
              for name, density in guide.densities.items()}
    mean = sum(slopes.values()) / 2
    assert guide.strengths == pytest.approx({name: slope / mean for name, slope in slopes.items()}, rel=1e-5)
    assert guide.strengths["wide"] > 1.5 * guide.strengths["late"]  # twice the operations
    assert prune.constant({"a": 0.1, "b": 0.9, "c": 1.0}).strengths == {"a": 1.0, "b": 1.0}


@each_method
def test_pressure_shares_out_by_strength(method):
    guide = prune.Guidance({name: prune.LayerGuide(0.1, "", slope=slope) for name, slope in {"a": 3e-6, "b": 1e-6}.items()})
    *_, (_, state) = train(make(method, guide, start={"lasso": 0.05, "surgery": 0.3}[method], rate=0), 20)
    densities = prune.densities(state)
    assert densities["a"] < densities["b"]
    assert float(state[1].loop.pressure) == 1  # rate 0: as it was given


@each_method
def test_a_constant_guide_is_the_same_code(method):
    """Equal slopes and a useful range that never ends say what no performance model says."""
    neutral = prune.Guidance({name: prune.LayerGuide(0.2, "", slope=2e-6, dense_seconds=2e-6, seconds=1e-6) for name in "ab"})
    ends = [list(train(make(method, guide, patience=3), STEPS))[-1]
            for guide in (neutral, prune.constant({"a": 0.2, "b": 0.2}))]
    assert_same(*ends)


@each_method
def test_the_ramp_decides_when_it_ends(method):
    """However short: exact counts the step it is full, and never a layer below its target on the way."""
    for params, _ in train(make(method, prune.constant({"a": 0.2, "b": 0.4}), ramp=(0, 2)), 3):
        assert all(np.count_nonzero(kernel(params, name)) >= count for name, count in {"a": 36, "b": 25}.items())
    assert [np.count_nonzero(kernel(params, name)) for name in SHAPES] == [36, 25, 72]


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


@each_method
def test_resuming_is_exact(method):
    history = guided(method, 20)
    again = make(method, GUIDE, patience=20)
    for killed in (2, 13, 30, 47):  # before pruning, in it, after a layer left, after the ramp
        leaves, treedef = jax.tree.flatten(history[killed - 1])
        params, state = jax.tree.unflatten(treedef, [jnp.asarray(np.asarray(leaf)) for leaf in leaves])
        *_, resumed = train(again, STEPS - killed, params, state, killed)
        assert_same(history[-1], resumed)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        return nn.Dense(2, name="head")(nn.relu(nn.Conv(8, (3, 3), name="middle")(x)).mean((1, 2)))


class Net(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(2, 8, (3, 3), rngs=rngs)
        self.middle = nnx.Conv(8, 8, (3, 3), rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.middle(nnx.relu(self.stem(x)))).mean((1, 2)))


@functools.cache
@jax.jit
def batch(step):
    x = jax.random.normal(jax.random.key(step), (8, 6, 6, 2))
    return x, (x.mean((1, 2, 3)) > 0).astype(jnp.int32)


def loss_of(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# "head" leaves at the first review: nothing gets it below 1 / 16 so soon.
NET_GUIDE = prune.Guidance({"stem": prune.LayerGuide(1.0, "dense: excluded"), "middle": prune.LayerGuide(0.2, ""),
                            "head": prune.LayerGuide(0.05, "", upper=0.06)})


@each_method
def test_nnx_training(method):
    """One compilation while masks change, exact zeros, a layer left alone, and nothing but arrays in the state."""
    traces = []

    @nnx.jit
    def step(model, optimizer, x, y):
        traces.append(None)
        optimizer.update(model, nnx.grad(lambda model: loss_of(model(x), y))(model))

    with jax.numpy_dtype_promotion("standard"):
        model = Net(nnx.Rngs(0))
        tx = optax.chain(optax.adam(1e-2), make(method, NET_GUIDE, ramp=(2, 20), patience=6))
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        saved, seen = None, []
        for i in range(24):
            step(model, optimizer, *batch(i))
            weights = prune.kernels(nnx.state(model, nnx.Param))
            for layer, mask in prune.masks(optimizer.opt_state).items():
                assert not np.asarray(weights[layer])[~np.asarray(mask)].any()
            seen.append(prune.densities(optimizer.opt_state)["middle"])
            if i == 10:
                saved = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state((model, optimizer))))
        assert len(traces) == 1
        assert prune.densities(optimizer.opt_state) == {"middle": round(0.2 * 576) / 576, "head": 1.0}
        assert len(set(seen)) > 6 and np.all(np.asarray(weights["stem"]))

        other = Net(nnx.Rngs(1))
        other_optimizer = nnx.Optimizer(other, tx, wrt=nnx.Param)
        state = nnx.state((other, other_optimizer))
        nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, saved))
        nnx.update((other, other_optimizer), state)
        for i in range(11, 24):
            step(other, other_optimizer, *batch(i))
        assert_same(*(nnx.to_pure_dict(nnx.state(pair)) for pair in ((model, optimizer), (other, other_optimizer))))


@each_method
def test_linen_training_with_donated_buffers(method):
    net, tx, traces = LinenNet(), optax.chain(optax.trace(0.9), make(method, NET_GUIDE, ramp=(0, 20), patience=6)), []

    @functools.partial(jax.jit, donate_argnums=(0, 1))  # weights and their copies must not share a buffer
    def step(params, state, x, y):
        traces.append(None)
        updates, state = tx.update(jax.grad(lambda p: loss_of(net.apply({"params": p}, x), y))(params), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.jit(net.init)(jax.random.key(0), batch(0)[0])["params"]
    state = tx.init(params)
    for i in range(24):
        params, state = step(params, state, *batch(i))
    assert len(traces) == 1
    assert np.count_nonzero(params["middle"]["kernel"]) == round(0.2 * 576)
    assert prune.densities(state)["head"] == 1 and np.count_nonzero(params["stem"]["kernel"]) == 144


@each_method
def test_bfloat16_weights_under_float32_updates(method):
    """Zeros stay exact, and counts too."""
    params = jax.tree.map(lambda p: jax.device_put(p.astype(jnp.bfloat16)), make_params())
    for after, state in train(make(method, GUIDE), STEPS, params):
        for name, mask in prune.masks(state).items():
            assert after[name]["kernel"].dtype == jnp.bfloat16
            assert not kernel(after, name)[~np.asarray(mask).reshape(-1)].any()
    assert prune.densities(state)["b"] == 19 / 63


@each_method
def test_bad_arguments(method):
    with pytest.raises(ValueError, match="patience must be at least 1 step, or None for one review at the end, got 0"):
        make(method, GUIDE, patience=0)
    with pytest.raises(ValueError, match=r"rate must be at least 0 \(a fixed pressure\), got -1"):
        make(method, GUIDE, rate=-1)
    with pytest.raises(ValueError, match=r"no kernel in the parameters for layers \['z'\]"):
        make(method, prune.constant({"z": 0.5})).init(make_params())
    with pytest.raises(ValueError, match="pruning needs the parameters"):
        make(method, GUIDE).update(make_params(), make(method, GUIDE).init(make_params()))


@each_method
def test_a_guide_without_layers_changes_nothing(method):
    *_, (params, state) = train(make(method, prune.constant({"a": 1.0})), 5)
    *_, (plain, _) = train(optax.sgd(RATE), 5)
    assert_same(params, plain)
    assert prune.masks(state) == {}
