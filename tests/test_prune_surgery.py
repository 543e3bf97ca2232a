"""What is surgery's own: the band of the threshold and the shadow, step by step by hand. The rest: test_prune_gsl."""

import jax.numpy as jnp
import numpy as np
import optax

from sparseflax import prune

# Mean 1: a threshold of 1 keeps what is above 0.9, and takes back what has grown above 1.1. One weight balances the mean.
WEIGHTS = jnp.array([[0.85, -0.95, 1.05, -1.15]])


def test_the_band_and_the_shadow():
    tx = prune.surgery(prune.constant({"a": 0.25}), prune.ramp(0, 100), threshold=1.0, rate=0)
    params, state = {"a": {"kernel": WEIGHTS}}, tx.init({"a": {"kernel": WEIGHTS}})
    for update, expected in [
        ([[0, 0, 0, 0]], [[0, -0.95, 1.05, -1.15]]),  # |0.85| is below the band
        ([[0.2, 0, 0, 0.2]], [[0, -0.95, 1.05, -0.95]]),  # grown to 1.05, inside the band: not yet back
        ([[0, 0.2, 0.2, -0.2]], [[0, 0, 1.25, -1.15]]),  # the second falls to 0.75
        ([[0.15, 0, -0.15, 0]], [[1.2, 0, 1.1, -1.15]]),  # 1.2 is above the band: spliced, with all it has learned
    ]:
        updates, state = tx.update({"a": {"kernel": jnp.array(update, float)}}, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["a"]["kernel"], expected, rtol=0, atol=1e-6)
        np.testing.assert_array_equal(prune.masks(state)["a"], np.array(expected) != 0)
        np.testing.assert_array_equal(params["a"]["kernel"] == 0, np.array(expected) == 0)


def test_what_others_write_into_a_kept_weight_is_taken_over():
    tx = prune.surgery(prune.constant({"a": 0.25}), prune.ramp(0, 100), threshold=1.0, rate=0)
    params, state = {"a": {"kernel": WEIGHTS}}, tx.init({"a": {"kernel": WEIGHTS}})
    zero = {"a": {"kernel": jnp.zeros_like(WEIGHTS)}}
    _, state = tx.update(zero, state, params)
    clipped = {"a": {"kernel": jnp.array([[0, -0.95, 1.0, -1.0]])}}
    updates, state = tx.update(zero, state, clipped)
    np.testing.assert_array_equal(optax.apply_updates(clipped, updates)["a"]["kernel"], clipped["a"]["kernel"])
    np.testing.assert_allclose(state.shadow["a"]["kernel"], [[0.85, -0.95, 1.0, -1.0]], rtol=0, atol=1e-7)
