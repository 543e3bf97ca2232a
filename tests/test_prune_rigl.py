"""RigL against a plain NumPy simulation; resuming; nnx."""

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
    rate, every, end, drop = 0.02, 3, 14, 0.5
    weights = {name: np.asarray(p["kernel"], np.float64).ravel() for name, p in make_params().items()}
    kept = {name: round(DENSITIES[name] * w.size) for name, w in weights.items()}
    masks = {name: np.argsort(np.argsort(-np.abs(w))) < kept[name] for name, w in weights.items()}
    rewired = 0
    tx = prune.rigl(optax.sgd(rate), GUIDE, end=end, every=every, drop=drop)
    for step, (params, state) in enumerate(train(tx, make_params(), 18), start=1):
        for name, w in weights.items():
            gradient = np.asarray(make_params(99 + step)[name]["kernel"], np.float64).ravel()
            w -= rate * gradient
            w[~masks[name]] = 0
            if step % every == 0 and step < end:
                swapped = int(drop / 2 * (1 + np.cos(np.pi * step / end)) * kept[name])
                stay = masks[name].copy()
                stay[np.argsort(np.where(masks[name], np.abs(w), np.inf))[:swapped]] = False
                grown = np.argsort(np.where(stay, -1, np.abs(gradient)))[stay.size - swapped :]
                new = stay.copy()
                new[grown] = True
                rewired += np.sum(new & ~masks[name])
                masks[name] = new
                w[~new] = 0
            kernel = np.asarray(params[name]["kernel"]).ravel()
            np.testing.assert_array_equal(np.asarray(prune.masks(state)[name]).ravel(), masks[name])
            assert masks[name].sum() == kept[name]
            assert np.all(kernel[~masks[name]] == 0)
            np.testing.assert_allclose(kernel, w, rtol=0, atol=18 * 8 * np.finfo(np.float32).eps)
    assert rewired > 20
    bias = 1 - rate * sum(np.asarray(make_params(100 + step)["a"]["bias"], np.float64) for step in range(18))
    np.testing.assert_allclose(params["a"]["bias"], bias, rtol=0, atol=18 * 8 * np.finfo(np.float32).eps)


def test_random_first_masks():
    first, again, other = (prune.rigl(optax.sgd(0.1), GUIDE, key=jax.random.key(seed), end=9).init(make_params())
                           for seed in (1, 1, 2))
    for name, mask in prune.masks(first).items():
        assert mask.sum() == round(DENSITIES[name] * mask.size)
        assert jnp.array_equal(mask, prune.masks(again)[name]) and not jnp.array_equal(mask, prune.masks(other)[name])


@jax.numpy_dtype_promotion("standard")  # for optax.adam
def test_resuming_is_exact_and_nothing_recompiles():
    tx = prune.rigl(optax.adam(0.01), GUIDE, end=16, every=3)
    *_, (params, state) = train(tx, make_params(), 7)
    saved = jax.tree.map(np.asarray, (params, state))
    *_, through = train(tx, params, 11, state, first=7)
    *_, resumed = train(tx, saved[0], 11, jax.tree.map(jnp.asarray, saved[1]), first=7)
    jax.tree.map(np.testing.assert_array_equal, through, resumed)
    traces = []
    counting = prune.rigl(optax.chain(optax.stateless(lambda u, p: traces.append(None) or u), optax.adam(0.01)),
                          GUIDE, end=16, every=3)
    *_, _ = train(counting, make_params(), 12)
    assert len(traces) == 1


def test_nnx():
    model = nnx.Sequential(nnx.Conv(4, 5, (3, 3), rngs=nnx.Rngs(0)), nnx.Linear(5, 3, rngs=nnx.Rngs(1)))
    tx = prune.rigl(optax.sgd(0.1), prune.constant({"layers/0": 0.2}), end=5, every=1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    step = nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.state(model, nnx.Param)))
    for _ in range(3):
        step(model, optimizer)
        mask = prune.masks(optimizer.opt_state)["layers/0"]
        assert mask.sum() == 36
        assert jnp.all(jnp.where(mask, 0, model.layers[0].kernel[...]) == 0)


def test_refusals():
    with pytest.raises(ValueError, match="every and end must be at least 1 step, got every=0, end=5"):
        prune.rigl(optax.sgd(0.1), GUIDE, end=5, every=0)
    with pytest.raises(ValueError, match=r"drop must be in \(0, 1\], got 0"):
        prune.rigl(optax.sgd(0.1), GUIDE, end=5, drop=0)
    with pytest.raises(ValueError, match="two pruning methods over the same layers"):
        prune.rigl(prune.magnitude(GUIDE, prune.ramp(0, 1)), GUIDE, end=5).init(make_params())
