"""Linen models packed: the outputs of the dense ones, norms folded, epilogues fused, and variables that say what changed."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

import sparseflax
from sparseflax.conv.primitive import conv_p
from tests.machines import HERE

EPS = np.finfo(np.float32).eps


class Block(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x, train):
        norm = lambda: nn.BatchNorm(use_running_average=not train)  # noqa: E731
        y = nn.relu(norm()(nn.Conv(self.features, (3, 3), use_bias=False)(x)))
        y = norm()(nn.Conv(self.features, (3, 3))(y))
        return nn.relu(x + y)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(32, (3, 3), use_bias=False, name="stem")(x)))
        shared = Block(32)
        x = nn.remat(Block, static_argnums=(2,))(32)(shared(shared(x, train), train), train)
        x = nn.max_pool(x, (2, 2), (2, 2)).mean((1, 2))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(5, name="head")(nn.relu(nn.BatchNorm(use_running_average=not train, name="late")(x)))


def pruned(module, x, density=0.1, **call):
    """Variables drawn, with the kernels of all but the stem and the head pruned."""
    random = np.random.default_rng(0)

    def draw(path, leaf):
        name, draws = path[-1].key, random.standard_normal(leaf.shape)
        if name in ("scale", "var"):
            return jnp.asarray(0.5 + np.abs(draws), jnp.float32)
        if name == "kernel" and path[-2].key not in ("stem", "head"):
            draws *= random.random(leaf.shape) < density
        return jnp.asarray(draws / (10 if name == "kernel" else 1), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, module.init(jax.random.key(0), x, **call))


X = np.random.default_rng(1).standard_normal((2, 12, 12, 3)).astype(np.float32)


def test_outputs_norms_and_variables():
    net: Any = Net()
    variables = pruned(net, X, train=False)
    table = sparseflax.plan((net, variables), X, HERE, train=False)
    rows = {row.path: row for row in table.layers}
    assert rows["stem"].norm == "BatchNorm_0" and rows["stem"].choice == "dense"
    assert rows["CheckpointBlock_0/Conv_0"].norm == "CheckpointBlock_0/BatchNorm_0" and rows["head"].norm is None
    # The shared block's layers are called twice, each time with its norm right after.
    assert {row.path for row in table.layers if row.choice == "sparse"} == {
        f"{block}/Conv_{i}" for block in ("Block_0", "CheckpointBlock_0") for i in (0, 1)}
    before = jax.tree.map(np.array, variables)
    packed, packed_variables = sparseflax.pack_model((net, variables), table, train=False, x=X)
    jax.tree.map(np.testing.assert_array_equal, variables, before)  # the model stays as it is

    exact = jax.jit(lambda v, x: net.apply(v, x, train=False))
    with jax.enable_x64(True):
        wanted = np.asarray(exact(*jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (variables, X))), np.float64)
    bound = 16 * np.abs(np.asarray(exact(variables, X)) - wanted).max() + 64 * EPS * np.abs(wanted).max()
    run = jax.jit(lambda v, x: packed.apply(v, x, train=False))
    for y in (run(packed_variables, X), packed.apply(packed_variables, X, train=False)):
        assert y.dtype == jnp.float32 and np.abs(y - wanted).max() <= bound

    names = {"/".join(path) for path in flatten_dict(packed_variables["params"])}
    assert {"stem/kernel", "stem/bias", "head/kernel", "late/scale", "Block_0/Conv_0/values", "Block_0/Conv_0/bias"} <= names
    assert not {"BatchNorm_0/scale", "Block_0/Conv_0/kernel", "Block_0/BatchNorm_1/scale"} & names
    assert set(packed_variables["batch_stats"]) == {"late", *packed_variables["batch_stats"].keys() - {"BatchNorm_0"}}


def test_the_fused_program_has_no_epilogue_of_its_own():
    net: Any = Net()
    variables = pruned(net, X, train=False)
    table = sparseflax.plan((net, variables), X, HERE, train=False)
    counts = {}
    for fuse in (True, False):
        packed, packed_variables = sparseflax.pack_model((net, variables), table, X, fuse=fuse, train=False)
        jaxpr = jax.make_jaxpr(lambda v, x, packed=packed: packed.apply(v, x, train=False))(packed_variables, X)
        text = str(jaxpr)
        counts[fuse] = text.count("'relu'") + text.count("activation=relu")
        assert text.count(f"{conv_p.name}[") + text.count("Step(op='conv'") >= 4
    assert counts[True] >= 4 and counts[False] == 0


@pytest.mark.parametrize("layer, reason", [
    (lambda: nn.Conv(32, (3, 3), dtype=jnp.bfloat16), "dtype=bfloat16: only float32 is supported"),
    (lambda: nn.ConvTranspose(32, (3, 3), transpose_kernel=True), "transpose_kernel=True: only False is supported"),
    (lambda: nn.Conv(32, (3, 3), feature_group_count=32), "depthwise: 1 input channel per group")])
def test_layers_that_stay_dense_say_why(layer, reason):
    net: Any = nn.Sequential([nn.Conv(32, (3, 3)), layer()])
    variables = pruned(net, X)
    table = sparseflax.plan((net, variables), X, HERE)
    assert table.layers[1].choice == "dense" and table.layers[1].reason == reason
    packed, inner = sparseflax.pack_model((net, variables), table, X)
    np.testing.assert_allclose(packed.apply(inner, X), net.apply(variables, X), rtol=1e-4, atol=1e-4)


class Tied(nn.Module):
    """A decoder multiplies by the encoder's kernel, another layer's kernel is sown, a third's is normalized for each call."""

    @nn.compact
    def __call__(self, x):
        encoder = nn.Conv(32, (3, 3), use_bias=False, name="encoder")
        y = nn.BatchNorm(use_running_average=True, name="norm")(encoder(x))
        x = x + jnp.einsum("nhwk,rsck->nhwc", y, encoder.variables["params"]["kernel"])
        sown = nn.Conv(32, (3, 3), use_bias=False, name="sown")
        y = nn.BatchNorm(use_running_average=True, name="sown_norm")(sown(x))
        self.sow("intermediates", "kernel", sown.variables["params"]["kernel"])
        y = nn.WeightNorm(nn.Conv(32, (3, 3), name="scaled"))(y)
        return nn.BatchNorm(use_running_average=True, name="free_norm")(nn.Conv(32, (3, 3), name="free")(y))


@pytest.mark.parametrize("wrap", [lambda kind: kind, nn.remat, nn.jit])
@pytest.mark.parametrize("freeze", [lambda tree: tree, flax.core.freeze])
def test_weights_with_another_reader_stay(wrap, freeze):
    net: Any = nn.Sequential([nn.Conv(16, (3, 3)), wrap(Tied)()])
    variables = freeze(pruned(net, X))
    table = sparseflax.plan((net, variables), X, HERE)
    rows = {row.path.rpartition("/")[2]: row for row in table.layers}
    assert {name: (row.choice, row.norm and row.norm.rpartition("/")[2]) for name, row in rows.items()} == {
        "layers_0": ("sparse", None), "encoder": ("dense", None), "sown": ("dense", None), "scaled": ("dense", None),
        "free": ("sparse", "free_norm")}
    for name in ("encoder", "sown", "scaled"):
        assert rows[name].reason.startswith("the call uses its kernel elsewhere, too")
    packed, inner = sparseflax.pack_model((net, variables), table, X)
    y = net.apply(variables, X)
    np.testing.assert_allclose(packed.apply(inner, X), y, rtol=1e-4, atol=1e-5 * float(jnp.abs(y).max()))


def test_other_modules_with_weights_are_listed():
    class Position(nn.Module):
        @nn.compact
        def __call__(self, x):
            table = self.param("table", nn.initializers.ones, (12, 32))
            return x + table.reshape(1, 12, 1, 32) * self.param("scale", nn.initializers.ones, (32,)).reshape(1, 1, 1, -1)

    net: Any = nn.Sequential([nn.Conv(32, (3, 3)), Position(), nn.GroupNorm(4)])
    table = sparseflax.plan((net, pruned(net, X)), X, HERE)
    assert [(row.path, row.kernel_shape, row.reason) for row in table.layers[1:]] == [
        ("layers_1", (12, 32), "Position has no sparse form")]
    packed, inner = sparseflax.pack_model((net, pruned(net, X)), table, X)
    np.testing.assert_allclose(packed.apply(inner, X), net.apply(pruned(net, X), X), rtol=1e-4, atol=1e-4)


def test_a_mask_counts_and_is_packed():
    kernel_shape = (3, 3, 3, 32)
    mask = (np.random.default_rng(5).random(kernel_shape) < 0.2).astype(np.float32)
    net: Any = nn.Sequential([nn.Conv(32, (3, 3), mask=mask), nn.Conv(32, (3, 3))])
    variables = pruned(net, X, density=0.5)
    table = sparseflax.plan((net, variables), X, HERE)
    assert table.layers[0].density == np.count_nonzero(variables["params"]["layers_0"]["kernel"] * mask) / mask.size
    packed, inner = sparseflax.pack_model((net, variables), table, X)
    np.testing.assert_allclose(packed.apply(inner, X), net.apply(variables, X), rtol=1e-4, atol=1e-4)


def test_bad_input():
    net: Any = Net()
    variables = pruned(net, X, train=False)
    table = sparseflax.plan((net, variables), X, HERE, train=False)
    with pytest.raises(TypeError, match="x is None, wanted the input of the Linen model"):
        sparseflax.pack_model((net, variables), table, train=False)
    other = nn.Sequential([nn.Conv(4, (3, 3))])
    with pytest.raises(ValueError, match="the plan was made for another model: 'stem' is missing"):
        sparseflax.pack_model((other, pruned(other, X)), table, x=None or X)
    with pytest.raises(TypeError, match="model is a tuple, wanted an nnx.Module or a pair"):
        sparseflax.pack_model((net, variables, X), table, X)  # type: ignore[type-var]
    variables["params"]["Block_0"]["Conv_0"]["kernel"] = variables["params"]["Block_0"]["Conv_0"]["kernel"] * jnp.nan
    with pytest.raises(ValueError, match="layer 'Block_0/Conv_0': kernel holds 9216 non-finite"):
        sparseflax.pack_model((net, variables), table, X, train=False)
