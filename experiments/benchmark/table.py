"""The results as tables: on the terminal while they come in, and as Markdown from the file."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from experiments.benchmark.results import Line, geometric_mean
from experiments.benchmark.run import OURS

HEAD = ("layer", "n", "density", "us", "+-", "useful Gflop/s", "of peak", "effective Gflop/s", "fastest dense", "us", "speedup",
        "over the yardstick")


def fastest_dense(line: Line) -> tuple[str, float]:
    """(name, seconds) of the fastest rival that does not use the zeros."""
    dense = {name: t["seconds"] for name, t in line["times"].items() if t["dense"]}
    name = min(dense, key=dense.__getitem__)
    return name, dense[name]


def speedup(line: Line) -> float:
    return fastest_dense(line)[1] / line["times"][OURS]["seconds"]


def share_of_peak(line: Line) -> float | None:
    """Useful flop/s over those of FMAs from registers in the same run."""
    return line["peak"] and line["flops"] * line["density"] / line["times"][OURS]["seconds"] / line["peak"]


def row(line: Line) -> tuple[str, ...]:
    """The cells of HEAD."""
    ours, (name, dense), share = line["times"][OURS], fastest_dense(line), share_of_peak(line)
    effective = line["flops"] / ours["seconds"]
    yardstick = line.get("yardstick")
    return (line["layer"], str(line["n"]), f"{line['density']:.3g}", f"{1e6 * ours['seconds']:.0f}", f"{ours['spread']:.0%}",
            f"{effective * line['density'] / 1e9:.0f}", f"{share:.0%}" if share else "", f"{effective / 1e9:.0f}", name,
            f"{1e6 * dense:.0f}", f"{speedup(line):.2f}x", f"{yardstick['speedup']:.2f}x" if yardstick else "")


def summaries(lines: Iterable[Line]) -> list[str]:
    """Geometric means and worst layers, one sentence for each batch, density and number of threads."""
    groups: dict[tuple, list[Line]] = {}
    for line in lines:
        groups.setdefault((line["threads"], line["n"], round(line["density"], 1)), []).append(line)
    return [f"n={n}, {threads} threads, density {density:g}, {len(group)} layers: {_summary(group)}"
            for (threads, n, density), group in groups.items()]


def _summary(group: Sequence[Line]) -> str:
    return f"geometric mean {geometric_mean(map(speedup, group)):.2f}x, worst {min(map(speedup, group)):.2f}x the fastest dense"
