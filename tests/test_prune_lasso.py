"""What is the lasso's own: a proximal step by hand, its schedule, zeros that return or do not. The rest: test_prune_gsl."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparseflax import prune

WEIGHTS = jnp.array([[-0.5, -0.2, -0.01, 0.02], [0.04, 0.1, 0.3, 1.0]])
PARAMS = {"a": {"kernel": WEIGHTS}}


def step(tx, state, params, gradient):
    updates, state = tx.update({"a": {"kernel": gradient}}, state, params)
    return optax.apply_updates(params, updates), state


def test_one_step_is_a_soft_threshold():
    tx = prune.lasso(prune.constant({"a": 0.25}), 0.05, prune.ramp(0, 100), rate=0)
    params, state = step(tx, tx.init(PARAMS), PARAMS, jnp.zeros_like(WEIGHTS))
    expected = [[-0.45, -0.15, 0, 0], [0, 0.05, 0.25, 0.95]]
    np.testing.assert_allclose(params["a"]["kernel"], expected, rtol=0, atol=1e-7)
    np.testing.assert_array_equal(prune.masks(state)["a"], np.array(expected) != 0)


def test_the_step_that_would_overshoot_keeps_exactly_the_target_unshrunk():
    tx = prune.lasso(prune.constant({"a": 0.25}), 0.4, prune.ramp(0, 100), rate=0)
    params, state = step(tx, tx.init(PARAMS), PARAMS, jnp.zeros_like(WEIGHTS))
    np.testing.assert_array_equal(params["a"]["kernel"], jnp.where(jnp.abs(WEIGHTS) >= 0.5, WEIGHTS, 0))
    params, _ = step(tx, state, params, jnp.full_like(WEIGHTS, 0.01))  # fixed from now on, and free of l1
    np.testing.assert_allclose(params["a"]["kernel"], [[-0.49, 0, 0, 0], [0, 0, 0, 1.01]], rtol=0, atol=1e-7)


def test_the_strength_follows_its_schedule():
    """Called with 0 at the first update, as optax calls a learning rate's."""
    tx = prune.lasso(prune.constant({"a": 0.1}), lambda count: 0.01 * (count + 1), prune.ramp(0, 100), rate=0)
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        params, state = step(tx, state, params, jnp.zeros_like(WEIGHTS))
    assert float(params["a"]["kernel"][1, 3]) == pytest.approx(1.0 - 0.01 - 0.02 - 0.03)


@pytest.mark.parametrize("wrapped", [False, True])
def test_zeros_return_unless_wrapped(wrapped):
    method = prune.lasso(prune.constant({"a": 0.25}), 0.05, prune.ramp(0, 100), rate=0)
    tx = prune.wrap(optax.sgd(1.0), method) if wrapped else optax.chain(optax.sgd(1.0), method)
    params, state = step(tx, tx.init(PARAMS), PARAMS, jnp.zeros_like(WEIGHTS))
    params, state = step(tx, state, params, jnp.full_like(WEIGHTS, -0.2))
    assert bool(params["a"]["kernel"][0, 2] != 0) is bool(prune.masks(state)["a"][0, 2]) is not wrapped
