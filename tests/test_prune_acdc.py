"""AC/DC: what each phase keeps, against NumPy; resuming; nnx."""

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


@pytest.mark.parametrize("end", [13, 15, 17, 18])  # the last phase before it: compressed or not, full or cut short
def test_phases(end):
    rate, begin, phase = 0.05, 3, 5
    compressed = {done + 1 for done in range(24) if done >= end or done >= begin and (done - begin) // phase % 2 == 0}
    weights = {name: np.asarray(p["kernel"], np.float64).ravel() for name, p in make_params().items()}
    masks = {name: np.ones(w.size, bool) for name, w in weights.items()}
    tx = optax.chain(optax.sgd(rate), prune.acdc(GUIDE, begin=begin, end=end, phase=phase))
    for step, (params, state) in enumerate(train(tx, make_params(), 24), start=1):
        for name, w in weights.items():
            w -= rate * np.asarray(make_params(99 + step)[name]["kernel"], np.float64).ravel()
            if step in compressed and step - 1 not in compressed:
                masks[name] = np.argsort(np.argsort(-np.abs(w))) < round(DENSITIES[name] * w.size)
            elif step not in compressed:
                masks[name][:] = True
            w[~masks[name]] = 0
            kernel = np.asarray(params[name]["kernel"]).ravel()
            np.testing.assert_array_equal(kernel == 0, ~masks[name])
            np.testing.assert_array_equal(np.asarray(prune.masks(state)[name]).ravel(), masks[name])
            np.testing.assert_allclose(kernel, w, rtol=0, atol=24 * 8 * np.finfo(np.float32).eps)
    assert not masks["a"].all()


@jax.numpy_dtype_promotion("standard")  # for optax.adam
def test_resuming_is_exact_and_nothing_recompiles():
    tx = optax.chain(optax.adam(0.01), prune.acdc(GUIDE, begin=2, end=14, phase=3))
    *_, (params, state) = train(tx, make_params(), 7)
    saved = jax.tree.map(np.asarray, (params, state))
    *_, through = train(tx, params, 11, state, first=7)
    *_, resumed = train(tx, saved[0], 11, jax.tree.map(jnp.asarray, saved[1]), first=7)
    jax.tree.map(np.testing.assert_array_equal, through, resumed)
    traces = []
    *_, _ = train(optax.chain(optax.stateless(lambda u, p: traces.append(None) or u), tx), make_params(), 16)
    assert len(traces) == 1


def test_nnx():
    model = nnx.Sequential(nnx.Conv(4, 5, (3, 3), rngs=nnx.Rngs(0)), nnx.Linear(5, 3, rngs=nnx.Rngs(1)))
    tx = optax.chain(optax.sgd(0.1), prune.acdc(prune.constant({"layers/0": 0.2}), begin=0, end=3, phase=1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    nonzero = []
    for _ in range(4):
        gradient = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
        optimizer.update(model, gradient)
        nonzero.append(int(jnp.count_nonzero(model.layers[0].kernel[...])))
    assert nonzero == [36, 180, 36, 36]


def test_refusals():
    with pytest.raises(ValueError, match="0 <= begin < end, got begin=5, end=5"):
        prune.acdc(GUIDE, begin=5, end=5, phase=1)
    with pytest.raises(ValueError, match="phase must be from 1 to the 5 steps between begin and end, got 6"):
        prune.acdc(GUIDE, begin=0, end=5, phase=6)
    with pytest.raises(ValueError, match="no kernel in the parameters"):
        prune.acdc(prune.constant({"c": 0.5}), begin=0, end=5, phase=1).init(make_params())
