"""What is read, what is measured (with a clock of our own: no timings here), what is refused."""

import itertools
import math
import os
import types
from dataclasses import replace

import jax
import numpy as np
import pytest

from sparseflax.conv import ffi
from sparseflax.cost import cpu, detect, estimate, timing
from sparseflax.cost.cpu import client_threads
from sparseflax.cost.detect import detect_machine
from sparseflax.cost.estimate import TIMED, Timed
from sparseflax.cost.machine import ATOM_C2750, TYPICAL, TYPICAL_PEAK, XEON_E5_2697V4, XEON_PHI_7250, Machine
from sparseflax.cost.model import conv_seconds, dense_seconds


@pytest.fixture(autouse=True)
def nothing_calibrated(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    detect._detect.cache_clear()
    yield
    detect._detect.cache_clear()


def test_presets_agree_with_the_papers_rates():
    assert XEON_E5_2697V4.alpha == pytest.approx(2150 / 760, rel=0.07)  # it rounds 2.83 to 3
    assert ATOM_C2750.alpha == pytest.approx(62 / 51, rel=0.02)
    assert XEON_PHI_7250.alpha == pytest.approx(4.54 / (0.09 * 13.9), rel=0.01)
    for preset in (ATOM_C2750, XEON_E5_2697V4, XEON_PHI_7250):
        assert preset.beta == 2
        assert "Park et al. 2017" in str(preset)


@pytest.mark.parametrize("change", [{"peak": 0.0}, {"bandwidth": math.nan}, {"alpha": -1.0}, {"beta": math.inf}])
def test_impossible_machine(change):
    (name,) = change
    with pytest.raises(ValueError, match=f"machine 'Intel Atom C2750' has {{'{name}': .*positive and finite"):
        replace(ATOM_C2750, **change)


def test_caches_of_a_calibrated_machine():
    with pytest.raises(ValueError, match="machine 'Intel Atom C2750' has {'l1_bytes': 0}"):
        replace(ATOM_C2750, fitted=TYPICAL, l1_bytes=0)


@pytest.mark.parametrize("name, value", [("threads", 1 << 17), ("l3_bytes", -1), ("l2_bytes", 10**80)])
def test_more_than_any_machine_has(name, value):
    with pytest.raises(ValueError, match=f"has {{'{name}': {value}}}, wanted at most"):
        replace(ATOM_C2750, **{name: value})


def test_detect_machine_measures_once():
    found = detect_machine(seconds=0.02)
    assert isinstance(found, Machine) and found.threads == client_threads()
    assert detect_machine(threads=found.threads, seconds=0.02) is found
    assert all(type(value) is float and math.isfinite(value) for value in (found.peak, found.bandwidth, found.alpha))
    assert found.source.startswith("estimated, ")
    assert f"not calibrated for {found.threads} threads: run python -m sparseflax calibrate" in found.source
    assert (found.fitted is not None) == bool(ffi.kernels())
    assert (found.isa == ffi.isa()) == bool(ffi.kernels())


@pytest.mark.skipif(not ffi.kernels(), reason="no native kernel")
def test_estimate_predicts_the_timed_layers_on_the_average(monkeypatch):
    times = [Timed(shape, 0.1, k * 5e-4) for k, shape in enumerate(TIMED, 1)]
    monkeypatch.setattr(estimate, "_time_layers", lambda seconds, isa: times)
    found = detect_machine(seconds=0.02)
    sparse = [float(conv_seconds(t.shape, t.density, found)) / t.seconds for t in times]
    assert math.prod(sparse) == pytest.approx(1, rel=1e-5)
    assert found.rates.dense.flop == pytest.approx(TYPICAL.dense.flop * TYPICAL_PEAK / found.peak)
    each = [t.seconds * found.peak / (0.1 * t.shape.flops) for t in times]
    assert found.alpha == pytest.approx(math.prod(each)**(1 / 3))


def test_detect_machine_without_the_native_module(monkeypatch):
    monkeypatch.setattr(ffi, "kernels", lambda *_: [])
    found = detect_machine(seconds=0.02, isa="avx2")
    assert found.fitted is None and found.alpha == estimate.ESTIMATED_ALPHA
    assert "alpha guessed: the native kernel does not run here" in found.source
    assert conv_seconds(TIMED[0], 0.1, found) < dense_seconds(TIMED[0], found)


def test_detect_machine_while_something_is_traced():
    detect._detect.cache_clear()

    @jax.jit
    def traced(x):
        return x * detect_machine(seconds=0.02).peak

    assert np.isfinite(traced(1.0))


@pytest.mark.parametrize("arguments, message", [
    ({"threads": 4097}, "threads=4097, but JAX's CPU client has .* start Python with NPROC=4097"),
    ({"isa": "mmx"}, "isa='mmx', wanted one of .*'avx512'"),
    ({"seconds": 0}, "seconds=0, wanted a positive time"),
])
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        detect_machine(**arguments)


def test_threads_of_the_client(monkeypatch):
    monkeypatch.delenv("PJRT_NPROC", raising=False)
    monkeypatch.delenv("NPROC", raising=False)
    assert client_threads() == len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    monkeypatch.setenv("NPROC", "3")
    assert client_threads() == 3
    monkeypatch.setenv("PJRT_NPROC", "5")
    assert client_threads() == 5
    monkeypatch.setenv("PJRT_NPROC", "many")
    assert client_threads() == 3


def write_caches(folder, *caches):
    for i, (level, kind, size) in enumerate(caches):
        index = folder / "cpu0" / "cache" / f"index{i}"
        index.mkdir(parents=True)
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (index / name).write_text(f"{text}\n")


def test_caches_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "SYSFS", tmp_path)
    assert cpu.caches() == (32 << 10, 512 << 10, 8 << 20, "caches assumed")
    write_caches(
        tmp_path, (1, "Data", "48K"), (1, "Instruction", "32K"), (2, "Unified", "1280K"), (3, "Unified", "36M"))
    assert cpu.caches() == (48 << 10, 1280 << 10, 36 << 20, "caches read")
    (tmp_path / "cpu0" / "cache" / "index3" / "size").unlink()
    assert cpu.caches() == (48 << 10, 1280 << 10, 0, "caches read")


def test_hyperthreads_are_one_core(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "SYSFS", tmp_path)
    monkeypatch.setattr(cpu, "_cpus", lambda: {0, 1, 2})
    assert cpu.cores() == 3  # no topology
    for number, core in ((0, 0), (1, 1), (2, 0)):
        (tmp_path / f"cpu{number}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{number}" / "topology" / "core_id").write_text(f"{core}\n")
        (tmp_path / f"cpu{number}" / "topology" / "physical_package_id").write_text("0\n")
    assert cpu.cores() == 2


@pytest.mark.parametrize("flags, isa", [
    ("sse2 avx avx2 fma avx512f", "avx512"), ("sse2 avx avx2 fma", "avx2"), ("sse2 avx avx2", "portable")])
def test_isa_without_the_native_module(monkeypatch, tmp_path, flags, isa):
    monkeypatch.setattr(ffi, "kernels", lambda: [])
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert cpu.instruction_set() == "portable"
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: {flags}\n\n")
    assert cpu.instruction_set() == isa
    assert cpu.processor() == "Some CPU"


def test_processors_of_one_name_differ(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nstepping\t: 1\n\n")
    assert cpu.processor() == "AMD EPYC (family 25, model 17, stepping 1)"


def test_medians_of_calls_in_turn(monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock.now)

    def taking(*durations):
        left = itertools.cycle(durations)

        def wait():
            clock.now += next(left)

        return lambda: types.SimpleNamespace(block_until_ready=wait)

    # The first call only compiles; then rounds until the time is up, here the least number, three.
    assert timing.medians([taking(100.0, 1.0, 9.0, 2.0), taking(100.0, 5.0, 4.0, 0.5)], 1.0) == [2.0, 4.0]


def test_an_estimate_takes_the_quiet_times(monkeypatch):
    monkeypatch.setattr(estimate, "in_turn", lambda calls, seconds, burst: [[1.0, 2.0, 3.0, 4.0, 90.0]])
    assert estimate._quiet([lambda: None], 1.0) == [2.0]


def test_rates_from_the_timed_work(monkeypatch):
    monkeypatch.setattr(estimate, "_quiet", lambda calls, seconds: [0.5, 2.0, 0.5, 2.0, 0.5, 2.0][:len(calls)])
    assert estimate._peak(1.0) == 2 * 1024**3 / 0.5
    for cache, array in ((0, 64 << 20), (32 << 20, 128 << 20), (1 << 30, 256 << 20)):
        assert estimate._bandwidth(1.0, cache) == 2 * array / 0.5
    monkeypatch.setattr(ffi, "kernels", lambda: ["portable"])
    timed = estimate._time_layers(1.0, "portable")
    assert [t.shape for t in timed] == list(TIMED)
    assert all(0.09 < t.density < 0.11 and t.seconds in (0.5, 2.0) for t in timed)
    assert estimate._time_layers(1.0, "neon") == []


def test_what_tells_cpus_of_one_name_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(cpu, "SYSFS", tmp_path)
    assert cpu.identity() == {"cpu family": "", "model": "", "stepping": "", "caches": [32 << 10, 512 << 10, 8 << 20]}
    (tmp_path / "cpuinfo").write_text("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\nstepping\t: 1\n")
    write_caches(tmp_path, (1, "Data", "48K"))
    assert cpu.identity() == {"cpu family": "25", "model": "17", "stepping": "1", "caches": [48 << 10, 0, 0]}
