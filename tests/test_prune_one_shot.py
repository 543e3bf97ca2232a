"""Pruning without training: one-shot magnitude, layer-wise OBS against plain loops and least squares, batch-norm statistics."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from sparseflax import prune
from sparseflax.prune.correct import statistics
from sparseflax.prune.obs import _gram, _prune


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 8, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.grouped = nnx.Conv(8, 6, (3, 3), feature_group_count=2, padding="VALID", rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.grouped(nnx.relu(self.norm(self.conv(x)))))
        return self.head(self.dropout(x.mean((1, 2))))


class LinenNet(nn.Module):
    """The same in Linen."""

    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(8, (3, 3), strides=2, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=2, padding="VALID", name="grouped")(x))
        return nn.Dense(3, name="head")(nn.Dropout(0.5, deterministic=not train)(x.mean((1, 2))))


def twin(model):
    """(module, variables) of the Linen network with the weights of an nnx one."""
    params, statistics = (nnx.to_pure_dict(nnx.state(model, kind)) for kind in (nnx.Param, nnx.BatchStat))
    return LinenNet(), {"params": params, "batch_stats": {"norm": {name: statistics["norm"][name] for name in ("mean", "var")}}}


def images(seed, count=24):
    """Correlated between pixels and channels, so that weights can make up for each other."""
    noise = jax.random.normal(jax.random.key(seed), (count, 9, 9, 2))
    return jnp.cumsum(noise, axis=1) / 3 + noise[..., ::-1]


def test_one_shot_keeps_the_largest():
    model = Net(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    plain = nnx.to_pure_dict(params)
    guide = prune.constant({"conv": 0.3, "head": 0.5})
    for pruned in (prune.one_shot(plain, guide), nnx.to_pure_dict(prune.one_shot(params, guide))):
        for name, density in guide.densities.items():
            dense, sparse = np.asarray(plain[name]["kernel"]).ravel(), np.asarray(pruned[name]["kernel"]).ravel()
            kept = np.sort(np.argsort(-np.abs(dense))[: round(density * dense.size)])
            np.testing.assert_array_equal(np.flatnonzero(sparse), kept)
            np.testing.assert_array_equal(sparse[kept], dense[kept])
        np.testing.assert_array_equal(pruned["grouped"]["kernel"], plain["grouped"]["kernel"])
    thin = prune.one_shot(plain, prune.constant({"conv": 0.1}))
    further = prune.one_shot(thin, prune.constant({"conv": 0.3}), keep_zeros=True)
    np.testing.assert_array_equal(further["conv"]["kernel"], thin["conv"]["kernel"])
    with pytest.raises(ValueError, match="no kernel in the parameters for layers"):
        prune.one_shot(plain, prune.constant({"conw": 0.3}))


LAYERS = {
    "strided": dict(kernel_size=(3, 3), strides=2),
    "dilated": dict(kernel_size=(3, 2), kernel_dilation=2, padding=((1, 0), 2)),
    "grouped": dict(kernel_size=(1, 3), feature_group_count=2, padding="VALID"),
    "circular": dict(kernel_size=(3, 3), padding="CIRCULAR"),
    "row": dict(kernel_size=3),
    "causal": dict(kernel_size=2, padding="CAUSAL"),
    "volume": dict(kernel_size=(2, 1, 3)),
}


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
def test_hessians_are_those_of_the_outputs(options):
    """sum over positions of y_o^2 is w_o^T H w_o, for the layer's own y = X w."""
    size = options["kernel_size"]
    settings = {k: v for k, v in options.items() if k not in ("kernel_size", "kind")}
    layer = options.get("kind", nnx.Conv)(4, 6, size, use_bias=False, **settings, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (3, *(5,) * (1 if isinstance(size, int) else len(size)), 4))
    energies = np.square(np.asarray(layer(x), np.float64)).reshape(-1, 6).sum(axis=0)
    hessians = np.asarray(_gram(layer, layer.kernel.shape, x), np.float64)
    groups = len(hessians)
    rows = np.asarray(layer.kernel[...], np.float64).reshape(-1, groups, 6 // groups).transpose(1, 2, 0)
    found = np.einsum("goi,gij,goj->go", rows, hessians, rows).ravel()
    np.testing.assert_allclose(found, energies, rtol=1e-4)  # float32 sums over about a hundred positions


def test_some_positions_stand_for_all():
    """As many as there are give all of it; fewer give what they were drawn from, at their share."""
    layer = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=nnx.Rngs(0))
    ramp = np.broadcast_to(np.arange(1.0, 4), (2, 6, 6, 3)).astype(np.float32)  # all inner positions see the same
    full, inner = _gram(layer, (3, 3, 3, 4), ramp), nnx.Conv(3, 4, (3, 3), padding="VALID", use_bias=False, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(_gram(layer, (3, 3, 3, 4), ramp, 36), full)
    np.testing.assert_array_equal(_gram(layer, (3, 3, 3, 4), ramp, 99), full)
    some, every = (_gram(inner, (3, 3, 3, 4), ramp, count) for count in (5, None))
    np.testing.assert_allclose(some / 5, every / 16, rtol=1e-6)


@pytest.mark.parametrize("kept", [0, 1, 13, 30, 59, 60])
def test_both_systems_of_surgery_are_least_squares(kept):
    """Of few kept weights and of few lost ones."""
    rng = np.random.default_rng(1)
    x, rows = rng.normal(size=(80, 20)) @ rng.normal(size=(20, 20)), rng.normal(size=(1, 3, 20))
    found = _prune(rows, (x.T @ x)[None], kept, 1, 1e-9)
    assert np.count_nonzero(found) == kept
    for weights, row in zip(found[0], rows[0], strict=True):
        keep = np.flatnonzero(weights)
        expected = np.linalg.lstsq(x[:, keep], x @ row, rcond=None)[0]
        np.testing.assert_allclose(weights[keep], expected, rtol=1e-5, atol=1e-6)


def test_surgery_of_one_weight_at_a_time():
    """With a round per weight: the textbook's greedy loop, in which every choice is tried out by least squares."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 6)) @ rng.normal(size=(6, 6))
    rows, hessian = rng.normal(size=(1, 2, 6)), x.T @ x
    damped = hessian + 1e-9 * np.trace(hessian) / 6 * np.eye(6)

    def best(o, keep):
        weights = np.zeros(6)
        weights[keep] = np.linalg.lstsq(x[:, keep], x @ rows[0, o], rcond=None)[0]
        change = weights - rows[0, o]
        return weights, change @ damped @ change

    keep = [list(range(6)), list(range(6))]
    while sum(map(len, keep)) > 5:
        rises = {(o, i): best(o, [j for j in keep[o] if j != i])[1] - best(o, keep[o])[1] for o in range(2) for i in keep[o]}
        o, i = min(rises, key=rises.get)
        keep[o].remove(i)
    # 12 weights to 5, in rounds so many that each loses at most one
    found = _prune(rows, hessian[None], 5, 60, 1e-9)
    for o in range(2):
        np.testing.assert_array_equal(np.flatnonzero(found[0, o]), keep[o])
        np.testing.assert_allclose(found[0, o], best(o, keep[o])[0], rtol=1e-5, atol=1e-7)


def test_obs_does_less_damage_than_magnitude():
    model, batches = Net(nnx.Rngs(0)), [images(0), images(1)]
    guide = prune.constant({"conv": 0.3, "grouped": 0.4, "head": 0.5})
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Param))
    pruned = prune.obs(model, batches, guide)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, nnx.state(model, nnx.Param)))
    for name, density in guide.densities.items():
        kernel = getattr(pruned, name).kernel[...]
        assert jnp.count_nonzero(kernel) == round(density * kernel.size)
        assert type(getattr(pruned, name)) is type(getattr(model, name))
    np.testing.assert_array_equal(pruned.head.bias[...], model.head.bias[...])
    magnitude = nnx.clone(model)
    nnx.update(magnitude, prune.one_shot(nnx.state(magnitude, nnx.Param), guide))
    for net in (model, magnitude):
        net.eval()
    x = images(2, 100)  # not those of the calibration
    first = [np.square(np.asarray(net.conv(x) - model.conv(x))).mean() for net in (pruned, magnitude)]
    assert first[0] < first[1]
    last = [np.square(np.asarray(prune.recalibrate(net, batches)(x) - model(x))).mean() for net in (pruned, magnitude)]
    assert last[0] < last[1]


def test_obs_of_inputs_that_are_always_zero():
    """Weights on dead inputs go first, and H, which is singular, is no obstacle."""
    model = nnx.Sequential(nnx.Linear(5, 3, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (20, 5)) * jnp.array([[1.0, 0, 1, 0, 1]])
    pruned = prune.obs(model, [x], prune.constant({"layers/0": 0.6}))
    np.testing.assert_array_equal(jnp.count_nonzero(pruned.layers[0].kernel[...], axis=1), [3, 0, 3, 0, 3])
    np.testing.assert_allclose(pruned(x), model(x), rtol=0, atol=1e-5)


def test_recalibrated_statistics_are_those_of_all_examples():
    model, batches = Net(nnx.Rngs(0)), [images(seed) for seed in range(3)]
    model.norm.mean.set_value(jnp.full(8, 7.0))
    fresh = prune.recalibrate(model, iter(batches))
    y = np.asarray(model.conv(jnp.concatenate(batches)), np.float64).reshape(-1, 8)
    np.testing.assert_allclose(fresh.norm.mean[...], y.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(fresh.norm.var[...], y.var(axis=0), rtol=1e-4)
    assert jnp.all(model.norm.mean[...] == 7) and fresh.norm.momentum == model.norm.momentum
    assert fresh.norm.use_running_average and fresh.dropout.deterministic
    model.eval()
    x = images(9)
    assert not np.allclose(model(x), fresh(x))


def test_linen_networks_are_pruned_and_recalibrated_alike():
    model, batches, guide = Net(nnx.Rngs(0)), [images(0), images(1)], prune.constant({"conv": 0.3, "grouped": 0.4, "head": 0.5})
    pair = twin(model)
    before = jax.tree.map(np.asarray, pair[1])
    module, pruned = prune.obs(pair, batches, guide, train=False)
    expected = prune.obs(model, batches, guide)
    _, fresh = prune.recalibrate((module, pruned), batches, train=False)
    statistics = prune.recalibrate(expected, batches).norm
    for name in guide.densities:
        np.testing.assert_array_equal(pruned["params"][name]["kernel"], getattr(expected, name).kernel[...])
        np.testing.assert_array_equal(fresh["params"][name]["kernel"], pruned["params"][name]["kernel"])
    for name in ("mean", "var"):
        # float32 means of 600 numbers, summed in another order.
        np.testing.assert_allclose(fresh["batch_stats"]["norm"][name], getattr(statistics, name)[...], rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, pair[1]))
    assert module.apply(fresh, images(9), train=False).shape == (24, 3)
    with pytest.raises(ValueError, match=r"no linen.Conv, ConvTranspose or Dense of the model ran at \['norm'\]"):
        prune.obs(pair, batches, prune.constant({"norm": 0.3}), train=False)
    with pytest.raises(ValueError, match="there are no batches"):
        prune.recalibrate(pair, [], train=False)
    with pytest.raises(ValueError, match="found no linen.BatchNorm in Dense"):
        prune.recalibrate((nn.Dense(2), nn.Dense(2).init(jax.random.key(0), jnp.ones((1, 2)))), [jnp.ones((1, 2))])


def test_refusals():
    model, guide = Net(nnx.Rngs(0)), prune.constant({"conv": 0.3})
    with pytest.raises(ValueError, match=r"no nnx.Conv, ConvTranspose or Linear in the model at \['norm'\]"):
        prune.obs(model, [images(0)], prune.constant({"norm": 0.3}))
    with pytest.raises(ValueError, match=r"layers \['conv'\] did not run"):
        prune.obs(model, [], guide)
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        prune.obs(model, [images(0)], guide, rounds=0)
    with pytest.raises(ValueError, match="damping must be positive, got 0"):
        prune.obs(model, [images(0)], guide, damping=0)
    with pytest.raises(ValueError, match="found no nnx.BatchNorm in Linear"):
        prune.recalibrate(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), [])
    with pytest.raises(ValueError, match="there are no batches"):
        prune.recalibrate(model, itertools.chain())

    class Compiled(nnx.Module):
        def __init__(self):
            self.conv = nnx.Conv(2, 8, (3, 3), rngs=nnx.Rngs(0))

        def __call__(self, x):
            return nnx.jit(lambda conv, x: conv(x))(self.conv, x)

    with pytest.raises(TypeError, match="layer 'conv' is called inside a compiled function"):
        prune.obs(Compiled(), [images(0)], guide)


def test_outputs_are_given_their_mean_and_spread_back():
    """On the examples that it was done with, exactly; by the original, or by what was noted of it."""
    model, batches = Net(nnx.Rngs(0)), [images(0), images(1)]
    model.eval()
    small = prune.obs(model, batches, prune.constant({"conv": 0.3, "grouped": 0.4}))
    layers = ["conv", "grouped"]
    found = prune.correct(small, model, batches, layers)
    noted = prune.correct(small, statistics(model, batches, [*layers, "head"]), batches, layers)
    jax.tree.map(np.testing.assert_array_equal, nnx.state(found, nnx.Param), nnx.state(noted, nnx.Param))
    x = jnp.concatenate(batches)
    np.testing.assert_allclose(found.conv(x).mean((0, 1, 2)), model.conv(x).mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(found.conv(x).std((0, 1, 2)), model.conv(x).std((0, 1, 2)), rtol=1e-4)
    assert jnp.count_nonzero(found.conv.kernel[...]) == jnp.count_nonzero(small.conv.kernel[...])
    with pytest.raises(ValueError, match=r"layers \['nose'\] did not run"):
        prune.correct(small, model, batches, ["nose"])
