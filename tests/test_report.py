"""The main job from end to end, as small as it can be, and what it says about itself."""

import copy
import dataclasses
import json
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from experiments import evaluate, report, run
from experiments.benchmark import results
from experiments.configs import digits, smoke
from experiments.data import Dataset
from experiments.methods import Speed
from experiments.models import VGG
from sparseflax import prune
from sparseflax.conv.packing import PackedKernel
from sparseflax.cost.atomic import write_atomically
from sparseflax.cost.machine import Machine, to_dict
from sparseflax.layers.nnx import SparseConv
from sparseflax.network.pack import pack_model
from sparseflax.network.plan import plan
from sparseflax.network.shapes import conv_shapes
from tests.hasty import hurry

# What is fixed here stands for any machine: that it is not this one is meant.
pytestmark = pytest.mark.filterwarnings("ignore:the plan was made for:RuntimeWarning")

# Known constants instead of a measurement: what is pruned must not depend on how busy this machine is.
MACHINE = Machine(name="test", isa="portable", lanes=4, cores=2, threads=2, l1_bytes=32 << 10, l2_bytes=1 << 20, l3_bytes=0,
                  peak=100e9, bandwidth=50e9, alpha=1.5, beta=1.5, source="assumed")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(config, result) of one smoke run; its folder is config.out."""
    out = tmp_path_factory.mktemp("smoke")
    config = dataclasses.replace(smoke.config, out=out, results=out / "all.jsonl")
    write_atomically(out / "machine.json", json.dumps(to_dict(MACHINE)))
    for name in ("whole.json", "aimed.json"):
        write_atomically(out / name, json.dumps(whole(config)._asdict()))
    return config, run.run(config)


def whole(config):
    """The network as it is predicted: nothing but its layers."""
    model = config.network(config.widths, 1, config.classes, rngs=nnx.Rngs(0))
    dense = prune.guided(conv_shapes(model, config.data().test_images[:1]), MACHINE, speedup=1).dense_seconds
    return prune.Whole(dense, dense_scale=1.0)


@pytest.fixture
def result(finished):
    return copy.deepcopy(finished[1])


@pytest.fixture
def begun(finished, tmp_path):
    """The folder of a run that goes on where that one ended its dense training, which no speedup or method changes."""
    for name in ("machine.json", "whole.json", "aimed.json"):
        shutil.copy(finished[0].out / name, tmp_path)
    shutil.copytree(finished[0].out / "dense-training", tmp_path / "dense-training")
    return tmp_path


@pytest.fixture
def timed_here(monkeypatch):
    """Runs that are timed in no time, for one picture."""
    hurry(monkeypatch, run)
    monkeypatch.setattr(run, "BATCHES", (1,))


@pytest.fixture
def timed_before(finished, monkeypatch):
    """Runs that take that run's times for theirs: how a network is timed does not depend on how it was pruned."""
    monkeypatch.setattr(run, "afresh", lambda *_: {what: finished[1][what] for what in ("times", "layers")})


def test_the_main_job(finished, capsys):
    config, result = finished
    assert json.loads((config.out / "result.json").read_text()) == json.loads(json.dumps(result))
    assert result["machine"] == to_dict(MACHINE)
    assert set(result["times"]) == set(result["layers"]) == {"1", "16"}
    layers = {layer["path"]: layer for layer in result["layers"]["1"]}
    assert layers["stages/1/0/conv"]["choice"] == "sparse" and layers["head"]["choice"] == "dense"
    kept = layers["stages/1/0/conv"]["density"]
    assert 0 < kept < 1 and result["kept"] == result["weights"] - round((1 - kept) * 9 * 16 * 32)
    assert result["predicted"] == pytest.approx(config.speedup, rel=0.02)
    assert result["accuracy"]["packed"] == result["accuracy"]["pruned"]
    assert result["bytes"]["packed"]["disk"] < result["bytes"]["dense"]["disk"]
    assert result["cpu"] and result["commit"] and result["versions"]["jax"] == jax.__version__ and result["threads"] >= 1


def test_the_same_command_goes_on_and_trains_nothing_twice(finished, timed_before, monkeypatch):
    config, result = finished
    monkeypatch.setattr(run.train, "_step", None)
    again = run.run(config)
    assert again["accuracy"] == result["accuracy"] and again["kept"] == result["kept"] and again["curves"] == result["curves"]
    assert len(results.read(config.results)) == 2


def test_a_folder_of_another_run(finished):
    config, _ = finished
    with pytest.raises(ValueError, match="holds a run with peak_lr 0.1 instead of 0.2: give another --out, or delete"):
        run.run(dataclasses.replace(config, peak_lr=0.2))


def test_a_learning_rate_that_would_still_rise_at_its_end():
    with pytest.raises(ValueError, match="warmup_steps=80, wanted 0 or more, and fewer than dense_steps=80"):
        dataclasses.replace(digits.config, dense_steps=80)


@pytest.mark.parametrize("method", ["GMP, guided", "GMP, uniform", "GMP, global"])
def test_a_run_ends_whatever_it_was_asked_for_and_its_first_sentence_says_so(method, begun, timed_here, capsys):
    config = dataclasses.replace(smoke.config, out=begun, method=method, speedup=1000.0, timing_seconds=0.0)
    result = run.run(config)
    assert re.match(r"asked for 1000x, this machine allows [0-9.]+x", result["shortfall"])
    assert capsys.readouterr().out.count(result["shortfall"]) >= 1 and result["times"]["1"]["packed"]["seconds"] > 0
    assert report.headline(result).startswith("Asked for 1000x, this machine allows ")


@pytest.mark.parametrize("busy", [2.0, 0.5])
def test_a_run_aims_by_what_it_measures_before_it_prunes(busy, begun, timed_here, monkeypatch, capsys):
    """The machine was busy when the dense network was first timed, or is now; the packed one takes what is predicted."""
    config = dataclasses.replace(smoke.config, out=begun, speedup=1.6, timing_seconds=0.0)
    (begun / "aimed.json").unlink()
    true = whole(config)
    write_atomically(begun / "whole.json", json.dumps(true._replace(dense_seconds=busy * true.dense_seconds)._asdict()))
    model = config.network(config.widths, 1, config.classes, rngs=nnx.Rngs(0))
    speed = Speed(conv_shapes(model, config.data().test_images[:1]), MACHINE, true)
    speedups = []

    def timed(function, networks, *rest):
        if function is not evaluate.time_networks:
            return function(networks, *rest)
        kept = {layer.path: layer.density for layer in plan(networks[evaluate.DENSE], rest[0], MACHINE).layers}
        speedups.append(speed.speedup(kept))
        return {name: {"seconds": 1 / (speedups[-1] if name == evaluate.PACKED else 1)} for name in networks}

    monkeypatch.setattr(run, "afresh", timed)
    result = run.run(config)
    assert len(speedups) > 1 and abs(speedups[0] / 1.6 - 1) > 0.05 and speedups[-1] == pytest.approx(1.6, rel=0.05)
    assert result["predicted"] == pytest.approx(1.6, rel=0.02)
    assert result["whole"]["dense_seconds"] == pytest.approx(true.dense_seconds, rel=0.05)
    assert re.search(rf"aiming at 1.6x .* predicted [0-9.]+x, measured {speedups[0]:.3g}x ", capsys.readouterr().err)


def test_a_run_goes_on_pruning_by_what_it_began_with(begun, timed_before, monkeypatch):
    """As one of several processes does, which measures nothing."""
    config = dataclasses.replace(smoke.config, out=begun, speedup=1.6)
    run.run(config)
    (begun / "aimed.json").unlink()
    monkeypatch.setattr(run, "steered", None)
    run.run(config)
    assert not (begun / "aimed.json").exists()


def test_accuracy_bounds_the_speedup(begun, timed_before, monkeypatch, capsys):
    config = dataclasses.replace(smoke.config, out=begun, speedup=1.6, points=2.0)
    train_to, started = run.train.fit, []

    def losing(model, *arguments, title, **options):
        """What is pruned too far loses 10 points, what is not none."""
        trained = train_to(model, *arguments, title=title, **options)
        if title == "dense training":
            started[:] = [trained.accuracies[-1][1], nnx.state(model, nnx.Param)["head"]["kernel"][...]]
        else:
            started.append(title)
            lost = 0.1 if title == "pruning" else 0.0
            trained = trained._replace(accuracies=[(1, started[0] - lost)])
        return trained

    monkeypatch.setattr(run.train, "fit", losing)
    result = run.run(config)
    assert started[2:] == ["pruning", "pruning for 1.45x"]
    assert result["shortfall"] == "asked for 1.6x at 2.0 points at most: 1.45x costs 0.00, 1.6x costs 10.00"
    assert result["predicted"] == pytest.approx(1.45, rel=0.02) and result["requested"] == 1.6
    assert "1.6x costs 10.00 points, 2.0 are allowed: pruned again for 1.45x" in capsys.readouterr().out


def test_the_command_line(monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(run, "run", seen.append)
    monkeypatch.setattr(sys, "argv", ["run"])
    run.main()
    monkeypatch.setattr(sys, "argv", ["run", "smoke", "--seed", "4", "--peak-lr", "0.2", "--out", "here"])
    run.main()
    assert seen == [digits.config, dataclasses.replace(smoke.config, seed=4, peak_lr=0.2, out=Path("here"))]
    monkeypatch.setattr(sys, "argv", ["run", "nosuch"])
    with pytest.raises(SystemExit, match="no configuration 'nosuch', wanted one of .*'digits'"):
        run.main()


def test_packed_weights_come_back_from_disk(finished):
    config, _ = finished
    dense, packed = np.load(config.out / "dense.npz"), np.load(config.out / "packed.npz")
    kernel = dense["stages/1/0/conv/kernel"]
    norm = {name: dense[f"stages/1/0/norm/{name}"] for name in ("scale", "var")}
    arrays = {name: packed[f"stages/1/0/conv/kernel/{name}"] for name in ("values", "gaps", "layout")}
    again = PackedKernel.from_arrays(arrays)
    np.testing.assert_array_equal(np.asarray(again.unpack()) != 0, kernel != 0)
    # A folded weight is w * scale / sqrt(var + 1e-5), rounded once to float32.
    np.testing.assert_allclose(again.unpack(), kernel * norm["scale"] / np.sqrt(norm["var"] + 1e-5), rtol=1e-6)


class Links(HTMLParser):
    """Collects what a browser would fetch, and checks that tags nest."""

    def __init__(self):
        super().__init__()
        self.fetched, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.fetched += [value for name, value in attributes if name in ("src", "href", "srcset") and value[0] != "#"]
        self.fetched += [value for _, value in attributes if "url(" in (value or "") and "url(#" not in value]
        self.fetched += [value for name, value in attributes if name == "xlink:href" and value[0] != "#"]
        if tag not in ("meta", "li"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag != "li":
            assert self.open.pop() == tag


def test_the_page_needs_nothing_else(finished):
    config, result = finished
    text = (config.out / "report.html").read_text()
    links = Links()
    links.feed(text)
    assert not links.fetched and not links.open and "@import" not in text and "<script" not in text
    assert text.count("<svg") == 3 and "stages/1/0/conv" in text
    assert f"{100 * result['accuracy']['packed']:.2f} %" in text


def test_where_it_loses(result):
    result["accuracy"] = {"dense": 0.97, "pruned": 0.965, "packed": 0.965}
    result["test_images"], result["requested"] = 2000, 3.0
    fast, slow = ({"seconds": seconds, "spread": 0.1, "calls": 9, "error": 1e-7} for seconds in (1.0, 2.0))
    result["times"] = {"1": {evaluate.DENSE: slow, evaluate.FOLDED: fast, evaluate.PACKED: slow}}
    layer = {"path": "a", "shape": "n1 8x4x4 -> 8 3x3", "density": 0.1, "choice": "sparse", "reason": "predicted 2x",
             "useful": [0.01, 0.3], "dense": [0.4, 0.4], "sparse": [0.2, 0.8]}
    result["layers"] = {"1": [layer, layer | {"path": "b", "choice": "dense", "reason": "too dense", "sparse": [0.2, 0.1]}]}
    assert report.losses(result) == [
        "0.50 points of test accuracy are lost (2000 test images).",
        "Asked for 3x at batch 1: measured 0.50x.",
        "At batch 1 the packed network is slower than the dense one: 0.50x.",
        "b stays dense: too dense.",
        "a runs sparse but is slower so at batch 1: 0.50x.",
        "b runs dense but would be 4.0x as fast sparse at batch 1.",
        "At batch 1 the sparse pruned layers take 4.0x the predicted time (median).",
        "At batch 1 40 % of the packed network's time goes to what is no layer: pooling, ReLU, copies, calls.",
    ]
    assert report.headline(result).startswith("Asked for 3x at batch 1: pruned to ")
    assert "0.5 times as fast at batch 1" in report.headline(result) and "0.50 points less accurate" in report.headline(result)


def test_a_table_of_runs(result):
    other = result | {"seed": 1}
    newer = copy.deepcopy(result)
    newer["accuracy"]["packed"] = 0.4321
    text = report.table([result, other, newer])
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| smoke")]
    assert [row[0] for row in rows] == ["| smoke, seed 0", "| smoke, seed 1"]
    assert rows[0][1] == "1.2x" and rows[0][2].endswith("→ 43.2 %") and result["cpu"] in text
    fastest = min(result["times"]["1"][name]["seconds"] for name in (evaluate.DENSE, evaluate.FOLDED))
    assert f"**{fastest / result['times']['1'][evaluate.PACKED]['seconds']:.1f}x**" in rows[0][5]


def test_a_run_that_was_started_again_and_again(result):
    def measured(speedup, seed=0, shortfall=""):
        line = copy.deepcopy(result) | {"seed": seed, "shortfall": shortfall}
        dense = min(line["times"]["1"][name]["seconds"] for name in (evaluate.DENSE, evaluate.FOLDED))
        line["times"]["1"][evaluate.PACKED]["seconds"] = dense / speedup
        return line

    short = measured(1.2, shortfall="asked for 1.2x, this machine allows 1.19x")
    text = report.starts([measured(1.33), short, measured(9, 1), measured(1.1)])
    assert [line for line in text.splitlines() if line.startswith("| smoke")] == [
        f"| smoke, seed 0 | 3 | 1 | 1.2x | 1.10, 1.20, 1.33 | 2 | 1 | {result['commit']} |"]
    assert report.starts([measured(1.2), measured(1.2, 1)]) == ""


def test_no_table_of_nothing_or_of_two_machines(result):
    with pytest.raises(ValueError, match="no results to make a table of: run python -m experiments.run --results FILE first"):
        report.table([])
    with pytest.raises(ValueError, match="come from different machines, .*another CPU.*: keep those of one"):
        report.table([result, result | {"seed": 1, "cpu": "another CPU"}])


def test_networks_that_differ_are_not_timed():
    model = VGG(((4,), (8,)), 1, 10, rngs=nnx.Rngs(0))
    model.eval()
    model.stages[1][0].conv.kernel[0] = 0.0  # an unpruned layer stays dense
    x = np.random.default_rng(0).standard_normal((2, 16, 16, 1), np.float32)
    packed = pack_model(model, plan(model, x, dataclasses.replace(MACHINE, alpha=0.1)))
    assert isinstance(packed.stages[1][0].conv, SparseConv)
    times = evaluate.time_networks({"dense": model, "packed": packed}, x, 0.01)
    assert times["packed"]["error"] <= 16 * times["dense"]["error"] and times["dense"]["calls"] >= 5
    values = packed.stages[1][0].conv.values
    values.set_value(values[...] * (1 + 1e-3))
    with pytest.raises(AssertionError, match="outputs of {'packed': .*they compute something else, and no time counts"):
        evaluate.time_networks({"dense": model, "packed": packed}, x, 0.01)


def test_what_runs_in_eight_bits_is_timed_and_weighed_as_that(tmp_path):
    """Its layers by inputs that they can have; an output that is off by half of the largest is another network's."""
    rngs, draw = nnx.Rngs(0), np.random.default_rng(0)
    convolve = [nnx.Conv(ic, oc, (3, 3), rngs=rngs) for ic, oc in ((8, 16), (16, 16))]
    model = nnx.Sequential(convolve[0], nnx.relu, convolve[1], nnx.relu, lambda x: x.mean((1, 2)))
    nnx.update(model, prune.one_shot(nnx.state(model, nnx.Param), prune.constant({"layers/0": 0.5, "layers/2": 0.5}), block=4))
    images = draw.random((64, 6, 6, 8), np.float32)
    labels = np.zeros(64, np.int32)
    data = Dataset(images, labels, images, labels)
    single, rounded = (evaluate.planned(model, data, MACHINE, precision) for precision in ("float32", "int8"))
    assert [row.inputs is not None for row in rounded.layers] == [True, True]
    networks = {"dense": model, "packed": pack_model(model, rounded)}
    times = evaluate.time_networks(networks, images[:1], 0.01)
    assert 1e-6 < times["packed"]["error"] < evaluate.ROUNDED
    rows = evaluate.time_layers(evaluate.fold_only(model, rounded), rounded, 1, 0.01)
    assert [row["sparse"][0] for row in rows] == [layer.int8_seconds for layer in rounded.layers]
    both = networks["packed"], pack_model(model, single)
    small, large = (evaluate.save_weights(network, tmp_path / "weights.npz") for network in both)
    assert small["memory"] < large["memory"] and small["disk"] < large["disk"]
    networks["dense"] = nnx.Sequential(*model.layers[:-1], lambda x: 3 * x.mean((1, 2)))
    with pytest.raises(AssertionError, match=r"'packed': 0.*wanted at most 5.0e-01.*they compute something else"):
        evaluate.time_networks(networks, images[:1], 0.01)
