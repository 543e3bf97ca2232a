"""The README and the pages of docs/ are run: their code, their commands, and what makes their tables."""

import contextlib
import functools
import importlib.util
import io
import re
import runpy
import shlex
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from experiments import docs
from sparseflax.calibration.calibrate import describe
from sparseflax.conv import ffi
from sparseflax.cost import profile
from tests import pages

pytestmark = pytest.mark.usefixtures("optimized")
ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "xla_ffi" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = PAGES[0].read_text()

def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def each(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A cache with a calibration in it, as the README asks for, which is an estimate here."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        if ffi.kernels():
            profile.save(describe(), {})
    return folder


@each([page for page in PAGES if blocks(page, "python")])
def test_the_code_of_a_page_runs(page, tmp_path, calibrated):
    code = blocks(page, "python")
    if any("load_onnx" in block for block in code):
        pytest.importorskip("onnx")
        write_network(tmp_path / "network.onnx")
    if any("network.int8.onnx" in block for block in code):
        pytest.importorskip("onnxruntime")
        write_quantized(tmp_path)
    for package in ("torch", "qwix"):
        if importlib.util.find_spec(package) is None:
            code = [block for block in code if f"import {package}" not in block]
    out = pages.run("\n".join(code), tmp_path, tmp_path / "empty" if page.name == "README.md" else calibrated)
    if page.name == "README.md":
        assert len(code[0].splitlines()) <= 15
        assert "(1, 28, 28, 128)" in out and "sparse" in out


def write_network(path: Path) -> None:
    """A network as it comes from elsewhere."""
    from flax import nnx

    from experiments.export_onnx import to_onnx

    rngs = nnx.Rngs(0)
    conv, head = nnx.Conv(3, 16, (3, 3), rngs=rngs), nnx.Linear(16, 10, rngs=rngs)
    model = nnx.Sequential(conv, nnx.relu, lambda x: x.mean((1, 2)), head)
    path.write_bytes(to_onnx(model, np.ones((1, 32, 32, 3), np.float32)))


def write_quantized(folder: Path) -> None:
    """The same in eight bits."""
    from sparseflax.job.quantized import quantized

    examples = np.random.default_rng(0).standard_normal((4, 3, 32, 32), np.float32)
    (folder / "network.int8.onnx").write_bytes(quantized((folder / "network.onnx").read_bytes(), examples, 1))


def commands(page: Path) -> set[str]:
    """Those in blocks, and those of experiments that are named in the text."""
    lines = (line.split("  #")[0].strip() for block in blocks(page, "sh") for line in block.splitlines())
    return {line for line in lines if line.startswith("python -m")} | set(
        re.findall(r"`(python -m experiments[^`]*)`", page.read_text()))


@functools.cache
def usage(module: str, *words: str) -> str:
    """What a command says of itself, in this process: another one takes a second to import what is here."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), warnings.catch_warnings():
        warnings.filterwarnings("ignore", f".*{module}.*found in sys.modules", RuntimeWarning)
        patch.setattr(sys, "argv", [module, *words, "--help"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert not ended.value.code
    return said.getvalue()


@pytest.mark.parametrize("command", sorted(set().union(*map(commands, PAGES))))
def test_a_command_has_what_it_is_given(command):
    module, *words = shlex.split(command)[2:]
    assert importlib.util.find_spec(module), f"there is no module {module}"
    if module == "pytest":
        return
    text = usage(module, *words[:1]) if words and not words[0].startswith("-") else usage(module)
    assert "usage" in text.lower()
    for option in (word for word in words if word.startswith("-")):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), f"{module} has no {option}"


def test_the_readme_is_short_and_its_first_commands_install_run_and_test():
    assert len(README.splitlines()) <= 150 and README.count("![") <= 3
    first = [line.split("  ")[0].strip() for line in blocks(PAGES[0], "sh")[0].splitlines()]
    assert first == ["pip install -e '.[test]'", "python -m experiments.run digits", "python -m pytest"]


def test_contributors_run_what_is_run_for_them():
    checks = blocks(ROOT / "docs" / "CONTRIBUTING.md", "sh")[0].splitlines()[1:]
    assert checks == ["ruff check .", "pyright", "python -m pytest"]
    assert all(check in (ROOT / ".ci" / "run").read_text().splitlines() for check in checks)


@each(PAGES)
def test_what_a_page_names_exists(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text) if "://" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    paths = re.findall(r"`((?:sparseflax|xla_ffi|experiments|docs|tests)/[\w/.*]*)`", text)
    assert missing + [path for path in paths if not list(ROOT.glob(path))] == []


@pytest.mark.parametrize("path", docs.PAGES)
def test_a_page_shows_what_the_result_files_say(path):
    assert docs.made(ROOT / path, docs.PAGES[path]) == (ROOT / path).read_text(), "run python -m experiments.docs"


def test_a_cpu_of_which_only_layers_were_measured_is_named(monkeypatch):
    networks = {"Xeon @ 2.80GHz (family 6)": [{"isa": "avx512"}], "EPYC (family 25)": [{"isa": "avx2"}]}
    monkeypatch.setattr(docs.results, "by_cpu", lambda path: networks)
    monkeypatch.setattr(docs.results, "read", lambda path: [{"cpu": path}])
    monkeypatch.setattr(docs, "LAYERS", ("Xeon", "EPYC", "EPYC (family 25)"))
    monkeypatch.setattr(docs, "cpus_table", lambda found: ", ".join(found))
    assert docs.overview() == f"{', '.join(networks)}\n\nOn Xeon only single layers were measured so far."


def test_every_picture_is_there():
    assert {path.name for path in docs.PICTURES.glob("*.svg")} == set(docs.DRAWINGS)


def test_pages_and_pictures_are_made_anew(monkeypatch, tmp_path, capsys):
    (tmp_path / "page.md").write_text("# title\n<!-- a:begin -->\nold\n<!-- a:end -->\nafter\n")
    for name, value in (("ROOT", tmp_path), ("PICTURES", tmp_path), ("PAGES", {"page.md": {"a": lambda: "new"}}),
                        ("DRAWINGS", {"a.svg": lambda: "<svg/>"})):
        monkeypatch.setattr(docs, name, value)
    for _ in range(2):
        docs.main([])
        assert (tmp_path / "page.md").read_text() == "# title\n<!-- a:begin -->\n\nnew\n\n<!-- a:end -->\nafter\n"
    assert (tmp_path / "a.svg").read_text() == "<svg/>"


def test_a_page_without_markers():
    begin, end = "<!-- a:begin -->", "<!-- a:end -->"
    for page in ("", begin, f"{end}\n{begin}", f"{begin}{begin}{end}"):
        with pytest.raises(ValueError, match=f"needs one line {begin} and after it one line {end}"):
            docs.with_section(page, "a", "table")


def test_missing_results_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"transfer.jsonl is missing: run python -m experiments.calibrate --transfer"):
        docs.carries(tmp_path)
