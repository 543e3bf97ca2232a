"""The comparison of pruning methods: from end to end as small as it can be, its arithmetic, and what it says about itself."""

import dataclasses
import json
import re
from functools import cache

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from test_report import MACHINE, Links

from experiments import docs, evaluate, train
from experiments.benchmark import results
from experiments.compare import __main__ as compare
from experiments.compare import networks, page, runs, summary, timing, training
from experiments.compare.published import PUBLISHED
from experiments.compare.runs import Run
from experiments.methods import METHODS, Speed
from sparseflax import prune
from sparseflax.cost.atomic import write_atomically
from sparseflax.cost.machine import to_dict
from sparseflax.cost.model import conv_seconds, dense_seconds
from sparseflax.cost.shape import ConvShape
from sparseflax.network.shapes import conv_shapes
from tests.hasty import hurry

# What is fixed here stands for any machine: that it is not this one is meant.
pytestmark = pytest.mark.filterwarnings("ignore:the plan was made for:RuntimeWarning")

CONFIG = dataclasses.replace(networks.QUICK["vgg"], widths=((8,), (32,)), dense_steps=4, prune_steps=4, ramp_steps=3,
                             prune_every=1, save_every=2, train_images=64, test_images=32, timing_seconds=0.0, warmup_steps=1)
CHOSEN = ("GMP, guided", "one-shot")
SHAPES = {"a": ConvShape(1, 14, 14, 32, 64, 3, 3), "b": ConvShape(1, 14, 14, 64, 64, 3, 3),
          "c": ConvShape(1, 28, 28, 3, 8, 3, 3)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Of a finished comparison: two speedups, the second out of reach."""
    out = tmp_path_factory.mktemp("compare")
    write_atomically(out / "machine.json", json.dumps(to_dict(MACHINE)))
    model, data = CONFIG.network(CONFIG.widths, 1, CONFIG.classes, rngs=nnx.Rngs(0)), CONFIG.data()
    dense = prune.guided(conv_shapes(model, data.test_images[:1]), MACHINE, speedup=1).dense_seconds
    write_atomically(out / "vgg-whole.json", json.dumps(prune.Whole(dense)._asdict()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "use_threads", lambda threads: None)
        patch.setattr(compare, "keep_memory", lambda: True)
        patch.setattr(networks, "QUICK", {"vgg": CONFIG})
        hurry(patch, timing)
        compare.main(flags(out))
    return out


@pytest.fixture(autouse=True)
def all_cpus(monkeypatch):
    """The process is the other tests' too, which want all its CPUs."""
    monkeypatch.setattr(compare, "use_threads", lambda threads: None)
    monkeypatch.setattr(compare, "keep_memory", lambda: True)


def flags(out):
    return ["--quick", "--out", str(out), "--speedups", "1.2", "1000", "--methods", *CHOSEN]


def test_a_line_for_every_run(folder):
    lines = runs.lines(folder / runs.RESULTS)
    assert list(lines) == [Run("vgg", method, speedup, 0) for method in CHOSEN for speedup in (1.2, 1000.0)]
    for run, line in lines.items():
        if run.speedup == 1000:
            assert re.match("a speedup of 1000 cannot be reached: the highest is [0-9.]+", line["refused"])
            assert "times" not in line
            continue
        assert line["guided"] == (run.method == "GMP, guided")
        assert 0 < line["kept"] < line["weights"] and line["packed_accuracy"] == line["accuracy"]
        assert set(line["times"]) == {"1", "16"} and line["times"]["1"][evaluate.PACKED]["error"] < 1e-5
        assert line["predicted"] == pytest.approx(1.2, rel=0.02)
        assert line["bytes"][evaluate.PACKED]["disk"] > 0 and line["training_seconds"] > 0
        steps, densities, speedups = zip(*line["curve"], strict=True) if line["curve"] else ((), (), ())
        if run.method == "one-shot":
            assert not steps
        else:
            assert steps == (1, 2, 3, 4) and densities[-1] == pytest.approx(line["kept"] / line["weights"], rel=0.02)
            assert list(densities) == sorted(densities, reverse=True)
            assert speedups[-1] == pytest.approx(line["predicted"], rel=0.02)
    assert len({line["dense_accuracy"] for line in lines.values()}) == 1


def test_finished_runs_are_skipped_and_lost_lines_made_again(folder, monkeypatch):
    monkeypatch.setattr(networks, "QUICK", {"vgg": CONFIG})
    monkeypatch.setattr(train, "_step", None)
    hurry(monkeypatch, timing)
    before = (folder / runs.RESULTS).read_text()
    compare.main(flags(folder))
    assert (folder / runs.RESULTS).read_text() == before
    # A dense network that is trained, and weights that are there: only the timing is repeated.
    (folder / runs.RESULTS).write_text("\n".join(before.splitlines()[:-2]) + "\n")
    compare.main(["time", *flags(folder)])
    again, lines = results.read(folder / runs.RESULTS), [json.loads(line) for line in before.splitlines()]
    assert [(line["method"], line["requested"], line.get("kept")) for line in again] == [
        (line["method"], line["requested"], line.get("kept")) for line in lines]


def test_a_killed_run_goes_on_from_its_checkpoints(folder, tmp_path, monkeypatch):
    for name in ("machine.json", "vgg-whole.json"):
        (tmp_path / name).write_text((folder / name).read_text())
    monkeypatch.setattr(networks, "QUICK", {"vgg": CONFIG})
    take_step, calls = train._step, iter(range(100))

    def killed(*arguments):
        if next(calls) == 4 + 4 + 3:  # dense training, its reference, one step after the first checkpoint of pruning
            raise KeyboardInterrupt
        return take_step(*arguments)

    monkeypatch.setattr(train, "_step", killed)
    command = ["train", "--quick", "--out", str(tmp_path), "--speedups", "1.2", "--methods", "GMP, guided"]
    with pytest.raises(KeyboardInterrupt):
        compare.main(command)
    steps = []
    monkeypatch.setattr(train, "_step", lambda *arguments: steps.append(0) or take_step(*arguments))
    compare.main(command)
    assert len(steps) == 2
    run = Run("vgg", "GMP, guided", 1.2, 0)
    line, straight = (runs.lines(out / runs.TRAINED)[run] for out in (tmp_path, folder))
    assert line["accuracy"] == straight["accuracy"] and line["curve"] == straight["curve"]
    assert not (run.folder(tmp_path) / "training").exists() and (run.folder(tmp_path) / "pruned").exists()


def test_weights_that_are_not_there(folder):
    with pytest.raises(ValueError, match="no weights in .*nowhere/pruned: delete the run's line in trained.jsonl and"):
        training.pruned_network(CONFIG, folder / "nowhere")


def test_a_folder_of_other_settings(folder, monkeypatch):
    monkeypatch.setattr(networks, "QUICK", {"vgg": dataclasses.replace(CONFIG, peak_lr=0.2)})
    with pytest.raises(ValueError, match="holds a run with peak_lr 0.1 instead of 0.2: give another --out"):
        compare.main(["train", "--quick", "--out", str(folder), "--speedups", "1.1", "--methods", "one-shot"])


def test_predictions_of_a_network():
    speed = Speed(SHAPES, MACHINE, prune.Whole(1e-5 + sum(float(dense_seconds(s, MACHINE)) for s in SHAPES.values()), 1e-5))
    densities = {"a": 0.1, "b": 0.9}
    dense = {name: float(dense_seconds(shape, MACHINE)) for name, shape in SHAPES.items()}
    sparse = {name: float(conv_seconds(SHAPES[name], density, MACHINE)) for name, density in densities.items()}
    assert sparse["a"] < dense["a"] and sparse["b"] > dense["b"]  # b runs dense
    expected = (1e-5 + sum(dense.values())) / (1e-5 + sparse["a"] + dense["b"] + dense["c"])
    assert speed.speedup(densities) == pytest.approx(expected, rel=1e-5)
    weights = {name: shape.weights for name, shape in SHAPES.items()}
    kept = 0.1 * weights["a"] + 0.9 * weights["b"] + weights["c"]
    assert speed.density(densities) == pytest.approx(kept / sum(weights.values()))
    assert speed.density({}) == 1


@cache
def dense():
    """(data, network, its shapes); a few pictures are enough for a method to look at."""
    data, model = training.dataset(dataclasses.replace(CONFIG, train_images=16)), training._network(CONFIG)
    model.eval()
    return data, model, conv_shapes(model, data.test_images[:1])


def task(speedup, method=CONFIG.method, block=1):
    config = dataclasses.replace(CONFIG, speedup=speedup, method=method, block=block)
    data, model, shapes = dense()
    return training.main_job.task(config, nnx.clone(model), data, shapes, MACHINE, None)


def test_unguided_densities_are_the_largest_that_are_predicted_fast_enough():
    asked = task(1.5)
    guide = asked.matched(lambda density: prune.uniform(asked.params, density))
    density = next(iter(guide.densities.values()))
    assert asked.speed.speedup(guide.densities) >= 1.5 > asked.speed.speedup(dict.fromkeys(guide.densities, 1.01 * density))
    with pytest.raises(ValueError, match=r"a speedup of 99 cannot be reached: the highest is [0-9.]+, at a density of 0.01"):
        task(99).matched(lambda density: prune.uniform(asked.params, density))


# Without gradients the guided lasso shrinks all weights alike, and every layer leaves at the last review.
@pytest.mark.parametrize("name", [name for name in METHODS if name != "GESL"])
def test_every_method_prunes_to_the_requested_prediction(name):
    asked = dataclasses.replace(task(1.3, name), steps=80, ramp_steps=60, every=5)
    optimizer = METHODS[name].prepare(asked, METHODS[name].guide(asked))
    params = asked.params
    assert (optimizer is not None) == METHODS[name].trains
    if optimizer:
        state, zeros, update = optimizer.init(params), jax.tree.map(np.zeros_like, params), jax.jit(optimizer.update)
        for _ in range(asked.steps):
            updates, state = update(zeros, state, params)
            params = optax.apply_updates(params, updates)
    densities = {layer: np.count_nonzero(kernel) / kernel.size for layer, kernel in prune.kernels(params).items()}
    assert (asked.block, asked.precision) == (METHODS[name].block, METHODS[name].precision)
    # Rounded to whole weights, and gradients are zero here: a layer can settle where training would not leave it.
    assert min(densities.values()) < 1
    if name != "STR":  # its layers share their weights among them as training has it
        assert asked.speed.speedup(densities) == pytest.approx(1.3, rel=0.05)


@pytest.mark.parametrize("name", [name for name in METHODS if name != "GESL"])  # as above
def test_every_method_prunes_by_the_blocks_that_are_configured(name):
    asked = dataclasses.replace(task(1.3, name, block=4), steps=60, ramp_steps=50, every=5)
    optimizer = METHODS[name].prepare(asked, METHODS[name].guide(asked))
    params = asked.params
    if optimizer:
        state, zeros, update = optimizer.init(params), jax.tree.map(np.zeros_like, params), jax.jit(optimizer.update)
        for _ in range(asked.steps):
            updates, state = update(zeros, state, params)
            params = optax.apply_updates(params, updates)
    kept = {layer: np.asarray(kernel) != 0 for layer, kernel in prune.kernels(params).items()}
    assert not all(mask.all() for mask in kept.values())
    for mask in kept.values():
        for first in range(0, mask.shape[-2], 4):
            block = mask[..., first:first + 4, :]
            np.testing.assert_array_equal(block.all(-2), block.any(-2))


def line(method="GMP, guided", network="vgg", seed=0, requested=2.0, accuracy=0.96, ms=1.0, **other):
    """A made-up result: the dense network takes 3 ms as trained, 2 ms folded, and has an accuracy of 96 %."""
    times = {n: {name: {"seconds": float(n) * seconds, "spread": 0.1, "calls": 9, "error": 1e-7} for name, seconds in
                 ((evaluate.DENSE, 3e-3), (evaluate.FOLDED, 2e-3), (evaluate.PACKED, 1e-3 * ms))} for n in ("1", "16")}
    layers = [{"path": f"stages/{i}/conv", "shape": "", "density": density, "choice": "sparse", "useful": useful}
              for i, (density, useful) in enumerate([(1.0, [0.3, 0.3]), (0.1, [0.01, 0.3])])]
    return {"network": network, "method": method, "guided": METHODS[method].guided, "seed": seed, "requested": requested,
            "dense_accuracy": 0.96, "accuracy": accuracy, "packed_accuracy": accuracy, "kept": 100, "weights": 1000,
            "bytes": {evaluate.DENSE: {"disk": 4000}, evaluate.PACKED: {"disk": 800}}, "times": times, "predicted": 2.0,
            "training_seconds": 60.0, "layers": layers, "cpu": "a CPU", "threads": 2, "versions": {"jax": "1"}, "commit": "c",
            "date": "2026-11-23T00:00:00", "curve": [[10, 0.5, 1.5], [20, 0.1, 2.0]]} | other


def test_a_point_is_the_mean_of_its_seeds():
    (point,) = summary.points([line(seed=0, ms=1.0, accuracy=0.95), line(seed=1, ms=0.25, accuracy=0.96),
                               line(seed=2, ms=0.5, accuracy=0.94)])
    assert (point.seeds, point.accuracy, point.compression) == (3, pytest.approx(95), pytest.approx(5))
    assert point.spread == pytest.approx(2) and point.lost == pytest.approx(1) and point.density == pytest.approx(0.1)
    assert point.seconds[1] == pytest.approx(0.5e-3)  # the geometric mean of 1, 0.25 and 0.5
    assert point.speedup() == pytest.approx(4) and point.speedup(16) == pytest.approx(4)


def test_a_page_shows_the_newest_line_of_a_run(monkeypatch, tmp_path):
    for ms in (1.0, 0.5):
        results.append(tmp_path / "compare.jsonl", line(ms=ms))
    monkeypatch.setattr(docs, "RESULTS", tmp_path)
    assert docs.compared() == "## a CPU\n\n" + page.tables([line(ms=0.5)])


def test_the_sentence_compares_the_fastest_of_equal_accuracy():
    lines = [line("GMP, uniform", ms=1.0, accuracy=0.956), line("GMP, uniform", requested=4.0, ms=0.5, accuracy=0.95),
             line("GMP, guided", ms=1.0), line("GMP, guided", requested=4.0, ms=0.6, accuracy=0.9551),
             line("ESL", ms=1.1, accuracy=0.99)]
    said = summary.conclusions(lines)
    assert said[0] == (
        "vgg: at equal accuracy (at most 0.5 points below dense, one seed) the best guided method, GMP, guided (3.33x dense, "
        "-0.49 points), is measured 1.67 times as fast as the best unguided one, GMP, uniform (2.00x dense, -0.40 points), "
        "at batch 1. Between the measured points, at exactly 0.5 below dense: GMP, guided 3.33x dense, GMP, uniform 2.24x, a "
        "ratio of 1.48.")
    assert said[1].startswith("vgg: the same method with the guide and without: GMP, guided +0.51 points at 4x over GMP")
    assert said[2] == ("vgg: at 4x GMP, guided keeps 10 % of the 1 layers it prunes; GMP, uniform keeps 10 % of the 1 "
                       "layers it prunes. The less these differ, the less a guide can gain.")
    assert said[3] == ("Requested speedups met within 10% as measured at batch 1: 1 of 2 by guided methods. "
                       "Not met: vgg, GMP, guided: 4x asked, 3.33x measured.")
    lost = summary.conclusions([line("GMP, uniform", ms=0.5), line("GMP, guided")])
    assert "is measured not faster (0.50 times as fast: guidance does not win here) than the best unguided one" in lost[0]
    none = summary.conclusions([line("GMP, uniform", accuracy=0.5), line("GMP, guided")])
    assert none[0] == "vgg: no unguided method stays within 0.5 points of the dense network's accuracy."


def test_speedup_at_equal_accuracy_is_interpolated():
    """Dense, 2x at -0.2 points, 8x at -0.8: half a point lies in the middle of their logarithms."""
    lines = [line(accuracy=0.958), line(requested=8.0, ms=0.25, accuracy=0.952)]
    assert summary.equal_speedup(summary.points(lines)) == pytest.approx(4)
    assert summary.equal_speedup(summary.points(lines[:1])) == pytest.approx(2)  # nothing is claimed beyond
    # From dense, which loses nothing, to 2x at -1.0.
    assert summary.equal_speedup(summary.points([line(accuracy=0.95)])) == pytest.approx(2**0.5)
    both = lines + [line("GMP, uniform", accuracy=0.956, ms=1.0), line("GMP, uniform", requested=8.0, ms=0.25, accuracy=0.90)]
    assert summary.conclusions(both)[0].endswith(
        " Between the measured points, at exactly 0.5 below dense: GMP, guided 4.00x dense, GMP, uniform 2.05x, a ratio of "
        "1.95.")


def test_eight_bits_are_compared_with_the_fastest_of_float32():
    """At batch 1: 4x at -0.4 over 2x at -0.4; the curves from dense meet -0.5 at 4.36 (to 8x at -1.2) and 2^(5/4) over."""
    lines = [line(accuracy=0.956, ms=1.0), line("GMP, uniform", accuracy=0.95, ms=0.1), line("GMP, guided", requested=9.0,
             accuracy=0.94, ms=0.1)]
    int8 = [line("GMP, guided, int8", accuracy=0.958, packed_accuracy=0.956, precision="int8", ms=0.5),
            line("GMP, guided, int8", requested=9.0, accuracy=0.947, packed_accuracy=0.948, precision="int8", ms=0.25)]
    said = summary.conclusions(lines + int8)
    assert said[:1] == summary.conclusions(lines)[:1]  # float32 is compared with float32
    fast, slow = 4 * 2 ** ((0.5 - 0.4) / (1.2 - 0.4)), 2 * 10 ** ((0.5 - 0.4) / (2 - 0.4))
    alone = 20 ** (0.5 / 1)  # of the uniform one, from dense to 20x at -1.0
    ratio = f"{fast / max(slow, alone):.2f}"
    times = ("GMP, guided, int8 (4.00x dense, -0.40 points) is measured 2.00 times as fast as GMP, guided (2.00x dense, "
             f"-0.40 points), {ratio} times at exactly 0.5 below dense")
    assert said[1] == (
        f"vgg: eight bits over the fastest of float32 at equal accuracy: at batch 1 {times}; at batch 16 {times}. Eight bits "
        "by themselves lose 0.05 points in the mean to the same pruned weights in float32, at most 0.20 (at 2x).")
    none = summary.conclusions([line(), line("GMP, guided, int8", accuracy=0.9, precision="int8")])
    assert none[1] == "vgg: no network in eight bits stays within 0.5 points of dense."


def test_twins_are_compared_where_the_network_is_of_use():
    lines = [line(method, requested=requested, accuracy=accuracy) for requested, method, accuracy in (
        (2.0, "GMP, guided", 0.95), (2.0, "GMP, uniform", 0.94), (9.0, "GMP, guided", 0.90), (9.0, "GMP, uniform", 0.1))]
    assert "GMP, guided +1.00 points at 2x over GMP, uniform." in "".join(summary.conclusions(lines))


def test_refused_requests_of_a_method_are_one_sentence():
    refused = [{"network": "vgg", "method": "ESL", "guided": False, "seed": seed, "requested": requested,
                "refused": f"{requested:g} is too fast"} for requested in (9.0, 8.0) for seed in (0, 1)]
    assert [said for said in summary.conclusions([line(), *refused]) if "too" in said] == ["vgg, ESL, 8x, 9x: 8 is too fast"]


def test_a_point_of_fewer_seeds_does_not_win():
    lines = [line("GMP, uniform", seed=seed) for seed in (0, 1)] + [line("ESL", ms=0.1)]
    found = summary.fastest(summary.points(lines), "vgg", guided=False)
    assert found is not None and found.method == "GMP, uniform"


def test_the_best_methods_go_on_to_the_other_networks():
    lines = [line("GMP, uniform", accuracy=0.9), line("ESL", accuracy=0.8), line("GMP, guided", accuracy=0.95), line("GESL"),
             {"method": "GESL", "guided": True, "refused": "out of reach"}]
    assert summary.best(lines) == ["GMP, uniform", "GMP, guided", "GMP, guided, int8"]


def test_the_best_methods_are_asked_for_more(tmp_path, monkeypatch):
    made = []

    def pretend(config, wanted, out):
        for run in wanted:
            made.append(run)
            accuracy = 0.9 + 0.05 * run.method.startswith("DNS") + 0.06 * run.method.startswith("RigL, guided")
            results.append(out / runs.TRAINED, {"network": run.network, "method": run.method, "requested": run.speedup,
                                                "seed": run.seed, "guided": METHODS[run.method].guided, "accuracy": accuracy})

    monkeypatch.setattr(training, "measure", lambda config, out: None)
    monkeypatch.setattr(training, "prune_all", pretend)
    compare.main(["train", "--out", str(tmp_path), "--seeds", "3"])
    best = [(method, speedup) for method in ("DNS", "RigL, guided") for speedup in (1.5, 2.5, 3, 3.5, 4, 4.5, 5)]
    everything = [(method, speedup) for method in METHODS for speedup in (1.5, 2.5, 4)]
    asked = {name: [(run.method, run.speedup) for run in made if run.network == name] for name in networks.NETWORKS}
    assert asked == {"vgg": everything + best, "resnet": best, "inception": best}


def test_the_page_needs_nothing_else():
    lines = [line(method, network, seed, requested, 0.96 - 0.001 * requested, 2 / requested)
             for network in ("vgg", "resnet") for method in METHODS for requested in (1.5, 2.0, 3.0) for seed in (0, 1)]
    lines.append({"network": "vgg", "method": "ESL", "guided": False, "seed": 0, "requested": 9.0, "refused": "<never>"})
    text = page.page(lines)
    links = Links()
    links.feed(text)
    assert not links.fetched and not links.open and "<script" not in text
    assert text.count("<svg") == 2 * 4 and "vgg, ESL, 9x: &lt;never&gt;" in text
    assert text.count(": published</td>") == len(PUBLISHED) and "Kusupati et al., ICML 2020" in text
    looks = {(look["marker"], look["markerfacecolor"] == "white") for look in page.figures.styles(lines).values()}
    assert len(looks) == len(METHODS)  # told apart without colour


def test_a_page_of_refusals_only():
    text = page.page([{"network": "vgg", "method": "ESL", "guided": False, "seed": 0, "requested": 9.0, "refused": "too fast"}])
    assert "vgg, ESL, 9x: too fast" in text and "Every run was refused" in text


def test_nothing_to_show_or_two_machines():
    with pytest.raises(ValueError, match="no run was timed yet: run python -m experiments.compare"):
        page.page([])
    with pytest.raises(ValueError, match="come from different machines, .*another CPU.*: keep those of one"):
        page.gains([line(), line(seed=1, cpu="another CPU")])


def test_tables():
    lines = [line(), line("GMP, uniform")]
    text = page.gains(lines)
    assert "| GMP, guided: measured here | vgg, cluttered digits | 96.0 → 96.0 % | 10.0 % | 5.0x | 2.00x dense" in text
    assert sum(": published |" in row for row in text.splitlines()) == len(PUBLISHED)
    assert len({row.count(" | ") for row in text.splitlines() if row.startswith("|")}) == 1
    text = page.tables(lines)
    assert text.startswith("- vgg: ") and "## vgg" in text
    assert [row.split(" | ")[0] for row in text.splitlines() if row.startswith("| GMP")] == ["| GMP, guided", "| GMP, uniform"]


@pytest.mark.parametrize("command, message", [
    (["tarin"], "there is no stage tarin, wanted some of measure, train, time, report"),
    (["--methods", "magic"], "invalid choice: 'magic'"), (["--networks", "alexnet"], "invalid choice: 'alexnet'"),
    (["--speedups", "0.5"], r"a requested speedup is at least 1, got \[0.5\]")])
def test_a_wrong_command(command, message, capsys):
    with pytest.raises(SystemExit):
        compare.main(command)
    assert re.search(message, capsys.readouterr().err)


def test_settings_of_all_networks():
    for configs in (networks.NETWORKS, networks.QUICK):
        assert [config.name for config in configs.values()] == list(configs) == ["vgg", "resnet", "inception"]
        for config in configs.values():
            assert config.ramp_steps < config.prune_steps
