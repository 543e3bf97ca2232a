"""A packed network as a file: what comes back, what it costs, and that no damage or edit gets through or does harm."""

import functools
import json
import warnings
from dataclasses import replace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings

import sparseflax
from sparseflax.cost.atomic import write_atomically
from sparseflax.cost.machine import ATOM_C2750
from sparseflax.files.safetensors import DTYPES, dump, parse, seal, unseal
from sparseflax.layers.nnx import SparseConv, SparseDense
from tests.machines import HERE


class Net(nnx.Module):
    """Folded and kept batch norms, groups, a block known by two names, random state, an array that is no Variable."""

    def __init__(self, channels=32, *, rngs):
        self.conv, self.norm = nnx.Conv(8, channels, (3, 3), use_bias=False, rngs=rngs), nnx.BatchNorm(channels, rngs=rngs)
        self.block = self.again = nnx.Conv(channels, channels, (3, 3), feature_group_count=2, rngs=rngs)
        self.stage = nnx.List([nnx.Conv(channels, 16, (1, 1), dtype=jnp.bfloat16, rngs=rngs), nnx.BatchNorm(16, rngs=rngs)])
        self.dropout, self.scale = nnx.Dropout(0.5, rngs=rngs), nnx.data(jnp.full((), 2.0))
        self.small, self.small_norm = nnx.Conv(16, 8, (3, 3), param_dtype=jnp.bfloat16, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = self.again(self.block(nnx.relu(self.norm(self.conv(x)))))
        x = self.dropout(self.stage[1](self.stage[0](x))) * self.scale
        return self.head(self.small_norm(self.small(x)).mean((1, 2)))


@functools.cache
def abstract(**sizes):
    return nnx.eval_shape(lambda: Net(**sizes, rngs=nnx.Rngs(1)))


@pytest.fixture(scope="module")
def network():
    """(packed, plan, x): pruned, with statistics that are not those of a new network, and a value that became 0."""
    model, draw = Net(rngs=nnx.Rngs(0)), np.random.default_rng(0)
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.BatchNorm):
            module.mean[...] = jnp.asarray(draw.standard_normal(module.mean.shape).astype(np.float32))
            module.var[...] = jnp.asarray(draw.random(module.var.shape).astype(np.float32))
    for layer in (model.conv, model.block, model.head):
        layer.kernel[...] = layer.kernel[...] * (draw.random(layer.kernel.shape) < 0.2).astype(np.float32)
    model.scale = jnp.full((), 3.0)
    x = jnp.asarray(draw.standard_normal((2, 6, 6, 8)).astype(np.float32))
    planned = sparseflax.plan(model, x, HERE)
    packed = sparseflax.pack_model(model, planned)
    packed.conv.values[0] = 0.0
    return packed, planned, x


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "net.safetensors"
    sparseflax.save(path, *network[:2])
    return path


def edited(path, folder, tensors=(), remove=(), **metadata):
    """A copy with other content, sealed again, as somebody would who knows how."""
    arrays, text = unseal("network", path.read_bytes())
    arrays = {name: array for name, array in {**arrays, **dict(tensors)}.items() if name not in remove}
    copy = folder / "edited"
    write_atomically(copy, seal("network", arrays, {**text, **metadata}))
    return copy


@pytest.mark.parametrize("model", [abstract(), Net(rngs=nnx.Rngs(2))], ids=["abstract", "dense"])
def test_what_was_saved_comes_back(network, file, model):
    packed, planned, x = network
    before = jax.tree.leaves(nnx.state(model))
    loaded, table = sparseflax.load(file, model)
    assert table == planned and isinstance(loaded, Net)
    assert isinstance(loaded.conv, SparseConv) and loaded.again is loaded.block and isinstance(loaded.block, SparseConv)
    assert loaded.conv.pattern == packed.conv.pattern, "the weight that became 0 keeps its place"
    for kinds in (nnx.Param, nnx.BatchStat):
        jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded, kinds), nnx.state(packed, kinds))
    np.testing.assert_array_equal(jax.jit(loaded)(x), jax.jit(packed)(x))
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(nnx.state(loaded)))
    assert all(now is then for now, then in zip(jax.tree.leaves(nnx.state(model)), before, strict=True)), "the model stays"


def test_a_file_is_as_small_as_the_network_is_sparse(tmp_path):
    """5 bytes for each kept weight, of which 1 for its place, against 4 for each dense one, and the plan."""
    model = nnx.Sequential(nnx.Conv(128, 128, (3, 3), use_bias=False, rngs=nnx.Rngs(0)))
    kernel = model.layers[0].kernel
    kernel[...] = kernel[...] * (np.random.default_rng(0).random(kernel.shape) < 0.1).astype(np.float32)
    planned = sparseflax.plan(model, jnp.ones((1, 8, 8, 128)), HERE)
    sparseflax.save(tmp_path / "net", sparseflax.pack_model(model, planned), planned)
    kept = np.count_nonzero(kernel[...])
    assert 5 * kept <= (tmp_path / "net").stat().st_size <= 5 * kept + 4096 < 0.14 * 4 * kernel.size
    assert [entry.name for entry in tmp_path.iterdir()] == ["net"], "no temporary file is left"


def test_a_network_packed_by_hand(tmp_path):
    """Its sparse layers stand in the model's own code."""
    net = nnx.Sequential(SparseConv(4, 8, (3, 3), rngs=nnx.Rngs(0)), SparseDense(8, 3, use_bias=False, rngs=nnx.Rngs(0)))
    planned = sparseflax.plan(net, jnp.ones((1, 4, 4, 4)), HERE)
    sparseflax.save(tmp_path / "net", net, planned)
    other = nnx.Sequential(SparseConv(4, 8, (3, 3), rngs=nnx.Rngs(1)), SparseDense(8, 3, use_bias=False, rngs=nnx.Rngs(1)))
    loaded, _ = sparseflax.load(tmp_path / "net", other)
    np.testing.assert_array_equal(loaded(jnp.ones((1, 4, 4, 4))), net(jnp.ones((1, 4, 4, 4))))


def test_a_failed_write_leaves_the_old_file(network, file, monkeypatch):
    old = file.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        sparseflax.save(file, *network[:2])
    assert file.read_bytes() == old and len(list(file.parent.iterdir())) == 1


def test_another_machine_is_named(network, file, tmp_path):
    packed, planned, x = network
    sparseflax.save(tmp_path / "net", packed, replace(planned, machine=ATOM_C2750))
    with pytest.warns(RuntimeWarning, match=r"was packed for Intel Atom C2750 \(sse4.2, 8 threads\), this is .*plan and pack"):
        loaded, _ = sparseflax.load(tmp_path / "net", abstract())
    np.testing.assert_array_equal(loaded(x), packed(x))


def test_bad_files(network, file, tmp_path):
    packed, planned, x = network
    arrays, text = unseal("network", file.read_bytes())
    table = json.loads(text["plan"])
    gaps, layout = arrays["conv/gaps"], arrays["conv/layout"]
    flipped = bytearray(file.read_bytes())
    flipped[-1] ^= 1
    (tmp_path / "flipped").write_bytes(flipped)
    (tmp_path / "cut").write_bytes(file.read_bytes()[:-1])
    (tmp_path / "program").write_bytes(seal("program", {}, {}))
    newer = dump(arrays, {**text, "format": "sparseflax network", "version": "2"})
    (tmp_path / "newer").write_bytes(newer)

    def load(path, **sizes):
        return lambda: sparseflax.load(path, abstract(**sizes))

    def with_plan(**changes):
        return edited(file, tmp_path, plan=json.dumps({**table, **changes}))

    for error, parts, call in [
        (FileNotFoundError, ["missing"], load(tmp_path / "missing")),
        (ValueError, ["cut is no packed network", "the file is cut"], load(tmp_path / "cut")),
        (ValueError, ["content is not what its digest was taken of"], load(tmp_path / "flipped")),
        (ValueError, ["'sparseflax program', wanted 'sparseflax network'"], load(tmp_path / "program")),
        (ValueError, ["format version 2, this sparseflax reads 1: install the sparseflax that wrote it"],
         load(tmp_path / "newer")),
        (ValueError, ["does not fit Net", "'conv' is (3, 3, 8, 16), planned as (3, 3, 8, 32)", "'again'", "'stage/0'"],
         load(file, channels=16)),
        (ValueError, ["'conv/bias' is missing", "'head/bias' is missing", "'more' is not in the model",
                      "'stage/1/mean' is int32[3], the model has float32[16]"],
         lambda: load(edited(file, tmp_path, {"more": gaps, "stage/1/mean": np.zeros(3, np.int32)},
                             remove=("conv/bias", "head/bias")))()),
        (ValueError, ["'conv': the packed pattern points outside", "'again': packed arrays lack ['gaps']"],
         lambda: load(edited(file, tmp_path, {"conv/gaps": np.full_like(gaps, 254)}, remove=("again/gaps",)))()),
        (ValueError, ["'conv': packed layout", "is no kernel's"],
         lambda: load(edited(file, tmp_path, {"conv/layout": -layout}))()),
        (ValueError, ["'conv': its kernel is (3, 3, 8, 64) in 1 groups, the model's (3, 3, 8, 32) in 1"],
         lambda: load(edited(file, tmp_path, {"conv/layout": np.asarray([3, 3, 8, 64, 1, 8])}))()),
        (ValueError, ["'conv': packed values have shape (1,)"],
         lambda: load(edited(file, tmp_path, {"conv/values": np.ones(1, np.float32)}))()),
        (ValueError, ["no packed network", "'None' in its plan is no Plan"],
         lambda: load(edited(file, tmp_path, plan="null"))()),
        (ValueError, ["'3' in its plan is no str"],
         lambda: load(with_plan(inputs=3))()),
        (ValueError, ["a Plan with ['more'] missing or unknown"], lambda: load(with_plan(more=3))()),
        (ValueError, ["no packed network", "layer 'conv' has a kernel (3, 3, 8, 32), planned as"],
         lambda: load(with_plan(layers=[{**row, "shape": {**row["shape"], "ic": 2**31}} for row in table["layers"]]))()),
        (ValueError, ["does not fit Net", "batch norm 'head' is missing"],
         lambda: load(with_plan(layers=[{**table["layers"][0], "norm": "head"}, *table["layers"][1:]]))()),
        (TypeError, ["model is a function, wanted the nnx.Module that was packed, or a pair"],
         lambda: sparseflax.load(file, lambda x: x)),  # type: ignore[type-var]
        (TypeError, ["plan is a dict, wanted the one"], lambda: sparseflax.save(file, packed, {})),  # type: ignore[arg-type]
        (ValueError, ["not packed by this plan: its sparse layers are []"],
         lambda: sparseflax.save(file, Net(rngs=nnx.Rngs(0)), planned)),
    ]:
        with pytest.raises(error) as raised:
            call()
        assert all(part in str(raised.value) for part in parts), str(raised.value)


@given(st.data())
def test_safetensors_round_trip(data):
    names = st.text(max_size=5).filter(lambda name: name != "__metadata__")
    kinds = st.tuples(st.sampled_from(list(DTYPES)), st.lists(st.integers(0, 3), max_size=3))
    arrays = {name: np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(DTYPES[dtype])
              for name, (dtype, shape) in data.draw(st.dictionaries(names, kinds, max_size=5)).items()}
    text = data.draw(st.dictionaries(st.text(max_size=5), st.text(max_size=9), max_size=3))
    written = dump(arrays, text)
    found, metadata = parse(written)
    assert metadata == text and found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        np.testing.assert_array_equal(found[name], array)
    assert dump(found, metadata) == written
    assert (8 + int.from_bytes(written[:8], "little")) % 8 == 0, "the arrays are aligned"


def test_safetensors_as_the_format_says():
    """Against the bytes of the published example, written by hand."""
    header = b'{"__metadata__":{"a":"b"},"t":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]}}  '
    data = len(header).to_bytes(8, "little") + header + b"\x80\x3f\x00\x40"
    found, text = parse(data)
    assert text == {"a": "b"} and found["t"].dtype == ml_dtypes.bfloat16 and found["t"].tolist() == [[1.0], [2.0]]
    with pytest.raises(TypeError, match="cannot hold {'c': 'complex64'}"):
        dump({"c": np.zeros(1, np.complex64)}, {})


ENTRY = {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}


@pytest.mark.parametrize(("header", "message"), [
    (b"[1]", "no JSON object"), (b"{", "damaged safetensors header"), (b"\xff\xfe", "damaged safetensors header"),
    (b'{"t":' * 100000, "damaged safetensors header"), (b'{"a":{},"a":{}}', "a name occurs twice"),
    ({"__metadata__": {"a": 1}}, "should hold texts only"), ({"t": 3}, "tensor 't' is 3"),
    ({"t": {**ENTRY, "dtype": "F4"}}, "tensor 't' is {'dtype': 'F4'"), ({"t": {**ENTRY, "dtype": []}}, "tensor 't' is"),
    ({"t": {**ENTRY, "shape": [True, 2]}}, "tensor 't' is"), ({"t": {**ENTRY, "shape": [10**30, 0]}}, "tensor 't' is"),
    ({"t": {**ENTRY, "shape": [-2, -1]}}, "tensor 't' is"), ({"t": {**ENTRY, "shape": [1] * 99}}, "tensor 't' is"),
    ({"t": {**ENTRY, "data_offsets": [0, 2.0]}}, "tensor 't' is"), ({"t": {**ENTRY, "more": 1}}, "tensor 't' is"),
    ({"t": {**ENTRY, "data_offsets": [2, 0]}}, "wanted 2 from 0 on"), ({"t": {**ENTRY, "data_offsets": [1, 3]}}, "from 0 on"),
    ({"t": {**ENTRY, "shape": [3], "data_offsets": [0, 3]}}, "the bytes 0 to 3 of 2"), ({"t": ENTRY, "u": ENTRY}, "from 2 on"),
    ({}, "2 bytes follow the last tensor"), ({"t": {**ENTRY, "dtype": "BOOL"}}, "only 0 and 1"),
])
def test_safetensors_headers_are_checked(header, message):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with pytest.raises(ValueError) as raised:
        parse(len(text).to_bytes(8, "little") + text + b"\x07\x08")
    assert message in str(raised.value)


@given(st.data())
@settings(max_examples=60)
def test_damage_is_an_error_that_says_so(file, data):
    """Flipped bytes, cuts, and bytes that were put in or taken out."""
    content = bytearray(file.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "length"]))
    if kind == "flip":
        content[where] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del content[where:]
    elif kind == "insert":
        content[where:where] = data.draw(st.binary(min_size=1, max_size=9))
    else:
        content[:8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    if content == file.read_bytes():
        return
    with pytest.raises(ValueError):
        unseal("network", bytes(content))


# What an edited header or plan may hold: plain JSON of any form.
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(
    [10**400, "dense", "sparse", "norm", "head", "conv"]), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.text(max_size=5), inner, max_size=3), max_leaves=5)


def places(tree, path=()):
    """Every place in a JSON tree."""
    yield path
    for key, inner in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(inner, (*path, key))


@given(st.data())
@settings(max_examples=60)
def test_edits_are_refused_or_harmless(network, file, tmp_path_factory, data):
    """Any edit of the plan or of an array, with the digest renewed: it is refused by a ValueError, or the network runs."""
    arrays, text = unseal("network", file.read_bytes())
    if data.draw(st.booleans()):
        tree = json.loads(text["plan"])
        path = data.draw(st.sampled_from([path for path in places(tree) if path]))
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = data.draw(JSON)
        copy = edited(file, tmp_path_factory.mktemp("edited"), plan=json.dumps(tree))
    else:
        name = data.draw(st.sampled_from([name for name in arrays if name.endswith(("gaps", "layout", "values"))]))
        array = arrays[name].copy()
        array[data.draw(st.integers(0, array.size - 1))] = data.draw(st.integers(0, 255))
        copy = edited(file, tmp_path_factory.mktemp("edited"), {name: array[:data.draw(st.integers(0, array.size))]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # another machine
        try:
            loaded, planned = sparseflax.load(copy, abstract())
        except ValueError:
            return
    assert str(planned) and loaded(network[2]).shape == (2, 4)
