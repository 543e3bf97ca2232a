"""Blocks of four neighbouring input channels, which int8 kernels want, in the methods that prune by them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflax import prune
from sparseflax.prune.mask import keep_largest


def blocks(a, block=4):
    """(taps, blocks, block, oc), padded with zeros, by plain loops."""
    *taps, ic, oc = a.shape
    a = np.asarray(a).reshape(-1, ic, oc)
    out = np.zeros((len(a), -(-ic // block), block, oc), a.dtype)
    for c in range(ic):
        out[:, c // block, c % block] = a[:, c]
    return out


@settings(max_examples=15, deadline=None)
@given(st.sampled_from([3, 4, 6]), st.floats(0, 1), st.integers(0, 2**31))
def test_the_largest_blocks_are_kept_whole(ic, density, seed):
    score = np.random.default_rng(seed).standard_normal((3, ic, 2)).astype(np.float32)
    norms = (blocks(score).astype(np.float64) ** 2).sum(2)
    count = round(density * norms.size)
    mask = blocks(keep_largest(score, count, block=4))
    kept = mask.any(2)
    assert kept.sum() == count
    np.testing.assert_array_equal(mask, blocks(np.ones(score.shape, bool)) & kept[:, :, None])
    if 0 < kept.sum() < kept.size:
        assert norms[kept].min() >= norms[~kept].max()


def test_among_stays_so():
    score, among = np.ones((4, 1), np.float32), np.array([1, 0, 1, 1], bool).reshape(4, 1)
    np.testing.assert_array_equal(keep_largest(score, 1, among, block=4), among)
    np.testing.assert_array_equal(keep_largest(score, 0, np.zeros_like(among), block=4), np.zeros_like(among))
    with pytest.raises(ValueError, match=r"block=4 of a kernel of shape \(4,\), wanted at least 1, and \(..., ic, oc\)"):
        keep_largest(np.ones(4, np.float32), 1, block=4)
    with pytest.raises(ValueError, match=r"block=0 of a kernel"):
        keep_largest(score, 1, block=0)


def whole_blocks(kernel) -> float:
    """The density, of a kernel whose blocks are whole."""
    kept = blocks(np.asarray(kernel) != 0)
    assert (kept.all(2) == kept.any(2)).all()
    return kept.mean()


def test_magnitude_one_shot_and_obs_prune_whole_blocks():
    model = nnx.Sequential(nnx.Conv(8, 12, (3, 3), rngs=nnx.Rngs(0)), nnx.relu, nnx.Conv(12, 4, (1, 1), rngs=nnx.Rngs(1)))
    x = jax.random.normal(jax.random.key(0), (6, 7, 7, 8))
    guide = prune.constant({"layers/0": 0.25, "layers/2": 0.5})
    params = nnx.state(model, nnx.Param)
    pruned = prune.one_shot(params, guide, block=4)
    for layer, density in ((0, 0.25), (2, 0.5)):
        assert whole_blocks(pruned["layers"][layer]["kernel"][...]) == density
    tx = optax.chain(optax.sgd(0.01), prune.magnitude(guide, prune.ramp(0, 3), every=1, block=4))
    plain = nnx.to_pure_dict(params)
    state = tx.init(plain)
    for _ in range(4):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, plain), state, plain)
        plain = optax.apply_updates(plain, updates)
    assert whole_blocks(plain["layers"][0]["kernel"]) == 0.25

    surgeon, alone = (prune.obs(model, [x], guide, block=block) for block in (4, 1))
    assert whole_blocks(surgeon.layers[0].kernel[...]) == 0.25
    want = model(x)
    naive = nnx.clone(model)
    nnx.update(naive, pruned)
    errors = [float(jnp.linalg.norm(m(x) - want)) for m in (alone, surgeon, naive)]
    assert errors[0] < errors[1] < errors[2]  # blocks cost something, magnitude without making up for it more


@pytest.mark.parametrize("ic", [8, 6])  # whole blocks, and a smaller one at the end
def test_acdc_and_rigl_keep_whole_blocks(ic):
    """After every step, as many as the guide says; and RigL's pattern moves to where the gradient is."""
    draw = np.random.default_rng(0)
    start = {"conv": {"kernel": jnp.asarray(draw.standard_normal((3, 3, ic, 12)), jnp.float32)}}
    guide = prune.constant({"conv": 0.25})
    wanted = round(0.25 * 9 * 2 * 12)
    methods = {"acdc": optax.chain(optax.sgd(0.01), prune.acdc(guide, begin=0, end=4, phase=2, block=4)),
               "rigl": prune.rigl(optax.sgd(0.01), guide, end=20, every=2, block=4)}
    for name, tx in methods.items():
        params, state, seen = start, tx.init(start), []
        for _ in range(9):
            gradient = jax.tree.map(lambda p: jnp.asarray(draw.standard_normal(p.shape), p.dtype), params)
            updates, state = tx.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
            mask = prune.masks(state)["conv"]
            seen.append(np.asarray(mask))
            assert not np.asarray(params["conv"]["kernel"])[~seen[-1]].any()
            if mask.all():  # a decompressed phase
                assert name == "acdc"
                continue
            kept = blocks(mask).any(2)
            assert kept.sum() == wanted, name
            np.testing.assert_array_equal(blocks(mask), blocks(np.ones(mask.shape, bool)) & kept[:, :, None])
        assert (seen[0] != seen[-1]).any() or name == "acdc"
        assert name == "acdc" or (seen[1] != seen[0]).any() and (seen[2] == seen[1]).all()
