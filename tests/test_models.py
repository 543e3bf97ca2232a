"""The published networks: their sizes as published, what they are made of."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import sparseflax
from experiments.models import VGG16, AlexNet, GoogLeNet, MobileNetV1, SqueezeNet, UNet, layers, resnet18, resnet50
from experiments.networks import Spec, pruned
from sparseflax.conv import ffi
from tests.compilation import AS_FOR_USERS
from tests.machines import HERE
from tests.networks import NARROW

# Parameters and multiplications as published: by Caffe's model zoo, by torchvision, or in the paper (MobileNet: 4.2 million);
# U-Net's parameters are those of Pytorch-UNet for two classes, its multiplications counted.
PUBLISHED = {
    "alexnet": (AlexNet, 227, 60_965_224, 0.724),
    "vgg16": (VGG16, 224, 138_357_544, 15.47),
    "googlenet": (GoogLeNet, 224, 6_998_552, 1.58),
    "googlenet, batch norm": (lambda **k: GoogLeNet(batch_norm=True, **k), 224, 6_624_904, 1.50),
    "resnet18": (resnet18, 224, 11_689_512, 1.81),
    "resnet50": (resnet50, 224, 25_557_032, 4.09),
    "mobilenet": (MobileNetV1, 224, 4_231_976, 0.569),
    "squeezenet": (SqueezeNet, 224, 1_235_496, 0.349),
    "unet": (UNet, 128, 31_037_698, 12.04),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_the_published_ones(name):
    make, image, parameters, giga = PUBLISHED[name]
    model = nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0)))
    model.eval()
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))) == parameters
    shapes = sparseflax.conv_shapes(model, jax.ShapeDtypeStruct((1, image, image, 3), jnp.float32))
    assert sum(shape.flops for shape in shapes.values()) / 2e9 == pytest.approx(giga, rel=0.01)


@pytest.mark.parametrize("size", [6, 7, 8, 13])
@pytest.mark.parametrize("window, strides, padding, ceil", [(3, 2, 0, False), (3, 2, 0, True), (3, 2, 1, True), (2, 2, 0, True),
                                                            (3, 1, 1, False), (2, 3, 1, True), (1, 2, 0, True)])
def test_max_pool(size, window, strides, padding, ceil):
    x = -np.abs(np.random.default_rng(0).standard_normal((2, size, size + 1, 3), np.float32))  # padding must not win

    def starts(length):
        """First pixels of the windows, by the formula of Caffe and PyTorch."""
        count = (math.ceil if ceil else math.floor)((length + 2 * padding - window) / strides) + 1
        count -= ceil and (count - 1) * strides >= length + padding
        return [i * strides - padding for i in range(count)]

    def cut(b, length):
        return slice(max(b, 0), min(b + window, length))

    rows, columns = starts(size), starts(size + 1)
    expected = np.stack([np.stack([x[:, cut(r, size), cut(c, size + 1)].max((1, 2)) for c in columns], 1) for r in rows], 1)
    np.testing.assert_array_equal(layers.max_pool(jnp.asarray(x), window, strides, padding, ceil=ceil), expected)


@pytest.mark.parametrize("size", [1, 2, 5])
def test_local_response_norm(size):
    x = np.random.default_rng(0).standard_normal((1, 2, 3, 7)).astype(np.float32)
    before, expected = (size - 1) // 2, np.empty(x.shape)
    for c in range(7):
        neighbours = x[..., max(0, c - before):c - before + size].astype(np.float64)
        expected[..., c] = x[..., c] / (2 + 0.5 / size * (neighbours**2).sum(-1)) ** 0.75
    # A handful of roundings, two of them in an exponent below 3.
    np.testing.assert_allclose(layers.local_response_norm(jnp.asarray(x), size, 0.5, 2.0), expected, rtol=20 * 2.0**-24)


@pytest.mark.skipif(not ffi.available, reason="the native kernel is not available")
@pytest.mark.parametrize("name", NARROW)
def test_packed_networks_copy_no_images(name):
    """In the compiled program no layer's input is another's output in another layout: nothing is copied or transposed."""
    make, size = NARROW[name]
    model, x = pruned(Spec(name, make, size, lambda path, shape: 0.1)), jnp.ones((2, size, size, 3))
    planned = sparseflax.plan(model, x, HERE)
    graphdef, state = nnx.split(sparseflax.pack_model(model, planned))
    traced = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).trace(state, x)
    text = traced.lower().compile(AS_FOR_USERS).as_text()
    assert len(re.findall(r"Step\(op='conv'", str(traced.jaxpr))) >= sum(row.choice == "sparse" for row in planned.layers) > 5
    assert text.count(ffi.PROGRAM) == 1 and ffi.TARGET not in text
    assert re.findall(r"= \S+ fusion\(|= \S+ custom-call\(", text), "what is looked for below would be found"
    assert re.findall(r"= f32\[\d+,\d+,\d+,\d+\]\S* (?:transpose|copy)\(", text) == []
