"""Allocations without a performance model, against their definitions and a plain global sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from sparseflax import prune

SHAPES = {"stem": (3, 3, 3, 8), "wide": (3, 3, 32, 64), "point": (1, 1, 64, 32), "head": (32, 10)}
ALLOCATIONS = [prune.uniform, prune.erk, prune.global_magnitude]


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return {name: {"kernel": jnp.asarray(rng.normal(0, scale, shape), jnp.float32), "bias": jnp.zeros(shape[-1])}
            for (name, shape), scale in zip(SHAPES.items(), [0.3, 0.1, 0.2, 0.5], strict=True)}


def size(name):
    return int(np.prod(SHAPES[name]))


@given(st.floats(0.001, 1.0), st.sampled_from(ALLOCATIONS), st.sets(st.sampled_from(sorted(SHAPES)), max_size=3))
def test_the_kept_weights_add_up(density, allocation, exclude):
    guide = allocation(make_params(), density, exclude=exclude)
    assert list(guide.layers) == sorted(SHAPES)  # the order of the parameters
    for name in exclude:
        assert guide.layers[name].density == 1 and guide.layers[name].reason == "dense: excluded"
    pruned = [name for name in SHAPES if name not in exclude]
    kept = sum(guide.layers[name].density * size(name) for name in pruned)
    # Rounded to a whole weight, and one for each layer that would lose its last.
    assert abs(kept - density * sum(map(size, pruned))) <= len(pruned) + 0.5
    assert all(0 < layer.density <= 1 for layer in guide.layers.values())


def test_uniform():
    assert prune.uniform(make_params(), 0.1, exclude=["stem"]).densities == {"head": 0.1, "point": 0.1, "wide": 0.1}


@pytest.mark.parametrize("density", [0.02, 0.1, 0.35])
def test_erk_is_one_scale_for_all_layers_that_are_not_full(density):
    guide = prune.erk(make_params(), density)
    scale = {name: layer.density * size(name) / sum(SHAPES[name]) for name, layer in guide.layers.items()}
    others = [scale[name] for name in guide.densities]
    assert max(others) == pytest.approx(min(others))
    for name, layer in guide.layers.items():
        if layer.density == 1:
            assert scale[name] <= others[0]  # it would have got more than it has
    assert ("head" in guide.densities) == (density == 0.02)  # 320 weights, sizes that add up to 42: the first to be full


def test_global_magnitude_is_one_threshold():
    params, density = make_params(), 0.07
    guide = prune.global_magnitude(params, density)
    weights = {name: np.abs(np.asarray(p["kernel"])) for name, p in params.items()}
    total = sum(w.size for w in weights.values())
    threshold = sorted((float(x) for w in weights.values() for x in w.flat), reverse=True)[round(density * total) - 1]
    assert guide.densities == {name: np.mean(weights[name] >= threshold) for name in sorted(weights)}
    assert prune.global_magnitude(params, 1e-6).densities == {name: 1 / size(name) for name in sorted(SHAPES)}


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_drives_a_method_over_nnx(allocation):
    model = nnx.Sequential(nnx.Conv(3, 16, (3, 3), rngs=nnx.Rngs(0)), nnx.Linear(16, 4, rngs=nnx.Rngs(1)))
    params = nnx.state(model, nnx.Param)
    guide = allocation(params, 0.3)
    tx = prune.magnitude(guide, prune.ramp(0, 1))
    _, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert prune.densities(state) == pytest.approx(guide.densities, abs=0.5 / 64)
    assert set(guide.layers) == {"layers/0", "layers/1"}


def test_bad_arguments():
    for allocation in ALLOCATIONS:
        with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got 0: it is kept / all"):
            allocation(make_params(), 0)
    with pytest.raises(ValueError, match=r"cannot exclude layers \['stam'\]: the network has \['head', 'point'"):
        prune.uniform(make_params(), 0.5, exclude=["stam"])
    with pytest.raises(ValueError, match=r"there is no layer to prune: of the kernels \['head', .* all are excluded"):
        prune.erk(make_params(), 0.5, exclude=SHAPES)
