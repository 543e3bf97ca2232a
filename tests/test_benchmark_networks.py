"""The benchmark of whole networks: rivals compute the network that is timed, wrong ones are caught, time is accounted for."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from experiments.baselines import Rival, inductor, network_field
from experiments.benchmark import networks_table, results
from experiments.benchmark.networks import XLA, check, measure
from experiments.benchmark.table import OURS
from experiments.benchmark.where import where_time_goes
from experiments.models import AlexNet, MobileNetV1, resnet18
from experiments.networks import GOOGLENET, NETWORKS, Spec, pruned
from sparseflax.network.pack import pack_model
from sparseflax.network.plan import plan
from tests.machines import HERE, stored

pytest.importorskip("onnx")
pytestmark = pytest.mark.usefixtures("optimized")
ROOT = Path(__file__).parents[1]
TINY = Spec("tiny", partial(AlexNet, 10, 1 / 4, 67), 67, lambda path, shape: 0.05)


def kernels(spec):
    model = pruned(spec)
    return {"/".join(map(str, path[:-1])): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model))
            if path[-1] == "kernel"}


def test_densities():
    alexnet = kernels(Spec("alexnet", partial(AlexNet, 100, 1 / 2, 67), 67, NETWORKS["alexnet"].density))
    densities = {path: np.count_nonzero(kernel) / kernel.size for path, kernel in alexnet.items()}
    assert densities.pop("conv1") == 1
    assert all(density == pytest.approx(0.1, abs=0.01) for density in densities.values()) and len(densities) == 7
    mobile = NETWORKS["mobilenet"].density
    assert (mobile("", (1, 1, 8, 8)), mobile("", (3, 3, 1, 8)), mobile("", (8, 8))) == (0.1, 1.0, 1.0)
    google = NETWORKS["googlenet"].density
    paths = [f"inception{block}/branch{branch}/1/conv" for block in ("3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b")
             for branch in (2, 3)]
    assert google("inception4e/branch2/1/conv", ()) == pytest.approx(0.013)
    assert sorted(google(path, ()) for path in [*paths, "conv3/conv", "fc"]) == sorted(1 - z / 100 for z in GOOGLENET.values())
    assert google("inception4e/branch2/0/conv", ()) == google("inception4e/branch1/conv", ()) == google("conv2/conv", ()) == 1


def test_trained_kernels_take_the_place_of_random_ones():
    trained = np.zeros(kernels(TINY)["conv3"].shape, np.float32)
    trained[1, 1, 2, 3] = 7.0
    model = pruned(TINY, {"conv3": trained})
    np.testing.assert_array_equal(np.asarray(model.conv3.kernel[...]) != 0, trained != 0)
    with pytest.raises(ValueError, match=r"conv3 has shape \(1,\), wanted \(3, 3"):
        pruned(TINY, {"conv3": np.ones(1, np.float32)})
    with pytest.raises(ValueError, match=r"has no layers \['conv9'\]"):
        pruned(TINY, {"conv9": np.ones(1, np.float32)})


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    stub = tmp_path_factory.mktemp("stub") / "stub.py"
    stub.write_text("import json, os, sys\nargs = sys.argv[2:]\n"
                    "print(json.dumps({'engine': ' '.join(args), 'seconds': os.path.getsize(sys.argv[1])}))")
    return measure(TINY, 2, network_field()[0], HERE, threads=1, seconds=0.0, measured=False,
                   yardstick=f"{sys.executable} {stub}")


def test_a_line_of_the_results(line):
    assert set(line["times"]) >= {OURS, XLA, *(rival for name, rival in (
        ("onednn", "torch"), ("onnxruntime", "onnxruntime"), ("openvino", "openvino")) if name not in network_field()[1])}
    assert not line["times"][OURS]["dense"] and line["times"][XLA]["dense"]
    assert (line["layer"], line["n"], line["threads"]) == ("tiny", 2, 1)
    assert line["yardstick"]["engine"] == "--batch 2 --threads 1 --seconds 0.0"
    assert line["yardstick"]["seconds"][0] > 4 * 256 * 1024  # of its file's bytes: the weights of fc7 at least
    rows = {row["path"]: row for row in line["layers"]}
    assert list(rows)[:2] == ["conv1", "conv2"] and len(rows) == 8
    assert rows["fc7"]["choice"] == "sparse"
    assert all(row["measured"] > 0 for row in rows.values())
    assert line["rest"] and all(seconds > 0 for seconds in line["rest"].values())
    assert all(row["predicted"] > 0 for row in rows.values())
    assert line["steps"]["predicted"] > sum(row["predicted"] for row in rows.values())
    assert line["steps"]["measured"] >= sum(row["measured"] for row in rows.values())


def test_tables(line, tmp_path):
    cells = networks_table.row(line)
    assert len(cells) == len(networks_table.HEAD)
    assert "layers" in networks_table.breakdown(line)[0] and "fc7" in "\n".join(networks_table.breakdown(line))
    path = tmp_path / "networks.jsonl"
    written = {key: value for key, value in line.items() if key != "yardstick"}
    for seconds in (1.0, 2.0):
        times = {name: time | {"seconds": 4.0} for name, time in line["times"].items()} | {
            OURS: line["times"][OURS] | {"seconds": seconds}}
        results.append(path, {"set": "networks"} | written | {"times": times, "drawn": "random", "memory": "kept"}
                       | results.provenance({"jax"}))
    found = results.by_cpu(path)
    (text,) = map(networks_table.networks_table, found.values())
    assert "| tiny | 2 | 1 |" in text and "| 2000 | 4000 | 2.00x |" in text and "**2.00x**" in text
    assert f"take {line['steps']['measured'] / line['steps']['predicted']:.2f}x the prediction" in text
    older = {key: value for key, value in line.items() if key != "steps"}
    inside, predicted = (sum(row[kind] for row in line["layers"]) for kind in ("measured", "predicted"))
    assert f"which takes {inside / predicted:.2f}x the prediction" in networks_table.networks_table([older | {
        key: found[next(iter(found))][0][key] for key in ("versions", "cpu", "date", "commit")}])
    text = networks_table.cpus_table(found | {"another": [line | {"layer": "other", "isa": "avx2"}]})
    assert "| tiny | 2 | 4000 → 2000 | **2.00x** | not measured |  |" in text.splitlines()
    (newest,) = next(iter(found.values()))
    half = {"engine bf16": newest["times"][XLA] | {"seconds": 3.0, "exact": False}}
    text = networks_table.cpus_table({"another": [newest | {"times": newest["times"] | half}]})
    assert "| tiny | 2 | 4000 → 2000 | **2.00x** (1.50x over engine bf16) |" in text.splitlines()


def test_a_network_that_computes_something_else_is_an_error():
    exact = np.linspace(-1, 1, 20).reshape(2, 10)
    close = exact.astype(np.float32) + np.float32(1e-6)
    assert set(check([Rival(XLA, lambda: close, np.asarray)], exact)) == {XLA}
    with pytest.raises(RuntimeError, match="outputs of {'late': .*} are off"):
        check([Rival(XLA, lambda: close, np.asarray), Rival("late", lambda: close + 1e-4, np.asarray)], exact)
    with pytest.raises(RuntimeError, match=r"late returned \(1, 10\), wanted \(2, 10\)"):
        check([Rival(XLA, lambda: close, np.asarray), Rival("late", lambda: close[:1], np.asarray)], exact)


@pytest.mark.parametrize("make", [partial(MobileNetV1, 10, 1 / 4), partial(resnet18, 10, 1 / 4)], ids=["mobilenet", "resnet18"])
def test_every_layer_is_found_in_the_program(make):
    spec = Spec("small", make, 64, lambda path, shape: 0.1)
    x = np.ones((1, 64, 64, 3), np.float32)
    model = pruned(spec)
    planned = plan(model, x, HERE)
    inside, rest, steps = where_time_goes(pack_model(model, planned), x)
    assert set(inside) == {layer.path for layer in planned.layers}
    assert all(seconds >= 0 for seconds in [*inside.values(), *rest.values()]) and sum(inside.values()) > 0
    assert steps is not None and {step.path for step in steps.steps if step.path is not None} == set(inside)


def test_names_of_rivals_and_networks():
    assert inductor not in network_field()[0]
    with pytest.raises(ValueError, match="no rival is called"):
        network_field(["bcsr"])
    ran = subprocess.run([sys.executable, "-m", "experiments.benchmark", "networks", "--network", "lenet"], cwd=ROOT,
                         capture_output=True, text=True)
    assert ran.returncode == 2 and "no network is called ['lenet'], wanted some of" in ran.stderr


def test_the_yardstick_is_shown_and_not_written(tmp_path, monkeypatch):
    """The whole command, with a network as small as a test wants."""
    stub = tmp_path / "stub.py"
    stub.write_text("import json\nprint(json.dumps({'engine': 'stub', 'seconds': 1.0}))")
    script = """
from flax import nnx
from experiments import networks
from experiments.benchmark import __main__ as benchmark

def tiny(rngs):
    convolutions = [nnx.Conv(ic, oc, (3, 3), rngs=rngs) for ic, oc in ((3, 16), (16, 32))]
    return nnx.Sequential(convolutions[0], nnx.relu, convolutions[1], lambda x: x.mean((1, 2)), nnx.Linear(32, 10, rngs=rngs))

networks.NETWORKS["tiny"] = networks.Spec("tiny", tiny, 19, lambda path, shape: 0.1)
benchmark.main()
"""
    out = tmp_path / "out.jsonl"
    ran = subprocess.run([sys.executable, "-c", script, "networks", "--network", "tiny", "--batch", "1", "--seconds", "0",
                          "--rival", "onednn", "--explain", "--yardstick", f"{sys.executable} {stub}", "--out", str(out)],
                         cwd=ROOT, env=stored(tmp_path, 1), capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "tiny | 1 | 1 |" in ran.stdout and "tiny, n=1: layers" in ran.stdout
    (written,) = map(json.loads, out.read_text().splitlines())
    assert "yardstick" not in written and written["set"] == "networks" and "jax" in written["versions"]
