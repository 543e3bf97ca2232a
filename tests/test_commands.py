"""`python -m sparseflax`: each command on a network of a user's own, and what it says to mistakes."""

import re
import sys
from xml.etree import ElementTree

import pytest

from sparseflax import __main__ as commands
from sparseflax.calibration import calibrate as calibration
from sparseflax.calibration.samples import Sample
from sparseflax.conv import ffi
from sparseflax.cost import detect
from sparseflax.cost.counts import dense_counts, tile_counts
from sparseflax.cost.cpu import client_threads
from sparseflax.cost.machine import ATOM_C2750, TYPICAL
from sparseflax.cost.profile import load_machine
from sparseflax.prune.whole import Whole
from tests.machines import estimated

native = pytest.mark.skipif(not ffi.kernels(), reason="no native kernel")

NETWORK = """
import jax.numpy as jnp
from flax import linen as nn, nnx
import jax

def model():
    rngs = nnx.Rngs(0)
    return nnx.Sequential(nnx.Conv(8, 64, (3, 3), rngs=rngs), nnx.relu, nnx.Conv(64, 64, (3, 3), rngs=rngs))

def with_input():
    return model(), jnp.ones((1, 12, 12, 8))

def linen():
    net = nn.Sequential([nn.Conv(16, (3, 3)), nn.relu, nn.Conv(8, (1, 1))])
    return net, net.init(jax.random.key(0), jnp.ones((1, 6, 6, 4)))

def nothing():
    return 3
"""


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for module in (detect, calibration):
        monkeypatch.setattr(module, "estimate_machine", estimated)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as `python -m` does with the folder it is given in
    (tmp_path / "userland.py").write_text(NETWORK)
    detect.forget()
    yield
    detect.forget()
    sys.modules.pop("userland", None)


def run(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["sparseflax", *arguments])
    commands.main()
    return capsys.readouterr().out


def refused(monkeypatch, capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, capsys, *arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_help_lists_the_commands(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, capsys, "--help")
    out = capsys.readouterr().out
    names = "calibrate", "machine", "plan", "bench"
    assert stopped.value.code == 0 and all(f"python -m sparseflax {name}" in out for name in names)


@native
def test_calibrate(monkeypatch, capsys):
    def measured(layers, seconds, isa, int8):
        assert seconds == 3
        machine = calibration.describe(isa)
        for shape, densities in layers:
            yield Sample(shape, None, sum(c * r for c, r in zip(dense_counts(shape, machine), TYPICAL.dense, strict=True)), 0.1)
            for density in densities:
                counts = tile_counts(shape, density, machine)
                yield Sample(shape, density, sum(c * r for c, r in zip(counts, TYPICAL.sparse, strict=True)), 0.1)

    monkeypatch.setattr(calibration, "measure", lambda *args, **options: list(measured(*args, **options)))
    monkeypatch.setattr(calibration, "doubts", lambda samples, found: [])
    out = run(monkeypatch, capsys, "calibrate", "--seconds", "3")
    assert "calibrated 20" in out and re.search(r"stored .*\.json\n$", out)
    assert detect.detect_machine().source.startswith("calibrated")


def test_machine_and_a_plan_for_it(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(detect, "detect_machine", lambda: ATOM_C2750)
    assert run(monkeypatch, capsys, "machine", "server.json").endswith("written to server.json\n")
    assert load_machine(tmp_path / "server.json") == ATOM_C2750
    out = run(monkeypatch, capsys, "plan", "userland:with_input", "--machine", "server.json")
    assert "Intel Atom C2750" in out and "n1 8x12x12 -> 64 3x3" in out
    assert "1.50x as fast" in run(monkeypatch, capsys, "plan", "userland:with_input", "--machine", "server.json",
                                  "--speedup", "1.5")


def test_plan(monkeypatch, capsys):
    out = run(monkeypatch, capsys, "plan", "userland:with_input", "--batch", "2")
    assert "layers/0  n2 8x12x12 -> 64 3x3" in out and "not calibrated" in out
    assert "n1 4x6x6 -> 16 3x3" in run(monkeypatch, capsys, "plan", "userland:linen", "--shape", "6,6,4")


@native
def test_plan_for_a_speedup_is_a_guide(monkeypatch, capsys):
    from sparseflax import prune

    monkeypatch.setattr(prune, "measure", lambda model, x, machine: Whole(1e-2, 1e-3))
    assert "asked for 99x, this machine allows" in run(monkeypatch, capsys, "plan", "userland:with_input", "--speedup", "99")


def test_bench(monkeypatch, capsys):
    out = run(monkeypatch, capsys, "bench", "userland:with_input", "--density", "0.1", "--seconds", "0.01")
    rows = re.findall(r"^(dense|dense, batch norms folded|packed) +[\d.]+ +[\d.]+ to [\d.]+ +[\d.]+x$", out, re.MULTILINE)
    assert rows == ["dense", "dense, batch norms folded", "packed"] and "0.100" in out


@native
def test_bench_step_by_step(monkeypatch, capsys, tmp_path):
    out = run(monkeypatch, capsys, "bench", "userland:with_input", "--density", "0.1", "--seconds", "0.01", "--steps",
              "--svg", "steps.svg")
    assert re.search(r"^all steps( +[\d.]+){3}$", out, re.MULTILINE) and out.endswith("written to steps.svg\n")
    texts = {text.text for text in ElementTree.parse(tmp_path / "steps.svg").iter("{http://www.w3.org/2000/svg}text")}
    assert {"predicted, us", "measured, us", "layers/0", "layers/2"} <= texts
    assert f"userland:with_input, 1 image, {client_threads()} threads: " in " ".join(map(str, texts))


def test_onnx_files(monkeypatch, capsys, tmp_path):
    pytest.importorskip("onnx")
    import jax.numpy as jnp
    from flax import nnx

    from experiments.export_onnx import to_onnx

    model = nnx.Sequential(nnx.Conv(3, 16, (3, 3), rngs=nnx.Rngs(0)), nnx.relu)
    (tmp_path / "network.onnx").write_bytes(to_onnx(model, jnp.ones((1, 9, 7, 3))))
    assert "n4 3x9x7 -> 16 3x3" in run(monkeypatch, capsys, "plan", "network.onnx", "--batch", "4")


@pytest.mark.parametrize("arguments, message", [
    (("plan", "missing.onnx"), "missing.onnx"),
    (("plan", "userland:no"), "the module userland has no 'no'"),
    (("plan", "nowhere:model"), "No module named 'nowhere'"),
    (("plan", "userland:nothing"), "userland:nothing returned a int, wanted a model or a pair"),
    (("plan", "userland:model"), "says nothing of its input: return (model, x) from it, or say --shape H,W,C"),
    (("plan", "userland:model", "--shape", "8,0,8"), "'8,0,8' has a size below 1"),
    (("plan", "userland:with_input", "--batch", "0"), "--batch 0, wanted at least 1"),
    (("bench", "userland:with_input", "--density", "0.1", "--speedup", "2"), "both say how far to prune, wanted one of them"),
    (("plan", "userland:with_input", "--measure", "--speedup", "2"), "--measure times the network as it is"),
    (("calibrate", "--isa", "sse9"), "isa='sse9' does not run here" if ffi.kernels() else "no kernel to calibrate"),
    (("fly",), "invalid choice: 'fly'")])
def test_mistakes(monkeypatch, capsys, arguments, message):
    assert message in refused(monkeypatch, capsys, *arguments)
