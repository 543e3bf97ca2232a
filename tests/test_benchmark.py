"""The benchmark: rivals compute the layer that is timed, wrong ones are caught, results are written, read and summed up."""

import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import reference

from experiments.baselines import Rival, bcsr, field, xla
from experiments.baselines.yardstick import can_run, time_command
from experiments.benchmark import asked, memory, results, table, threads
from experiments.benchmark.layers import check, measure, ours
from experiments.benchmark.layers import reference as expected_of
from experiments.benchmark.timing import Others, Timing, alternate
from experiments.layers import ALEXNET, BENCHMARK, alexnet_problem, choose, layer, name_of, random_problem
from experiments.matrix_market import HEADER, read_matrix, write_matrix
from tests.machines import stored

ROOT = Path(__file__).parents[1]
TINY = layer(8, (5, 7), 6, 3).with_batch(2)


@pytest.mark.parametrize("shape", [
    TINY, layer(8, 6, 4, 3, stride=2, groups=2), layer(6, 7, 5, (1, 3), dilation=2), layer(8, (4, 5), 6, 1).with_batch(3),
], ids=str)
@pytest.mark.parametrize("baseline", field()[0], ids=lambda module: module.__name__.rpartition(".")[2])
def test_rivals_compute_the_layer(baseline, shape):
    problem = random_problem(shape, 0.5)
    window = {"strides": shape.strides, "padding": shape.padding, "dilation": shape.kernel_dilation, "groups": shape.groups}
    exact = np.maximum(reference.conv(problem.x, problem.kernel, **window) + problem.bias, 0)
    bound = reference.bound(problem.x, problem.kernel, problem.bias, **window)
    expected, tolerance = expected_of(problem)
    for rival in [ours(problem, None), *baseline.rivals(problem, 1)]:
        output = rival.output(rival.run())
        assert output.shape == exact.shape
        assert (np.abs(output - exact) <= bound).all(), rival.name
        check(rival, expected, tolerance)


def test_a_rival_that_disagrees_is_an_error():
    problem = random_problem(TINY, 0.5)
    expected, tolerance = expected_of(problem)
    smallest = np.abs(problem.kernel[problem.kernel != 0]).min()
    assert tolerance < 0.1 * smallest  # or a lost weight would pass
    wrong = expected.copy()
    wrong[0, 0, 0, 0] += 2 * tolerance
    with pytest.raises(RuntimeError, match="late is off by .* wanted at most"):
        check(Rival("late", lambda: wrong, np.asarray), expected, tolerance)
    with pytest.raises(RuntimeError, match="nan is off by nan"):
        check(Rival("nan", lambda: wrong * np.nan, np.asarray), expected, tolerance)
    with pytest.raises(RuntimeError, match="other returned .* computes another layer"):
        check(Rival("other", lambda: wrong[:1], np.asarray), expected, tolerance)


def test_contenders_take_turns():
    order = []
    timings, peak = alternate({name: lambda name=name: order.append(name) for name in "ab"}, 0.0, 1, peak=lambda: 3.0)
    turns = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    assert turns == ["a", "b"] * 5
    assert peak == 3.0
    assert 5 <= timings["a"].calls < order.count("a")  # some calls of every turn are not timed


def test_a_timing_is_the_median_and_the_quartiles():
    timing = Timing.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (timing.seconds, timing.calls) == (3.0, 5)
    assert timing.spread == pytest.approx(2 / 3)


def test_a_line_of_the_results(tmp_path):
    stub = tmp_path / "stub.py"
    stub.write_text("import json, sys\nprint('a banner')\nprint(json.dumps({'engine': ' '.join(sys.argv[1:]), 'seconds': 1}))")
    problem = random_problem(TINY, 0.25)
    line = measure(problem, [xla], threads=1, seconds=0.0, yardstick=f"{sys.executable} {stub}")
    assert line["density"] == problem.density
    assert line["flops"] == 2 * 2 * 5 * 7 * 6 * 9 * 8
    assert list(line["times"]) == ["sparseflax", "xla"]
    assert {**line["times"]["xla"], "seconds": 0}.keys() == {"seconds", "spread", "calls", "dense"}
    assert line["yardstick"]["engine"].startswith("--conv 8,5,7,6,3,3,1,1,1 --matrix ")
    assert line["yardstick"]["engine"].endswith("--batch 2 --threads 1 --seconds 0.0")
    assert 1 / line["yardstick"]["speedup"] == pytest.approx(np.median(line["yardstick"]["ours"]), rel=0.9)


def test_a_yardstick_that_fails(tmp_path):
    with pytest.raises(RuntimeError, match="exited with 3 and printed .* wanted a JSON line"):
        time_command(f"{sys.executable} -c 'raise SystemExit(3)'", random_problem(TINY, 0.5), 1, 0.0)
    assert not can_run(random_problem(layer(4, 9, 4, (1, 7)), 0.5))


def test_the_command_appends_and_draws(tmp_path):
    out, environment = tmp_path / "layers.jsonl", os.environ | {"COLUMNS": "200"}
    command = [sys.executable, "-m", "experiments.benchmark"]
    arguments = ["layers", "--layer", "64x28x28->10", "--corners", "--batch", "1", "--density", "0.1", "0.5",
                 "--seconds", "0", "--rival", "xla", "--out", str(out)]
    for _ in range(2):
        ran = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert len(results.read(out)) == 4
    assert len(results.newest(results.read(out))) == 2
    assert "1 layer: geometric mean" in ran.stdout
    line = results.read(out)[0]
    assert {"cpu", "commit", "date", "python", "versions", "memory", "absent", "set", "drawn"} < line.keys()
    assert line["threads"] == 1
    assert "64x28x28->10 3x3 | " in table.layers_table(out, layers="corners")
    picture = tmp_path / "pictures" / "speed.svg"
    subprocess.run([*command, "plot", "--results", str(out), "--out", str(picture)], cwd=ROOT, check=True)
    assert "</svg>" in picture.read_text()


def line_of(name="a", n=1, threads=1, density=0.1, drawn: float | None = 0.1, ours=1e-3, dense=4e-3, **more):
    seconds = {"sparseflax": ours, "slow": 9.0, "fast": dense, "sparse": 1e-9}
    times = {name: {"seconds": s, "spread": 0.1, "dense": name in ("slow", "fast")} for name, s in seconds.items()}
    return {"set": "benchmark", "layer": name, "n": n, "threads": threads, "isa": "avx2", "density": density, "drawn": drawn,
            "memory": "kept", "flops": 1e9, "peak": 2e11, "times": times, "cpu": "c", "commit": "abc", "date": "2026-01-01",
            "versions": {"jax": "1"}} | more


def test_tables_sum_up_the_newest_lines(tmp_path):
    path = tmp_path / "lines.jsonl"
    for line in (line_of(ours=7.0), line_of(), line_of("b", ours=4e-3, dense=4e-3), line_of(threads=2, ours=5e-4),
                 line_of("b", threads=2, ours=1e-3), line_of(cpu="c")):
        results.append(path, line)
    text = table.layers_table(path)
    assert "| a | 1000 | 50% | 4000 (fast) | 4.00x |" in text  # 1e9 * 0.1 / 1e-3 useful flop/s of 2e11
    assert "**2.00x**" in text
    assert "geometric mean 2.00x, worst 1.00x the fastest dense; 25% of the FMA peak" in text
    assert "c, avx2, 1 thread, " in text
    with pytest.raises(ValueError, match="holds none of the layers 'benchmark' with 3 threads"):
        table.layers_table(path, threads=3)


def test_results_of_several_cpus(tmp_path):
    path = tmp_path / "layers.jsonl"
    for line in (line_of(cpu="old"), line_of(cpu="new", date="2026-01-02"), line_of(cpu="old", ours=7.0)):
        results.append(path, line)
    results.append(tmp_path / "layers_other.jsonl", line_of(cpu="other", date="2026-01-03"))
    found = results.by_cpu(path)
    assert list(found) == ["new", "old", "other"]  # those of the file first, the newest of them first
    assert [line["times"]["sparseflax"]["seconds"] for line in found["old"]] == [7.0]
    (tmp_path / "asked.jsonl").write_text("")
    with pytest.raises(ValueError, match="asked.jsonl holds no results: measure them with .*experiments.benchmark asked`"):
        results.by_cpu(tmp_path / "asked.jsonl")


def test_densities_side_by_side():
    text = table.densities_table([line_of(drawn=0.5, density=0.5, ours=2e-3), line_of(), line_of("b", n=2, ours=3e-3)])
    assert text.splitlines()[2:4] == ["| a | 1 | 1000 | 2000 | 4000 |", "| b | 2 | 3000 |  | 4000 |"]


def test_speedups_that_were_asked_for():
    line = {"layer": "a", "n": 1, "threads": 1, "asked": 2.0, "measured": 1.9, "predicted": 2.0, "dense": 2e-3, "packed": 1e-3,
            "cpu": "c", "date": "2026-01-01", "commit": "abc"}
    text = asked.asked_table([line, line | {"asked": 3.0, "measured": 1.5}, line | {"asked": 9.0, "refused": "too fast"}])
    assert "| a | 1 | 1 | 2x | 1.90 | -5% | 2.00 | 2.000 | 1.000 |" in text and "- a, 1 thread, 9x: too fast" in text
    assert "- 1 thread: 1 of 2 speedups met within 10%, none off by more than 50%\n" in text
    more = asked.asked_table([line, line | {"asked": 1.5}])
    assert "| 1.5x | 1.90 | +27%, unpruned | 2.00 |" in more
    assert "- 1 thread: 1 of 1 speedups met within 10%, none off by more than 5%, 1 exceeded without pruning" in more
    assert len({row.count("|") for row in text.splitlines() if row.startswith("|")}) == 1


def test_gains_are_those_over_the_mean_of_the_cpus():
    assert threads.gain(0.5, [0.8, 1.2]) == pytest.approx(2)
    assert threads.copies([1.0, 2.0], [0.8, 1.2]) == pytest.approx(1.5)


def test_more_cpus_than_there_are():
    with pytest.raises(ValueError, match=r"threads=999, wanted 2 to \d+"):
        threads.measure(random_problem(TINY, 0.5), 999)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
def test_the_threads_command(tmp_path):
    out = tmp_path / "threads.jsonl"
    subprocess.run([sys.executable, "-m", "experiments.benchmark", "threads", "--layer", "512x7x7->512", "512x14",
                    "--batch", "1", "--rounds", "1", "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = results.read(out)
    assert len(lines) == 2
    assert lines[0]["gain"] == pytest.approx(threads.gain(lines[0]["all"], lines[0]["alone"]))
    results.append(out, lines[0] | {"gain": 8.0})
    results.append(out, lines[1] | {"gain": 2.0})
    text = table.threads_table(results.newest(results.read(out)))
    assert "| 8.00x | " in text
    assert "| **4.00x** | " in text


linux = pytest.mark.skipif(not memory.CLEAR.exists(), reason="the system does not tell the peak of a process")


@linux
def test_the_rise_of_a_process():
    def use(size):
        def touch():  # memory of its own: malloc may have kept as much from before
            with mmap.mmap(-1, size) as fresh:
                for _ in range(size >> 20):
                    fresh.write(bytes(1 << 20))

        return touch

    use(1 << 20)()  # what comes with the first call stays
    assert 60 << 20 <= memory.rise(use(64 << 20)) <= 80 << 20
    assert memory.rise(use(1 << 20)) < 8 << 20  # the peak before does not count


@linux
def test_the_memory_command(tmp_path):
    out = tmp_path / "memory.jsonl"
    subprocess.run([sys.executable, "-m", "experiments.benchmark", "memory", "--network", "mobilenet", "--batch", "1",
                    "--out", str(out)], cwd=ROOT, env=stored(tmp_path, 1), capture_output=True, text=True, check=True)
    (line,) = results.read(out)
    assert line["weights"][table.OURS] < line["weights"][memory.DENSE] == 4 * 4_253_864  # of MobileNetV1, with its statistics
    assert all(line["peak"][form] > line["weights"][form] for form in (table.OURS, memory.DENSE))
    results.append(out, line | {"peak": {table.OURS: 12_300_000, memory.DENSE: 45_600_000}})
    assert "| mobilenet | 1 | 12 | 46 | 0.27 | " in memory.memory_table(results.newest(results.read(out)))


def test_a_system_that_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "none")
    with pytest.raises(ValueError, match="does not tell the peak memory of a process: measure on Linux"):
        memory.measure("mobilenet", 1)


def test_trained_layers_are_summed():
    lines = [line_of(drawn=None), line_of("b", drawn=None, ours=3e-3, dense=4e-3)]
    assert "sum of times 2.00x" in table.summaries(lines)[0]


def test_losses_are_named():
    assert table.losses([line_of(), line_of("b", ours=8e-3)]) == ["loses to dense at b, n=1 (0.50x, fast)"]
    assert table.losses([line_of()]) == []


def test_cliffs_are_found():
    lines = [line_of(density=0.1), line_of(density=0.2, ours=0.8e-3), line_of(density=0.3, ours=0.79e-3)]
    assert table.cliffs(lines) == ["cliff: a, n=1 takes 1000 us at density 0.1, 800 us at 0.2"]


def test_rivals_that_are_not_installed_are_named(monkeypatch):
    monkeypatch.setattr(xla, "needs", ("jax", "not_installed_anywhere"))
    assert field(["xla", "bcsr"]) == ([bcsr], ["xla"])
    with pytest.raises(ValueError, match=r"no rival is called \['mkl'\]"):
        field(["mkl"])


def test_a_busy_machine_is_noticed():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        with Others() as others:
            time.sleep(0.5)
        other.kill()  # not before: the time of a child that has ended counts as this process's own
    assert others.load is not None and others.load > 0.2
    lines = [line_of(others=0.0), line_of("b", others=others.load)]
    assert table.disturbed(lines) == ["others used more than 10% of a CPU beside 1 of 2 measurements, do not trust b n=1"]
    assert table.disturbed(lines[:1]) == []


def test_damaged_results(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        results.read(path)


def test_layers_are_those_of_the_paper():
    assert [name_of(shape) for shape in BENCHMARK[:2]] == ["96x27x27->256 5x5 g2", "256x13x13->384 3x3"]
    assert len(BENCHMARK) == 13
    assert [shape.oh for shape in choose(BENCHMARK, ["s2"])] == [28]
    with pytest.raises(ValueError, match="no layer's name contains '9x9'"):
        choose(BENCHMARK, ["9x9"])


def test_trained_weights_keep_their_places(tmp_path):
    shape = ALEXNET["conv4"]
    kernel = random_problem(shape, 0.01).kernel
    matrices = kernel.transpose(3, 2, 0, 1).reshape(2, shape.oc // 2, -1)
    for g, matrix in enumerate(matrices):
        write_matrix(tmp_path / f"conv4_{g + 1}.mtx", matrix)
    problem = alexnet_problem("conv4", tmp_path, 2)
    np.testing.assert_array_equal(problem.kernel, kernel)
    assert problem.x.shape == (2, 13, 13, 384)


@pytest.mark.parametrize("text, message", [
    ("", "does not begin with"),
    ("%%MatrixMarket matrix array real general\n2 2 0", "does not begin with"),
    (f"{HEADER}\n% only a comment", "lacks its line of sizes"),
    (f"{HEADER}\n3 2 0", "line 2: a 3 x 2 matrix, wanted 2 x 2"),
    (f"{HEADER}\n2 2 2\n1 1 0.5", "2 entries promised, 1 found"),
    (f"{HEADER}\n%\n2 2 1\n1 x 0.5", "line 4: '1 x 0.5'"),
    (f"{HEADER}\n2 2 1\n1 2", "line 3: '1 2'"),
    (f"{HEADER}\n2 2 1\n0 1 0.5", "line 3: row 0, column 1"),
    (f"{HEADER}\n2 2 1\n1 3 0.5", "line 3: row 1, column 3"),
    (f"{HEADER}\n2 2 1\n1 1 nan", "value nan"),
])
def test_damaged_matrices(tmp_path, text, message):
    path = tmp_path / "a.mtx"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_matrix(path, (2, 2))


def test_results_are_plain_json(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    results.append(path, results.provenance(["jax"]))
    assert json.loads(path.read_text())["versions"].keys() == {"jax"}


def test_what_was_asked_stands_beside_what_was_measured():
    line = {"layer": "plain, n=1", "n": 1, "threads": 2, "asked": 2.0}
    measured = asked.row(line | {"measured": 2.2, "predicted": 2.0, "dense": 4.4e-3, "packed": 2e-3})
    assert measured == ("plain, n=1", "1", "2", "2x", "2.20", "+10%", "2.00", "4.400", "2.000")
    refused = asked.row(line | {"refused": "the highest is 1.5"})
    assert refused[4] == "refused" and refused[-1] == "the highest is 1.5" and len(refused) == len(measured) == len(asked.HEAD)
