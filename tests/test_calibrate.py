"""The calibration and its judgement: constants recovered from times made by them, and every number of the report by hand."""

import json
import re
from collections import Counter
from dataclasses import replace

import jax
import matplotlib.figure  # noqa: F401  its fonts are found in the user's cache, before that moves
import numpy as np
import pytest

import sparseflax
from experiments.calibrate import check, figures, gpu, gpu_conv, judgement, layers, spdy, transfer
from experiments.layers import BENCHMARK, layer
from sparseflax.calibration import calibrate as run_module
from sparseflax.calibration.calibrate import calibrate
from sparseflax.calibration.fit import PER_WEIGHT, Errors, errors, fit, predict
from sparseflax.calibration.layers import fitting
from sparseflax.calibration.samples import Sample, measure
from sparseflax.conv import ffi
from sparseflax.cost import detect
from sparseflax.cost.counts import dense_counts, tile_counts
from sparseflax.cost.detect import detect_machine
from sparseflax.cost.int8 import int8_seconds, of_words
from sparseflax.cost.machine import TYPICAL, XEON_E5_2697V4
from tests.machines import estimated

native = pytest.mark.skipif(not ffi.kernels(), reason="the counts are asked of the native kernel")
# The one constant that differs between CPUs of an instruction set: what an FMA of 512 bits takes, here as on Zen 4. Which
# tiles are near each other, and so what a smooth minimum over them adds, hangs on it.
CYCLES = 1.11 if ffi.isa() == "avx512" else 0.0
MACHINE = replace(XEON_E5_2697V4, isa=ffi.isa(), threads=1, l3_bytes=32 << 20, fitted=TYPICAL, fma_cycles=CYCLES)
LAYERS = fitting()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in (detect, run_module):
        monkeypatch.setattr(module, "estimate_machine", estimated)
    detect._detect.cache_clear()
    yield
    detect._detect.cache_clear()


def made_by(rates, noise=0.0):
    """Samples that a machine with these rates would give, with the tiles that the kernel chooses."""
    draw, samples = np.random.default_rng(1), []
    for shape, densities in LAYERS:
        samples.append(Sample(shape, None, float(np.dot(dense_counts(shape, MACHINE), rates.dense)), 0.1))
        for density in densities:
            counts = tile_counts(shape, density, MACHINE)
            seconds = sum((density if name in PER_WEIGHT else 1) * count * rate
                          for name, count, rate in zip(counts._fields, counts, rates.sparse, strict=True))
            samples.append(Sample(shape, density, float(seconds), 0.1))
        if rates.int8 is not None and densities:
            counts = tile_counts(of_words(shape), densities[0], MACHINE)
            seconds = sum((densities[0] if name in PER_WEIGHT else 1) * count * rate
                          for name, count, rate in zip(counts._fields, counts, rates.int8, strict=True))
            samples.append(Sample(shape, densities[0], float(seconds), 0.1, int8=True))
    return [replace(s, seconds=float(s.seconds * np.exp(noise * draw.standard_normal()))) for s in samples]


def other_rates():
    draw = np.random.default_rng(0)
    return replace(TYPICAL, sparse=TYPICAL.sparse._make(rate * draw.uniform(0.5, 2) for rate in TYPICAL.sparse),
                   dense=TYPICAL.dense._make(rate * draw.uniform(0.5, 2) for rate in TYPICAL.dense),
                   int8=TYPICAL.sparse._make(rate * draw.uniform(0.5, 2) for rate in TYPICAL.sparse))


@native
def test_fit_recovers_the_rates():
    samples = made_by(other_rates())
    found = fit(samples, replace(MACHINE, l3_bytes=512 << 20))
    assert found.l3_bytes == MACHINE.l3_bytes
    for kind in ("sparse", "dense", "int8"):
        known, rates = getattr(other_rates(), kind)._asdict(), getattr(found.rates, kind)._asdict()
        known.pop("split")  # nothing is shared, on one thread
        assert {name: rates[name] for name in known} == pytest.approx(known, rel=1e-3)
    assert errors(samples, found).median < 0.01  # what the smooth minimum over a few tiles adds
    assert found.rates.overlap == 1
    assert fit([s for s in samples if not s.int8], MACHINE).rates.int8 is None


@native
def test_what_was_timed_in_eight_bits_predicts_eight_bits():
    samples = made_by(other_rates())
    found = fit(samples, replace(MACHINE, l3_bytes=512 << 20))
    sample = next(s for s in samples if s.int8)
    assert int8_seconds(sample.shape, sample.density, found) == pytest.approx(predict([sample], found)[0], rel=1e-6)
    assert int8_seconds(sample.shape, sample.density, found) == pytest.approx(sample.seconds, rel=0.1)
    # Without such times it takes what float32 takes, and what is known of the instructions.
    known = replace(found, fitted=replace(found.fitted, int8=None), fma_cycles=0.5, int8_cycles=0.5)
    assert int8_seconds(sample.shape, sample.density, known) != int8_seconds(sample.shape, sample.density, found)


@native
def test_fit_is_not_led_astray_by_a_few_bad_times():
    samples = made_by(other_rates(), noise=0.02)
    spoilt = [replace(s, seconds=5 * s.seconds) if i % 15 == 0 else s for i, s in enumerate(samples)]
    assert errors(samples, fit(spoilt, MACHINE)).median < 0.03


def test_errors():
    found = Errors.of(np.array([1.1, 0.8, 1.0, 3.0]), np.array([1.0, 1.0, 1.0, 2.0]))
    assert found.median == pytest.approx(0.15) and found.bias == pytest.approx(0.05) and found.count == 4
    assert str(found) == "median 15.0%, 90th percentile 41.0%, bias +5.0% (4 times)"


@native
def test_calibrate_stores_what_detect_machine_finds(monkeypatch):
    monkeypatch.setattr(run_module, "measure", lambda *args, **options: made_by(other_rates(), noise=0.02))
    assert detect_machine(seconds=0.02).source.startswith("estimated")
    stored = sparseflax.calibrate(1.0)
    assert detect_machine(seconds=0.02) == stored and stored.source.startswith("calibrated 20")
    assert "in doubt" not in stored.source


@native
@pytest.mark.parametrize("isa", [None, "portable"])
def test_calibrate_times_the_kernel_that_will_run(monkeypatch, isa):
    seen = []
    monkeypatch.setattr(run_module, "measure",
                        lambda layers, seconds, isa, int8: seen.append((isa, int8)) or made_by(TYPICAL, noise=0.02)[::4])
    monkeypatch.setattr(run_module, "doubts", lambda samples, found: [])
    stored = calibrate(1.0, isa)
    assert seen == [(isa, isa in (None, ffi.isa()))] and stored.isa == (isa or ffi.isa())


@native
def test_a_calibration_among_noise_is_kept_and_marked(monkeypatch):
    monkeypatch.setattr(run_module, "measure", lambda *args, **options: made_by(TYPICAL, noise=0.5))
    with pytest.warns(RuntimeWarning, match=r"median error \(sparse\) is .*, above 15% and its 90th.*Stored all the s"):
        stored = calibrate(1.0)
    assert detect_machine() == stored
    assert "in doubt, as the fit's median error (sparse) is " in stored.source and stored.source.endswith("nothing else runs")


@native
def test_each_bound_of_a_calibration_counts():
    samples = made_by(TYPICAL)
    known = run_module.judge(samples, MACHINE)
    assert known["sparse"].median < 0.01 and run_module.doubts(samples, known) == []
    far = [replace(s, seconds=2 * s.seconds) if s.density and i % 5 == 0 else s for i, s in enumerate(samples)]
    assert run_module.doubts(far, run_module.judge(far, MACHINE)) == ["its 90th percentile (sparse) is 50%, above 40%"]
    unlike = [replace(s, spread=0.2) if s.density is None else s for s in samples]
    assert run_module.doubts(unlike, known) == ["the spread of one program's times (dense) is 20%, above 15%"]


def test_calibrate_without_the_native_module(monkeypatch):
    monkeypatch.setattr(ffi, "kernels", lambda: [])
    monkeypatch.setattr(ffi, "reason", "it is missing")
    with pytest.raises(ValueError, match="there is no kernel to calibrate: it is missing"):
        calibrate(1.0)


@native
def test_calibrate_for_a_kernel_that_does_not_run_here():
    with pytest.raises(ValueError, match="isa='sse9' does not run here, wanted one of"):
        calibrate(1.0, "sse9")


@native
def test_measure_a_layer(capsys):
    shapes = [(layer(8, 6, 8, 3), (0.5,)), (layer(8, 1, 8, 1), (0.5, 1.0))]
    samples = measure(shapes, 0.01, rounds=2)
    assert [(s.shape, s.density is None) for s in samples] == [
        (shapes[0][0], True), (shapes[0][0], False), (shapes[1][0], True), (shapes[1][0], False), (shapes[1][0], False)]
    assert samples[-1].density == 1.0 and all(0 < s.seconds < 1 and s.spread >= 0 for s in samples)
    assert [s.density is None for s in measure(shapes[:1], 0.01, isa="portable", dense=False, rounds=1)] == [False]
    assert "making programs" in capsys.readouterr().err
    three = [*shapes, (layer(8, 4, 8, 3), (0.3, 0.9))]
    samples = measure(three, 0.01, dense=False, int8=True, rounds=1)
    assert [s.kind for s in samples] == ["sparse", "int8", *["sparse"] * 4, "int8"], "every other layer"
    assert samples[1].density < 0.7 < samples[-1].density, "the first density of the first, the second of the third"


def test_networks():
    resnet, googlenet = layers.resnet50(), layers.googlenet()
    assert resnet.total() == 54 and googlenet.total() == 58  # with the classifier
    # Multiply-adds that He et al. (with the stride on the 3x3, as in torchvision) and Szegedy et al. state, in billions.
    assert sum(s.flops * n for s, n in resnet.items()) == pytest.approx(2 * 4.1e9, rel=0.01)
    assert sum(s.flops * n for s, n in googlenet.items()) == pytest.approx(2 * 1.58e9, rel=0.02)
    held = layers.held_out()
    assert len(held) == len(set(held)) and {*BENCHMARK, *resnet, *googlenet} == set(held)


def test_nothing_is_fitted_that_is_held_out():
    fitted = {shape.with_batch(1) for shape, _ in LAYERS}
    assert not fitted & set(layers.held_out())
    assert fitting() == LAYERS and {shape.n for shape, _ in LAYERS} >= {1, 4, 16}
    assert all(0.015 <= density <= 0.6 for _, densities in LAYERS for density in densities)


A, B = layer(64, 8, 64, 3), layer(32, 8, 32, 3)


def line(layer, density, measured, predicted):
    return {"cpu": "C", "isa": "avx2", "n": 1, "threads": 2, "layer": str(layer), "density": density,
            "drawn": density and check.nearest(density), "measured": measured, "predicted": predicted, "spread": 0.3,
            "date": "2026-01-01", "commit": "abc"}


def test_choices_by_hand():
    lines = [line(A, None, 10.0, 9.0), line(A, 0.1, 4.0, 3.0), line(A, 0.5, 10.5, 8.0), line(B, None, 10.0, 30.0),
             line(B, 0.1, 20.0, 25.0)]
    found = judgement.choices(lines)  # right, unclear and sparse, wrong
    assert (found.wrong, found.clear, found.dense, found.count) == (1, 2, 2, 3)
    assert found.loss == pytest.approx((4 + 10.5 + 20) / (4 + 10 + 10) - 1)
    near = [line(A, None, 10.0, 10.0), line(A, 0.5, 5.0, 9.5)]  # less than the margin that `plan` wants
    assert judgement.choices(near).loss == pytest.approx(1.0)
    # Of two lines for one time the second counts. Errors 0.25, 8 / 10.5 - 1, 0.25 and 0.1, 2.
    other = [line(A, 0.1, 1.0, 9.0), line(A, 0.1, 1.0, 9.0) | {"cpu": "another"}]
    cells = "25.0% | 25.0% | 105.0% | 181.0% | nan% | nan% | 2 of 3 | 1 of 2 | 43.75%"
    assert judgement.table([*other, *lines]).splitlines()[2:] == [
        f"| avx2, n=1, 2 threads | fitted in these rounds | {cells} |", "", "C. Measured 2026-01-01 at abc."]
    both = judgement.table([each | {"stored": each["predicted"]} for each in lines])
    assert f"| avx2, n=1, 2 threads | stored before | {cells} |" in both
    steady = judgement.table([each | {"spread": 0.1} if each["layer"] == str(B) else each for each in lines])
    assert "; the 2 of 5 times that repeat within 20% | 25.0% | 25.0% | 200.0% | 200.0% |  |" in steady
    eight = [line(A, 0.1, 1.0, 1.5) | {"precision": "int8"}, line(B, 0.1, 2.0, 1.8) | {"precision": "int8"}]
    rows = judgement.table([*lines, *eight]).splitlines()[2:4]
    assert f"| fitted in these rounds | {cells} |" in rows[0], "float32 as without them"
    assert rows[1] == "| avx2, n=1, 2 threads, int8 | fitted in these rounds | 30.0% | 46.0% |  |  |  |  |  |  |  |"
    missed = judgement.Judgement.of(lines).missed()
    assert missed[0] == "the sparse median error is 25.0%, above 10%"
    assert missed[-1] == "the time lost to choices is 43.8%, above 2%"


def test_network_errors_by_hand():
    lines = [line(A, None, 10.0, 11.0), line(A, 0.099, 4.0, 4.0), line(B, None, 1.0, 1.0), line(B, 0.102, 2.0, 1.0)]
    found = judgement.network_errors(lines, Counter({A: 3, B: 1}))
    assert found == {None: pytest.approx(34 / 31 - 1), 0.1: pytest.approx(13 / 14 - 1)}


@native
def test_check_writes_lines_and_a_plot(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run_module, "measure", lambda *args, **options: made_by(other_rates(), noise=0.02))
    stored = calibrate(1.0)

    def times(shapes, seconds, isa, int8):
        samples = [Sample(shape, density, 1.0, 0.1) for shape, densities in shapes for density in (None, *densities)]
        samples += [Sample(shape, densities[0], 1.0, 0.1, int8=True) for shape, densities in shapes[::2] if densities]
        return [replace(s, seconds=float(p)) for s, p in zip(samples, predict(samples, stored), strict=True)]

    monkeypatch.setattr(check, "measure", times)
    monkeypatch.setattr(check, "held_out", lambda: layers.held_out()[:12])
    check.run([1, 2], 1.0, None, tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "calibration.jsonl").read_text().splitlines()]
    assert len(judgement.in_float32(lines)) == 2 * 12 * 6 < len(lines)
    assert all(line["stored"] == pytest.approx(line["measured"]) for line in lines)
    assert np.median([abs(line["predicted"] / line["measured"] - 1) for line in lines]) < 0.05  # fitted anew, to the same times
    assert check.plot(lines).count("<svg") == 1
    out = capsys.readouterr().out
    assert out.count("| stored before | 0.0% | 0.0% | 0.0% | 0.0% | 0.0% | 0.0% | ") == 2
    assert len(re.findall(r"threads?, int8 \| stored before \| 0.0% \| 0.0% \|  \|", out)) == 2
    assert "n=2, ResNet-50 in all, dense: " in out and out.count("within every bound") == 2


@native
def test_check_without_a_calibration(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(check, "measure", lambda shapes, seconds, isa, int8: [
        Sample(shape, density, 1.0, 0.1) for shape, densities in shapes for density in (None, *densities)])
    monkeypatch.setattr(check, "held_out", lambda: layers.held_out()[:2])
    check.run([1], 1.0, None, tmp_path)
    out = capsys.readouterr().out
    assert "no stored calibration to judge: " in out and "not calibrated" in out
    assert "stored before" not in out and "above 10%" in out  # layers that all take a second are not of this world


def test_figures():
    text = figures.table()
    assert "Xeon E5-2697 v4 | 0.0197 to 0.333 | 3.70x | 3.4x |" in text
    assert "Atom C2750 | 0.0109 to 0.833 | 9.26x | 7.3x |" in text
    assert figures.figure3().count("<svg") == figures.figure5().count("<svg") == 1


def test_lowering_only_reads_more():
    conv5 = layer(384, 13, 256, 3, groups=2)
    direct, copied = figures.Work.of(conv5, XEON_E5_2697V4), figures.lowered(conv5, XEON_E5_2697V4)
    assert copied.tiles[0].input_bytes == 9 * direct.tiles[0].input_bytes
    assert figures.conv_seconds(copied, 0.01, XEON_E5_2697V4) > figures.conv_seconds(conv5, 0.01, XEON_E5_2697V4)


@pytest.mark.parametrize("shape", [
    layer(6, 7, 8, 3, stride=2), layer(8, 6, 12, 3, groups=2), layer(5, 9, 4, 3, dilation=2), layer(7, 1, 9, 1)], ids=str)
@pytest.mark.parametrize("block", [16, gpu_conv.BLOCKS[0]])  # more than one, and one that no image fills
def test_gathered_convolution(shape, block):
    draw = np.random.default_rng(0)
    shape = shape.with_batch(2)
    kernel = draw.standard_normal(shape.kernel_shape, np.float32) * (draw.random(shape.kernel_shape) < 0.3)
    x = draw.standard_normal((2, shape.ih, shape.iw, shape.ic), np.float32)
    found = gpu_conv.gather_conv(x.transpose(3, 0, 1, 2), *gpu_conv.rows_of(kernel, shape), shape, block)
    found, exact = found.transpose(1, 2, 3, 0), gpu_conv.dense_conv(x, kernel, shape)
    # Both add at most ic * kh * kw products; each rounds by 6e-8 of the sum of their sizes.
    size = gpu_conv.dense_conv(np.abs(x), np.abs(kernel), shape)
    np.testing.assert_array_less(np.abs(found - exact), 2 * kernel[..., 0].size * 6e-8 * size + 1e-9)


def test_gpu_table_without_a_gpu(tmp_path, capsys):
    gpu.run(1.0, tmp_path)
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("| n16 ")]
    assert len(rows) == len(BENCHMARK) and all(row.endswith(5 * "| not measured " + "|") for row in rows)
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert all(line["measured speedup"] is None and line["speedup"] > 0 for line in lines)


def test_gpu_code_runs_on_a_cpu(monkeypatch):
    device = jax.devices("cpu")[0]
    monkeypatch.setattr(gpu, "BENCHMARK", [layer(8, 6, 8, 3)] * 5)
    median = gpu._median
    monkeypatch.setattr(gpu, "_median", lambda call, operands, seconds: median(call, operands, 0.0))  # each a few times
    found = gpu.measure_machine(device)
    assert found.isa == "cpu" and min(found.peak, found.bandwidth, found.alpha) > 0
    row = gpu.compare(layer(8, 6, 8, 3), found, device, 0.01)
    assert row["measured speedup"] == pytest.approx(row["measured dense"] / row["measured sparse"])


def write_timings(folder, text=""):
    for network, file in spdy.FILES.items():
        body = "".join(f"{name}\n0.002 0.0000\n0.001 0.5000\n0.0005 0.9000\n" for name in spdy.shapes(network))
        (folder / file).write_text(f"base\n0.2\nprunable\n0.1\n{body}{text}")


@native
def test_spdy(tmp_path, capsys):
    write_timings(tmp_path)
    spdy.run(tmp_path, tmp_path)
    out = capsys.readouterr().out
    assert " kernel | ResNet-18, fitted | " in out and "| the paper's form | ResNet-50, predicted | " in out
    assert len((tmp_path / "spdy.jsonl").read_text().splitlines()) == 4


def test_spdy_files(tmp_path):
    assert len(spdy.shapes("ResNet-18")) == 21 and len(spdy.shapes("ResNet-50")) == 54
    assert spdy.shapes("ResNet-50")["layer2.0.conv2"] == layer(128, 56, 128, 3, 2).with_batch(64)
    assert sum(s.flops for s in spdy.shapes("ResNet-18").values()) == pytest.approx(64 * 2 * 1.814e9, rel=0.01)
    write_timings(tmp_path)
    samples = spdy.read(tmp_path / spdy.FILES["ResNet-18"], spdy.shapes("ResNet-18"))
    assert len(samples) == 63 and [s.density for s in samples[:3]] == [None, 0.5, pytest.approx(0.1)]
    for text in ("layer9.conv", "0.001 1.0", "0.001 -0.1", "0 0.5", "nan 0.5", "a b", "1 2 3"):
        write_timings(tmp_path, f"{text}\n")
        with pytest.raises(ValueError, match=f"line 89: '{text}' is neither a layer of the network nor seconds above 0"):
            spdy.read(tmp_path / spdy.FILES["ResNet-18"], spdy.shapes("ResNet-18"))
    (tmp_path / "empty").write_text("base\n0.2\n")
    with pytest.raises(ValueError, match="empty holds no times"):
        spdy.read(tmp_path / "empty", spdy.shapes("ResNet-18"))


def test_gpu_in_sentences():
    line = {"layer": "a", "speedup": 2.0, "measured dense": 8.0, "measured tensor cores": 2.0, "measured speedup": 2.0,
            "over tensor cores": 0.5}
    text = gpu.says([line, line | {"layer": "b", "measured speedup": 8.0}])
    assert "4.00 times as fast as the library's dense convolutions" in text and "0.50 times as fast as with them" in text
    assert "with alpha 5.0, from one layer, sparse loses above a density of 0.20" in text
    with pytest.raises(ValueError, match="no layer was measured: run python -m experiments.calibrate --gpu"):
        gpu.says([line | {"measured dense": None}])


def test_transfer_table():
    lines = [{"fitted": "a", "used": "b", "median": median, "high": 0.5, "bias": -0.1, "cpu": "C", "threads": 1,
              "date": "2026-01-01", "commit": "abc"} for median in (0.3, 0.25)]
    assert transfer.table(lines).splitlines()[2:] == [
        "| a | b | 25.0% | 50.0% | -10.0% |", "", "C, 1 thread. Measured 2026-01-01 at abc."]
