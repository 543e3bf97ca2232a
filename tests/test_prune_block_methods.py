"""Blocks of input channels in the methods whose thresholds are learned, adapted or solved for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflax import prune
from sparseflax.cost.int8 import int8_seconds
from sparseflax.cost.machine import XEON_E5_2697V4
from sparseflax.cost.shape import ConvShape
from sparseflax.prune import blocks
from tests.test_prune_blocks import blocks as apart

RAMP = prune.ramp(1, 6)
DENSITIES = {"conv": 0.3, "head": 0.5}


@functools.cache
def pruner(method, block):
    """A method whose masks are those of blocks in its own way, at settings that go with normal weights; one, compiled once."""
    guide, sgd = prune.constant(DENSITIES), optax.sgd(0.05, 0.9)
    scale = block**0.5  # the norm of a block of such weights
    return {"lasso": lambda: optax.chain(sgd, prune.lasso(guide, 0.03 * scale, RAMP, block=block)),
            "surgery": lambda: optax.chain(sgd, prune.surgery(guide, RAMP, threshold=0.3, block=block)),
            "soft_threshold": lambda: prune.soft_threshold(sgd, guide, RAMP, rate=0.1 / block, every=2, block=block)}[method]()


def weights(draw, ic):
    """A tree of a convolution and a fully connected layer."""
    normal = lambda *shape: jnp.asarray(draw.standard_normal(shape).astype(np.float32))  # noqa: E731
    return {"conv": {"kernel": normal(2, 2, ic, 6), "bias": normal(6)}, "head": {"kernel": normal(ic, 4)}}


def steps(tx, params, gradients):
    """Every (params, state) of a training with these gradients."""
    state, update = tx.init(params), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        yield params, state


@pytest.mark.parametrize("method", ["lasso", "surgery", "soft_threshold"])
@settings(max_examples=6, deadline=None)
@given(st.sampled_from([(3, 4), (6, 3), (8, 3)]), st.integers(0, 2**31))  # a compilation for each
def test_masks_are_of_whole_blocks_and_reach_the_densities(method, sizes, seed):
    """Of blocks, the last of a tap smaller where `block` does not divide the channels; nothing else is left of the weights."""
    ic, block = sizes
    draw = np.random.default_rng(seed)
    found = []
    for params, state in steps(pruner(method, block), weights(draw, ic), [weights(draw, ic) for _ in range(8)]):
        found.append({name: apart(mask, block) for name, mask in prune.masks(state).items()})
        for name, mask in found[-1].items():
            whole = mask.any(2)[:, :, None] & apart(np.ones(params[name]["kernel"].shape, bool), block)
            np.testing.assert_array_equal(mask, whole)
            assert not apart(params[name]["kernel"], block)[~mask].any()
    kept = {name: (int(mask.any(2).sum()), mask.any(2).size) for name, mask in found[-1].items()}
    wanted = {name: round(DENSITIES[name] * size) for name, (_, size) in kept.items()}
    if method == "soft_threshold":  # which shares out what the guide keeps in all
        assert sum(count for count, _ in kept.values()) == sum(wanted.values())
    else:
        assert {name: count for name, (count, _) in kept.items()} == wanted
    assert any((a[name] != b[name]).any() for a, b in zip(found, found[1:], strict=False) for name in a)


@pytest.mark.parametrize("method", ["lasso", "surgery", "soft_threshold"])
@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**31))
def test_blocks_of_equal_weights_go_the_way_of_one_of_them(method, seed):
    """Each channel four times over: norms are twice the weights, thresholds too, and each block goes where its weight goes.

    Trajectories differ by rounding, of a few float32 steps for each of 8 updates: 1e-5 of weights of about 1.
    """
    draw = np.random.default_rng(seed)
    start, gradients = weights(draw, 5), [weights(draw, 5) for _ in range(8)]

    def four(tree):
        return {name: {leaf: jnp.repeat(a, 4, axis=-2) if leaf == "kernel" else a for leaf, a in layer.items()}
                for name, layer in tree.items()}

    alone, together = steps(pruner(method, 1), start, gradients), steps(pruner(method, 4), four(start), map(four, gradients))
    for (one, state), (blocked, blocked_state) in zip(alone, together, strict=True):
        for name, mask in prune.masks(state).items():
            np.testing.assert_array_equal(jnp.repeat(mask, 4, axis=-2), prune.masks(blocked_state)[name])
            np.testing.assert_allclose(jnp.repeat(one[name]["kernel"], 4, axis=-2), blocked[name]["kernel"], rtol=0, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from([(3, 6, 2), (7, 3)]), st.sampled_from([2, 4]), st.integers(0, 2**31))
def test_norms_and_directions(shape, block, seed):
    kernel = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    kernel[..., :block, 0] = 0  # a block of zeros has no direction
    norms = np.sqrt((apart(kernel, block).astype(np.float64) ** 2).sum(2)).reshape(blocks.grid(shape, block))
    np.testing.assert_allclose(blocks.norms(kernel, block), norms, rtol=1e-6)
    directions = np.asarray(blocks.directions(jnp.asarray(kernel), block))
    np.testing.assert_allclose(directions * np.asarray(blocks.spread(jnp.asarray(norms), shape, block)), kernel, rtol=1e-6)
    assert not directions[..., :block, 0].any()
    np.testing.assert_array_equal(blocks.directions(jnp.asarray(kernel), 1), np.sign(kernel))


def test_gradients_go_through_the_soft_threshold():
    """What the optimizer sees of dense weights is the derivative of the loss at the shrunk ones; thresholds learn by theirs."""
    draw, block, rate, start = np.random.default_rng(0), 4, 0.1, weights(np.random.default_rng(1), 6)
    guide, ramp = prune.constant({"conv": 0.5}), prune.ramp(0, 100)
    tx = prune.soft_threshold(optax.sgd(1.0), guide, ramp, rate=rate, every=3, block=block)
    targets = weights(draw, 6)["conv"]["kernel"]
    *_, (params, state) = steps(tx, start, [weights(draw, 6) for _ in range(4)])  # after a rise a norm is the threshold
    v, s = state.dense["conv"]["kernel"], state.log_threshold["conv"]
    assert np.isfinite(float(s))

    def loss(v, s):
        square = jnp.pad(v**2, ((0, 0), (0, 0), (0, 2), (0, 0))).reshape(2, 2, 2, 4, 6).sum(3)
        shrink = jnp.maximum(1 - jnp.exp(s) / jnp.sqrt(square), 0)
        return jnp.sum(targets * v * jnp.repeat(shrink, 4, axis=2)[:, :, :6])

    for_v, for_s = jax.jit(jax.grad(loss, (0, 1)))(v, s)
    gradient = jax.tree.map(np.zeros_like, start) | {"conv": {"kernel": targets, "bias": np.zeros(6, np.float32)}}
    _, after = jax.jit(tx.update)(gradient, state, params)
    np.testing.assert_allclose(v - after.dense["conv"]["kernel"], for_v, rtol=1e-4, atol=1e-5)  # a difference of numbers near 1
    np.testing.assert_allclose(s - after.log_threshold["conv"], rate * for_s, rtol=1e-4, atol=1e-5)


def conv(ic, size, oc):
    return ConvShape(1, size, size, ic, oc, 3, 3, padding=((1, 1), (1, 1)))


SHAPES = {"stem": conv(3, 28, 32), "early": conv(32, 28, 64), "late": conv(64, 14, 62)}


def test_a_budget_of_words_takes_the_time_of_a_guide_for_int8():
    """Whole words, and the time that the cost model predicts of so many; a guide in float32 takes blocks, too."""
    guide = prune.guided(SHAPES, XEON_E5_2697V4, speedup=2.5, precision="int8")
    draw = np.random.default_rng(0)

    def tree():
        return {name: {"kernel": jnp.asarray(draw.standard_normal(shape.kernel_shape).astype(np.float32))}
                for name, shape in SHAPES.items()}

    start, gradients = tree(), [tree() for _ in range(7)]
    tx = prune.budget(optax.sgd(1e-3), guide, XEON_E5_2697V4, RAMP, every=2, block=4)
    *_, (params, state) = steps(tx, start, gradients)
    assert guide.densities and set(guide.densities) == set(prune.masks(state))
    taken, words = guide.seconds, {}
    for name in guide.densities:
        mask = apart(np.asarray(params[name]["kernel"]) != 0)
        words[name] = mask.any(2)
        np.testing.assert_array_equal(mask, words[name][:, :, None] & apart(np.ones(params[name]["kernel"].shape, bool)))
        taken += int8_seconds(SHAPES[name], words[name].mean(), XEON_E5_2697V4) - guide.layers[name].seconds
    assert taken <= guide.seconds * (1 + 1e-5)
    np.testing.assert_allclose(taken, guide.seconds, rtol=2e-3)  # less what rounding to whole words saves
    np.testing.assert_allclose(float(state.seconds), taken, rtol=1e-5)

    guide = prune.guided(SHAPES, XEON_E5_2697V4, speedup=1.5)
    *_, (params, state) = steps(prune.budget(optax.sgd(1e-3), guide, XEON_E5_2697V4, RAMP, every=2, block=4), start, gradients)
    np.testing.assert_allclose(float(state.seconds), guide.seconds, rtol=2e-3)


def test_a_guide_for_int8_wants_words():
    guide = prune.guided(SHAPES, XEON_E5_2697V4, speedup=2, precision="int8")
    with pytest.raises(ValueError, match="for int8, whose words are blocks of 4 input channels, got block=1: pass block=4"):
        prune.budget(optax.sgd(1.0), guide, XEON_E5_2697V4, RAMP)


def test_one_threshold_on_blocks():
    """A kernel whose blocks all have the same largest weight, but not the same norm."""
    one = np.zeros((8, 3), np.float32)
    one[::4] = 1
    params = {"thin": {"kernel": jnp.asarray(one)}, "full": {"kernel": jnp.ones((8, 3))}}
    guide = prune.global_magnitude(params, 0.5, block=4)
    assert guide.densities == {"thin": 1 / 6} and guide.layers["full"].density == 1
