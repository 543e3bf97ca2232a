"""A calibration is believed only where it was made; what is wrong with any other file is said, and what to do."""

import json
from dataclasses import replace

import pytest

from sparseflax.conv import ffi
from sparseflax.cost import detect, profile
from sparseflax.cost.cpu import client_threads, processor
from sparseflax.cost.detect import detect_machine
from sparseflax.cost.machine import TYPICAL, XEON_E5_2697V4, from_dict, to_dict

ERRORS = {"sparse": {"median": 0.04}}


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    detect._detect.cache_clear()
    yield tmp_path / "sparseflax"
    detect._detect.cache_clear()


def calibrated():
    rates = replace(TYPICAL, dense=TYPICAL.dense._replace(flop=1.5e-11))
    return replace(XEON_E5_2697V4, name=processor(), isa=ffi.isa(), threads=client_threads(), source="calibrated", fitted=rates)


def load(**changes):
    return profile.load(**{"name": processor(), "isa": ffi.isa(), "threads": client_threads()} | changes)


def test_what_is_saved_is_found(cache):
    file = profile.save(calibrated(), ERRORS)
    assert file.parent == cache and list(cache.iterdir()) == [file]  # no temporary file is left
    assert load() == calibrated()
    assert json.loads(file.read_text())["errors"] == ERRORS


@pytest.mark.skipif(not ffi.kernels(), reason="without kernels the machine's isa is not ffi.isa()")
def test_detect_machine_takes_it():
    profile.save(calibrated(), ERRORS)
    assert detect_machine() == calibrated()


def test_files_of_other_cpus_stand_side_by_side(cache):
    profile.save(calibrated(), ERRORS)
    profile.save(replace(calibrated(), name="Another CPU @ 3.0GHz"), ERRORS)
    assert len(list(cache.iterdir())) == 2 and load() == calibrated()


def test_none():
    with pytest.raises(profile.Unusable, match="not calibrated for 3 threads: run python -m sparseflax calibrate"):
        load(threads=3)


def change(**key):
    file = profile.save(calibrated(), ERRORS)
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"key": content["key"] | key}))
    return file


@pytest.mark.parametrize("field, value", [
    ("cpu", "Other"), ("model", "-1"), ("caches", [1, 2, 3]),
    ("native module", "0123"), ("jaxlib", "0.0.1"), ("kernels", ["portable", "neon"]), ("threads", 77)])
def test_stale(field, value):
    file = change(**{field: value})
    with pytest.raises(profile.Unusable, match=f"ignored {file}, it is of another machine.*\\({field} was .*, is .*run"):
        load()


@pytest.mark.parametrize("text, why", [
    ("", "cannot be read"), ('{"key": ', "cannot be read"), ("[]", "is no calibration \\(TypeError"),
    ('{"machine": 3}', "is no calibration \\(KeyError: 'key'\\)"), ('{"key": 3}', "is no calibration \\(AttributeError"),
    ("\x00\xff", "cannot be read"), pytest.param("[" * 100_000, "cannot be read", id="deep")])
def test_damaged(text, why):
    file = profile.save(calibrated(), ERRORS)
    file.write_text(text)
    with pytest.raises(profile.Unusable, match=f"ignored {file}, it {why}.*run python -m sparseflax calibrate"):
        load()


@pytest.mark.parametrize("part, name, value", [
    ("sparse", "fma", -1.0), ("sparse", "visit", "fast"), ("dense", "flop", None), ("dense", "unknown", 1.0)])
def test_impossible_rates(part, name, value):
    file = profile.save(calibrated(), ERRORS)
    content = json.loads(file.read_text())
    content["machine"]["fitted"][part][name] = value
    file.write_text(json.dumps(content))
    with pytest.raises(profile.Unusable, match=f"ignored {file}, it is no calibration"):
        load()


@pytest.mark.parametrize("name, value", [
    ("name", "Another CPU"), ("isa", "mmx"), ("threads", 99), ("peak", None), ("bandwidth", float("nan")),
    ("alpha", float("inf")), ("l1_bytes", 0), ("l2_bytes", -1), ("l3_bytes", None), ("l3_bytes", float("nan")),
    ("l2_bytes", "big"), ("fitted", None)])
def test_impossible_machine(name, value):
    file = profile.save(calibrated(), ERRORS)
    content = json.loads(file.read_text())
    content["machine"][name] = value
    file.write_text(json.dumps(content))
    with pytest.raises(profile.Unusable, match=f"ignored {file}, it is no calibration.*run python -m sparseflax calibrate"):
        load()


def test_a_damaged_file_is_named_in_the_plan():
    file = profile.save(calibrated(), ERRORS)
    file.write_text("{")
    assert f"ignored {file}, it cannot be read" in str(detect_machine(seconds=0.02, isa=None if ffi.kernels() else "portable"))


def test_nothing_is_left_of_a_save_that_fails(cache, monkeypatch):
    profile.save(calibrated(), ERRORS)
    monkeypatch.setattr("os.fsync", lambda file: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        profile.save(replace(calibrated(), source="newer"), ERRORS)
    monkeypatch.undo()


def test_presets_have_no_rates_to_save():
    assert from_dict(json.loads(json.dumps(to_dict(XEON_E5_2697V4)))) == XEON_E5_2697V4
