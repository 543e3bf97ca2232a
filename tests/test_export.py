"""A packed network as one artefact: what it computes elsewhere, without flax, and what it refuses."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparseflax
from sparseflax.conv import ffi
from sparseflax.files.safetensors import seal, unseal
from tests.machines import HERE

RUN = """
import sys
import numpy as np
import sparseflax
folder = sys.argv[1]
program = sparseflax.load_program(open(folder + "/program", "rb").read())
with np.load(folder + "/x.npz") as x:
    np.savez(folder + "/y.npz", *(program(x[name]) for name in x.files))
assert not {"flax", "optax"} & set(sys.modules), "the runtime part is to need jax alone"
"""


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.conv, self.norm = nnx.Conv(8, 16, (3, 3), rngs=rngs), nnx.BatchNorm(16, rngs=rngs)
        self.dropout, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(16, 3, rngs=rngs)
        kept = np.random.default_rng(0).random(self.conv.kernel.shape) < 0.2
        self.conv.kernel[...] = self.conv.kernel[...] * kept.astype(np.float32)

    def __call__(self, x):
        return {"logits": self.head(self.dropout(nnx.relu(self.norm(self.conv(x))).mean((1, 2))))}


@pytest.fixture(scope="module")
def packed():
    model = Net()
    packed = sparseflax.pack_model(model, sparseflax.plan(model, jnp.ones((2, 6, 7, 8)), HERE))
    assert isinstance(packed.conv, sparseflax.nnx.SparseConv)
    return packed


def inputs(*batches):
    draw = np.random.default_rng(1)
    return [draw.standard_normal((n, 6, 7, 8), np.float32) for n in batches]


def edited(data, tensors=(), **metadata):
    """An artefact with other content, sealed again."""
    old, text = unseal("program", data)
    return seal("program", {**old, **dict(tensors)}, {**text, **metadata})


def test_runs_where_only_jax_is(packed, tmp_path):
    """For any batch, in a process that imports neither flax nor the model, equal to the bit."""
    xs = inputs(1, 2, 5)
    (tmp_path / "program").write_bytes(sparseflax.export(lambda x: packed(x)["logits"], xs[1], any_batch=True))
    np.savez(tmp_path / "x.npz", *xs)
    subprocess.run([sys.executable, "-W", "error", "-c", RUN, str(tmp_path)], check=True, timeout=120,
                   env=os.environ | {"JAX_PLATFORMS": "cpu"})
    with np.load(tmp_path / "y.npz") as ys:
        for x, name in zip(xs, ys.files, strict=True):
            np.testing.assert_array_equal(ys[name], jax.jit(lambda x: packed(x)["logits"])(x))


def test_a_fixed_batch_and_a_tree_of_results(packed):
    (x,) = inputs(2)
    data = sparseflax.export(packed, jax.ShapeDtypeStruct(x.shape, jnp.float32))
    program = sparseflax.load_program(data)
    np.testing.assert_array_equal(program(x)["logits"], jax.jit(packed)(x)["logits"])
    np.testing.assert_array_equal(jax.jit(program)(x)["logits"], program(x)["logits"])
    with pytest.raises(ValueError, match="Shape mismatch"):
        program(x[:1])


def test_weights_are_stored_once_and_packed():
    """A dense network of 4 * 256 * 256 bytes at density 0.1, with 4 bytes of value and 1 of pattern per kept weight."""
    layer = nnx.Conv(256, 256, (1, 1), use_bias=False, rngs=nnx.Rngs(0))
    kept = np.random.default_rng(0).random(layer.kernel.shape) < 0.1
    layer.kernel[...] = layer.kernel[...] * kept.astype(np.float32)
    sparse = sparseflax.nnx.SparseConv.from_dense(layer)
    data = sparseflax.export(sparse, jnp.ones((1, 4, 4, 256)))
    assert 5 * sparse.kernel.nnz < len(data) < 5 * sparse.kernel.nnz + 8192


def test_any_function_of_one_argument():
    weight = jnp.arange(3.0)
    program = sparseflax.load_program(sparseflax.export(lambda x: (x["a"] * weight[None], x["b"].sum()), {
        "a": jnp.ones((2, 3)), "b": jnp.ones((2,))}, any_batch=True))
    product, total = program({"a": np.ones((5, 3), np.float32), "b": np.ones(5, np.float32)})
    assert np.array_equal(product, np.broadcast_to(np.arange(3.0), (5, 3))) and total == 5


def test_random_state_is_a_weight_like_any_other():
    def noisy(x):
        return x + jax.random.uniform(key, x.shape)

    key, x = jax.random.key(3), jnp.ones((2, 3))
    np.testing.assert_array_equal(sparseflax.load_program(sparseflax.export(noisy, x))(x), jax.jit(noisy)(x))


def test_bad_artefacts(packed, monkeypatch):
    data = sparseflax.export(packed, jnp.ones((1, 6, 7, 8)))
    flipped = bytearray(data)
    flipped[-100] ^= 1
    other = json.dumps(["fast", "portable"])
    for error, message, call in [
        (ValueError, "no program that sparseflax.export returned: no safetensors file, or a cut one: 0 bytes",
         lambda: sparseflax.load_program(b"")),
        (ValueError, "the file is cut", lambda: sparseflax.load_program(data[:-1])),
        (ValueError, "not what its digest was taken of", lambda: sparseflax.load_program(bytes(flipped))),
        (ValueError, "format is 'sparseflax network', wanted 'sparseflax program'",
         lambda: sparseflax.load_program(seal("network", {}, {}))),
        (ValueError, "has no program", lambda: sparseflax.load_program(seal("program", {}, {}))),
        (ValueError, "kernel 'sparseflax_conv_v0', this sparseflax has "
         "'sparseflax_conv_v1 sparseflax_conv_int8_v2 sparseflax_program_v2'",
         lambda: sparseflax.load_program(edited(data, target="sparseflax_conv_v0"))),
        (ValueError, r'exported where the kernels are \["fast", "portable"\], here they are .*other_kernels=True',
         lambda: sparseflax.load_program(edited(data, kernels=other))),
        (ValueError, f"jax {jax.__version__} cannot read a program that jax 0.1 exported",
         lambda: sparseflax.load_program(edited(data, {"program": np.zeros(9, np.uint8)}, jax="0.1"))),
        (ValueError, "weights are not those that the program takes",
         lambda: sparseflax.load_program(edited(data, {"weight 0": np.zeros(1, np.float32)}))),
        (ValueError, "any_batch=True, but an input has no batch dimension",
         lambda: sparseflax.export(jnp.sin, jnp.float32(1), any_batch=True)),
    ]:
        with pytest.raises(error, match=message):
            call()
    (x,) = inputs(1)
    moved = sparseflax.load_program(edited(data, kernels=other), other_kernels=True)
    np.testing.assert_array_equal(moved(x)["logits"], jax.jit(packed)(x)["logits"])
    monkeypatch.setattr(ffi, "available", False)
    monkeypatch.setattr(ffi, "reason", "no compiler")
    with pytest.raises(RuntimeError, match="needs the sparse kernel: no compiler"):
        sparseflax.load_program(data)


def test_the_light_import_has_the_whole_library_behind_it():
    code = ("import sys, sparseflax; from sparseflax import sparse_conv, pack; "
            "from sparseflax.conv import ffi; assert 'flax' not in sys.modules; "
            "from sparseflax.network.planned import Plan; assert sparseflax.Plan is Plan and callable(sparseflax.plan); "
            "assert sparseflax.nnx.SparseConv and sparseflax.prune.ramp; "
            "assert {'plan', 'pack', 'prune'} <= set(dir(sparseflax)) and not hasattr(sparseflax, 'missing')")
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, timeout=120)


def test_type_checkers_and_python_see_the_same_names():
    source = Path(sparseflax.__file__).read_text()
    (block,) = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    declared = {alias.asname for line in block.body if isinstance(line, ast.ImportFrom) for alias in line.names}
    assert declared == {*sparseflax._HOME, *sparseflax._MODULES}
    assert all(getattr(sparseflax, name).__name__.split(".")[-1] == name for name in declared)
