"""What every method keeps, whatever it prunes by: exact zeros, exact resuming through Orbax, the same masks on all devices."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from sparseflax import prune
from sparseflax.cost.machine import ATOM_C2750
from sparseflax.network.shapes import conv_shapes

STEPS, KILLED_AT = 20, 9  # inside the ramp, between two takings of the masks
RAMP = prune.ramp(2, 16, total=STEPS)
GUIDE = prune.constant({"stem": 0.5, "middle": 0.2, "head": 0.4})


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        x = nn.relu(nn.Conv(8, (3, 3), name="middle")(x))
        return nn.Dense(2, name="head")(x.mean((1, 2)))


@cache
@jax.jit
def batch(step):
    x = jax.random.normal(jax.random.key(step), (8, 6, 6, 2))
    return x, (x.mean((1, 2, 3)) > 0).astype(jnp.int32)


init = jax.jit(Net().init)


def by_speed():
    x = batch(0)[0]
    shapes = conv_shapes((Net(), init(jax.random.key(0), x)), x)
    return prune.budget(SGD, prune.guided(shapes, ATOM_C2750, speedup=1.3), ATOM_C2750, RAMP, every=3)


SGD = optax.sgd(0.1, momentum=0.9)
METHODS = {
    "magnitude": lambda: optax.chain(SGD, prune.magnitude(GUIDE, RAMP, every=3)),
    "lasso": lambda: optax.chain(SGD, prune.lasso(GUIDE, 1e-3, RAMP)),
    "surgery": lambda: optax.chain(SGD, prune.surgery(GUIDE, RAMP)),
    "soft_threshold": lambda: prune.soft_threshold(SGD, GUIDE, RAMP, every=3),
    "rigl": lambda: prune.rigl(SGD, GUIDE, end=16, every=3),
    "acdc": lambda: optax.chain(SGD, prune.acdc(GUIDE, begin=2, end=16, phase=4)),
    "budget": by_speed,
}
every_method = pytest.mark.parametrize("method", METHODS)


def gradients(params, x, y):
    def loss(params):
        logits = Net().apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return jax.grad(loss)(params)


def start(tx, seed=0):
    params = init(jax.random.key(seed), batch(0)[0])["params"]
    return params, tx.init(params)


def step(tx, params, state, x, y):
    updates, state = tx.update(gradients(params, x, y), state, params)
    return optax.apply_updates(params, updates), state


@every_method
def test_zeros_are_exact_and_a_kill_leaves_no_trace(method, tmp_path):
    tx = METHODS[method]()
    advance = jax.jit(partial(step, tx))
    params, state = start(tx)
    for i in range(STEPS):
        params, state = advance(params, state, *batch(i))
        for layer, mask in prune.masks(state).items():
            assert not np.any(np.asarray(prune.kernels(params)[layer])[~np.asarray(mask)]), (i, layer)
        if i + 1 == KILLED_AT:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "checkpoint", (params, state))
    assert advance._cache_size() == 1  # changing masks compile nothing anew
    assert all(density < 1 for density in prune.densities(state).values()) and prune.densities(state)

    # A new process: another seed, then the checkpoint.
    other = start(METHODS[method](), seed=1)
    with ocp.StandardCheckpointer() as checkpointer:
        other = checkpointer.restore(tmp_path / "checkpoint", other)
    other = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), other)  # tied to no device, or all compiles again
    for i in range(KILLED_AT, STEPS):
        other = advance(*other, *batch(i))
    jax.tree.map(np.testing.assert_array_equal, other, (params, state))


@every_method
@pytest.mark.skipif("jax.device_count() < 2", reason="needs two devices")
def test_two_devices_have_the_same_masks(method):
    """Data parallel: each device sees half the batch and prunes for itself, from the mean gradient."""
    tx, mesh = METHODS[method](), jax.sharding.Mesh(jax.devices()[:2], "d")
    split = PartitionSpec("d")

    @jax.jit
    @partial(jax.shard_map, mesh=mesh, in_specs=(split, split, split), out_specs=split, check_vma=False)
    def advance(both, x, y):
        params, state = jax.tree.map(lambda leaf: leaf[0], both)
        mean = jax.lax.pmean(gradients(params, x, y), "d")
        updates, state = tx.update(mean, state, params)
        return jax.tree.map(lambda leaf: leaf[None], (optax.apply_updates(params, updates), state))

    both = jax.tree.map(lambda leaf: np.stack([leaf, leaf]), start(tx))
    both = jax.device_put(both, jax.NamedSharding(mesh, split))  # as they come back, or all compiles again
    for i in range(STEPS):
        both = advance(both, *batch(i))
    both = jax.tree.map(np.asarray, both)
    for leaf in jax.tree.leaves(both):
        np.testing.assert_array_equal(leaf[0], leaf[1])
    assert advance._cache_size() == 1
    first, second = (jax.tree.map(lambda leaf, i=i: leaf[i], both) for i in range(2))
    assert prune.densities(first[1]) == prune.densities(second[1]) != {}
    for layer, mask in prune.masks(first[1]).items():
        kernel = np.asarray(prune.kernels(first[0])[layer])
        assert not np.any(kernel[~np.asarray(mask)]) and not np.all(mask)
