"""Stacks of equal layers that scan runs one after the other: packed, they compute what the dense ones and what each alone does.

The networks have small integers for weights and statistics, and var + epsilon = 1, as in test_plan.py: float32 is exact and the
tolerance 0.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

import sparseflax
from sparseflax import PackedKernel, pack, pack_model, plan, prune
from sparseflax.conv.primitive import conv_p
from sparseflax.layers.nnx import SparseStack
from sparseflax.layers.stack import PackedStack, from_arrays, of_step, steps
from sparseflax.network.program import program_p
from tests.machines import HERE
from tests.test_plan import with_integers, zeros

pytestmark = pytest.mark.usefixtures("strict_dtypes")
LAYERS = 3
X = np.random.default_rng(0).integers(-2, 3, (2, 7, 6, 3)).astype(np.float32)


def conv(ic, oc, size=(3, 3), use_bias=False):  # with random state of its own: vmap makes these
    return nnx.Conv(ic, oc, size, use_bias=use_bias, kernel_init=zeros, bias_init=zeros, rngs=nnx.Rngs(0))


def norm(channels):
    return nnx.BatchNorm(channels, epsilon=0.25, rngs=nnx.Rngs(0))


def linear(ic, oc):
    return nnx.Linear(ic, oc, kernel_init=zeros, bias_init=zeros, rngs=nnx.Rngs(0))


class Block(nnx.Module):
    """Images, then rows, then pixels: a layer of each kind."""

    def __init__(self):
        self.image, self.norm = conv(8, 8), norm(8)
        self.row, self.pixel, self.last = conv(8, 8, (3,), use_bias=True), linear(8, 8), norm(8)

    def __call__(self, x):
        y = self.row(nnx.relu(self.norm(self.image(x))))
        return nnx.relu(x + self.last(self.pixel(y))) % 5


def forwards(x, blocks):
    return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, blocks)


def backwards(x, blocks):
    return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry, reverse=True)(x, blocks)


def rematerialized(x, blocks):
    step = nnx.remat(lambda x, block: block(x))
    return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, blocks)


def collecting(x, blocks):
    def step(x, block):
        return block(x), block.image(x)

    x, images = nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0), reverse=True)(x, blocks)
    return x + 2 * images[0] - images[2]


def of_constants(x, blocks):
    first = blocks_input = nnx.relu(x)

    def step(x, block):
        return block(x) + first

    return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, blocks) + blocks_input


def twice(x, blocks):
    return forwards(forwards(x, blocks), blocks)


RUNS = [forwards, backwards, rematerialized, collecting, of_constants, twice]


class Net(nnx.Module):
    def __init__(self, run):
        self.stem = conv(3, 8)
        self.blocks = nnx.vmap(lambda _: Block(), in_axes=0, out_axes=0)(jnp.zeros(LAYERS))
        self.run, self.head = run, linear(8, 4)

    def __call__(self, x):
        return self.head(self.run(self.stem(x), self.blocks).sum((1, 2)))


def net(run=forwards):
    return with_integers(Net(run))


def run(model):
    """The model's jitted call, its state as an operand."""
    graphdef, state = nnx.split(model)
    return jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)), state


def all_sparse(table):
    """The plan with all stacks sparse, fully connected ones too, that would not gain."""
    return replace(table, layers=tuple(
        replace(row, choice="sparse") if row.path.startswith("blocks") and row.shape.groups == 1 else row
        for row in table.layers))


def primitives_in(jaxpr):
    """All of a jaxpr's primitives, inner ones included."""
    for equation in jaxpr.eqns:
        yield equation.primitive
        for param in equation.params.values():
            for inner in param if isinstance(param, tuple) else (param,):
                if hasattr(getattr(inner, "jaxpr", inner), "eqns"):
                    yield from primitives_in(getattr(inner, "jaxpr", inner))


@functools.cache
def planned(way):
    """(model, its plan, its output): packing leaves a model as it is."""
    model = net(way)
    table = plan(model, X, HERE)
    model.eval()
    call, state = run(model)
    return model, table, call(state, X)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("way", RUNS)
def test_a_packed_stack_computes_what_the_dense_one_does(way, fuse):
    model, table, wanted = planned(way)
    rows = {row.path: row for row in table.layers}
    for name, choice, after in [("image", "sparse", None if way is collecting else "blocks/norm"), ("row", "sparse", None),
                                ("pixel", "dense", "blocks/last")]:
        row = rows[f"blocks/{name}"]
        assert (row.choice, row.norm, row.shape.layers) == (choice, after, LAYERS)
    assert np.ptp(wanted) > 0
    for chosen in (table, all_sparse(table)):
        packed = pack_model(model, chosen, X, fuse=fuse)
        assert isinstance(packed.blocks.image, SparseStack)
        assert isinstance(packed.blocks.pixel, SparseStack) == (chosen is not table)
        call, state = run(packed)
        np.testing.assert_array_equal(call(state, X), wanted)
        np.testing.assert_array_equal(packed(X), wanted)
    kinds = [primitive.name for primitive in primitives_in(jax.make_jaxpr(call)(state, X).jaxpr)]
    assert ("scan" in kinds, "cond" in kinds, program_p.name in kinds, conv_p.name in kinds) == (
        (False, False, True, False) if fuse else (True, True, False, True))


def test_it_is_packed_like_its_layers_one_by_one():
    model, table, _ = planned(forwards)
    unrolled = nnx.clone(model)
    graphdef, state = nnx.split(model.blocks)
    unrolled.blocks = nnx.List([nnx.merge(graphdef, jax.tree.map(lambda leaf, i=i: leaf[i], state)) for i in range(LAYERS)])
    unrolled.run = lambda x, blocks: [x := block(x) for block in blocks][-1]
    table, one_by_one = all_sparse(table), all_sparse(plan(unrolled, X, HERE))
    assert table.dense_seconds == pytest.approx(one_by_one.dense_seconds, rel=1e-6)
    assert table.seconds == pytest.approx(one_by_one.seconds, rel=1e-2), "sparse seconds are not quite linear in density"
    packed, wanted = pack_model(model, table, X), pack_model(unrolled, one_by_one, X)
    np.testing.assert_array_equal(packed(X), wanted(X))
    for name in ("image", "row", "pixel"):
        stack, layers = getattr(packed.blocks, name), [getattr(block, name) for block in wanted.blocks]
        assert stack.patterns == tuple(layer.pattern for layer in layers) and len(set(stack.patterns)) == LAYERS
        for values, layer in zip(stack.values[...], layers, strict=True):
            np.testing.assert_array_equal(values[:layer.pattern.nnz], layer.values[...])
            assert not np.any(values[layer.pattern.nnz:])


def gradients(model):
    graphdef, state = nnx.split(model)
    loss = lambda state, x: jnp.sum(nnx.merge(graphdef, state)(x) * jnp.arange(4.0)[None])  # noqa: E731
    return jax.jit(jax.grad(loss, argnums=(0, 1)))(state, X)


@functools.cache
def dense_gradients():
    return gradients(planned(forwards)[0])


@pytest.mark.parametrize("fuse", [True, False])
def test_derivatives(fuse):
    model, table, _ = planned(forwards)
    packed = pack_model(model, all_sparse(table), X, fuse=fuse)

    (of_packed, of_x), (of_dense, of_dense_x) = gradients(packed), dense_gradients()
    np.testing.assert_array_equal(of_x, of_dense_x)
    row = packed.blocks.row  # no norm is folded into it
    wanted = of_dense.blocks.row.kernel[...]
    for i, pattern in enumerate(row.patterns):
        np.testing.assert_array_equal(of_packed.blocks.row["values"][i][:pattern.nnz], wanted[i].reshape(-1)[pattern.index])
    assert not np.any(of_packed.blocks.row.step[...]), "what says which step it is is not trained"


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        image = nn.Conv(8, (3, 3), use_bias=False, name="image")
        y = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=0.25, name="norm")(image(x)))
        y = nn.Dense(8, name="pixel")(nn.Conv(8, (3,), name="row")(y))
        late = nn.Conv(8, (1, 1), use_bias=False, name="late", feature_group_count=8)  # depthwise: dense, with its norm's bias
        return nn.relu(x + nn.BatchNorm(use_running_average=True, epsilon=0.25, name="last")(late(y))) % 5, y.sum()


class LinenNet(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="stem")(x)
        block = nn.remat(LinenBlock) if self.remat else LinenBlock
        blocks = nn.scan(block, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=LAYERS)
        x, sums = blocks(name="blocks")(x, None)
        return nn.Dense(4, name="head")(x.sum((1, 2))) + sums[1]


def integers(module):
    draw = np.random.default_rng(0)

    def leaf(path, leaf):
        name, values = path[-1].key, draw.integers(-1, 2, leaf.shape).astype(np.float32)
        kept = draw.random(leaf.shape) < (0.2 if name == "kernel" and leaf.shape[-2] == 8 else 1)
        return jnp.asarray(np.full(leaf.shape, 0.75, np.float32) if name == "var" else values * kept)

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(module.init, jax.random.key(0), X))


@functools.cache
def planned_linen(remat):
    """((module, variables), its plan with all stacks sparse, its output, the gradient of its sum by the image)."""
    module = LinenNet(remat)
    variables = integers(module)
    output, gradient = jax.jit(lambda x: (
        module.apply(variables, x), jax.grad(lambda x: module.apply(variables, x).sum())(x)))(X)
    return (module, variables), all_sparse(plan((module, variables), X, HERE)), output, gradient


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("remat", [True, False])
def test_linen(remat, fuse, tmp_path):
    (module, variables), table, wanted, wanted_gradient = planned_linen(remat)
    rows = {row.path: row for row in table.layers}
    assert {path: (row.choice, row.norm) for path, row in rows.items() if row.shape.layers == LAYERS} == {
        "blocks/image": ("sparse", "blocks/norm"), "blocks/row": ("sparse", None), "blocks/pixel": ("sparse", None),
        "blocks/late": ("dense", "blocks/last")}
    packed, inner = pack_model((module, variables), table, X, fuse=fuse)
    # by the variables, too: all of them are floats
    gradients = jax.grad(lambda inner, x: packed.apply(inner, x).sum(), argnums=(0, 1))
    output, (_, gradient) = jax.jit(lambda inner, x: (packed.apply(inner, x), gradients(inner, x)))(inner, X)
    np.testing.assert_array_equal(output, wanted)
    np.testing.assert_array_equal(gradient, wanted_gradient)
    np.testing.assert_array_equal(packed.apply(inner, X), wanted)
    assert "norm" not in inner["params"]["blocks"] and inner["params"]["blocks"]["image"].keys() == {"values", "bias", "step"}

    sparseflax.save(tmp_path / "net", (packed, inner), table)
    (again, restored), _ = sparseflax.load(tmp_path / "net", (module, jax.eval_shape(module.init, jax.random.key(0), X)))
    assert again.patterns == packed.patterns
    jax.tree.map(np.testing.assert_array_equal, flatten_dict(restored), flatten_dict(inner))
    np.testing.assert_array_equal(again.apply(restored, X), wanted)


def test_a_file_holds_a_stack(tmp_path):
    model, table, _ = planned(forwards)
    table = all_sparse(table)
    packed = pack_model(model, table, X)
    sparseflax.save(tmp_path / "net", packed, table)
    again, _ = sparseflax.load(tmp_path / "net", nnx.eval_shape(lambda: Net(forwards)))
    assert again.blocks.image.patterns == packed.blocks.image.patterns
    np.testing.assert_array_equal(again(X), packed(X))
    twice_packed = plan(packed, X, HERE)
    assert {row.reason for row in twice_packed.layers if row.path.startswith("blocks")} == {"already packed"}


def test_a_stack_is_guided_and_pruned_like_its_layers():
    model = net()
    shapes = sparseflax.conv_shapes(model, X)
    apart = {f"{name}/{i}": shape.one for name, shape in shapes.items() for i in range(shape.layers)}
    guide, of_each = (prune.guided(some, HERE, speedup=2.0, min_density=0.02) for some in (shapes, apart))
    assert any(density < 1 for name, density in guide.densities.items() if name.startswith("blocks"))
    for name, layer in guide.layers.items():
        for i in range(shapes[name].layers):
            assert layer.density == pytest.approx(of_each.layers[f"{name}/{i}"].density, rel=1e-4)
    assert guide.speedup == pytest.approx(of_each.speedup, rel=1e-4)

    names = [name for name in guide.densities if name.startswith("blocks")]
    params = nnx.state(model, nnx.Param)
    for tx in (optax.chain(optax.sgd(0.01), prune.magnitude(guide, prune.ramp(0, 2))),
               prune.budget(optax.sgd(0.01), guide, HERE, prune.ramp(0, 2))):
        @jax.jit
        def step(pruned, state, tx=tx):
            updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, pruned)
            return optax.apply_updates(pruned, updates), state

        pruned, state = params, tx.init(params)
        for _ in range(3):
            with jax.numpy_dtype_promotion("standard"):
                pruned, state = step(pruned, state)
        kept = {name: np.count_nonzero(kernel) / kernel.size for name, kernel in prune.kernels(pruned).items()}
        found = prune.densities(state)
        assert all(kept[name] == found[name] < 1 for name in names)
        if isinstance(state, tuple) and hasattr(state, "seconds"):
            assert float(state.seconds) <= guide.seconds * (1 + 1e-3)
        else:
            assert all(abs(found[name] - guide.densities[name]) < 1 / shapes[name].weights for name in names)


def test_measured_times_are_those_of_all_layers():
    table = plan(net(), X, HERE, measure=True, seconds=0.0)
    assert all(row.dense_measured and row.sparse_measured for row in table.layers if row.path.startswith("blocks"))


def beside(x, blocks):
    return nnx.vmap(lambda block, x: block(x), in_axes=(0, None))(blocks, x).sum(0)


def decayed(x, blocks):
    def step(x, block):
        return block(x) + block.image.kernel[...].sum()

    return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, blocks)


@pytest.mark.parametrize("way, name, reason", [
    (beside, "image", "this call does not run it as a 1-D, 2-D or 3-D convolution"),
    (decayed, "image", "the call uses its kernel elsewhere, too")])
def test_what_no_scan_runs_stays(way, name, reason):
    model = net(way)
    table = plan(model, X, HERE)
    row = {row.path: row for row in table.layers}[f"blocks/{name}"]
    assert row.choice == "dense" and row.reason.startswith(reason)
    packed = pack_model(model, table, X)
    model.eval()
    np.testing.assert_array_equal(packed(X), model(X))


def test_a_stack_along_another_axis_stays():
    class Last(nnx.Module):
        def __init__(self):
            self.stem = conv(3, 8)
            self.layers = nnx.vmap(lambda _: conv(8, 8), in_axes=0, out_axes=-1)(jnp.zeros(8))

        def __call__(self, x):
            run = nnx.scan(lambda x, layer: layer(x) % 3, in_axes=(nnx.Carry, -1), out_axes=nnx.Carry)
            return run(self.stem(x), self.layers)

    model = with_integers(Last())
    table = plan(model, X, HERE)
    assert [row.choice for row in table.layers if row.path == "layers"] == ["dense"]
    packed = pack_model(model, table, X)
    np.testing.assert_array_equal(packed(X), model(X))


KERNELS = [pack(np.where(np.random.default_rng(i).random((3, 3, 20, 8)) < density, i + 1, 0).astype(np.float32))
           for i, density in enumerate((0.3, 0.0, 0.05))]


def test_arrays_of_a_stack():
    stack = PackedStack.of(KERNELS)
    assert stack.shape == (3, 3, 3, 20, 8) and stack.values.shape == (3, KERNELS[0].nnz)
    assert stack.density == sum(kernel.nnz for kernel in KERNELS) / (3 * 9 * 160)
    arrays = stack.to_arrays()
    again = from_arrays(arrays)
    assert isinstance(again, PackedStack) and again.patterns == stack.patterns
    np.testing.assert_array_equal(again.values, stack.values)
    other = pack(np.ones((3, 3, 10, 8), np.float32))
    for change, message in [
            ({"layout": arrays["layout"][:2]}, "wanted 7 integers for each layer"),
            ({"layout": arrays["layout"] + [0, 0, 0, 0, 0, 0, 1]}, "wanted 7 integers for each layer"),
            ({"layout": arrays["layout"][:0], "gaps": arrays["gaps"][:0], "values": arrays["values"][:0]}, "wanted 7 integers"),
            ({"values": arrays["values"][0]}, "wanted 7 integers for each layer"),
            ({"values": np.pad(arrays["values"], ((0, 0), (0, 1)))}, "wanted equal ones"),
            ({"values": arrays["values"][:, 1:]}, "the pattern keeps"),
            ({"gaps": arrays["gaps"] * 0 + 254}, "outside its kernel"),
            (PackedStack.of([KERNELS[0], other]).to_arrays(), "wanted equal ones")]:
        with pytest.raises(ValueError, match=message):
            from_arrays(arrays | change)


@pytest.mark.parametrize("scale", [1.0, 1e-20])
def test_a_step_is_known_whatever_decays(scale):
    stack = PackedStack.of(KERNELS)
    for step, values, kernel in zip(scale * steps(3), stack.values, KERNELS, strict=True):
        run = jax.jit(lambda step, values: of_step(step, values, stack.patterns, PackedKernel.unpack))
        np.testing.assert_array_equal(run(step, values), kernel.unpack())
    with pytest.raises(ValueError, match="a stack of 3 sparse layers is called at once, wanted one of them in each step"):
        of_step(steps(3), stack.values, stack.patterns, PackedKernel.unpack)
