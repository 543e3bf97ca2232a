"""What was measured, one JSON line for each layer or network, batch, density and number of threads: only ever appended."""

from __future__ import annotations

import datetime
import json
import math
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

Line = dict[str, Any]
ROOT = Path(__file__).parents[2]
LAYERS = ROOT / "experiments" / "results" / "layers.jsonl"
NETWORKS = LAYERS.with_name("networks.jsonl")
THREADS = LAYERS.with_name("threads.jsonl")
MEMORY = LAYERS.with_name("memory.jsonl")
INT8 = LAYERS.with_name("int8.jsonl")
QUANTIZED = LAYERS.with_name("quantized.jsonl")
TRAINED = LAYERS.with_name("trained.jsonl")
ASKED = LAYERS.with_name("asked.jsonl")
STORIES = LAYERS.with_name("stories.jsonl")
SOAK = LAYERS.with_name("soak.jsonl")
OTHER_LAYERS = LAYERS.with_name("layers_zen4.jsonl"), LAYERS.with_name("layers_xeon.jsonl")  # of other CPUs
# Two lines that agree in these measure the same.
KEY = ("set", "layer", "n", "threads", "isa", "drawn", "memory", "asked", "engine")
MEASURED = ("sparseflax", "xla_ffi")  # what makes a commit differ from another here


def provenance(packages: Iterable[str]) -> Line:
    """Where, when and with what a line was measured."""
    from sparseflax.cost.cpu import processor  # here, as the number of threads is set before JAX is imported

    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "cpu": processor(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in sorted(packages)},
    }


def versions(line: Line) -> str:
    """The packages that a line was measured with, in words."""
    return ", ".join(f"{package} {number}" for package, number in line["versions"].items())


def append(path: Path, line: Line) -> None:
    """Adds a line to a file, without a yardstick's times: they are shown, not written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps({key: value for key, value in line.items() if key != "yardstick"}) + "\n")


def read(path: Path) -> list[Line]:
    """All lines, oldest first.

    Raises:
      ValueError: a line that is not JSON.
    """
    lines = []
    for at, text in enumerate(path.read_text().splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise ValueError(f"{path}, line {at} is not JSON ({error}): remove it, the others stay good") from None
    return lines


def newest(lines: Iterable[Line]) -> list[Line]:
    """The last line of each layer, batch, density, number of threads, instruction set and request, on the CPU measured last."""
    lines = list(lines)
    last = {tuple(line.get(key) for key in KEY): line for line in lines if line["cpu"] == lines[-1]["cpu"]}
    return list(last.values())


def by_cpu(path: Path) -> dict[str, list[Line]]:
    """The newest lines of each CPU, of a file and of those beside it named after it, as threads_xeon.jsonl is; its own first.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a damaged line, or none at all.
    """
    others = sorted(path.parent.glob(f"{path.stem}_*{path.suffix}"))
    lines = [line for file in (*others, path) for line in read(file)]
    if not lines:
        raise ValueError(f"{path} holds no results: measure them with `python -m experiments.benchmark {path.stem}`")
    last = {line["cpu"]: line["date"] for line in lines}
    own = {line["cpu"] for line in read(path)}
    cpus = sorted(last, key=lambda cpu: (cpu in own, last[cpu]), reverse=True)
    return {cpu: newest(line for line in lines if line["cpu"] == cpu) for cpu in cpus}


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs))


def _commit() -> str:
    try:
        commit, changes = (subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True, check=True).stdout
                           for command in (("rev-parse", "--short", "HEAD"), ("status", "--porcelain", *MEASURED)))
        return commit.strip() + ("-dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
