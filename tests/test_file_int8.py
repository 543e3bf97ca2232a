"""A network in eight bits as a file: what comes back, what it costs, what is refused, and that no edit does harm."""

import functools
import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings

import sparseflax
from sparseflax import prune
from sparseflax.cost.atomic import write_atomically
from sparseflax.files.safetensors import seal, unseal
from sparseflax.nnx import Int8Conv, Int8Dense, SparseConv
from tests.machines import HERE


class Net(nnx.Module):
    """A folded norm, groups of channels that are no whole words, a shortcut, a layer by two names, one in float32, a head."""

    def __init__(self, *, rngs):
        self.one, self.norm = nnx.Conv(12, 12, (3, 3), use_bias=False, rngs=rngs), nnx.BatchNorm(12, rngs=rngs)
        self.two = self.again = nnx.Conv(12, 12, (3, 3), feature_group_count=2, rngs=rngs)
        self.random, self.head = nnx.Conv(12, 16, (3, 3), rngs=rngs), nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.one(x)))
        x = nnx.relu(self.again(self.two(x)) + x)
        return self.head(nnx.relu(self.random(x)).mean((1, 2)))


@functools.cache
def abstract():
    return nnx.eval_shape(lambda: Net(rngs=nnx.Rngs(1)))


@pytest.fixture(scope="module")
def network():
    """(packed, plan, x)"""
    model, draw = Net(rngs=nnx.Rngs(0)), np.random.default_rng(0)
    kept = prune.constant({"one": 0.5, "again": 0.5, "head": 0.5})
    nnx.update(model, prune.one_shot(nnx.state(model, nnx.Param), kept, block=4))
    model.random.kernel[...] = model.random.kernel[...] * (draw.random(model.random.kernel.shape) < 0.2)
    model.norm.mean[...] = jnp.asarray(draw.standard_normal(12), jnp.float32)
    x = draw.standard_normal((20, 6, 6, 12)).astype(np.float32)
    planned = sparseflax.plan(model, x[:2], HERE, precision="int8", examples=x)
    planned = replace(planned, layers=tuple(replace(row, choice="sparse") for row in planned.layers))
    return sparseflax.pack_model(model, planned), planned, x[:2]


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "net.safetensors"
    sparseflax.save(path, *network[:2])
    return path


def edited(file, folder, tensors=(), **metadata):
    """A copy with other content, sealed again."""
    arrays, text = unseal("network", file.read_bytes())
    write_atomically(folder / "edited", seal("network", {**arrays, **dict(tensors)}, {**text, **metadata}))
    return folder / "edited"


@pytest.mark.parametrize("model", [abstract(), Net(rngs=nnx.Rngs(2))], ids=["abstract", "dense"])
def test_what_was_saved_comes_back(network, file, model):
    packed, planned, x = network
    loaded, table = sparseflax.load(file, model)
    assert table == planned and loaded.again is loaded.two
    for layer, kind in ((loaded.one, Int8Conv), (loaded.two, Int8Conv), (loaded.random, SparseConv), (loaded.head, Int8Dense)):
        assert type(layer) is kind
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(packed))
    for before, after in ((packed.one, loaded.one), (packed.two, loaded.two), (packed.head, loaded.head)):
        assert (before.inputs, before.outputs, before.pattern) == (after.inputs, after.outputs, after.pattern)
    run = jax.jit(lambda m, x: m(x))
    np.testing.assert_array_equal(run(loaded, x), run(packed, x))


def test_a_word_of_four_takes_five_bytes(tmp_path):
    """4 bytes of weights and 1 for their place, against 20 of four weights in float32."""
    model = nnx.Sequential(nnx.Conv(256, 256, (3, 3), rngs=nnx.Rngs(0)))
    nnx.update(model, prune.one_shot(nnx.state(model, nnx.Param), prune.constant({"layers/0": 0.1}), block=4))
    x = np.random.default_rng(0).standard_normal((16, 4, 4, 256)).astype(np.float32)
    sizes = {}
    for precision in ("float32", "int8"):
        planned = sparseflax.plan(model, x[:1], HERE, precision=precision, examples=x)
        sparseflax.save(tmp_path / "net", sparseflax.pack_model(model, planned), planned)
        sizes[precision] = (tmp_path / "net").stat().st_size
    words = np.count_nonzero(model.layers[0].kernel[...]) // 4
    assert 5 * words <= sizes["int8"] <= 5 * words + 12 * 256 + 8192  # a scale, a bias, a correction by channel, the plan
    assert sizes["int8"] < 0.3 * sizes["float32"]


RUN = """
import sys
import numpy as np
import sparseflax
folder = sys.argv[1]
with open(folder + "/program", "rb") as file:
    program = sparseflax.load_program(file.read())
np.save(folder + "/y.npy", program(np.load(folder + "/x.npy")))
assert not {"flax", "optax"} & set(sys.modules), "the runtime part is to need jax alone"
"""


@pytest.mark.parametrize("fuse", [True, False])
def test_a_program_in_eight_bits_runs_where_only_jax_is(network, file, tmp_path, fuse):
    """One native program, and layers that are called one by one; of what was loaded from a file."""
    packed, x = sparseflax.load(file, abstract())[0], network[2]
    call = packed if fuse else lambda x: Net.__call__(packed, x)
    (tmp_path / "program").write_bytes(sparseflax.export(call, x[:1], any_batch=True))
    np.save(tmp_path / "x.npy", x)
    subprocess.run([sys.executable, "-W", "error", "-c", RUN, str(tmp_path)], check=True, timeout=120,
                   env=os.environ | {"JAX_PLATFORMS": "cpu"})
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), jax.jit(call)(x))


def test_bad_files(network, file, tmp_path):
    packed, planned, _ = network
    arrays, text = unseal("network", file.read_bytes())
    table = json.loads(text["plan"])

    def load(tensors=(), **changes):
        return lambda: sparseflax.load(edited(file, tmp_path, tensors, plan=json.dumps({**table, **changes})), abstract())

    first = table["layers"][0]
    assert first["path"] == "one"
    words = arrays["one/words"].copy()
    words[0] = -128
    other = replace(planned, layers=(replace(planned.layers[0], inputs=sparseflax.Quantization(1.0, 3)), *planned.layers[1:]))
    for parts, call in [
        (["'one': a packed int8 weight is -128"], load({"one/words": words})),
        (["'one': packed arrays are", "'words': 'float32'", "wanted those of QuantizedKernel.to_arrays()"],
         load({"one/words": words.astype(np.float32)})),
        (["'again': packed scale has shape (1,)"], load({"again/scale": np.ones(1, np.float32)})),
        (["'head': its kernel is (1, 1, 16, 8) in 1 groups, the model's (1, 1, 16, 4) in 1"],
         load({"head/scale": np.ones(8, np.float32), "head/layout": np.where(np.arange(7) == 3, 8, arrays["head/layout"])})),
        (["'one/sums' is not in the model"], load({"one/sums": np.zeros(12, np.int32)})),
        (["no packed network", "scale=-1.0, wanted one between"],
         load(layers=[{**first, "inputs": {"scale": -1.0, "zero": 0}}, *table["layers"][1:]])),
        (["does not fit Net", "broadcast"], load(layers=[{**first, "correction": [0.0] * 5}, *table["layers"][1:]])),
        (["the inputs of ['one'] are rounded by", "zero=3"], lambda: sparseflax.save(tmp_path / "net", packed, other)),
    ]:
        with pytest.raises(ValueError) as raised:
            call()
        assert all(part in str(raised.value) for part in parts), str(raised.value)


@given(st.data())
@settings(max_examples=40)
def test_edits_are_refused_or_harmless(network, file, tmp_path_factory, data):
    """Any edit of an array, with the digest renewed: it is refused by a ValueError, or the network runs."""
    arrays, _ = unseal("network", file.read_bytes())
    name = data.draw(st.sampled_from([name for name in arrays if name.endswith(("gaps", "layout", "words", "scale"))]))
    array = arrays[name].copy()
    array[data.draw(st.integers(0, array.size - 1))] = data.draw(st.integers(-2**31, 2**31 - 1) if name.endswith("words")
                                                                 else st.integers(0, 255))
    copy = edited(file, tmp_path_factory.mktemp("edited"), {name: array[:data.draw(st.integers(0, array.size))]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            loaded, _ = sparseflax.load(copy, abstract())
        except ValueError:
            return
    assert loaded(network[2]).shape == (2, 4)
