"""Shapes of layers: sizes against XLA's own, and the walk through a model against what the model really does."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from sparseflax.cost.shape import ConvShape
from sparseflax.network.shapes import conv_shapes

IMAGE = jax.ShapeDtypeStruct((2, 12, 10, 4), jnp.float32)


def conv(ic=4, oc=4, kernel=(3, 3), **options):
    return nnx.Conv(ic, oc, kernel, rngs=nnx.Rngs(0), **options)


class Chain(nnx.Module):
    """The layers one after the other; `order` may name a layer twice."""

    def __init__(self, *layers, order=None):
        self.layers = nnx.List(layers)
        self.order = order or tuple(range(len(layers)))

    def __call__(self, x):
        for i in self.order:
            x = self.layers[i](x)
        return x


class Net(nnx.Module):
    """Branches, a shared layer, statistics, dropout and a head."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(4, 8, (3, 3), strides=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        grouped = nnx.Conv(8, 8, (5, 5), feature_group_count=2, rngs=rngs)
        self.branches = nnx.List([nnx.Conv(8, 8, (1, 1), rngs=rngs), grouped])
        self.head = nnx.Linear(16, 3, rngs=rngs)

    def __call__(self, x):
        x = self.drop(nnx.relu(self.norm(self.stem(x))))
        x = jnp.concatenate([self.branches[1](x), self.branches[0](x)], -1)
        return self.head(x.mean((1, 2)))


@settings(max_examples=60, deadline=None)
@given(
    image=st.tuples(st.integers(5, 20), st.integers(5, 20)), kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)), dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(*[st.tuples(st.integers(0, 2), st.integers(0, 2))] * 2), groups=st.sampled_from([1, 2]),
)
def test_output_size_is_xlas(image, kernel, strides, dilation, padding, groups):
    shape = ConvShape(3, *image, 4, 6, *kernel, strides, padding, dilation, groups)
    x, w = (jax.ShapeDtypeStruct(sizes, jnp.float32) for sizes in ((3, *image, 4), shape.kernel_shape))
    y = jax.eval_shape(lambda x, w: jax.lax.conv_general_dilated(
        x, w, strides, padding, rhs_dilation=dilation, feature_group_count=groups,
        dimension_numbers=("NHWC", "HWIO", "NHWC")), x, w)
    assert y.shape == (3, shape.oh, shape.ow, 6)
    assert shape.output_bytes == y.size * 4


def test_numbers_of_a_known_layer():
    conv5 = ConvShape(1, 13, 13, 384, 256, 3, 3, padding=((1, 1), (1, 1)), groups=2)  # of AlexNet
    assert conv5.flops == 149_520_384
    assert conv5.input_bytes + conv5.output_bytes == 432_640
    assert (conv5.weights, conv5.weight_bytes) == (442_368, 1_769_472)
    assert conv5.with_batch(7).flops == 7 * conv5.flops
    assert conv5.with_batch(7).weight_bytes == conv5.weight_bytes


def test_str():
    assert str(ConvShape(1, 14, 14, 256, 256, 3, 3)) == "n1 256x14x14 -> 256 3x3"
    full = ConvShape(2, 14, 7, 8, 4, 3, 1, strides=(2, 2), kernel_dilation=(2, 1), groups=4)
    assert str(full) == "n2 8x14x7 -> 4 3x1 s2 d2x1 g4"


@pytest.mark.parametrize("change, message", [
    ({"n": 0}, "'n': 0}, wanted at least 1"),
    ({"strides": (1, 0)}, "'strides': 0}, wanted at least 1"),
    ({"groups": 3}, "groups=3 has to divide both ic=4 and oc=6"),
    ({"void": -1}, "void=-1, wanted fewer than the 216 places"),
    ({"void": 216}, "void=216, wanted fewer than the 216 places"),
    ({"kh": 9}, "9x3 kernel with dilation (1, 1) does not fit into a 8x8 image"),
])
def test_impossible_sizes(change, message):
    sizes = {"n": 1, "ih": 8, "iw": 8, "ic": 4, "oc": 6, "kh": 3, "kw": 3}
    with pytest.raises(ValueError) as error:
        ConvShape(**(sizes | change))
    assert message in str(error.value)


@pytest.fixture(scope="module")
def net():
    return Net(nnx.Rngs(0))


@pytest.mark.parametrize("graph", [True, False])
def test_whole_network_in_call_order(graph, net):
    with nnx.set_graph_mode(graph):
        before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(net, nnx.Not(nnx.RngKey))))
        shapes = conv_shapes(net, IMAGE)
        after = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(net, nnx.Not(nnx.RngKey))))
    jax.tree.map(np.testing.assert_array_equal, before, after)  # statistics and the random counter stay
    assert type(net.stem) is nnx.Conv and not hasattr(net.stem, "_observe")
    assert shapes == {
        "stem": ConvShape(2, 12, 10, 4, 8, 3, 3, (2, 2), ((0, 1), (0, 1))),
        "branches/1": ConvShape(2, 6, 5, 8, 8, 5, 5, padding=((2, 2), (2, 2)), groups=2),
        "branches/0": ConvShape(2, 6, 5, 8, 8, 1, 1),
        "head": ConvShape(2, 1, 1, 16, 3, 1, 1),
    }
    assert list(shapes) == ["stem", "branches/1", "branches/0", "head"]
    kernels = {"/".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(net, nnx.Param))}
    for path, shape in shapes.items():
        assert kernels[f"{path}/kernel"].get_value().reshape(shape.kernel_shape).size == shape.weights


@pytest.mark.parametrize("padding", ["SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", 2, (1, 0), ((2, 0), (0, 1))])
@pytest.mark.parametrize("strides, dilation", [(1, 1), ((2, 1), (1, 3)), (None, 2)])
def test_every_padding(padding, strides, dilation):
    layer = conv(padding=padding, strides=strides, kernel_dilation=dilation, kernel=(3, 2))
    (shape,) = conv_shapes(layer, IMAGE).values()
    y = jax.eval_shape(lambda x: layer(x), IMAGE)
    assert (shape.n, shape.oh, shape.ow, shape.oc) == y.shape
    assert (shape.ih, shape.iw, shape.ic) == IMAGE.shape[1:]


def test_no_arithmetic_is_spent():
    shape = (2**14, 512, 512, 4)  # 70 GB
    (found,) = conv_shapes(conv(), jax.ShapeDtypeStruct(shape, jnp.float32)).values()
    assert found.n == 2**14


def test_abstract_weights_and_a_second_call_of_a_jitted_block():
    class Jitted(nnx.Module):
        def __init__(self):
            self.inner = Chain(conv(), conv(kernel=(1, 1)))

        def __call__(self, x):
            return nnx.jit(lambda inner, x: inner(x))(self.inner, x)

    model = Jitted()
    first = conv_shapes(model, IMAGE)
    assert list(first) == ["inner/layers/0", "inner/layers/1"]
    assert conv_shapes(model, IMAGE) == first
    assert conv_shapes(nnx.eval_shape(Jitted), IMAGE) == first
    assert conv_shapes(nnx.Sequential(conv(), nnx.relu), IMAGE)["layers/0"] == first["inner/layers/0"]


def test_calls_of_a_shared_layer_add_up():
    once = conv_shapes(Chain(conv()), IMAGE)["layers/0"]
    thrice = conv_shapes(Chain(conv(), order=(0, 0, 0)), IMAGE)
    assert thrice == {"layers/0": once.with_batch(6)}

    shared = conv()
    assert conv_shapes(Chain(shared, shared), IMAGE) == {"layers/0": once.with_batch(4)}
    kernels = nnx.to_flat_state(nnx.state(Chain(shared, shared), nnx.Param))
    assert ("layers", 0, "kernel") in [path for path, _ in kernels]

    halving = conv(strides=2)  # 12x10 -> 6x5 -> 3x3: flops as 30 + 9 outputs, so two images and 0.6, rounded to 3
    assert conv_shapes(Chain(halving, order=(0, 0)), IMAGE)["layers/0"].with_batch(1) == (
        conv_shapes(halving, IMAGE)[""].with_batch(1))
    assert conv_shapes(Chain(halving, order=(0, 0)), IMAGE)["layers/0"].n == 3


def test_batch_dimensions_are_flattened():
    assert conv_shapes(conv(), jax.ShapeDtypeStruct((3, 5, 12, 10, 4), jnp.float32))[""].n == 15
    assert conv_shapes(conv(), jax.ShapeDtypeStruct((12, 10, 4), jnp.float32))[""].n == 1
    linear = nnx.Linear(4, 7, rngs=nnx.Rngs(0))
    assert conv_shapes(linear, IMAGE) == {"": ConvShape(2, 12, 10, 4, 7, 1, 1)}


def test_what_no_2d_convolution_describes_is_left_out():
    class Padded(nnx.Conv):
        def __call__(self, x):
            return super().__call__(jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0))))

    rngs = nnx.Rngs(0)
    assert conv_shapes(conv(kernel=(1, 1, 1, 2)), jax.ShapeDtypeStruct((2, 5, 5, 5, 5, 4), jnp.float32)) == {}
    assert conv_shapes(conv(input_dilation=2, padding=1), IMAGE) == {}
    for options in ({"kernel_dilation": 2}, {"transpose_kernel": True}, {"padding": "CIRCULAR"}):
        assert conv_shapes(nnx.ConvTranspose(4, 4, (3, 3), strides=(2, 2), rngs=rngs, **options), IMAGE) == {}
    assert conv_shapes(Padded(4, 4, (3, 3), padding="VALID", rngs=rngs), IMAGE) == {}
    assert conv_shapes(nnx.Sequential(nnx.relu), IMAGE) == {}


@pytest.mark.parametrize("padding, pads", [
    ("SAME", (2, 2)), ("SAME_LOWER", (2, 2)), ("VALID", (0, 0)), ("CAUSAL", (4, 0)), ("CIRCULAR", (2, 2)), ("REFLECT", (2, 2)),
    (1, (1, 1)), ([(0, 3)], (0, 3)), ([2], (2, 2))])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_a_1d_convolution_is_one_of_a_row(batch, padding, pads):
    layer = nnx.Conv(4, 8, 3, padding=padding, kernel_dilation=2, feature_group_count=2, rngs=nnx.Rngs(0))
    assert conv_shapes(layer, jax.ShapeDtypeStruct((*batch, 9, 4), jnp.float32)) == {
        "": ConvShape(math.prod(batch), 1, 9, 4, 8, 1, 3, (1, 1), ((0, 0), pads), (1, 2), 2)}


class Stack(nnx.Module):
    """Three equal convolutions of each kind, made by vmap, and run by scan or vmap."""

    def __init__(self, kernel, run):
        self.layers = nnx.vmap(lambda rngs: nnx.Conv(4, 4, kernel, rngs=rngs))(nnx.Rngs(0).split(3))
        self.shared, self.run = nnx.Conv(4, 4, kernel, rngs=nnx.Rngs(1)), run

    def __call__(self, x):
        return self.run(x, self.layers, self.shared)


def scanned(x, layers, shared):
    return nnx.scan(lambda x, layer: layer(shared(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, layers)


def side_by_side(x, layers, shared):
    return nnx.vmap(lambda layer, x: layer(shared(x)), in_axes=(0, None))(layers, x)


@pytest.mark.parametrize("kernel, image, one", [
    ((3, 3), (2, 12, 10, 4), ConvShape(2, 12, 10, 4, 4, 3, 3, padding=((1, 1), (1, 1)))),
    ((3,), (2, 9, 4), ConvShape(2, 1, 9, 4, 4, 1, 3, padding=((0, 0), (1, 1))))])
def test_stacks(kernel, image, one):
    image = jax.ShapeDtypeStruct(image, jnp.float32)
    stack = nnx.eval_shape(lambda: Stack(kernel, scanned))
    assert conv_shapes(stack, image) == {"shared": one.with_batch(6), "layers": dataclasses.replace(one, layers=3)}
    twice = nnx.eval_shape(lambda: Stack(kernel, lambda x, *layers: scanned(scanned(x, *layers), *layers)))
    assert conv_shapes(twice, image) == {"shared": one.with_batch(12), "layers": dataclasses.replace(one, n=4, layers=3)}
    beside = nnx.eval_shape(lambda: Stack(kernel, side_by_side))
    assert conv_shapes(beside, image) == {"shared": one}, "no single convolution describes layers that all run at once"


def test_the_sizes_of_a_stack_are_those_of_its_layers():
    one = ConvShape(2, 12, 10, 4, 4, 3, 3)
    stack = dataclasses.replace(one, layers=3)
    assert (stack.weights, stack.flops, stack.weight_bytes) == (3 * one.weights, 3 * one.flops, 3 * one.weight_bytes)
    assert stack.kernel_shape == one.kernel_shape and stack.one == one and str(stack) == f"{one} 3 layers"
    with pytest.raises(ValueError, match="'layers': 0}, wanted at least 1"):
        dataclasses.replace(one, layers=0)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Conv(8, (3, 3), strides=2, padding=1, name="stem")(x)
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        again = nn.Conv(8, (3, 3), feature_group_count=2, name="again")
        x = again(inputs=again(x))
        x = nn.Conv(8, (3,))(x.reshape(x.shape[0], -1, 8))
        return nn.Dense(3)(x.mean(1))


@pytest.mark.parametrize("train", [False, True])
def test_linen(train):
    module = LinenNet()
    variables = module.init(jax.random.key(0), jnp.zeros(IMAGE.shape), train=False)
    shapes = conv_shapes((module, variables), IMAGE, train=train)
    assert shapes == {
        "stem": ConvShape(2, 12, 10, 4, 8, 3, 3, (2, 2), ((1, 1), (1, 1))),
        "again": ConvShape(4, 6, 5, 8, 8, 3, 3, padding=((1, 1), (1, 1)), groups=2),
        "Conv_0": ConvShape(2, 1, 30, 8, 8, 1, 3, padding=((0, 0), (1, 1))),
        "Dense_0": ConvShape(2, 1, 1, 8, 3, 1, 1),
    }
    assert conv_shapes((module, jax.eval_shape(lambda: variables)), IMAGE, train=train) == shapes


def test_wrong_model_and_empty_batch():
    with pytest.raises(TypeError, match="model is a function, wanted an nnx.Module or a pair"):
        conv_shapes(lambda x: x, IMAGE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'n': 0}, wanted at least 1: is the batch"):
        conv_shapes(conv(), jax.ShapeDtypeStruct((0, 12, 10, 4), jnp.float32))
    with pytest.raises(ValueError, match=r"a convolution with {'n': 4294967296}, wanted at most 2\^31"):
        ConvShape(2**32, 12, 10, 4, 4, 3, 3)


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_a_3d_convolution_is_one_of_images_of_each_depth(batch):
    layer = conv(4, 8, (3, 1, 2), strides=(2, 1, 1), feature_group_count=2)
    x = jax.ShapeDtypeStruct((*batch, 7, 5, 6, 4), jnp.float32)
    wanted = ConvShape(4 * math.prod(batch), 5, 6, 12, 8, 1, 2, padding=((0, 0), (0, 1)), groups=2)
    assert conv_shapes(layer, x) == {"": wanted} and wanted.weights == layer.kernel[...].size


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 1), (0, 2)), ((-1, 0), (3, 3))])
@pytest.mark.parametrize("size, strides", [((2, 2), 2), ((4, 4), 2), ((3, 3), 2), ((3, 2), (1, 3)), ((1, 1), 2)])
def test_a_transposed_convolution_makes_blocks(size, strides, padding):
    """Its weights are counted, and no place more; its blocks hold all outputs, and less than a block more."""
    layer = nnx.ConvTranspose(4, 5, size, strides=strides, padding=padding, rngs=nnx.Rngs(0))
    (shape,) = conv_shapes(layer, IMAGE).values()
    sh, sw = (strides, strides) if isinstance(strides, int) else strides
    n, oh, ow, oc = jax.eval_shape(lambda x: layer(x), IMAGE).shape
    assert (shape.n, shape.oc, shape.weights) == (n, sh * sw * oc, layer.kernel[...].size)
    assert 0 <= sh * shape.oh - oh < sh and 0 <= sw * shape.ow - ow < sw
    assert shape.flops == 2 * n * shape.oh * shape.ow * math.prod(size) * 4 * oc
