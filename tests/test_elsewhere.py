"""Pruned and packed here for a CPU that is somewhere else, known from a file; and run where there is no kernel at all."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import sparseflax
from sparseflax.conv import ffi
from sparseflax.cost.machine import TYPICAL, to_dict
from tests.machines import HERE

native = pytest.mark.skipif(not ffi.kernels(), reason="no native kernel")
# Two servers: one on whose cores a kept weight costs little, and one on which it costs far more than a dense one.
QUICK = replace(HERE, name="Server A", isa=ffi.isa(), threads=2, fitted=TYPICAL)
SLOW = replace(HERE, name="Server B", isa="portable", threads=4, source="calibrated",
               fitted=replace(TYPICAL, sparse=TYPICAL.sparse._replace(fma=1e-6, weight=1e-6)))


@pytest.fixture
def model():
    layer = nnx.Sequential(nnx.Conv(64, 64, (3, 3), rngs=nnx.Rngs(0)))
    kernel = layer.layers[0].kernel
    kernel[...] = kernel[...] * (np.random.default_rng(0).random(kernel.shape) < 0.05).astype(np.float32)
    return layer


X = jnp.ones((1, 14, 14, 64))


@native
def test_a_plan_from_the_files_of_two_machines(model, tmp_path):
    for machine, choice in ((QUICK, "sparse"), (SLOW, "dense")):
        sparseflax.save_machine(tmp_path / "machine.json", machine)
        found = sparseflax.load_machine(tmp_path / "machine.json")
        plan = sparseflax.plan(model, X, found)
        assert found == machine and [row.choice for row in plan.layers] == [choice]
        with pytest.warns(RuntimeWarning, match=f"the plan was made for {machine.name}"):
            packed = sparseflax.pack_model(model, plan)
        np.testing.assert_allclose(packed(X), model(X), rtol=0, atol=1e-4)
    assert [file.name for file in tmp_path.iterdir()] == ["machine.json"]


@native
def test_a_linen_model_is_packed_for_another_machine(tmp_path):
    module = nn.Conv(64, (3, 3))
    variables = {"params": {"kernel": jnp.zeros((3, 3, 64, 64)).at[0, 0].set(1.0), "bias": jnp.zeros(64)}}
    plan = sparseflax.plan((module, variables), X, QUICK)
    with pytest.warns(RuntimeWarning, match="the plan was made for Server A"):
        packed, packed_variables = sparseflax.pack_model((module, variables), plan, X)
    assert plan.layers[0].choice == "sparse" and packed.apply(packed_variables, X).shape == (1, 14, 14, 64)
    with pytest.raises(ValueError, match="the plan was made for the input"):
        sparseflax.pack_model((module, variables), plan, X[:, 1:])


def test_a_machine_nobody_has_seen(model, tmp_path):
    """It is planned for, dense where its kernel cannot be counted; by its peak and bandwidth if the rates are left out."""
    unseen = replace(QUICK, name="Quantum 9000", isa="sve2", lanes=64, cores=512, threads=1024)
    sparseflax.save_machine(tmp_path / "machine.json", unseen)
    found = sparseflax.load_machine(tmp_path / "machine.json")
    row, = sparseflax.plan(model, X, found).layers
    assert row.choice == "dense" and "the counts of the 'sve2' kernel" in row.reason and "Machine without rates" in row.reason
    row, = sparseflax.plan(model, X, replace(found, fitted=None)).layers
    assert row.choice == "sparse"


def test_what_a_calibration_stored_is_a_machine_too(tmp_path):
    (tmp_path / "stored.json").write_text(json.dumps({"key": {}, "errors": {}, "machine": to_dict(SLOW)}))
    assert sparseflax.load_machine(tmp_path / "stored.json") == SLOW


@pytest.mark.parametrize("text, why", [
    ("", "JSONDecodeError"), ("[]", "AttributeError"), ("{}", "KeyError: 'l1_bytes'"), ("\x00\xff", "JSONDecodeError"),
    (json.dumps(to_dict(QUICK) | {"colour": "red"}), "unexpected keyword argument 'colour'"),
    (json.dumps(to_dict(QUICK) | {"peak": -1.0}), "these have to be positive"),
    (json.dumps(to_dict(QUICK))[:200], "JSONDecodeError")])
def test_bad_files(tmp_path, text, why):
    (tmp_path / "machine.json").write_text(text)
    with pytest.raises(ValueError, match=rf"machine.json holds no machine \(.*{why}.*python -m sparseflax machine FILE"):
        sparseflax.load_machine(tmp_path / "machine.json")
    with pytest.raises(FileNotFoundError):
        sparseflax.load_machine(tmp_path / "missing.json")


ANYWHERE = """
import jax, jax.numpy as jnp, numpy as np, sparseflax
from flax import nnx
if jax.default_backend() == "cpu":
    raise SystemExit(3)
model = nnx.Sequential(nnx.Conv(16, 32, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
kernel = model.layers[0].kernel
kernel[...] = jnp.where(jnp.abs(kernel[...]) > 0.1, kernel[...], 0.0)
layer = sparseflax.nnx.SparseConv.from_dense(model.layers[0], activation="relu")
x = jax.random.normal(jax.random.key(0), (2, 9, 9, 16))
with jax.default_matmul_precision("highest"):
    y, wanted = jax.jit(layer)(x), jax.jit(model)(x)
assert y.devices() == x.devices() and not any(device.platform == "cpu" for device in y.devices())
np.testing.assert_allclose(y, wanted, rtol=0, atol=1e-4)
"""


def test_a_packed_layer_runs_on_an_accelerator():
    """As a dense convolution, in a process of its own that may see more than CPUs."""
    there = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", ANYWHERE], env=there, capture_output=True, text=True, timeout=240)
    if done.returncode == 3:
        pytest.skip("no GPU or TPU")
    assert done.returncode == 0, done.stderr
