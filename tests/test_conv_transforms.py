"""`sparse_conv` under every transformation of JAX, against the same transformation of a dense convolution.

The data are small whole numbers (biases lie halfway between, so that no activation sits on its kink): float32 computes
every sum of them exactly, and the tests ask for equality.
"""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from jax.test_util import check_grads
from reference import integers

import sparseflax as sf
from sparseflax.conv import ffi

pytestmark = pytest.mark.usefixtures("strict_dtypes")
ACTIVATIONS = [None, "relu", "relu6"]
WINDOW = {"strides": (2, 1), "padding": ((1, 1), (2, 0)), "kernel_dilation": (1, 2), "feature_group_count": 2}
XLA = {"window_strides": (2, 1), "padding": ((1, 1), (2, 0)), "rhs_dilation": (1, 2), "feature_group_count": 2,
       "dimension_numbers": ("NHWC", "HWIO", "NHWC")}


def dense_call(x, kernel, bias, residual, activation=None):
    y = jax.lax.conv_general_dilated(x, kernel, **XLA) + bias.reshape(1, 1, 1, -1) + residual
    if activation is None:
        return y
    return jnp.where(y > 0, jnp.where(y < 6, y, 6) if activation == "relu6" else y, 0)


def sparse_call(x, packed, bias, residual, activation=None):
    return sf.sparse_conv(x, packed, bias, **WINDOW, activation=activation, residual=residual)


class Problem:
    """Operands of a strided, dilated, grouped convolution, and the cotangent of its output."""

    def __init__(self, *batch: int, seed: int = 0, n: int = 3):
        random = np.random.default_rng(seed)
        mask = random.random((3, 2, 5, 6)) < 0.4
        self.x = integers(random, *batch, n, 6, 7, 10)
        self.kernel = integers(random, *batch, 3, 2, 5, 6) * mask.astype(np.float32)
        self.kernel += mask * (self.kernel == 0).astype(np.float32)  # kept weights are not zero
        self.bias = integers(random, *batch, 6) + np.float32(0.5)
        self.residual = integers(random, *batch, n, 3, 7, 6)
        self.cotangent = integers(random, n, 3, 7, 6)
        first = sf.pack(self.kernel[(0,) * len(batch)], 2)
        self.pattern, self.index = first.pattern, first.pattern.index
        self.packed = self.pack(self.kernel)

    def pack(self, kernel) -> sf.PackedKernel:
        """The kept entries of any array shaped like the kernel, with leading batch dimensions."""
        values = np.reshape(kernel, (*kernel.shape[:-4], -1))[..., self.index]
        return sf.PackedKernel(jax.device_put(values), self.pattern)

    @property
    def sparse(self):
        return self.x, self.packed, self.bias, self.residual

    @property
    def dense(self):
        return self.x, self.kernel, self.bias, self.residual

    def assert_same(self, ours, dense):
        """Trees of the four operands' shapes, ours with the values where the dense one has the kernel."""
        x, kernel, bias, residual = dense
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves((x, self.pack(kernel), bias, residual)), strict=True):
            assert a.shape == b.shape and np.array_equal(a, b)


@pytest.fixture(scope="module")
def problem():
    return Problem()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_jit(problem, activation):
    want = dense_call(*problem.dense, activation)
    for f in (sparse_call, jax.jit(sparse_call, static_argnames="activation")):
        assert np.array_equal(f(*problem.sparse, activation=activation), want)


def test_other_values_do_not_recompile(problem):
    traces = []

    @jax.jit
    def f(packed):
        traces.append(packed.pattern)
        return sparse_call(problem.x, packed, problem.bias, problem.residual)

    f(problem.packed), f(jax.tree.map(lambda v: 2 * v, problem.packed)), f(sf.pack(3 * problem.kernel, 2))
    assert len(traces) == 1
    f(sf.pack(problem.kernel[:, ::-1], 2))
    assert len(traces) == 2


@functools.partial(jax.jit, static_argnames="activation")  # one for all tests: what is compiled is found again
def dense_gradient(x, kernel, bias, residual, cotangent, activation):
    return jax.grad(lambda *operands: jnp.vdot(dense_call(*operands, activation), cotangent), argnums=(0, 1, 2, 3))(
        x, kernel, bias, residual)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint], ids=["grad", "jit", "remat"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients(problem, activation, wrap):
    """To x, values, bias and residual at once."""
    f = wrap(functools.partial(sparse_call, activation=activation))
    gradient = jax.grad(lambda operands: jnp.vdot(f(*operands), problem.cotangent))(problem.sparse)
    problem.assert_same(gradient, dense_gradient(*problem.dense, problem.cotangent, activation))


@pytest.mark.parametrize("argument", range(4))
def test_gradient_to_one_operand(problem, argument):
    ours = jax.grad(lambda *a: jnp.vdot(sparse_call(*a, activation="relu"), problem.cotangent), argnums=argument)(
        *problem.sparse)
    dense = dense_gradient(*problem.dense, problem.cotangent, "relu")[argument]
    assert np.array_equal(ours.values if argument == 1 else ours, problem.pack(dense).values if argument == 1 else dense)


def test_no_gradient_without_operands(problem):
    """A call outside the differentiated part has a tangent of zero."""
    value, tangent = jax.jvp(lambda t: jnp.sum(sparse_call(*problem.sparse)) + t, (1.0,), (1.0,))
    assert tangent == 1 and value == jnp.sum(dense_call(*problem.dense)) + 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_mode(problem, activation):
    tangents = Problem(seed=1)
    tangents = (tangents.x, problem.kernel[::-1] * (problem.kernel != 0), tangents.bias, tangents.residual)
    ours = jax.jvp(functools.partial(sparse_call, activation=activation), problem.sparse,
                   (tangents[0], problem.pack(tangents[1]), *tangents[2:]))
    dense = jax.jvp(functools.partial(dense_call, activation=activation), problem.dense, tangents)
    assert np.array_equal(ours[0], dense[0]) and np.array_equal(ours[1], dense[1])


def test_check_grads_to_second_order(problem):
    """Central differences of step h are exact for the call, of degree two; what `check_grads` differentiates for the second
    order, v -> vjp(v)(y(v)), is cubic: off by h^2 / 6 of its third derivative, 5e-3 here, in the entries of x and values,
    of which there are 1260 and 74, and it multiplies its tolerances by that size. Rounding, 2^-24 |y| / h, is below 1e-4.
    """
    scaled = jax.tree.map(lambda a: a / 8, problem.sparse)
    check_grads(sparse_call, scaled, order=2, modes=("fwd", "rev"), atol=1e-3, rtol=1e-3, eps=1e-2)


def test_second_derivatives(problem):
    """Forward over reverse, reverse over forward and reverse over reverse."""
    direction = Problem(seed=1)

    @functools.partial(jax.jit, static_argnums=0)
    def second(call, operands, tangents):
        def loss(*a):
            return jnp.sum(call(*a, activation="relu") ** 2)

        gradient = jax.grad(loss, argnums=(0, 1, 2, 3))
        forward_reverse = jax.jvp(gradient, operands, tangents)[1]
        reverse_forward = jax.grad(lambda a: jax.jvp(loss, a, tangents)[1])(operands)
        reverse_reverse = jax.grad(lambda a: sum(jax.tree.leaves(jax.tree.map(jnp.vdot, gradient(*a), tangents))))(operands)
        return forward_reverse, reverse_forward, reverse_reverse

    weights = problem.kernel[::-1] * (problem.kernel != 0)
    ours = second(sparse_call, problem.sparse, (direction.x, problem.pack(weights), direction.bias, direction.residual))
    dense = second(dense_call, problem.dense, (direction.x, weights, direction.bias, direction.residual))
    for a, b in zip(ours, dense, strict=True):
        problem.assert_same(a, b)


def test_hessian():
    random = np.random.default_rng(5)
    x = integers(random, 1, 3, 4, 2)
    kernel = np.array([0, 1, -2, 0, 0, 3, 0, 0, 0, 0, 2, -1, 0, 1, 0, 1], np.float32).reshape(2, 2, 2, 2)
    packed = sf.pack(kernel)
    kept = packed.pattern.index

    def dense(k):
        return jnp.sum(jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) ** 2)

    ours = jax.jit(jax.hessian(lambda p: jnp.sum(sf.sparse_conv(x, p) ** 2)))(packed).values.values
    assert np.array_equal(ours, jax.jit(jax.hessian(dense))(kernel).reshape(16, 16)[np.ix_(kept, kept)])


AXES = {"x": (0, None, None, None), "values": (None, 0, None, None), "bias": (None, None, 0, None),
        "residual": (None, None, None, 0), "x, values": (0, 0, None, None), "x, residual": (0, None, None, 0),
        "all": (0, 0, 0, 0)}


@functools.partial(jax.jit, static_argnums=0)  # one for all tests: what is compiled is found again
def row(call, cotangent, *operands):
    f = functools.partial(call, activation="relu")
    return f(*operands), jax.grad(lambda *a: jnp.vdot(f(*a), cotangent), argnums=(0, 1, 2, 3))(*operands)


@pytest.mark.parametrize("axes", AXES.values(), ids=list(AXES))
def test_vmap(problem, axes):
    """Values and gradients; what is not mapped is the plain problem."""
    many = Problem(4)
    sparse = tuple(b if axis is None else a for a, b, axis in zip(many.sparse, problem.sparse, axes, strict=True))
    dense = tuple(b if axis is None else a for a, b, axis in zip(many.dense, problem.dense, axes, strict=True))

    y, grads = jax.vmap(functools.partial(row, sparse_call, problem.cotangent), in_axes=axes)(*sparse)
    rows = [row(dense_call, problem.cotangent, *(o if axis is None else o[i] for o, axis in zip(dense, axes, strict=True)))
            for i in range(4)]
    want, dense_grads = jax.tree.map(lambda *a: np.stack(a), *rows)
    assert np.array_equal(y, want)
    problem.assert_same(grads, dense_grads)


def test_vmap_axes_and_nesting(problem):
    """Axes other than the first, two levels, and none at all."""
    many = Problem(2, 3)
    f = functools.partial(sf.sparse_conv, **WINDOW)
    want = jax.lax.conv_general_dilated(many.x.reshape(-1, *many.x.shape[3:]), problem.kernel, **XLA)
    nested = jax.vmap(jax.vmap(f, in_axes=(2, None), out_axes=1), in_axes=(4, None), out_axes=-1)
    y = nested(np.moveaxis(many.x, (0, 1), (4, 2)), problem.packed)
    assert np.array_equal(np.moveaxis(y, (-1, 1), (0, 1)).reshape(want.shape), want)
    values = np.moveaxis(many.packed.values, (0, 1), (1, 2))
    over_values = jax.vmap(jax.vmap(lambda x, v: f(x, sf.PackedKernel(v, many.pattern)), in_axes=(None, 1)), in_axes=(None, 1))
    y = over_values(problem.x, values)
    y = np.asarray(y)
    for i, j in np.ndindex(2, 3):
        assert np.array_equal(y[i, j], jax.lax.conv_general_dilated(problem.x, many.kernel[i, j], **XLA))
    empty = jax.vmap(f, in_axes=(0, None))(many.x[0, :0], problem.packed)
    assert empty.shape == (0, 3, 3, 7, 6)


def test_scan_over_layers_with_remat():
    """Layers of one pattern with stacked values, rematerialised, differentiated through the loop."""
    random = np.random.default_rng(4)
    mask = (random.random((3, 3, 6, 6)) < 0.1).astype(np.float32)
    kernels, x = np.sign(integers(random, 3, 3, 3, 6, 6)) * mask, integers(random, 2, 5, 5, 6)
    kernels += mask * (kernels == 0)
    packed = sf.pack(kernels[0])
    values = jnp.stack([sf.pack(k).values for k in kernels])

    def loss(call, x, weights):
        y, outputs = jax.lax.scan(jax.checkpoint(lambda x, w: (call(x, w),) * 2), x, weights)
        return jnp.sum(y) + jnp.sum(outputs)

    def sparse(x, v):
        return sf.sparse_conv(x, sf.PackedKernel(v, packed.pattern), activation="relu", residual=x)

    def dense(x, k):
        return jax.nn.relu(jax.lax.conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")) + x)

    y, (dx, dv) = jax.jit(jax.value_and_grad(functools.partial(loss, sparse), argnums=(0, 1)))(x, values)
    want, (want_dx, want_dk) = jax.jit(jax.value_and_grad(functools.partial(loss, dense), argnums=(0, 1)))(x, kernels)
    assert y == want and np.array_equal(dx, want_dx)
    assert np.array_equal(dv, want_dk.reshape(3, -1)[:, packed.pattern.index])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_shard_map(activation):
    """Images split over two devices, weights on both: their gradients have to be summed over the devices."""
    problem = Problem(n=4)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = PartitionSpec("d"), PartitionSpec()

    def loss(x, packed, bias, residual, cotangent):
        local = jnp.vdot(sparse_call(x, packed, bias, residual, activation), cotangent)
        return jax.lax.psum(local, "d")

    sharded = jax.shard_map(loss, mesh=mesh, in_specs=(split, whole, whole, split, split), out_specs=whole)
    value, grads = jax.jit(jax.value_and_grad(sharded, argnums=(0, 1, 2, 3)))(*problem.sparse, problem.cotangent)
    want, dense = jax.jit(jax.value_and_grad(
        lambda *a: jnp.vdot(dense_call(*a, activation), problem.cotangent), argnums=(0, 1, 2, 3)))(*problem.dense)
    assert value == want
    problem.assert_same(grads, dense)


@pytest.mark.parametrize("split_operand", range(1, 4))
def test_shard_map_with_the_same_images(problem, split_operand):
    """Images on both devices, other weights, biases or residuals on each: the output differs between them though x does not."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = tuple(PartitionSpec("d") if i == split_operand else PartitionSpec() for i in range(4))
    both = Problem(2)
    sparse, dense = (tuple(two if i == split_operand else one for i, (one, two) in enumerate(zip(ones, twos, strict=True)))
                     for ones, twos in ((problem.sparse, both.sparse), (problem.dense, both.dense)))

    def local(*operands):
        own = [jax.tree.map(lambda a: a[0], o) if i == split_operand else o for i, o in enumerate(operands)]
        return jax.lax.psum(jnp.vdot(sparse_call(*own, activation="relu"), problem.cotangent), "d")

    sharded = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=PartitionSpec())
    axes = tuple(0 if i == split_operand else None for i in range(4))
    want = jax.vmap(lambda *a: jnp.vdot(dense_call(*a, activation="relu"), problem.cotangent), in_axes=axes)
    value, grads = jax.jit(jax.value_and_grad(sharded, argnums=(0, 1, 2, 3)))(*sparse)
    exact, dense_grads = jax.jit(jax.value_and_grad(lambda *a: jnp.sum(want(*a)), argnums=(0, 1, 2, 3)))(*dense)
    assert value == exact
    problem.assert_same(grads, dense_grads)


def test_gradients_inside_shard_map(problem):
    """`jax.grad` within the mapped function, averaged by hand, as data-parallel training loops do."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x = np.concatenate([problem.x, problem.x[::-1] + 1])

    def local(x, packed):
        varying = jax.tree.map(lambda v: jax.lax.pcast(v, ("d",), to="varying"), packed)
        return jax.lax.psum(jax.grad(lambda p: jnp.sum(sf.sparse_conv(x, p, **WINDOW)))(varying).values, "d")

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(PartitionSpec("d"), PartitionSpec()), out_specs=PartitionSpec())
    want = jax.grad(lambda k: jnp.sum(jax.lax.conv_general_dilated(x, k, **XLA)))(problem.kernel)
    assert np.array_equal(jax.jit(sharded)(x, problem.packed), problem.pack(want).values)


def test_sharded_batch_under_jit():
    problem = Problem(n=4)
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(problem.x, NamedSharding(mesh, PartitionSpec("d")))
    assert np.array_equal(jax.jit(sparse_call)(x, *problem.sparse[1:]), dense_call(*problem.dense))


def test_explicit_sharding_follows_the_batch():
    problem = Problem(n=4)
    with jax.set_mesh(jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))):
        x = jax.device_put(problem.x, PartitionSpec("d"))
        y = jax.jit(lambda x: sf.sparse_conv(x, problem.packed, **WINDOW))(x)
        assert jax.typeof(y).sharding.spec[0] == "d"
    assert np.array_equal(y, jax.lax.conv_general_dilated(problem.x, problem.kernel, **XLA))


@pytest.mark.skipif(not ffi.available, reason="without the native module every platform runs plain JAX")
def test_other_platforms_run_plain_jax(problem):
    traced = jax.jit(sparse_call).trace(*problem.sparse)
    assert ffi.TARGET in traced.lower(lowering_platforms=("cpu",)).as_text()
    other = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ffi.TARGET not in other and "stablehlo.convolution" in other


LOADED = """
import sys
import jax, numpy as np
from sparseflax.conv import ffi  # registers the target
folder = sys.argv[1]
with open(folder + "/program", "rb") as file:
    exported = jax.export.deserialize(bytearray(file.read()))
data = np.load(folder + "/data.npz")
y = exported.call(data["x"], data["values"])
gradient = exported.vjp().call(data["x"], data["values"], data["cotangent"]) if exported.has_vjp() else ()
np.savez(folder + "/result.npz", y, *gradient)
"""


@pytest.mark.parametrize("n", [3, "n"], ids=["fixed", "symbolic"])
def test_export_to_another_process(problem, tmp_path, n):
    """Serialised with its derivative, for a fixed batch or any, and run by a process that only imports the target."""
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"{n}, 6, 7, 10"), jnp.float32)

    def f(x, values):
        return sf.sparse_conv(x, sf.PackedKernel(values, problem.pattern), problem.bias, **WINDOW, activation="relu")

    exported = jax.export.export(jax.jit(f), disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(ffi.TARGET)])(
        x, jax.ShapeDtypeStruct(problem.packed.values.shape, jnp.float32))
    (tmp_path / "program").write_bytes(exported.serialize(vjp_order=1))
    np.savez(tmp_path / "data.npz", x=problem.x, values=problem.packed.values, cotangent=problem.cotangent)
    subprocess.run([sys.executable, "-W", "error", "-c", LOADED, str(tmp_path)], check=True, timeout=120,
                   env=os.environ | {"JAX_PLATFORMS": "cpu"})
    nothing = jnp.zeros_like(problem.residual)
    want, vjp = jax.vjp(lambda x, k: dense_call(x, k, problem.bias, nothing, "relu"), problem.x, problem.kernel)
    dx, dk = vjp(problem.cotangent)
    with np.load(tmp_path / "result.npz") as result:
        for name, expected in zip(result.files, (want, dx, problem.pack(dk).values), strict=True):
            assert np.array_equal(result[name], expected)
