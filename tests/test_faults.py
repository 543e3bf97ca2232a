"""Disks that are full, folders that cannot be written, checkpoints of other states, clocks that go backwards, and kills."""

import errno
import os
import sys

import jax.numpy as jnp
import pytest
from flax import nnx

from experiments import checkpoint, evaluate, run
from sparseflax.calibration import calibrate as calibration
from sparseflax.cost.atomic import write_atomically
from sparseflax.cost.machine import ATOM_C2750
from sparseflax.cost.profile import save_machine
from sparseflax.files.safetensors import seal
from tests import kills
from tests.test_train import assert_same

STATE = {"w": jnp.arange(4.0), "n": jnp.int32(3)}
FULL = OSError(errno.ENOSPC, "No space left on device")


def fail(error):
    def call(*_, **__):
        raise error
    return call


@pytest.mark.parametrize("what, error", [
    ("orbax", ValueError("RESOURCE_EXHAUSTED: No space left on device")), ("orbax", FULL), ("note", FULL)])
def test_a_full_disk_leaves_the_last_checkpoint_and_no_rubbish(tmp_path, monkeypatch, what, error):
    checkpoint.save(tmp_path, 2, STATE, {})
    if what == "orbax":
        (tmp_path / "000004.orbax-checkpoint-tmp").mkdir()
        monkeypatch.setattr(checkpoint.ocp.StandardCheckpointer, "save", fail(error))
    else:
        monkeypatch.setattr(os, "fsync", fail(error))
    with pytest.raises(OSError, match="the checkpoint of step 4 cannot be written to .*No space left.*Free space there"):
        checkpoint.save(tmp_path, 4, STATE, {})
    monkeypatch.undo()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000002", "000002.json"]
    assert checkpoint.restore(tmp_path, STATE)[0] == 2


@pytest.mark.parametrize("write", [lambda path: write_atomically(path, "new"),
                                   lambda path: save_machine(path, ATOM_C2750)])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch, write):
    path = tmp_path / "file.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fail(FULL))
    with pytest.raises(OSError, match="No space left"):
        write(path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="step 2 cannot be written to .*Not a directory.*make it writable"):
        checkpoint.save(tmp_path / "file" / "run", 2, STATE, {})
    monkeypatch.setattr(sys, "argv", ["run", "smoke", "--out", str(tmp_path / "file" / "run")])
    with pytest.raises(SystemExit, match="python -m experiments.run smoke: .*Not a directory"):
        run.main()


def test_a_calibration_that_cannot_be_stored_is_returned(monkeypatch):
    for name, value in (("describe", lambda isa: ATOM_C2750), ("measure", lambda *_, **__: []), ("fit", lambda _, start: start),
                        ("judge", lambda *_: {kind: type("E", (), {"median": 0.01})() for kind in ("sparse", "dense")}),
                        ("doubts", lambda *_: [])):
        monkeypatch.setattr(calibration, name, value)
    monkeypatch.setattr(calibration.profile, "save", fail(OSError(errno.EROFS, "Read-only file system")))
    with pytest.warns(RuntimeWarning, match="could not be stored .*Read-only.*XDG_CACHE_HOME"):
        assert calibration.calibrate(1.0).name == ATOM_C2750.name


def test_a_checkpoint_of_another_state_is_named(tmp_path):
    checkpoint.save(tmp_path, 2, STATE, {})
    other = {"w": jnp.zeros((2, 2)), "n": jnp.int32(0), "more": jnp.zeros(1)}
    with pytest.raises(ValueError, match=r"\['w'\] is float32\[4\], wanted float32\[2, 2\]; \['more'\] is missing, wanted"):
        checkpoint.restore(tmp_path, other)


def test_a_checkpoint_of_an_older_version(tmp_path):
    """Which did not say what arrays it has: read all the same, or refused by a sentence."""
    checkpoint.save(tmp_path, 2, STATE, {})
    note = tmp_path / "000002.json"
    content = kills.json.loads(note.read_text())
    del content["arrays"]
    note.write_text(kills.json.dumps(content))
    assert_same(checkpoint.restore(tmp_path, STATE)[1], STATE)
    with pytest.raises(ValueError, match="000002 is a checkpoint of another state or version"):
        checkpoint.restore(tmp_path, {"v": jnp.zeros(4)})


def test_weights_are_written_in_one_order(tmp_path):
    """A model that was put together again has its arrays in another."""
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    again = nnx.merge(*nnx.split(model))
    assert list(vars(model)) != list(vars(again))
    for name, one in (("model", model), ("again", again)):
        evaluate.save_weights(one, tmp_path / f"{name}.npz")
    assert (tmp_path / "model.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()


@pytest.mark.parametrize("name, content", [("a.json", b'{"half": '), ("a.safetensors", seal("layer", {}, {})[:-9])])
def test_files_that_are_not_whole_are_seen(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError):
        kills.whole(tmp_path)
