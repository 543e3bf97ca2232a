"""Training: goes on bit for bit after a kill, keeps its last good checkpoint, and says what is wrong with a damaged one."""

import io
import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from rich.console import Console

from experiments import checkpoint, train
from experiments.data import cluttered_digits
from experiments.models import VGG, ResNet, max_pool
from sparseflax import prune
from sparseflax.cost.progress import progress
from tests import kills

DATA = cluttered_digits(0, 64, 32)
LAYERS = {"stages/1/0/conv": 0.2}


def fit(folder, steps=6, learning_rate=0.05, data=DATA):
    """A small network, pruned while it learns, with a checkpoint every second step: (model, what training left)."""
    model = VGG(((4,), (8,)), 1, 10, rngs=nnx.Rngs(0))
    optimizer = optax.chain(
        optax.sgd(learning_rate, 0.9), prune.magnitude(prune.constant(LAYERS), prune.ramp(0, 5), every=1))
    return model, train.fit(model, optimizer, data, title="test", folder=folder, seed=1, batch=16, steps=steps, save_every=2)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A training that nothing interrupted."""
    return fit(tmp_path_factory.mktemp("straight"))


def test_training_prunes_and_learns(straight):
    model, trained = straight
    kernel = model.stages[1][0].conv.kernel[...]
    assert prune.densities(trained.optimizer) == {"stages/1/0/conv": round(0.2 * 288) / 288}
    assert int((kernel != 0).sum()) == round(0.2 * 288)
    assert [step for step, _ in trained.losses] == [step for step, _ in trained.accuracies] == [2, 4, 6]
    assert trained.losses[-1][1] < trained.losses[0][1]


def test_goes_on_bit_for_bit_where_it_was_interrupted(straight, tmp_path, monkeypatch):
    take_step, calls = train._step, iter(range(10))

    def killed(*args):
        if next(calls) == 5:  # one step after the checkpoint of step 4
            raise KeyboardInterrupt
        return take_step(*args)

    monkeypatch.setattr(train, "_step", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path)
    steps_taken = []
    monkeypatch.setattr(train, "_step", lambda *args: steps_taken.append(args) or take_step(*args))
    model, trained = fit(tmp_path)
    assert len(steps_taken) == 2
    assert_same(trained, straight[1])
    assert_same(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(straight[0])))


def test_a_finished_training_is_not_repeated(straight, tmp_path, monkeypatch):
    fit(tmp_path)
    monkeypatch.setattr(train, "_step", None)
    model, trained = fit(tmp_path)
    assert_same(trained, straight[1])
    assert model.stages[0][0].norm.use_running_average
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000004", "000004.json", "000006", "000006.json"]


@pytest.mark.parametrize("moment", ["before the note", "while orbax writes", "while the note is written"])
def test_killed_while_saving(tmp_path, monkeypatch, moment):
    state = {"w": jnp.arange(4.0), "n": jnp.int32(3)}
    checkpoint.save(tmp_path, 2, state, {"curve": [1]})
    later = jax.tree.map(lambda leaf: leaf + 1, state)
    if moment == "before the note":
        monkeypatch.setattr(checkpoint, "write_atomically", lambda *_: 1 / 0)
    elif moment == "while orbax writes":
        (tmp_path / "000004.orbax-checkpoint-tmp").mkdir()
        monkeypatch.setattr(checkpoint.ocp.StandardCheckpointer, "save", lambda *_: 1 / 0)
    else:
        monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoint.save(tmp_path, 4, later, {"curve": [1, 2]})
    monkeypatch.undo()
    step, restored, note = checkpoint.restore(tmp_path, state)
    assert (step, note) == (2, {"curve": [1]})
    assert_same(restored, state)
    checkpoint.save(tmp_path, 4, later, {"curve": [1, 2]})
    step, restored, note = checkpoint.restore(tmp_path, state)
    assert (step, note) == (4, {"curve": [1, 2]})
    assert_same(restored, later)
    checkpoint.save(tmp_path, 6, later, {})
    assert {path.stem for path in tmp_path.iterdir()} == {"000004", "000006"}


def test_every_file_of_a_checkpoint_cut_in_half(tmp_path):
    state = {"w": jnp.arange(4000.0), "n": jnp.int32(3)}
    checkpoint.save(tmp_path, 2, state, {})
    checkpoint.save(tmp_path, 4, state, {})
    files = [path for path in tmp_path.rglob("*") if path.is_file() and "000004" in str(path)]
    assert len(files) > 3
    for file in files:
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError) as error:
            checkpoint.restore(tmp_path, state)
        assert str(file) in str(error.value) and "is damaged" in str(error.value)
        assert f"Delete {tmp_path / '000004.json'} and run the same command again: training then goes on from step 2" in str(
            error.value)
        file.write_bytes(whole)
    (tmp_path / "000004.json").unlink()
    assert checkpoint.restore(tmp_path, state)[0] == 2
    next((tmp_path / "000002").rglob("manifest.ocdbt")).unlink()
    with pytest.raises(ValueError, match="missing, wanted [0-9]+ bytes.*training then starts over"):
        checkpoint.restore(tmp_path, state)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    fit(tmp_path, steps=2)
    data = DATA._replace(train_images=np.full_like(DATA.train_images, np.nan))
    with pytest.raises(FloatingPointError, match="test diverged at step 3: loss .*nan.*of step 2, stays in .*lower peak_lr"):
        fit(tmp_path, steps=4, data=data)
    assert fit(tmp_path, steps=2)[1].losses[-1][0] == 2


def test_an_update_that_is_not_finite_is_not_saved(tmp_path):
    def explode(step):
        return jnp.where(step == 3, jnp.inf, 0.01)

    with pytest.raises(FloatingPointError, match="test diverged at step 4: loss [0-9.]+, norm .* (inf|nan).*of step 2, stays"):
        fit(tmp_path, steps=4, learning_rate=explode)
    assert not (tmp_path / "000004").exists()


KILLED = """
import os, pathlib, signal
import conftest, test_train
digest = test_train.checkpoint._digest
def kill(file):
    if "000004" in str(file):
        os.kill(os.getpid(), signal.SIGKILL)
    return digest(file)
test_train.checkpoint._digest = kill
test_train.fit(pathlib.Path({folder!r}))
"""


def test_goes_on_bit_for_bit_after_the_process_was_killed(straight, tmp_path):
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    child = subprocess.run([sys.executable, "-c", KILLED.format(folder=str(tmp_path))], env=os.environ | {"PYTHONPATH": paths})
    assert child.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000002", "000002.json", "000004"]
    model, trained = fit(tmp_path)
    assert_same(trained, straight[1])
    assert_same(nnx.to_pure_dict(nnx.state(model)), nnx.to_pure_dict(nnx.state(straight[0])))


def test_a_clock_that_goes_backwards(straight, tmp_path, monkeypatch):
    now, ticks = time.time(), itertools.count()
    monkeypatch.setattr(time, "time", lambda: now - 100.0 * next(ticks))
    assert_same(fit(tmp_path)[1], straight[1])


def test_goes_on_after_kills_at_random_moments(straight, tmp_path):
    """`python -m tests.kills` does it a hundred times, and with everything that a run does."""
    here, run, draw = Path(__file__).parent, tmp_path / "run", random.Random(1)
    paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    code = f"import pathlib, test_train; test_train.fit(pathlib.Path({str(run)!r}))"
    for _ in range(2):
        kills.survive([sys.executable, "-c", code], tmp_path, {"PYTHONPATH": paths}, draw.uniform(3, 12))
        kills.whole(run)
    assert_same(fit(run)[1], straight[1])


def test_accuracy_counts_the_last_partial_batch():
    class Constant(nnx.Module):
        def __call__(self, x):
            return jnp.zeros((len(x), 3)).at[:, 1].set(1.0)

    labels = np.array([1, 1, 0, 2, 1])
    assert train.accuracy(Constant(), np.zeros((5, 1)), labels, batch=2) == 3 / 5


def test_plain_lines_without_a_terminal_and_a_bar_on_one(capsys):
    with progress("slow", 40, done=20) as advance:
        for step in range(21, 41):
            advance(step, f"at {step}")
    lines = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[:3] for line in lines] == [["slow", f"{n}/40", f"at {n}"] for n in (24, 28, 32, 36, 40)]

    screen = io.StringIO()
    with progress("slow", 40, console=Console(file=screen, force_terminal=True, width=100)) as advance:
        advance(40, "at 40")
    assert "40/40" in screen.getvalue() and "at 40" in screen.getvalue() and capsys.readouterr() == ("", "")


def test_max_pool_is_a_maximum_over_windows():
    x = jax.random.normal(jax.random.key(0), (2, 6, 4, 3))
    np.testing.assert_array_equal(max_pool(x), nnx.max_pool(x, (2, 2), strides=(2, 2)))


def test_a_residual_block_adds_its_input():
    model = ResNet(((8,), (16,)), 1, 10, rngs=nnx.Rngs(0))
    model.blocks[0].norm2.scale.set_value(jnp.zeros(8))
    inner = jax.random.normal(jax.random.key(0), (2, 12, 12, 8))
    run = nnx.jit(lambda model, x, inner: (model.blocks[0](inner), model(x)))
    identity, logits = run(model, jnp.ones((2, 24, 24, 1)), inner)
    np.testing.assert_array_equal(identity, nnx.relu(inner))
    assert logits.shape == (2, 10)
    assert [block.project for block in model.blocks] == [False, True]


def test_two_methods_over_one_layer_are_refused_before_training(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_step", None)
    model = VGG(((4,), (8,)), 1, 10, rngs=nnx.Rngs(0))
    guide = prune.uniform(nnx.state(model, nnx.Param), 0.5)
    twice = optax.chain(optax.sgd(0.1), *(prune.magnitude(guide, prune.ramp(0, 1)) for _ in range(2)))
    with pytest.raises(ValueError, match="two pruning methods over the same layers"):
        train.fit(model, twice, DATA, title="test", folder=tmp_path, seed=0, batch=8, steps=1, save_every=1)
