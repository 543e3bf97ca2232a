"""What is planned and why, and that a packed model computes what the masked dense one does in evaluation mode.

The networks here have small integers for weights and statistics, and var + epsilon = 1, so that every value is an integer
below 2^24, or such an integer over a power of two, whatever the order of summation: float32 is exact and the tolerance 0.
"""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import sparseflax
from sparseflax import pack_model, plan
from sparseflax.conv import ffi
from sparseflax.cost.machine import ATOM_C2750
from sparseflax.layers.nnx import SparseConv, SparseDense
from sparseflax.network.fold import Folded, fold
from sparseflax.network.plan import MARGIN
from tests.machines import HERE, HOPELESS

pytestmark = pytest.mark.usefixtures("strict_dtypes")
RNGS = nnx.Rngs(0)


def zeros(_, shape, dtype):
    return np.zeros(shape, dtype)


def conv(ic, oc, size=3, strides=1, use_bias=False, kind=nnx.Conv, **kwargs):
    size = (size, size) if isinstance(size, int) else size
    return kind(ic, oc, size, strides, use_bias=use_bias, kernel_init=zeros, bias_init=zeros, rngs=RNGS, **kwargs)


def norm(channels, **kwargs):
    return nnx.BatchNorm(channels, epsilon=0.25, rngs=RNGS, **kwargs)


def linear(ic, oc):
    return nnx.Linear(ic, oc, kernel_init=zeros, bias_init=zeros, rngs=RNGS)


def with_integers(model, density=0.2):
    """Fills a model; `density` of all weights are kept, except in layers with fewer than 8 input channels."""
    draw = np.random.default_rng(0)

    def integers(variable, low, high):
        variable[...] = jnp.asarray(draw.integers(low, high + 1, variable.shape).astype(np.float32))

    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            integers(module.mean, -1, 1)
            module.var[...] = jnp.asarray(np.full(module.var.shape, 0.75, np.float32))
            for variable in (module.scale, module.bias):
                if variable is not None:
                    integers(variable, -1, 2)
        elif hasattr(module, "kernel"):
            integers(module.kernel, 0, 1)
            kept = draw.random(module.kernel.shape) < (density if module.kernel.shape[-2] >= 8 else 1.0)
            module.kernel[...] = jnp.asarray((2 * np.asarray(module.kernel[...]) - 1) * kept.astype(np.float32))
            if module.bias is not None:
                integers(module.bias, -1, 1)
    return model


class VGG(nnx.Module):
    def __init__(self):
        self.stages = nnx.List([
            nnx.List([conv(3, 8), norm(8), conv(8, 8, use_bias=True), norm(8, use_scale=False)]),
            nnx.List([conv(8, 16, padding="VALID"), norm(16, use_bias=False)])])
        self.head = linear(16, 4)

    def __call__(self, x):
        for stage in self.stages:
            for layer, follower in zip(stage[::2], stage[1::2], strict=True):
                x = nnx.relu(follower(layer(x)))
            x = nnx.max_pool(x, (2, 2), (2, 2))
        return self.head(x.mean((1, 2)))


class ResNet(nnx.Module):
    def __init__(self):
        self.conv1, self.norm1 = conv(8, 16, strides=2), norm(16)
        self.conv2, self.norm2 = conv(16, 16), norm(16)
        self.shortcut, self.shortcut_norm = conv(8, 16, 1, strides=2), norm(16)
        self.shared = conv(16, 16)  # its output is normed and added: the norm stays
        self.kept = norm(16)

    def __call__(self, x):
        y = self.norm2(self.conv2(nnx.relu(self.norm1(self.conv1(x)))))
        x = nnx.relu(y + self.shortcut_norm(self.shortcut(x)))
        x = self.shared(x)
        return x + self.kept(x)


class Branches(nnx.Module):
    def __init__(self):
        self.branches = nnx.Dict(one=conv(8, 8, 1), three=nnx.Sequential(conv(8, 8), norm(8), nnx.relu, conv(8, 16, 3)))
        self.late = norm(24)  # of two convolutions at once
        self.dropout = nnx.Dropout(0.5, rngs=RNGS)
        self.first = norm(24)  # before its convolution
        self.last = conv(24, 8)
        self.after = norm(8)  # after an activation

    def __call__(self, x):
        x = self.late(jnp.concatenate([branch(x) for branch in self.branches.values()], axis=-1))
        return self.after(nnx.relu(self.last(self.first(nnx.relu(self.dropout(x))))))


class Shared(nnx.Module):
    """One block applied twice and known by two names, a convolution that two norms follow, a norm after two convolutions."""

    def __init__(self):
        self.block = self.again = nnx.Dict(conv=conv(8, 8), norm=norm(8))
        self.twice, self.norms = conv(8, 8, 1), nnx.List([norm(8), norm(8)])
        self.convs, self.common = nnx.List([conv(8, 8, 1), conv(8, 8, 1)]), norm(8)

    def __call__(self, x):
        for block in (self.block, self.again):
            x = nnx.relu(block["norm"](block["conv"](x)))
        for follower in self.norms:
            x = follower(self.twice(x))
        for layer in self.convs:
            x = self.common(layer(x))
        return x


class Jitted(nnx.Module):
    """Inner transformations around whole blocks do not hide what follows what."""

    def __init__(self):
        self.conv1, self.norm1, self.conv2, self.norm2 = conv(8, 8), norm(8), conv(8, 8), norm(8)

    def __call__(self, x):
        x = nnx.jit(lambda m, x: m.norm1(m.conv1(x)))(self, x)
        return nnx.remat(lambda m, x: m.norm2(m.conv2(x)))(self, x)


class Tied(nnx.Module):
    """Two convolutions with one kernel: folding a norm into the first must not change the second."""

    def __init__(self):
        self.conv1, self.norm, self.conv2 = conv(8, 8), norm(8), conv(8, 8)
        self.conv2.kernel = self.conv1.kernel

    def __call__(self, x):
        return self.conv2(self.norm(self.conv1(x)))


class TiedDecoder(nnx.Module):
    """A decoder multiplies by the encoder's kernel: neither may the encoder take its norm, nor become sparse."""

    def __init__(self):
        self.encoder, self.norm, self.last, self.last_norm = conv(8, 8), norm(8), conv(8, 8), norm(8)

    def __call__(self, x):
        y = nnx.relu(self.norm(self.encoder(x)))
        return self.last_norm(self.last(jnp.einsum("nhwk,rsck->nhwc", y, self.encoder.kernel[...])))


class Readers(nnx.Module):
    """What else may read a weight: a bias, statistics in an inner jit, a kernel that is only returned or only written."""

    def __init__(self):
        self.biased, self.biased_norm = conv(8, 8, use_bias=True), norm(8)
        self.inner, self.inner_norm = conv(8, 8), norm(8)
        self.returned, self.written = conv(8, 8), conv(8, 8)
        self.kernel_sum = nnx.BatchStat(jnp.zeros(()))
        self.free, self.free_norm = conv(8, 8, use_bias=True), norm(8)

    def __call__(self, x):
        x = self.biased_norm(self.biased(x)) + self.biased.bias[...].reshape(1, 1, 1, -1)
        block = jax.jit(lambda x: self.inner_norm(self.inner(x)) * self.inner_norm.mean[...].reshape(1, 1, 1, -1))
        x = self.written(self.returned(block(x)))
        self.kernel_sum[...] = self.written.kernel[...].sum()
        x = nnx.jit(lambda m, x: m.free_norm(m.free(x)))(self, x)
        return x, self.returned.kernel[...]


class Masked(nnx.Module):
    def __init__(self):
        mask = jnp.asarray((np.random.default_rng(1).random((3, 3, 8, 8)) < 0.5).astype(np.float32))
        self.conv, self.norm, self.dense, self.dense_norm = conv(8, 8, mask=mask), norm(8), linear(8, 8), norm(8)

    def __call__(self, x):
        return self.dense_norm(self.dense(self.norm(self.conv(x))))


NETWORKS = {
    VGG: {"stages/0/0": "stages/0/1", "stages/0/2": "stages/0/3", "stages/1/0": "stages/1/1"},
    ResNet: {"conv1": "norm1", "conv2": "norm2", "shortcut": "shortcut_norm"},
    Branches: {"branches/three/layers/0": "branches/three/layers/1"},
    Shared: {"again/conv": "again/norm"},
    Jitted: {"conv1": "norm1", "conv2": "norm2"},
    Tied: {"conv1": "norm"},
    TiedDecoder: {"last": "last_norm"},
    Readers: {"free": "free_norm"},
    Masked: {"conv": "norm", "dense": "dense_norm"},
}


@pytest.mark.parametrize("machine", [HERE, HOPELESS], ids=["sparse", "dense"])
@pytest.mark.parametrize("network", NETWORKS)
def test_packed_model_agrees_with_the_masked_dense_one(network, machine):
    model = with_integers(network())  # in training mode, as the pruner leaves it
    x = np.random.default_rng(1).integers(-2, 3, (2, 8, 8, 3 if network is VGG else 8)).astype(np.float32)
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.Not(nnx.RngState)))
    planned = plan(model, x, machine)
    packed = pack_model(model, planned)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(model, nnx.Not(nnx.RngState)))
    assert isinstance(packed, network) and type(packed).__name__ == network.__name__ and type(model) is network
    assert type(pack_model(model, planned, fuse=False)) is network

    kinds = {"/".join(map(str, path)): type(module) for path, module in nnx.iter_modules(packed)}
    assert {row.path: row.norm for row in planned.layers if row.norm} == NETWORKS[network]
    assert {path for path, kind in kinds.items() if kind is Folded} == set(NETWORKS[network].values())
    sparse = {path for path, kind in kinds.items() if kind in (SparseConv, SparseDense)}
    assert sparse == {row.path for row in planned.layers if row.choice == "sparse"}
    assert not sparse if machine is HOPELESS else sparse
    variables = {id(leaf) for _, leaf in nnx.iter_graph(model) if isinstance(leaf, nnx.Variable)}
    assert not variables & {id(leaf) for _, leaf in nnx.iter_graph(packed) if isinstance(leaf, nnx.Variable)}

    model.eval()
    jax.tree.map(np.testing.assert_array_equal, *nnx.jit(lambda packed, model, x: (packed(x), model(x)))(packed, model, x))


def test_a_weight_that_is_computed_is_not_the_layers():
    """Packing the raw kernel would drop the normalization of a wrapper that writes it during the call."""
    model = nnx.Sequential(nnx.WeightNorm(with_integers(conv(8, 8)), rngs=RNGS), norm(8))
    row = plan(model, jnp.ones((1, 4, 4, 8)), HERE).layers[0]
    assert (row.path, row.choice, row.norm) == ("layers/0/layer_instance", "dense", None)
    assert row.reason.startswith("the call uses its kernel elsewhere, too")


def test_control_flow_does_not_hide_what_reads_a_weight():
    class Net(nnx.Module):
        def __init__(self):
            self.one, self.two, self.three, self.four = (conv(8, 8) for _ in range(4))

        def __call__(self, x):
            x = jax.lax.fori_loop(0, 2, lambda _, x: self.one(x), x)
            x = jax.lax.cond(x.sum() > 0, lambda x: self.two(x), lambda x: x, x)
            x = jax.lax.fori_loop(0, 2, lambda _, x: x + self.three.kernel[...].sum(), self.three(x))
            return jax.lax.cond(x.sum() > 0, lambda x: self.four(x), lambda x: x * self.four.kernel[...].sum(), x)

    rows = plan(with_integers(Net()), jnp.ones((1, 8, 8, 8)), HERE).layers
    assert {row.path: row.choice for row in rows} == {"one": "sparse", "two": "sparse", "three": "dense", "four": "dense"}


def test_a_second_reader_is_named():
    x = jnp.ones((1, 8, 8, 8))
    tied = {row.path: row for row in plan(with_integers(TiedDecoder()), x, HERE).layers}
    assert tied["encoder"].reason == ("the call uses its kernel elsewhere, too; norm stays, as the call uses encoder/kernel "
                                      "elsewhere, too")
    assert tied["encoder"].choice == "dense" and tied["last"].choice == "sparse"
    rows = {row.path: row for row in plan(with_integers(Readers()), x, HERE).layers}
    assert {path: row.choice for path, row in rows.items()} == {
        "biased": "sparse", "inner": "sparse", "returned": "dense", "written": "dense", "free": "sparse"}
    assert rows["biased"].reason.endswith("; biased_norm stays, as the call uses biased/bias elsewhere, too")
    assert rows["inner"].reason.endswith("; inner_norm stays, as the call uses inner_norm/mean elsewhere, too")
    assert rows["returned"].reason == rows["written"].reason == "the call uses its kernel elsewhere, too"
    measured = plan(with_integers(Readers()), x, HERE, measure=True, seconds=0.0)
    assert [row.path for row in measured.layers if row.dense_measured] == ["biased", "inner", "free"]
    assert measured.layers[0].reason.endswith("; biased_norm stays, as the call uses biased/bias elsewhere, too")


def test_folding_any_numbers():
    draw = np.random.default_rng(0)
    layer, follower = conv(6, 5, use_bias=True), nnx.BatchNorm(5, epsilon=1e-3, rngs=RNGS)
    for variable in (layer.kernel, layer.bias, follower.mean, follower.scale, follower.bias):
        variable[...] = jnp.asarray(draw.standard_normal(variable.shape).astype(np.float32))
    follower.var[...] = jnp.asarray(draw.random(5).astype(np.float32))
    kernel, bias = fold(layer.kernel[...], layer.bias[...], follower)
    multiplier = np.float64(follower.scale[...]) / np.sqrt(np.float64(follower.var[...]) + follower.epsilon)
    x = jnp.asarray(draw.standard_normal((2, 5, 5, 6)).astype(np.float32))
    y = sparseflax.sparse_conv(x, sparseflax.pack(kernel), jnp.asarray(bias))
    follower.eval()
    # Either sum has 54 products, a bias and the norm's few operations, on numbers bounded by those of the absolute values.
    magnitude = jax.lax.conv_general_dilated(jnp.abs(x), np.abs(kernel), (1, 1), "SAME",
                                             dimension_numbers=("NHWC", "HWIO", "NHWC"))
    terms = np.abs(multiplier) * (np.abs(layer.bias[...]) + np.abs(follower.mean[...])) + np.abs(follower.bias[...])
    tolerance = 2 * (54 + 8) * np.finfo(np.float32).eps / 2 * (magnitude + terms.reshape(1, 1, 1, -1))
    assert np.all(np.abs(y - follower(layer(x))) <= tolerance)


def test_sparse_only_where_it_is_predicted_to_be_faster():
    class Net(nnx.Module):
        def __init__(self):
            self.pruned, self.unpruned, self.empty, self.head = conv(16, 16), conv(16, 16), conv(16, 16), linear(16, 8)

        def __call__(self, x):
            return self.head(self.empty(self.unpruned(self.pruned(x))))

    model = with_integers(Net())
    model.unpruned.kernel[...] = jnp.ones(model.unpruned.kernel.shape)
    model.empty.kernel[...] = jnp.zeros(model.empty.kernel.shape)
    x = jax.ShapeDtypeStruct((4, 8, 8, 16), jnp.float32)
    table = plan(model, x, HERE)
    rows = {row.path: row for row in table.layers}
    assert list(rows) == ["pruned", "unpruned", "empty", "head"], "in call order"
    for row in rows.values():
        assert (row.choice == "sparse") == (MARGIN * row.sparse_seconds < row.dense_seconds)
        assert row.kernel == HERE.isa, "dense or sparse"
    assert [row.choice for row in rows.values()] == ["sparse", "dense", "sparse", "dense"]
    assert rows["empty"].density == 0
    speedup = sparseflax.speedup(rows["pruned"].shape, rows["pruned"].density, HERE)
    assert rows["pruned"].reason == f"predicted {float(speedup):.3g}x"
    upper = sparseflax.useful_range(rows["unpruned"].shape, HERE).upper
    assert rows["unpruned"].reason == f"denser than the break-even {float(upper):.2f}"
    assert rows["head"].reason == "predicted 1.02x, less than the margin of 1.1x"
    assert plan(model, x, HOPELESS).layers[0].reason == "at no density of 0.01 or more faster"
    seconds = [row.sparse_seconds if row.choice == "sparse" else row.dense_seconds for row in rows.values()]
    assert table.seconds == sum(seconds) < table.dense_seconds
    assert json.loads(json.dumps(table.to_dict()))["layers"][0]["shape"]["oc"] == 16

    lines = str(table).splitlines()
    assert lines[0].split() == "layer shape density choice kernel dense ms sparse ms reason".split()
    words = ("choice", "sparse", "dense", "sparse", "dense ")
    assert len({line.find(word) for line, word in zip(lines[:5], words, strict=True)}) == 1, "columns are aligned"
    assert lines[-1].startswith(f"predicted {1e3 * table.dense_seconds:.3f} ms dense") and HERE.name in lines[-1]
    assert np.all(pack_model(model, table).empty.kernel.unpack() == 0)


class Standardized(nnx.Conv):
    def __call__(self, inputs):
        return super().__call__(inputs)


class Position(nnx.Module):
    """A module with weights that is no layer, and one that has no weight worth a row."""

    def __init__(self):
        self.table, self.scale = nnx.Param(jnp.ones((8, 8))), nnx.GroupNorm(8, num_groups=2, rngs=RNGS)

    def __call__(self, x):
        return x + self.table[...].reshape(1, 8, 1, 8)


class Unknown(nnx.Module):
    """Layers that stay as they are."""

    def __init__(self):
        self.conv = conv(8, 8)
        self.depthwise = conv(8, 8, feature_group_count=8)
        self.own = conv(8, 8, kind=Standardized)
        self.half = conv(8, 8, dtype=jnp.bfloat16)
        self.upward, self.upward_norm = conv(8, 8, kind=nnx.ConvTranspose), norm(8)
        self.turned, self.turned_norm = conv(8, 8, kind=nnx.ConvTranspose, transpose_kernel=True), norm(8)
        self.general = nnx.LinearGeneral(8, 8, rngs=RNGS)
        self.space, self.space_norm = conv(8, 8, (3, 3, 3)), norm(8)
        self.idle = conv(8, 8)
        self.pair = nnx.data((conv(8, 8), norm(8)))
        self.position = Position()
        self.batch, self.batch_norm = conv(8, 8), norm(8)
        self.first, self.first_norm = conv(8, 8), norm(8, axis=1)

    def __call__(self, x):
        x = self.half(self.own(self.depthwise(self.conv(self.position(x))))).astype(jnp.float32)
        x = self.turned_norm(self.turned(self.upward_norm(self.upward(x))))
        x = self.space_norm(self.space(self.general(x)[:, None]))[:, 0]
        x = self.pair[1](self.pair[0](x))
        x = self.batch_norm(self.batch(x), use_running_average=False)
        return self.first_norm(self.first(x))


def test_what_cannot_be_packed_stays_and_says_why():
    model, x = with_integers(Unknown()), jnp.ones((1, 8, 8, 8))
    table = plan(model, x, HERE)
    reasons = {row.path: row.reason for row in table.layers if row.choice == "dense"}
    assert reasons == {
        "depthwise": "depthwise: 1 input channel per group",
        "own": "Standardized has a __call__ of its own",
        "half": "dtype=bfloat16: only float32 is supported",
        "turned": "transpose_kernel=True: only False is supported",
        "general": "LinearGeneral has no sparse form",
        "idle": "this call does not run it as a 1-D, 2-D or 3-D convolution or a fully connected layer",
        "pair/0": "it stands in a tuple, which cannot be changed: use an nnx.List",
        "position": "Position has no sparse form",
    }
    # A 3-D or a transposed convolution takes a norm as well; one in a tuple, on batch statistics or along another axis stays.
    assert {row.path: row.norm for row in table.layers if row.norm} == {"space": "space_norm", "upward": "upward_norm"}
    packed = pack_model(model, table)
    assert isinstance(packed.conv, SparseConv) and isinstance(packed.own, Standardized)
    model.eval()
    wanted = nnx.jit(lambda model, x: model(x))(model, x)  # as a packed one's call: XLA keeps more of bfloat16 than it has to
    # The batch statistics of batch_norm are not integers: 64 pixels, then 72 products, relative to the largest value.
    np.testing.assert_allclose(packed(x), wanted, rtol=0, atol=(64 + 72) * 2**-23 * float(jnp.abs(wanted).max()))


def test_without_the_native_kernel_everything_stays_dense(monkeypatch):
    monkeypatch.setattr(ffi, "available", False)
    monkeypatch.setattr(ffi, "reason", "no compiler")
    monkeypatch.setattr(sys.modules["sparseflax.network.plan"], "detect_machine", lambda: ATOM_C2750)
    model, x = with_integers(ResNet()), jnp.ones((1, 8, 8, 8))
    rows = plan(model, x).layers
    assert {(row.choice, row.reason) for row in rows} == {("dense", "the native kernel is not available: no compiler")}
    assert "sparse" in {row.choice for row in plan(model, x, ATOM_C2750).layers}, "a machine that was named decides"


def test_a_packed_model_is_usable_like_any_other():
    model, x = with_integers(ResNet()), jnp.ones((1, 8, 8, 8))
    packed = pack_model(model, plan(model, x, HERE))
    wanted = packed(x)
    graphdef, state = nnx.split(packed)
    np.testing.assert_array_equal(jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, x), wanted)
    view = nnx.view(packed, use_running_average=True, deterministic=True, raise_if_not_found=False)
    np.testing.assert_array_equal(view(x), wanted)
    again = plan(packed, x, HERE)
    assert {row.reason for row in again.layers} == {"already packed"}
    assert [row.shape for row in again.layers] == [row.shape for row in plan(model, x, ATOM_C2750).layers]
    np.testing.assert_array_equal(pack_model(packed, again)(x), wanted)


def test_a_single_layer_is_a_model():
    model = with_integers(conv(8, 8))
    table = plan(model, jnp.ones((1, 4, 4, 8)), HERE)
    assert isinstance(pack_model(model, table), SparseConv) and str(table).splitlines()[1].startswith(". ")


def test_linen_models_are_planned():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=True):
            x = nn.BatchNorm(use_running_average=not train)(nn.Conv(8, (3, 3), name="conv")(x))
            return nn.Dense(3, name="head")(x.mean((1, 2)))

    net, x = Net(), jnp.ones((2, 6, 6, 8))
    variables = jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), jax.eval_shape(net.init, jax.random.key(0), x))
    variables["params"]["conv"]["kernel"][:, :, 2:] = 0
    rows = plan((net, variables), x, ATOM_C2750, train=False).layers
    assert [(row.path, row.kind, row.density, row.choice) for row in rows] == [
        ("conv", "Conv", 0.25, "sparse"), ("head", "Dense", 1.0, "dense")]


def test_bad_input():
    model, other, x = with_integers(ResNet()), with_integers(Shared()), jnp.ones((1, 8, 8, 8))
    table = plan(model, x, HERE)
    wider = ResNet()
    wider.conv2 = conv(16, 16, 5)
    diverged = with_integers(ResNet())
    diverged.conv2.kernel[...] = diverged.conv2.kernel[...] * jnp.nan
    perceptron = nnx.Sequential(linear(8, 8), nnx.relu, linear(8, 8))
    dense = nn.Dense(3)
    for error, message, call in [
        (ValueError, "no convolution in Sequential with 2 Linear, 1 List; .*SparseDense.from_dense",
         lambda: plan(perceptron, x, ATOM_C2750)),
        (ValueError, r"no convolution in Dense with the params \['bias', 'kernel'\]",
         lambda: plan((dense, {"params": {"kernel": np.ones((8, 3)), "bias": np.ones(3)}}), x, ATOM_C2750)),
        (TypeError, "model is a function, wanted an nnx.Module or a pair", lambda: plan(zeros, x, ATOM_C2750)),
        (TypeError, "kernel of 'conv1' is a ShapeDtypeStruct, wanted concrete",
         lambda: plan(nnx.eval_shape(lambda: model), x, ATOM_C2750)),
        (TypeError, "wanted concrete weights: plan outside jit",
         lambda: nnx.jit(lambda m: plan(m, x, ATOM_C2750).seconds)(model)),
        (ValueError, "for another model: 'conv1' is missing, planned as.*'twice' is not in the plan.*'norm1' is missing",
         lambda: pack_model(other, table)),
        (ValueError, r"'conv2' is \(5, 5, 16, 16\), planned as \(3, 3, 16, 16\); call sparseflax.plan",
         lambda: pack_model(wider, table)),
        (TypeError, "plan is a dict, wanted what sparseflax.plan", lambda: pack_model(model, {})),
        (ValueError, "layer 'conv2': .*non-finite", lambda: pack_model(diverged, table)),
    ]:
        with pytest.raises(error, match=message):
            call()


