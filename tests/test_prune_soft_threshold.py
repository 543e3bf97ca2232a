"""STR against a NumPy simulation of its own formulas; resuming; nnx."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparseflax import prune

SHAPES = {"a": (3, 3, 4, 5), "b": (1, 1, 7, 9)}
DENSITIES = {"a": 0.21, "b": 0.4}
GUIDE = prune.constant(DENSITIES)


def make_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {name: {"kernel": jax.random.normal(key, shape), "bias": jnp.ones(shape[-1])}
            for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)}


def train(tx, params, steps, state=None, first=0):
    """Every (params, state) of a training with made-up gradients."""
    update = jax.jit(tx.update)
    state = tx.init(params) if state is None else state
    for step in range(first, first + steps):
        updates, state = update(make_params(100 + step), state, params)
        params = optax.apply_updates(params, updates)
        yield params, state


def test_against_a_simulation():
    begin, end, every, lr, rate, decay = 2, 15, 3, 0.05, 0.02, 0.1
    tx = prune.soft_threshold(optax.chain(optax.add_decayed_weights(decay), optax.sgd(lr)), GUIDE, prune.ramp(begin, end),
                              rate=rate, every=every)
    v = {name: np.asarray(p["kernel"], np.float64).ravel() for name, p in make_params().items()}
    w, s = {name: x.copy() for name, x in v.items()}, None
    goal = sum(x.size - round(DENSITIES[name] * x.size) for name, x in v.items())
    masks = {name: np.ones(x.size, bool) for name, x in v.items()}
    returned = 0
    for step, (params, state) in enumerate(train(tx, make_params(), 22), start=1):
        fraction = 1 - (1 - np.clip((step - begin) / (end - begin), 0, 1)) ** 3
        for name in v:
            g = np.asarray(make_params(99 + step)[name]["kernel"], np.float64).ravel() * masks[name]
            if s is not None and step <= end:  # dL/ds = -exp(s) sum g sign(v)
                s[name] += rate * np.exp(s[name]) * np.sum(g * np.sign(v[name]))
            v[name] = v[name] - lr * (g + decay * v[name])
        if begin < step <= end and (step % every == 0 or step == end):
            s = dict.fromkeys(v, 0.0) if s is None else s
            scores = np.sort(np.concatenate([np.abs(v[name]) / np.exp(s[name]) for name in v]))
            shift = np.log(scores[round(fraction * goal) - 1])  # the largest score that is pruned
            s = {name: value + shift for name, value in s.items()}
            up_to = {name: np.exp(s[name]) * (1 + 1e-12) for name in v}
        else:
            up_to = {name: np.exp(s[name]) if s else 0.0 for name in v}
        for name in v:
            if step > end:
                w[name] = np.where(masks[name], v[name], 0)
            else:
                alive = np.abs(v[name]) > up_to[name]
                returned += np.sum(alive & ~masks[name])
                w[name] = np.where(alive, np.sign(v[name]) * (np.abs(v[name]) - (np.exp(s[name]) if s else 0)), 0)
                masks[name] = alive
                if step == end:
                    v[name] = w[name].copy()
            kernel = np.asarray(params[name]["kernel"]).ravel()
            np.testing.assert_array_equal(np.asarray(prune.masks(state)[name]).ravel(), masks[name])
            assert np.all(kernel[~masks[name]] == 0)
            # 22 steps of numbers below 8, and as many rounded thresholds
            np.testing.assert_allclose(kernel, w[name], rtol=0, atol=2 * 22 * 8 * np.finfo(np.float32).eps)
    assert returned > 0  # weights do come back
    assert sum(mask.sum() for mask in masks.values()) == sum(mask.size for mask in masks.values()) - goal
    assert abs(masks["a"].mean() - 0.21) > 0.01  # the layers' shares are learned


def test_the_thresholds_gradient():
    """Differences of the loss sum(c * soft(v, exp(s))) in float64, upwards: the largest pruned weight lies on the kink."""
    tx = prune.soft_threshold(optax.sgd(0.0), GUIDE, prune.ramp(0, 8), rate=1.0, every=4)
    *_, (params, state) = train(tx, make_params(), 4)
    slope = make_params(5)
    _, after = tx.update(slope, state, params)
    for name, s in state.log_threshold.items():
        v, c = (np.asarray(tree[name]["kernel"], np.float64) for tree in (make_params(), slope))
        high, low = (np.sum(c * np.sign(v) * np.maximum(np.abs(v) - np.exp(float(s) + e), 0)) for e in (2e-6, 1e-6))
        moved = float(after.log_threshold[name]) - float(s)
        assert moved == pytest.approx(-(high - low) / 1e-6, rel=1e-3)


@jax.numpy_dtype_promotion("standard")  # for optax.adam
def test_resuming_is_exact_and_nothing_recompiles():
    tx = prune.soft_threshold(optax.adam(0.05), GUIDE, prune.ramp(2, 14), every=3)
    *_, (params, state) = train(tx, make_params(), 7)
    saved = jax.tree.map(np.asarray, (params, state))
    *_, through = train(tx, params, 11, state, first=7)
    *_, resumed = train(tx, saved[0], 11, jax.tree.map(jnp.asarray, saved[1]), first=7)
    jax.tree.map(np.testing.assert_array_equal, through, resumed)
    traces = []
    inner = optax.chain(optax.stateless(lambda u, p: traces.append(None) or u), optax.adam(0.05))
    *_, _ = train(prune.soft_threshold(inner, GUIDE, prune.ramp(2, 14), every=3), make_params(), 16)
    assert len(traces) == 1


def test_nnx():
    model = nnx.Sequential(nnx.Conv(4, 5, (3, 3), rngs=nnx.Rngs(0)), nnx.Linear(5, 3, rngs=nnx.Rngs(1)))
    tx = prune.soft_threshold(optax.sgd(0.1), prune.constant({"layers/0": 0.2}), prune.ramp(0, 3), every=1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.state(model, nnx.Param)))
    for _ in range(4):
        step(model, optimizer)
    mask = prune.masks(optimizer.opt_state)["layers/0"]
    assert mask.sum() == 36
    np.testing.assert_array_equal(model.layers[0].kernel[...] != 0, mask)


def test_a_guide_that_prunes_nothing():
    params = make_params()
    *_, (after, state) = train(prune.soft_threshold(optax.sgd(0.5), prune.constant({}), prune.ramp(0, 2)), params, 1)
    np.testing.assert_array_equal(after["a"]["kernel"], params["a"]["kernel"] - 0.5 * make_params(100)["a"]["kernel"])
    assert prune.masks(state) == {}


def test_refusals():
    with pytest.raises(ValueError, match="every must be at least 1 step, got 0"):
        prune.soft_threshold(optax.sgd(0.1), GUIDE, prune.ramp(0, 1), every=0)
    with pytest.raises(ValueError, match="two pruning methods over the same layers"):
        prune.soft_threshold(prune.magnitude(GUIDE, prune.ramp(0, 1)), GUIDE, prune.ramp(0, 1)).init(make_params())
    with pytest.raises(ValueError, match="pruning needs the parameters"):
        tx = prune.soft_threshold(optax.sgd(0.1), GUIDE, prune.ramp(0, 1))
        tx.update(make_params(), tx.init(make_params()))
