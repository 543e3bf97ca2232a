"""Depthwise convolutions as sums of shifted images, against Flax's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseflax.layers.shifted import Shifted, shifted

EPS = float(np.finfo(np.float32).eps)


def conv(channels=5, kernel=(3, 3), **options):
    options = {"feature_group_count": channels, "rngs": nnx.Rngs(0), **options}
    return nnx.Conv(channels, options.pop("out", channels), kernel, **options)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (5, 2)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 1), (3, 2)])
@pytest.mark.parametrize("padding", ["SAME", "VALID", 1, ((0, 2), (3, 0)), (2, (1, 0))])
def test_as_flax(kernel, strides, padding):
    layer = conv(kernel=kernel, strides=strides, padding=padding)
    quick = shifted(layer)
    assert type(quick) is Shifted and type(layer) is nnx.Conv
    x = jax.random.normal(jax.random.key(1), (2, 9, 10, 5))

    def call(layer, x):
        graph, params = nnx.split(layer)
        return jax.vjp(lambda params, x: nnx.merge(graph, params)(x), params, x)

    (y, back), (wanted, wanted_back) = call(quick, x), call(layer, x)
    t = jax.random.normal(jax.random.key(2), y.shape)
    for a, b in zip(jax.tree.leaves((y, back(t))), jax.tree.leaves((wanted, wanted_back(t))), strict=True):
        # Sums of 2 x 9 x 10 products at most, each operand below 5: n^2 roundings of products of 25.
        np.testing.assert_allclose(a, b, rtol=0, atol=180 * EPS * 25)


def test_a_batch_of_none_and_an_image_without_batch():
    layer = conv()
    assert shifted(layer)(jnp.zeros((0, 4, 4, 5))).shape == (0, 4, 4, 5)
    x = jax.random.normal(jax.random.key(1), (4, 4, 5))
    np.testing.assert_allclose(shifted(layer)(x), layer(x), atol=9 * EPS * 25)


@pytest.mark.parametrize("options", [
    {"feature_group_count": 1}, {"out": 10}, {"kernel_dilation": 2}, {"input_dilation": 2}, {"padding": "CIRCULAR"},
    {"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}, {"kernel": (9, 9)}, {"kernel": (3,)}, {"kernel": (3, 3, 3)},
    {"mask": jnp.ones((3, 3, 1, 5))}])
def test_others_stay(options):
    assert type(shifted(conv(**options))) is nnx.Conv


def test_a_model_keeps_its_paths_and_what_it_is():
    model = nnx.Sequential(conv(), nnx.BatchNorm(5, rngs=nnx.Rngs(0)), conv())
    quick = shifted(model)
    assert [type(layer) for layer in quick.layers] == [Shifted, nnx.BatchNorm, Shifted]
    assert list(dict(nnx.to_flat_state(nnx.state(quick)))) == list(dict(nnx.to_flat_state(nnx.state(model))))
    assert type(model.layers[0]) is nnx.Conv
