"""Pruning inside whole trainings, nnx and Linen: exact zeros, one compilation, and a kill that leaves no trace."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx

from sparseflax import prune
from sparseflax.cost.machine import ATOM_C2750
from sparseflax.network.shapes import conv_shapes

STEPS, KILLED_AT = 24, 11  # inside the ramp, between two takings of the masks
DENSITIES = {"stem": 0.5, "blocks/0": 0.13, "head": 0.3}
GUIDE = prune.constant(DENSITIES)


@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):  # optax.adam multiplies floats by integer counts
        yield


def make_tx():
    return optax.chain(optax.adam(3e-2), prune.magnitude(GUIDE, prune.ramp(2, 18, total=STEPS), every=3))


def batch(step):
    x = jax.random.normal(jax.random.key(step), (8, 6, 6, 2))
    return x, (x.mean((1, 2, 3)) > 0).astype(jnp.int32)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.stem = nnx.Conv(2, 8, (3, 3), rngs=rngs)
        self.blocks = nnx.List([nnx.Conv(8, 8, (3, 3), rngs=rngs)])
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 2, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.blocks[0](nnx.relu(self.stem(x)))))
        return self.head(x.mean((1, 2)))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        x = nn.relu(nn.Conv(8, (3, 3), name="middle")(x))
        return nn.Dense(2, name="head")(x.mean((1, 2)))


def loss_of(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_nnx_step():
    traces = []

    @nnx.jit
    def step(model, optimizer, x, y):
        traces.append(None)
        loss, grads = nnx.value_and_grad(lambda model: loss_of(model(x), y))(model)
        optimizer.update(model, grads)
        return loss

    return step, traces


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_nnx_training_and_resuming(tmp_path):
    step, traces = make_nnx_step()
    model = Net(nnx.Rngs(0))
    model.train()
    optimizer = nnx.Optimizer(model, make_tx(), wrt=nnx.Param)
    first = {layer: np.array(kernel) for layer, kernel in prune.kernels(nnx.state(model, nnx.Param)).items()}
    seen = []
    for i in range(STEPS):
        step(model, optimizer, *batch(i))
        masks = prune.masks(optimizer.opt_state)
        for layer, kernel in prune.kernels(nnx.state(model, nnx.Param)).items():
            assert not np.any(np.asarray(kernel)[~np.asarray(masks[layer])])
        seen.append(prune.densities(optimizer.opt_state))
        if i + 1 == KILLED_AT:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "checkpoint", nnx.to_pure_dict(nnx.state((model, optimizer))))
    assert len(traces) == 1
    assert seen[-1] == {layer: round(d * first[layer].size) / first[layer].size for layer, d in DENSITIES.items()}
    assert all(later[layer] <= earlier[layer] for earlier, later in zip(seen, seen[1:], strict=False) for layer in DENSITIES)
    assert len({d["blocks/0"] for d in seen}) > 4  # a ramp, not a jump
    for layer, kernel in prune.kernels(nnx.state(model, nnx.Param)).items():
        assert np.count_nonzero(kernel) == round(DENSITIES[layer] * kernel.size)

    # A new process: another seed, then the checkpoint.
    other = Net(nnx.Rngs(1))
    other.train()
    other_optimizer = nnx.Optimizer(other, make_tx(), wrt=nnx.Param)
    state = nnx.state((other, other_optimizer))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "checkpoint", nnx.to_pure_dict(state))
    # Tied to no device, or the step compiles again.
    nnx.replace_by_pure_dict(state, jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), restored))
    nnx.update((other, other_optimizer), state)
    for i in range(KILLED_AT, STEPS):
        step(other, other_optimizer, *batch(i))
    assert_same(nnx.to_pure_dict(nnx.state((model, optimizer))), nnx.to_pure_dict(nnx.state((other, other_optimizer))))

    pruned = prune.apply_masks(nnx.state(Net(nnx.Rngs(0)), nnx.Param), prune.masks(optimizer.opt_state))
    nnx.update(other, pruned)  # what comes back is a state of the model
    mask = prune.masks(optimizer.opt_state)["blocks/0"]
    np.testing.assert_array_equal(other.blocks[0].kernel[...], np.where(mask, first["blocks/0"], 0))


def test_a_guide_from_a_model_fits_its_parameters():
    model, x = Net(nnx.Rngs(0)), jnp.ones((1, 6, 6, 2))
    guide = prune.guided(conv_shapes(model, x), ATOM_C2750, speedup=1.3)
    assert set(guide.layers) == set(prune.kernels(nnx.state(model, nnx.Param)))
    state = prune.magnitude(guide, prune.ramp(0, 10)).init(nnx.state(model, nnx.Param))
    assert set(prune.masks(state)) == set(guide.densities) != set()

    net = LinenNet()
    variables = net.init(jax.random.key(0), x)
    assert set(conv_shapes((net, variables), x)) == set(prune.kernels(variables["params"]))


def test_linen_training_and_resuming():
    net, traces = LinenNet(), []
    guide = prune.constant({"middle": 0.2, "head": 0.5})
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), prune.magnitude(guide, prune.ramp(0, 15), every=2))

    @jax.jit
    def step(params, state, x, y):
        traces.append(None)
        grads = jax.grad(lambda params: loss_of(net.apply({"params": params}, x), y))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = net.init(jax.random.key(0), batch(0)[0])["params"]
    state = tx.init(params)
    for i in range(STEPS):
        params, state = step(params, state, *batch(i))
        if i + 1 == KILLED_AT:
            saved = jax.tree.map(np.asarray, (params, state))
    assert len(traces) == 1
    assert np.count_nonzero(params["middle"]["kernel"]) == round(0.2 * 576)
    assert np.count_nonzero(params["head"]["kernel"]) == 8
    assert np.count_nonzero(params["stem"]["kernel"]) == 144  # not in the guide

    leaves, treedef = jax.tree.flatten(saved)
    resumed_params, resumed = jax.tree.unflatten(treedef, [jnp.asarray(leaf) for leaf in leaves])
    for i in range(KILLED_AT, STEPS):
        resumed_params, resumed = step(resumed_params, resumed, *batch(i))
    assert_same((params, state), (resumed_params, resumed))
