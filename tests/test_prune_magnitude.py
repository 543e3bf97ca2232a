"""Magnitude pruning against a NumPy simulation, and the companions `ramp`, `fixed` and `wrap`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparseflax import prune

SHAPES = {"a": (3, 3, 4, 5), "b": (1, 1, 7, 9)}
DENSITIES = {"a": 0.21, "b": 0.4}


def make_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {name: {"kernel": jax.random.normal(key, shape), "bias": jnp.ones(shape[-1])}
            for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)}


def gradients(step):
    return make_params(100 + step)


def train(tx, params, steps):
    """Every (params, state) of a training with made-up gradients."""
    update = jax.jit(tx.update)
    state = tx.init(params)
    for step in range(steps):
        updates, state = update(gradients(step), state, params)
        params = optax.apply_updates(params, updates)
        yield params, state


def test_against_a_simulation():
    begin, end, every, rate = 3, 17, 4, 0.05
    tx = optax.chain(optax.sgd(rate), prune.magnitude(prune.constant(DENSITIES), prune.ramp(begin, end), every=every))
    weights = {name: np.asarray(p["kernel"], np.float64).reshape(-1) for name, p in make_params().items()}
    kept = {name: np.ones(w.size, bool) for name, w in weights.items()}
    history = list(train(tx, make_params(), 25))
    for step, (params, _) in enumerate(history, start=1):
        fraction = 1 - (1 - np.clip((step - begin) / (end - begin), 0, 1)) ** 3
        for name, w in weights.items():
            w -= rate * np.asarray(gradients(step - 1)[name]["kernel"], np.float64).reshape(-1)
            if fraction > 0 and (step % every == 0 and step < end or step == end):
                goal = w.size - round(DENSITIES[name] * w.size)
                order = np.argsort(np.where(kept[name], np.abs(w), -1))
                kept[name][order[: round(fraction * goal)]] = False
            w[~kept[name]] = 0
            kernel = np.asarray(params[name]["kernel"]).reshape(-1)
            np.testing.assert_array_equal(kernel == 0, ~kept[name])
            # 25 float32 subtractions of numbers below 8
            np.testing.assert_allclose(kernel, w, rtol=0, atol=25 * 8 * np.finfo(np.float32).eps)
    params, state = history[-1]
    assert prune.densities(state) == {name: round(DENSITIES[name] * w.size) / w.size for name, w in weights.items()}
    unpruned = 1 - rate * sum(np.asarray(gradients(step)["a"]["bias"], np.float64) for step in range(25))
    np.testing.assert_allclose(params["a"]["bias"], unpruned, rtol=0, atol=25 * 8 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("density", [1 / 180, 0.5, 0.9999, 1.0])
def test_counts_at_the_edges(density):
    tx = prune.magnitude(prune.constant({"a": density}), prune.ramp(0, 2))
    *_, (params, state) = train(tx, make_params(), 2)
    assert jnp.count_nonzero(params["a"]["kernel"]) == round(density * 180)
    assert prune.densities(state) == ({"a": round(density * 180) / 180} if density < 1 else {})


def test_pruning_a_pruned_network_further():
    def tx(density):
        return prune.magnitude(prune.constant({"a": density}), prune.ramp(0, 6), every=1, keep_zeros=True)

    *_, (first, _) = train(tx(0.5), make_params(), 6)
    zeros = first["a"]["kernel"] == 0
    for params, _ in train(tx(0.25), first, 6):
        assert jnp.all(params["a"]["kernel"][zeros] == 0)
    assert jnp.count_nonzero(params["a"]["kernel"]) == 45


@jax.numpy_dtype_promotion("standard")  # for optax.adam
def test_fine_tuning_with_fixed_masks():
    *_, (pruned, _) = train(prune.magnitude(prune.constant(DENSITIES), prune.ramp(0, 1)), make_params(), 1)
    *_, (tuned, state) = train(optax.chain(optax.adam(0.1), prune.fixed()), pruned, 5)
    for name in SHAPES:
        zeros = pruned[name]["kernel"] == 0
        assert jnp.array_equal(tuned[name]["kernel"] == 0, zeros)
        assert jnp.array_equal(prune.masks(state)[name], ~zeros)
    *_, (_, state) = train(prune.fixed(["b"]), pruned, 1)
    assert list(prune.masks(state)) == ["b"]


@jax.numpy_dtype_promotion("standard")  # for optax.adam
def test_wrap_hides_gradients_of_pruned_weights():
    """A clipped global norm sees the kept weights only; Adam's moments of pruned ones only decay."""
    method = prune.magnitude(prune.constant(DENSITIES), prune.ramp(0, 1))
    tx = prune.wrap(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)), method)
    *_, (params, state) = train(tx, make_params(), 1)
    updates, _ = tx.update(gradients(1), state, params)
    norm = np.sqrt(sum(np.sum(np.square(u, dtype=np.float64)) for u in jax.tree.leaves(updates)))
    assert abs(norm - 1) < 1e-5  # without wrap it is below: the part of pruned weights is lost after the clipping

    *_, (_, state) = train(prune.wrap(optax.adam(0.1), method), make_params(), 4)
    pruned = ~prune.masks(state)["a"]
    momentum = optax.tree.get(state, "mu")["a"]["kernel"]
    first = 0.1 * gradients(0)["a"]["kernel"]  # seen once, before the masks were taken
    np.testing.assert_allclose(momentum[pruned], 0.9**3 * first[pruned], rtol=1e-5)


def test_ramp_goes_from_0_to_1():
    ramp = prune.ramp(10, 20, total=20)
    assert [float(ramp(step)) for step in (0, 10, 15, 20, 99)] == [0, 0, 1 - 0.5**3, 1, 1]
    assert float(prune.ramp(0, 4, power=1)(1)) == 0.25


def test_bad_ramps():
    with pytest.raises(ValueError, match="the ramp ends after 20 steps but training has only 19"):
        prune.ramp(10, 20, total=19)
    with pytest.raises(ValueError, match="0 <= begin < end, got begin=5, end=5"):
        prune.ramp(5, 5)


def test_bad_arguments():
    guide = prune.constant(DENSITIES)
    with pytest.raises(ValueError, match="every must be at least 1 step, got 0"):
        prune.magnitude(guide, prune.ramp(0, 1), every=0)
    for tx in (prune.magnitude(guide, prune.ramp(0, 1)), prune.fixed()):
        with pytest.raises(ValueError, match="pruning needs the parameters"):
            tx.update(gradients(0), tx.init(make_params()))
