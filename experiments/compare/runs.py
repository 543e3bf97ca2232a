"""A run of the comparison: one network, method, requested speedup and seed; where its files are and whether it is done."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from experiments.benchmark import results
from experiments.benchmark.results import Line

TRAINED, RESULTS = "trained.jsonl", "results.jsonl"


class Run(NamedTuple):
    """What decides a run, besides the settings of its network."""

    network: str
    method: str
    speedup: float
    seed: int

    @classmethod
    def of(cls, line: Line) -> Run:
        return cls(line["network"], line["method"], line["requested"], line["seed"])

    def folder(self, out: Path) -> Path:
        name = re.sub("[^a-z0-9.]+", "-", f"{self.method} {self.speedup:g}x".lower())
        return network_folder(out, self.network, self.seed) / name

    def __str__(self) -> str:
        return f"{self.network}, {self.method}, {self.speedup:g}x, seed {self.seed}"


def network_folder(out: Path, network: str, seed: int) -> Path:
    """Of what all runs with one network and seed share: the dense network."""
    return out / f"{network}-seed{seed}"


def lines(path: Path) -> dict[Run, Line]:
    """What a file of JSON lines says of each run, the newest line of each; nothing if there is no file yet."""
    return {Run.of(line): line for line in results.read(path)} if path.exists() else {}


def selected(found: dict[Run, Line], wanted: Iterable[Run]) -> list[Line]:
    """The lines of the wanted runs that there are."""
    return [found[run] for run in wanted if run in found]
