"""The README is run: its example, its commands, and the command that generates its table."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import report

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_is_fifteen_lines_and_runs():
    example = blocks("python")[0]
    assert len(example.splitlines()) <= 15
    out = run("-W", "error::RuntimeWarning", "-c", example)  # a RuntimeWarning would mean that the kernel is missing
    assert "(1, 28, 28, 128)" in out and "sparse" in out


def test_the_onnx_example_runs(tmp_path):
    pytest.importorskip("onnx")
    from flax import nnx

    from experiments.export_onnx import to_onnx

    rngs = nnx.Rngs(0)
    conv, head = nnx.Conv(3, 16, (3, 3), rngs=rngs), nnx.Linear(16, 10, rngs=rngs)
    model = nnx.Sequential(conv, nnx.relu, lambda x: x.mean((1, 2)), head)
    (tmp_path / "network.onnx").write_bytes(to_onnx(model, np.ones((1, 32, 32, 3), np.float32)))
    done = subprocess.run([sys.executable, "-c", blocks("python")[1]], cwd=tmp_path, capture_output=True, text=True,
                          timeout=240)
    assert done.returncode == 0, done.stderr
    assert "measured" in done.stdout and "(1, 10)" in done.stdout and (tmp_path / "network.safetensors").exists()


MODULES = sorted(set(re.findall(r"^python -m (experiments\.\S+)", "\n".join(blocks("sh")), re.MULTILINE)))


@pytest.mark.parametrize("module", MODULES)
def test_commands_exist(module):
    assert "usage" in run("-m", module, "--help").lower()


def test_the_first_commands_install_run_and_test():
    commands = [line.split("  ")[0].strip() for line in blocks("sh")[0].splitlines()]
    assert commands == ["pip install -e '.[test]'", "python -m experiments.run digits", "python -m pytest"]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:sparseflax|xla_ffi|experiments)/[\w/.]*)`", TEXT))))
def test_the_map_names_what_exists(path):
    assert (ROOT / path).exists()


def test_its_numbers_are_those_of_the_result_files():
    assert report.with_tables(TEXT) == TEXT
