"""Linen models in eight bits: planned, packed and stored, bit for bit what the same nnx model gives."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

import sparseflax
from sparseflax.cost.atomic import write_atomically
from sparseflax.files.safetensors import seal, unseal
from sparseflax.network.linen.packed import Words
from tests.machines import HERE
from tests.test_plan import zeros

X = np.random.default_rng(0).standard_normal((40, 9, 9, 8)).astype(np.float32)
CONVS = {"stem": (8, 16, (3, 3), {"strides": 2, "padding": 1}), "left": (16, 16, (3, 3), {"use_bias": False}),
         "right": (16, 16, (1, 1), {}), "grouped": (16, 32, (3, 3), {"feature_group_count": 2, "kernel_dilation": 2}),
         "wise": (32, 32, (3, 3), {"feature_group_count": 32}), "scattered": (32, 8, (1, 1), {})}


class Net(nn.Module):
    """A folded norm, a residual, a concatenation, groups, a depthwise convolution, one not pruned by blocks, and a head."""

    @nn.compact
    def __call__(self, x, train=True):
        def conv(name, x):
            ic, oc, size, settings = CONVS[name]
            return nn.Conv(oc, size, name=name, **settings)(x)

        norm = nn.BatchNorm(use_running_average=not train, name="norm")
        x = nn.relu(norm(conv("stem", x)))
        x = conv("right", nn.relu(conv("left", x))) + x
        x = conv("scattered", nn.relu(conv("wise", nn.relu(conv("grouped", nn.relu(x))))))
        return nn.Dense(5, name="head")(jnp.concatenate([x, nn.relu(x)], -1).mean((1, 2)))


class Same(nnx.Module):
    """The same as an nnx model, of the Linen model's variables."""

    def __init__(self, variables):
        params, rngs = variables["params"], nnx.Rngs(0)
        for name, (ic, oc, size, settings) in CONVS.items():
            setattr(self, name, nnx.Conv(ic, oc, size, kernel_init=zeros, rngs=rngs, **settings))
        self.norm, self.head = nnx.BatchNorm(16, rngs=rngs), nnx.Linear(16, 5, kernel_init=zeros, rngs=rngs)
        for name, leaves in params.items():
            for leaf, array in leaves.items():
                getattr(getattr(self, name), leaf).set_value(jnp.asarray(array))
        for leaf, array in variables["batch_stats"]["norm"].items():
            getattr(self.norm, leaf).set_value(jnp.asarray(array))

    def __call__(self, x):
        x = nnx.relu(self.norm(self.stem(x)))
        x = self.right(nnx.relu(self.left(x))) + x
        x = self.scattered(nnx.relu(self.wise(nnx.relu(self.grouped(nnx.relu(x))))))
        return self.head(jnp.concatenate([x, nnx.relu(x)], -1).mean((1, 2)))


@pytest.fixture(scope="module")
def linen():
    """(module, variables), pruned, plan, packed pair"""
    draw = np.random.default_rng(1)
    module: Any = Net()
    drawn = jax.tree.map(lambda leaf: (0.1 + 0.2 * np.abs(draw.standard_normal(leaf.shape))).astype(np.float32),
                         jax.eval_shape(module.init, jax.random.key(0), X[:1]))
    signs = {name: leaves | {"kernel": leaves["kernel"] * draw.choice(np.float32([-1, 1]), leaves["kernel"].shape)}
             for name, leaves in drawn["params"].items() if "kernel" in leaves}
    params = {**drawn["params"], **signs}
    params = sparseflax.prune.one_shot(params, sparseflax.prune.constant(
        {name: 0.25 for name in ("stem", "left", "right", "grouped", "head")}), block=4)
    kernel = params["scattered"]["kernel"]
    params["scattered"]["kernel"] = kernel * (draw.random(kernel.shape) < 0.1)
    model = module, drawn | {"params": params}
    plan = sparseflax.plan(model, X[:2], HERE, precision="int8", examples=X, train=False)
    return model, plan, sparseflax.pack_model(model, plan, X[:2], train=False)


def run(packed, x):
    module, variables = packed
    return jax.jit(lambda variables, x: module.apply(variables, x, train=False))(variables, x)


def test_plan_and_outputs_are_those_of_the_same_nnx_model(linen):
    (_, variables), plan, packed = linen
    same = Same(variables)
    wanted = sparseflax.plan(same, X[:2], HERE, precision="int8", examples=X)
    assert [dataclasses.replace(row, kind="") for row in plan.layers] == [
        dataclasses.replace(row, kind="") for row in wanted.layers]
    rows = {row.path: row for row in plan.layers}
    assert {name for name, row in rows.items() if row.inputs is not None} == {"stem", "left", "right", "grouped", "head"}
    assert "prune with block=4" in rows["scattered"].reason and rows["wise"].reason == "depthwise: 1 input channel per group"
    for fuse in (True, False):
        ours, theirs = (sparseflax.pack_model(*arguments, fuse=fuse, **call) for arguments, call in (
            ((linen[0], plan, X[:2]), {"train": False}), ((same, wanted), {})))
        np.testing.assert_array_equal(run(ours, X[:2]), jax.jit(lambda m, x: m(x))(theirs, X[:2]))
    exact = jax.jit(lambda m, x: m(x))(same, X[:2])
    assert np.linalg.norm(run(packed, X[:2]) - exact) < 0.05 * np.linalg.norm(exact)


def test_a_stored_network_comes_back(linen, tmp_path):
    model, plan, packed = linen
    path = tmp_path / "net"
    sparseflax.save(path, packed, plan)
    for like in (model[1], jax.eval_shape(lambda: model[0].init(jax.random.key(1), X[:1]))):
        loaded, table = sparseflax.load(path, (model[0], like))
        assert (loaded[0], table) == (packed[0], plan)
        arrays = {path: leaf for path, leaf in flatten_dict(packed[1]).items() if hasattr(leaf, "shape")}
        jax.tree.map(np.testing.assert_array_equal, flatten_dict(loaded[1]), arrays)
        np.testing.assert_array_equal(run(loaded, X[:2]), run(packed, X[:2]))

    arrays, text = unseal("network", path.read_bytes())
    assert "params/left/sums" not in arrays  # which follow from the words
    for content, message in (
            (arrays | {"params/left/layout": np.asarray([3, 3, 4, 32, 1, 4, 16])}, "'left': packed scale has shape"),
            (arrays | {"params/left/bias": np.zeros(3, np.float32)},
             r"'params/left/bias' is float32\[3\], the model has float32\[16\]"),
            ({name: array for name, array in arrays.items() if name != "params/left/words"}, "'left': packed arrays are")):
        write_atomically(path, seal("network", content, text))
        with pytest.raises(ValueError, match=f"does not fit Net: {message}"):
            sparseflax.load(path, model)
    wrong = dataclasses.replace(plan, layers=tuple(
        dataclasses.replace(row, inputs=sparseflax.Quantization(1.0, 0)) if row.path == "left" else row for row in plan.layers))
    with pytest.raises(ValueError, match=r"the inputs of \['left'\] are rounded by"):
        sparseflax.save(path, packed, wrong)


def test_a_layer_that_is_the_model():
    """Of one dimension: its words are params of the model itself."""
    conv, x = nn.Conv(16, (3,)), np.random.default_rng(2).standard_normal((20, 30, 8)).astype(np.float32)
    variables = jax.jit(conv.init)(jax.random.key(0), x)
    variables = {"params": sparseflax.prune.one_shot(variables["params"], sparseflax.prune.constant({"": 0.25}), block=4)}
    plan = sparseflax.plan((conv, variables), x[:1], HERE, precision="int8", examples=x)
    module, arrays = sparseflax.pack_model((conv, variables), plan, x[:1])
    assert isinstance(dict(module.patterns)[""], Words) and set(arrays["params"]) == {"words", "scale", "sums", "bias"}
    exact: Any = conv.apply(variables, x[:1])
    assert np.linalg.norm(module.apply(arrays, x[:1]) - exact) < 0.02 * np.linalg.norm(exact)


def test_what_a_layer_takes_in_remat_is_not_seen():
    class Remat(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(nn.Conv)(16, (3, 3), name="hidden")(nn.Conv(8, (3, 3), name="seen")(x))

    variables = jax.jit(Remat().init)(jax.random.key(0), X[:1])
    rows = {row.path: row for row in sparseflax.plan((Remat(), variables), X[:1], HERE, precision="int8", examples=X).layers}
    assert rows["hidden"].reason.endswith("float32: a jit or remat hides its inputs") and rows["seen"].inputs is not None
