"""A packed Linen model as a file: what comes back, and that what does not fit is named."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

import sparseflax
from sparseflax.cost.atomic import write_atomically
from sparseflax.files.safetensors import seal, unseal
from tests.machines import HERE
from tests.test_plan_linen import Net, X, pruned


@pytest.fixture(scope="module")
def network():
    """(packed, variables, plan, variables of the dense model)"""
    dense = pruned(Net(), X)
    planned = sparseflax.plan((Net(), dense), X, HERE, train=False)
    packed, variables = sparseflax.pack_model((Net(), dense), planned, X, train=False)
    assert packed.patterns and packed.folded and packed.biased
    return packed, variables, planned, dense


@pytest.fixture(scope="module")
def file(network, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "net.safetensors"
    sparseflax.save(path, network[:2], network[2])
    return path


@pytest.mark.parametrize("abstract", [False, True], ids=["dense", "abstract"])
def test_what_was_saved_comes_back(network, file, abstract):
    packed, variables, planned, dense = network
    like = jax.eval_shape(lambda: Net().init(jax.random.key(1), X)) if abstract else dense
    (loaded, arrays), table = sparseflax.load(file, (Net(), like))
    assert (loaded, table) == (packed, planned)
    before, after = flatten_dict(variables), flatten_dict(arrays)
    assert {path for path, leaf in before.items() if hasattr(leaf, "shape")} == after.keys()
    for path, leaf in after.items():
        np.testing.assert_array_equal(leaf, before[path])
    runs = [jax.jit(lambda variables, x, model=model: model.apply(variables, x, train=False)) for model in (loaded, packed)]
    np.testing.assert_array_equal(runs[0](arrays, X), runs[1](variables, X))


def test_a_layer_that_is_the_model(tmp_path):
    conv, x = nn.Conv(64, (1, 1)), jnp.ones((1, 14, 14, 512))
    dense = {"params": {"kernel": jnp.eye(512, 64)[None, None], "bias": jnp.ones(64)}}
    planned = sparseflax.plan((conv, dense), x, HERE)
    assert [row.choice for row in planned.layers] == ["sparse"]
    sparseflax.save(tmp_path / "net", sparseflax.pack_model((conv, dense), planned, x), planned)
    (loaded, arrays), _ = sparseflax.load(tmp_path / "net", (conv, dense))
    np.testing.assert_array_equal(loaded.apply(arrays, x), conv.apply(dense, x))


def test_what_does_not_fit_is_named(network, file, tmp_path):
    packed, variables, planned, dense = network
    arrays, text = unseal("network", file.read_bytes())
    (path, pattern), *_ = packed.patterns
    name = f"params/{path}"

    def edited(changes, remove=(), plan=None):
        content = {key: array for key, array in {**arrays, **changes}.items() if key not in remove}
        copy = tmp_path / str(len(list(tmp_path.iterdir())))
        write_atomically(copy, seal("network", content, text | ({"plan": json.dumps(plan)} if plan else {})))
        return copy

    table = json.loads(text["plan"])
    rows = [row | ({"norm": "nowhere"} if row["norm"] else {}) for row in table["layers"]]
    own = [row | ({"norm": path} if row["path"] == path else {}) for row in table["layers"]]
    layout = arrays[f"{name}/layout"]
    other = {"params": {**dense["params"], "head": {"kernel": jnp.ones((32, 6)), "bias": jnp.ones(6)}},
             "batch_stats": dense["batch_stats"]}
    wider = {"params": {**dense["params"], "stem": {"kernel": jnp.ones((3, 3, 3, 16))}}, "batch_stats": dense["batch_stats"]}
    for like, where, parts in [
        (dense, edited({"more": layout}, remove=("params/head/bias",)), ["'more' is not in", "'params/head/bias' is missing"]),
        (other, file, ["'params/head/kernel' is float32[32, 5], the model has float32[32, 6]"]),
        (wider, file, ["'stem' is (3, 3, 3, 16), planned as (3, 3, 3, 32)"]),
        (dense, edited({f"{name}/gaps": np.full_like(arrays[f"{name}/gaps"], 254)}), [f"'{path}': the packed pattern points"]),
        (dense, edited({}, remove=(f"{name}/gaps",)), [f"'{path}': packed arrays lack ['gaps']"]),
        (dense, edited({}, remove=(f"{name}/values",)), [f"'{path}': packed arrays lack ['values']"]),
        (dense, edited({f"{name}/layout": np.asarray([3, 3, 32, 64, 1, 8])}),
         [f"'{path}': its kernel is (3, 3, 32, 64), the model's (3, 3, 32, 32)"]),
        (dense, edited({}, plan={**table, "layers": rows}), ["batch norm 'nowhere' is missing"]),
        (dense, edited({}, plan={**table, "layers": own}), [f"batch norm '{path}' is missing"]),
        (dense, edited({f"{name}/layout": np.asarray([*layout[:4], 2, layout[5]])}), ["its kernel has 2 groups, the layer 1"]),
    ]:
        with pytest.raises(ValueError, match="does not fit Net: ") as raised:
            sparseflax.load(where, (Net(), like))
        assert all(part in str(raised.value) for part in parts), str(raised.value)
    with pytest.raises(ValueError, match="not packed by this plan: its sparse layers are"):
        nothing = sparseflax.plan((Net(), jax.tree.map(lambda leaf: leaf + 1, dense)), X, HERE, train=False)
        sparseflax.save(tmp_path / "net", (packed, variables), nothing)
    with pytest.raises(TypeError, match=r"the variables \['params/odd'\] are no arrays"):
        sparseflax.save(tmp_path / "net", (packed, variables | {"params": {**variables["params"], "odd": "text"}}), planned)
