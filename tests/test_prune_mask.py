"""Masks: exact counts, deterministic ties, weights at exactly zero, and what the readers of an optimizer state see."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflax import prune
from sparseflax.prune.mask import all_kept, hold, keep_largest

PARAMS = {"conv": {"kernel": jnp.arange(-4.0, 8.0).reshape(1, 1, 3, 4), "bias": jnp.ones(4)}, "norm": {"scale": jnp.ones(4)}}


def expected_mask(score, count, among):
    """The first `count` positions by falling |score|, then rising position: a stable sort."""
    order = [i for i in np.argsort(-np.abs(score), kind="stable") if among[i]]
    mask = np.zeros(score.size, bool)
    mask[order[:count]] = True
    return mask


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_keep_largest_is_a_stable_sort(data):
    size = 12  # one size: hypothesis varies values, not programs
    few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, 1e-45, -1e-38, 3e38, float("inf")])  # many ties, denormals, extremes
    score = np.array(data.draw(st.lists(few, min_size=size, max_size=size)), np.float32)
    among = np.array(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))
    count = data.draw(st.integers(0, int(among.sum())))
    mask = jit_keep_largest(score.reshape(3, 4), jnp.int32(count), among.reshape(3, 4))
    np.testing.assert_array_equal(np.asarray(mask).reshape(-1), expected_mask(score, count, among))


jit_keep_largest = jax.jit(keep_largest)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_keep_largest_on_normal_weights(dtype):
    score = jax.random.normal(jax.random.key(0), (3, 3, 16, 32), dtype)  # 4608 numbers: bfloat16 has many ties
    reference = np.asarray(score, np.float32).reshape(-1)
    for count in (0, 1, 461, 4607, 4608):
        mask = np.asarray(jit_keep_largest(score, jnp.int32(count))).reshape(-1)
        np.testing.assert_array_equal(mask, expected_mask(reference, count, np.ones(4608, bool)))


def test_keep_largest_does_not_hide_a_nan():
    score = jnp.array([jnp.inf, 1.0, -jnp.nan, 2.0])
    assert keep_largest(score, 1).tolist() == [False, False, True, False]


@pytest.mark.parametrize("weight, update", [("float32", "float32"), ("bfloat16", "float32"), ("float32", "bfloat16")])
def test_held_weights_are_exactly_zero(weight, update):
    params = {"conv": {"kernel": jax.random.normal(jax.random.key(0), (3, 3, 4, 4)).astype(weight)}}
    updates = {"conv": {"kernel": jax.random.normal(jax.random.key(1), (3, 3, 4, 4)).astype(update)}}
    start = {"conv": {"kernel": params["conv"]["kernel"] * (jnp.arange(4) > 1).reshape(1, 1, 1, 4).astype(weight)}}
    masks = all_kept(start, ["conv"], keep_zeros=True)
    with jax.numpy_dtype_promotion("standard"):  # optax adds the two
        new = optax.apply_updates(params, hold(masks, updates, params))["conv"]["kernel"]
    assert new.dtype == weight
    assert not np.any(np.asarray(new[..., :2], np.float32))  # was nonzero, update nonzero
    assert np.all(np.asarray(new[..., 2:], np.float32) != 0)


def test_kernels_are_named_by_layer():
    assert list(prune.kernels(PARAMS)) == ["conv"]
    assert list(prune.kernels({"kernel": jnp.ones((2, 2))})) == [""]  # a model that is itself a layer


def test_masks_of_a_state_apply_to_the_parameters():
    guide = prune.constant({"conv": 0.5})
    tx = optax.chain(optax.sgd(0.0), prune.magnitude(guide, lambda step: jnp.float32(1)))
    _, state = tx.update(jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS), PARAMS)
    assert prune.densities(state) == {"conv": 0.5}
    pruned = prune.apply_masks(PARAMS, prune.masks(state))
    # |w| of -4 ... 7: the six largest are 7, 6, 5, 4, -4 and then 3, since of 3 and -3 the first in memory stays
    assert pruned["conv"]["kernel"].reshape(-1).tolist() == [-4, -3, 0, 0, 0, 0, 0, 0, 4, 5, 6, 7]
    assert pruned["norm"] is not None and jnp.array_equal(pruned["conv"]["bias"], PARAMS["conv"]["bias"])


def test_the_bias_of_a_model_that_is_itself_a_layer_has_no_mask():
    mask = jnp.array([[True, False], [False, True]])
    pruned = prune.apply_masks({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, {"": mask})
    assert jnp.array_equal(pruned["kernel"], jnp.eye(2)) and pruned["bias"].tolist() == [1, 1]


def test_a_state_without_pruning_has_no_masks():
    assert prune.masks(optax.adam(1e-3).init(PARAMS)) == {}


def test_unknown_layers_are_named():
    with pytest.raises(ValueError, match=r"no kernel in the parameters for layers \['conw'\]; their kernels are \['conv'\]"):
        prune.magnitude(prune.constant({"conw": 0.5}), prune.ramp(0, 10)).init(PARAMS)


def test_two_methods_over_one_layer_are_refused():
    method = prune.magnitude(prune.constant({"conv": 0.5}), prune.ramp(0, 10))
    with pytest.raises(ValueError, match=r"two pruning methods over the same layers: \['conv'\]"):
        prune.densities(optax.chain(optax.sgd(0.1), method, prune.fixed()).init(PARAMS))
    with pytest.raises(ValueError, match=r"two pruning methods over the same layers: \['conv'\]"):
        prune.wrap(optax.chain(optax.sgd(0.1), method), prune.fixed()).init(PARAMS)


def test_masks_of_other_parameters_are_refused():
    with pytest.raises(ValueError, match=r"mask of layer 'conv' has shape \(2, 2\), its kernel in the param.* \(1, 1, 3, 4\)"):
        prune.apply_masks(PARAMS, {"conv": jnp.ones((2, 2), bool)})
    with pytest.raises(ValueError, match=r"mask of layer 'head' has shape \(2, 2\), its kernel in the parameters None"):
        prune.apply_masks(PARAMS, {"head": jnp.ones((2, 2), bool)})
