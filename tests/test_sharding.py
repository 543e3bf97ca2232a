"""Batches that are sharded over devices: each runs its own images, and nothing is sent.

The data are small whole numbers, of which float32 computes every sum exactly: the tests ask for equality.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from reference import integers

import sparseflax as sf
from sparseflax.conv import ffi
from sparseflax.network.fuse import fuse

pytestmark = pytest.mark.skipif(not ffi.available, reason="without the native module XLA shards what runs")
DRAW = np.random.default_rng(0)
MASK = DRAW.random((3, 3, 8, 8)) < 0.3
KERNEL = integers(DRAW, 3, 3, 8, 8) * MASK.astype(np.float32)
X, BIAS = integers(DRAW, 4, 6, 5, 8), integers(DRAW, 8)
FLOAT, INT8 = sf.pack(KERNEL), sf.pack_int8(KERNEL, sf.Quantization(0.5, 7))
SENT = re.compile(r"all-(gather|reduce|to-all)|collective-|dynamic-slice")


def network(x, packed, bias):
    """Two results, one of a step with a residual and one of a mean."""
    y = nnx.relu(sf.sparse_conv(x, packed, bias))
    y = nnx.relu(sf.sparse_conv(y, packed) + y)
    return y, nnx.max_pool(y, (2, 2), (2, 2)).sum((1, 2))


CALLS = {
    "conv": lambda x, weights: sf.sparse_conv(x, weights[0], weights[2], residual=x),
    "int8": lambda x, weights: sf.sparse_conv(x, weights[1], weights[2]),
    "program": lambda x, weights: fuse(network)(x, weights[0], weights[2]),
}
WEIGHTS = FLOAT, INT8, BIAS


def mesh_of(*sizes: int, kind: AxisType = AxisType.Auto):
    return jax.make_mesh(sizes, ("a", "b")[:len(sizes)], axis_types=(kind,) * len(sizes))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(("sizes", "spec"), [((2,), "a"), ((2, 1), ("a", "b")), ((1, 2), "b"), ((1, 2), ("b", "a"))], ids=str)
def test_a_sharded_batch_stays_so(call, sizes, spec):
    split = NamedSharding(mesh_of(*sizes), PartitionSpec(spec))
    f, x = jax.jit(call), jax.device_put(X, split)
    text, wanted = f.lower(x, WEIGHTS).compile().as_text(), jax.tree.leaves(jax.jit(call)(X, WEIGHTS))
    assert not SENT.search(text) and 'custom_call_target="sparseflax_' in text
    for y, want in zip(jax.tree.leaves(f(x, WEIGHTS)), wanted, strict=True):
        assert y.sharding.is_equivalent_to(split, y.ndim) and np.array_equal(y, want)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_other_shardings_are_gathered(call):
    """Rows of an image, channels and weights: each device gets all of them."""
    mesh = mesh_of(2)
    wanted = jax.tree.leaves(jax.jit(call)(X, WEIGHTS))
    for spec in (PartitionSpec(None, "a"), PartitionSpec(None, None, None, "a"), PartitionSpec()):
        x = jax.device_put(X, NamedSharding(mesh, spec))
        weights = (*WEIGHTS[:2], jax.device_put(BIAS, NamedSharding(mesh, PartitionSpec("a"))))
        for y, want in zip(jax.tree.leaves(jax.jit(call)(x, weights)), wanted, strict=True):
            assert np.array_equal(y, want)


def test_a_batch_that_the_devices_do_not_divide():
    split = NamedSharding(mesh_of(2), PartitionSpec("a"))
    f = jax.jit(lambda x: CALLS["program"](jax.lax.with_sharding_constraint(x, split), WEIGHTS))
    for y, want in zip(f(X[:3]), jax.jit(CALLS["program"])(X[:3], WEIGHTS), strict=True):
        assert np.array_equal(y, want)


@pytest.mark.parametrize("call", [CALLS["conv"], CALLS["program"]], ids=["conv", "program"])
def test_gradients_and_maps_of_a_sharded_batch(call):
    x = jax.device_put(X, NamedSharding(mesh_of(2), PartitionSpec("a")))

    def loss(x, packed, bias):
        return sum((y * y).sum() for y in jax.tree.leaves(call(x, (packed, INT8, bias))))

    for f in (jax.grad(loss, (0, 1, 2)), lambda *a: jax.vmap(lambda x: call(x[None], (a[1], INT8, a[2])))(a[0])):
        got, wanted = (jax.tree.leaves(jax.jit(f)(images, FLOAT, BIAS)) for images in (x, X))
        assert got[0].sharding.spec[0] == "a"
        assert all(np.array_equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_explicit_meshes_and_meshes_in_a_context(call):
    wanted = jax.tree.leaves(jax.jit(call)(X, WEIGHTS))
    for kind in AxisType.Explicit, AxisType.Auto:
        with jax.set_mesh(mesh_of(2, kind=kind)):
            x = jax.device_put(X, PartitionSpec("a"))
            ys = jax.tree.leaves(jax.jit(call)(x, WEIGHTS))
            alone = jax.tree.leaves(jax.jit(call)(X, WEIGHTS))  # on all devices, but with no sharding of anything
        for y, other, want in zip(ys, alone, wanted, strict=True):
            assert y.sharding.spec[0] == "a" and np.array_equal(y, want) and np.array_equal(other, want)


def test_a_jitted_network_in_a_shard_map():
    """Whose numbers, as the zero of a relu, are cast to vary over the mesh; and for a mesh without devices."""
    f, split = jax.jit(lambda x: CALLS["program"](x, WEIGHTS)), PartitionSpec("a")
    mesh = mesh_of(2)
    for y, want in zip(jax.shard_map(f, mesh=mesh, in_specs=split, out_specs=split)(X), f(X), strict=True):
        assert np.array_equal(y, want)
    abstract = jax.jit(jax.shard_map(f, mesh=mesh.abstract_mesh, in_specs=split, out_specs=split))
    images = jax.ShapeDtypeStruct(X.shape, X.dtype, sharding=NamedSharding(mesh.abstract_mesh, split))
    assert ffi.PROGRAM in abstract.trace(images).lower(lowering_platforms=("cpu",)).as_text()


def test_an_exported_function_has_no_call_back_to_this_process():
    split = NamedSharding(mesh_of(2), PartitionSpec("a"))
    f = jax.jit(lambda x: CALLS["program"](x, WEIGHTS), in_shardings=split)
    allowed = [jax.export.DisabledSafetyCheck.custom_call(ffi.PROGRAM)]
    exported = jax.export.deserialize(jax.export.export(f, disabled_checks=allowed)(jnp.asarray(X)).serialize())
    for y, want in zip(exported.call(jax.device_put(X, split)), jax.jit(CALLS["program"])(X, WEIGHTS), strict=True):
        assert np.array_equal(y, want)
