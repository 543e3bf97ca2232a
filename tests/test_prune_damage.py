"""What pruning a layer does: measured as defined, and shared out by the guide at the least sum."""

import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import sparseflax
from sparseflax import prune
from sparseflax.cost.machine import ATOM_C2750, XEON_E5_2697V4
from sparseflax.cost.model import conv_seconds, dense_seconds
from sparseflax.cost.shape import ConvShape
from sparseflax.prune.damage import DENSITIES, Reference

LAYERS = "first", "second", "head"


class Small(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.second = nnx.Conv(8, 8, (3, 3), strides=2, feature_group_count=2, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.second(nnx.relu(self.norm(self.first(x)))))
        return self.head(x.mean((1, 2))), x


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(nn.Conv(8, (3, 3), name="first")(x))
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, feature_group_count=2, name="second")(x))
        return nn.Dropout(0.5, deterministic=not train)(nn.Dense(5, name="head")(x.mean((1, 2))))


def images(count=6):
    return np.random.default_rng(1).normal(size=(count, 8, 8, 3)).astype(np.float32)


def squared(outputs):
    return sum(float(np.square(np.asarray(y, np.float64)).sum()) for y in jax.tree.leaves(outputs))


@pytest.mark.parametrize("block", [1, 4])
@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_is_the_relative_error_of_all_outputs_with_one_layer_pruned(kind, block):
    batches = [images()[:4], images()[4:]]
    if kind == "nnx":
        model = Small()
        call, options = (lambda model, x: model(x)), {}
        model.eval()
    else:
        module, options = Linen(), {"train": False}
        model = module, module.init(jax.random.key(0), images(), train=False)
        call = lambda model, x: model[0].apply(model[1], x, train=False)  # noqa: E731
    found = prune.damage(model, batches, LAYERS, densities=(0.5, 0.2), block=block, **options)
    assert list(found) == list(LAYERS)
    for name, k in itertools.product(LAYERS, range(2)):
        densities, errors = found[name]
        assert densities == [0.5, 0.2]
        pruned = prune.obs(model, batches, prune.constant({name: densities[k]}), rounds=1, block=block, **options)
        wrong = sum(squared(jax.tree.map(jnp.subtract, call(pruned, x), call(model, x))) for x in batches)
        # The one is jitted, the other not: each output is off by some rounding of float32, the damage by twice its root.
        right = wrong / sum(squared(call(model, x)) for x in batches)
        assert errors[k] == pytest.approx(right, abs=1e-5 * math.sqrt(right)) and errors[k] > 0


def test_a_kernel_without_numbers_is_infinite_damage_and_its_own_is_none():
    model = Small()
    reference = Reference(model, [images()])
    kernel = np.asarray(model.first.kernel[...])
    assert reference.error("first", kernel) == 0
    assert reference.error("first", kernel * np.nan) == math.inf


SHAPES = {"wide": ConvShape(1, 14, 14, 256, 256, 3, 3, padding=((1, 1), (1, 1))),
          "narrow": ConvShape(1, 28, 28, 64, 96, 3, 3, padding=((1, 1), (1, 1)))}


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.floats(-4, 0), st.floats(1, 3)), min_size=2, max_size=2), st.sampled_from([1.5, 2.0, 2.5]))
def test_the_guide_finds_the_least_sum_of_it(curves, speedup):
    """Of powers that the fit is exact for: 1 and higher, and no measurement below what counts as none."""
    machine = XEON_E5_2697V4
    known = dict(zip(SHAPES, curves, strict=True))

    def of(name, density):
        factor, power = known[name]
        return 10**factor * (1 / density - 1) ** power

    damage = {name: (DENSITIES, [of(name, density) for density in DENSITIES]) for name in SHAPES}
    guide = prune.guided(SHAPES, machine, speedup=speedup, min_density=0.01, damage=damage)
    total = sum(float(dense_seconds(shape, machine)) for shape in SHAPES.values()) / speedup
    grid = np.append(np.geomspace(0.01, 0.999, 300), 1.0)
    choices = []
    for name, shape in SHAPES.items():
        seconds = np.asarray(conv_seconds(shape, jnp.asarray(grid, jnp.float32), machine), float)
        choices.append((np.where(grid < 1, seconds, float(dense_seconds(shape, machine))),
                        np.where(grid < 1, [of(name, min(d, 0.9999)) for d in grid], 0.0)))
    (t1, d1), (t2, d2) = choices
    possible = t1[:, None] + t2[None, :] <= total
    least = (d1[:, None] + d2[None, :])[possible].min()
    lost = sum(of(name, density) for name, density in guide.densities.items())
    # A step of either grid, 1.5 and 3.6 %, changes a damage by three times as much.
    assert guide.speedup >= speedup * 0.999 and lost <= 1.12 * least


def test_only_ratios_count_and_what_was_not_measured_stays_dense():
    machine = XEON_E5_2697V4
    damage = {"wide": (DENSITIES, [1e-4, 1e-3, 5e-3, 2e-2, 1e-1]), "narrow": (DENSITIES, [1e-3, 1e-2, 5e-2, 2e-1, 1.0])}
    guide = prune.guided(SHAPES, machine, speedup=2, damage=damage)
    larger = {name: (densities, [100 * error for error in errors]) for name, (densities, errors) in damage.items()}
    assert prune.guided(SHAPES, machine, speedup=2, damage=larger).densities == pytest.approx(guide.densities, rel=1e-6)
    one, other = ((prune.guided(SHAPES, ATOM_C2750, speedup=3, damage=known).layers["narrow"].density)
                  for known in (damage, {**damage, "narrow": damage["wide"]}))
    assert one > other
    only = prune.guided(SHAPES, machine, speedup=1.5, damage={"wide": damage["wide"]})
    assert only.layers["narrow"].density == 1 and "was not measured" in only.layers["narrow"].reason
    # Layers that lose nothing at all, or lose everything, or were measured once, have a damage as well.
    for errors in ([0.0] * 5, [math.inf] * 5, [0.0, 0.0, 1.0, math.inf, math.inf]):
        odd = prune.guided(SHAPES, machine, speedup=2, damage={**damage, "wide": (DENSITIES, errors)})
        assert odd.speedup == pytest.approx(2, rel=1e-3) and all(0 < d < 1 for d in odd.densities.values())
    assert prune.guided(SHAPES, machine, speedup=2, damage={**damage, "wide": ([0.2], [0.01])}).speedup >= 1.999


class Two(nnx.Module):
    """Two layers of one size, of which one says a tenth of what the other one does."""

    def __init__(self):
        self.loud, self.quiet = (nnx.Conv(64, 64, (3, 3), rngs=nnx.Rngs(seed)) for seed in range(2))

    def __call__(self, x):
        return self.loud(x) + 0.1 * self.quiet(x)


def test_a_guide_by_damage_loses_less_than_one_without():
    model = Two()
    x = np.random.default_rng(0).normal(size=(8, 12, 12, 64)).astype(np.float32)
    shapes = sparseflax.conv_shapes(model, x)
    damage = prune.damage(model, [x], shapes)
    lost = {}
    for name, known in (("size", None), ("damage", damage)):
        guide = prune.guided(shapes, XEON_E5_2697V4, speedup=2, damage=known)
        pruned = prune.obs(model, [x], guide)
        lost[name] = float(np.square(np.asarray(pruned(x) - model(x))).sum())
    assert lost["damage"] < 0.75 * lost["size"]


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match=re.escape("densities [0.0, 1.0], wanted numbers between 0 and 1")):
        prune.damage(Small(), [images()], LAYERS, densities=(0.0, 0.5, 1.0))
    with pytest.raises(ValueError, match="there is no batch, wanted some inputs of the model"):
        prune.damage(Small(), [], LAYERS)
    with pytest.raises(ValueError, match="third"):
        prune.damage(Small(), [images()], ["third"])
