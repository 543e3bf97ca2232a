"""The results as tables: on the terminal while they come in, and as Markdown from the file."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

from experiments.benchmark.results import LAYERS, Line, geometric_mean, newest, read, versions

OURS = "sparseflax"
HEAD = ("layer", "n", "density", "us", "spread", "useful Gflop/s", "of peak", "effective Gflop/s", "fastest dense", "us",
        "spread", "speedup", "over yardstick")
THREADS_HEAD = ("layer", "n", "1 thread, us", "all threads, us", "gain", "independent copies")
BUSY = 0.1  # CPU seconds a second of other processes


def fastest_dense(line: Line) -> str:
    """Name of the fastest rival that computes in float32 and does not use the zeros."""
    dense = {name: time["seconds"] for name, time in line["times"].items() if time["dense"] and time.get("exact", True)}
    return min(dense, key=dense.__getitem__)


def fastest_in_fewer_bits(line: Line) -> str | None:
    """Name of the fastest rival that computes in fewer bits than float32 and does not use the zeros, if there is one."""
    dense = {name: time["seconds"] for name, time in line["times"].items() if time["dense"] and not time.get("exact", True)}
    return min(dense, key=dense.__getitem__, default=None)


def seconds(line: Line) -> tuple[float, float]:
    """(ours, the fastest dense rival's)."""
    return line["times"][OURS]["seconds"], line["times"][fastest_dense(line)]["seconds"]


def speedup(line: Line) -> float:
    """The fastest dense rival's time over ours."""
    ours, dense = seconds(line)
    return dense / ours


def share_of_peak(line: Line) -> float | None:
    """Useful flop/s over those of FMAs from registers in the same run; None where these were not measured."""
    return line["peak"] and line["flops"] * line["density"] / seconds(line)[0] / line["peak"]


def row(line: Line) -> tuple[str, ...]:
    """The cells under HEAD."""
    ours, dense, share = line["times"][OURS], line["times"][fastest_dense(line)], share_of_peak(line)
    effective = line["flops"] / ours["seconds"]
    return (line["layer"], str(line["n"]), f"{line['density']:.3g}", f"{1e6 * ours['seconds']:.0f}", f"{ours['spread']:.0%}",
            f"{effective * line['density'] / 1e9:.0f}", f"{share:.0%}" if share else "-", f"{effective / 1e9:.0f}",
            fastest_dense(line), f"{1e6 * dense['seconds']:.0f}", f"{dense['spread']:.0%}", f"{speedup(line):.2f}x",
            f"{line['yardstick']['speedup']:.2f}x" if "yardstick" in line else "-")


def summaries(lines: Iterable[Line]) -> list[str]:
    """One sentence for each batch, density and number of threads."""
    groups: dict[tuple, list[Line]] = {}
    for line in lines:
        groups.setdefault((line["n"], line["threads"], line["drawn"]), []).append(line)
    return [f"n={n}, {threads} thread{'s' * (threads > 1)}, {f'density {drawn:g}' if drawn else 'trained weights'}, "
            f"{len(group)} layer{'s' * (len(group) > 1)}: {_summary(group)}" for (n, threads, drawn), group in groups.items()]


def _summary(group: Sequence[Line]) -> str:
    def mean_and_worst(values: list[float]) -> str:
        return f"geometric mean {geometric_mean(values):.2f}x, worst {min(values):.2f}x"

    parts = [f"{mean_and_worst([speedup(line) for line in group])} the fastest dense"]
    if group[0]["drawn"] is None:
        ours, dense = map(sum, zip(*map(seconds, group), strict=True))
        parts.append(f"sum of times {dense / ours:.2f}x")
    if beside := [line["yardstick"]["speedup"] for line in group if "yardstick" in line]:
        parts.append(f"{mean_and_worst(beside)} the yardstick")
    if shares := [share for line in group if (share := share_of_peak(line))]:
        parts.append(f"{geometric_mean(shares):.0%} of the FMA peak")
    return "; ".join(parts)


def disturbed(lines: Sequence[Line]) -> list[str]:
    """A warning where other processes ran beside the timing."""
    names = [f"{line['layer']} n={line['n']}" for line in lines if (line["others"] or 0) > BUSY]
    return [f"others used more than {BUSY:.0%} of a CPU beside {len(names)} of {len(lines)} measurements, do not trust "
            f"{', '.join(names)}"] if names else []


def cliffs(lines: Iterable[Line]) -> list[str]:
    """Where fewer weights took longer than more of them, by more than the spread of both."""
    groups: dict[tuple, list[Line]] = {}
    for line in lines:
        groups.setdefault((line["layer"], line["n"], line["threads"], line["isa"]), []).append(line)
    found = []
    for (layer, n, *_), group in groups.items():
        for fewer, more in pairwise(sorted(group, key=lambda line: line["density"])):
            a, b = fewer["times"][OURS], more["times"][OURS]
            if a["seconds"] * (1 - a["spread"] / 2) > b["seconds"] * (1 + b["spread"] / 2):
                found.append(f"cliff: {layer}, n={n} takes {1e6 * a['seconds']:.0f} us at density {fewer['density']:.3g}, "
                             f"{1e6 * b['seconds']:.0f} us at {more['density']:.3g}")
    return found


def losses(lines: Iterable[Line]) -> list[str]:
    """Where a dense rival is faster, in a sentence."""
    slow = [f"{line['layer']}, n={line['n']} ({speedup(line):.2f}x, {fastest_dense(line)})"
            for line in lines if speedup(line) < 1]
    return [f"loses to dense at {'; '.join(slow)}"] if slow else []


def machines_table(paths: Sequence[Path], *, density: float = 0.1) -> str:
    """What the files sum up to, as a Markdown table with a row for each and for each batch; errors as in `layers_table`."""
    rows = []
    for path in paths:
        benchmark, alexnet = (_chosen(path, layers, 1, density, None) for layers in ("benchmark", "alexnet"))
        for n in sorted({line["n"] for line in benchmark}):
            of_n = [line for line in benchmark if line["n"] == n]
            trained = [seconds(line) for line in alexnet if line["n"] == n]
            shares = [share for line in of_n if (share := share_of_peak(line))]
            rows.append([f"{of_n[0]['cpu']}, {of_n[0]['isa']}", str(n),
                         f"**{geometric_mean(map(speedup, of_n)):.2f}x**", f"{min(map(speedup, of_n)):.2f}x",
                         f"{sum(dense for _, dense in trained) / sum(ours for ours, _ in trained):.2f}x" if trained else "",
                         f"{geometric_mean(shares):.0%}" if shares else ""])
    return markdown(["CPU", "n", "over the fastest dense, geometric mean", "worst layer", "pruned AlexNet, sum of times",
                     "of the FMA peak"], rows)


def layers_table(path: Path = LAYERS, *, layers: str = "benchmark", threads: int = 1, density: float = 0.1,
                 isa: str | None = None) -> str:
    """The newest results as a Markdown table, a row for each layer and four columns for each batch, and what they sum up to.

    Args:
      path: JSON lines of `python -m experiments.benchmark layers`.
      layers: "benchmark", "corners" or "alexnet".
      threads: that they were measured with.
      density: that was drawn; trained weights ("alexnet") have their own.
      isa: instruction set of our kernel; None for the one measured last.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it has no such lines, or a damaged one.
    """
    lines = _chosen(path, layers, threads, density, isa)
    found = {(line["layer"], line["n"]): line for line in lines}
    names, batches = dict.fromkeys(layer for layer, _ in found), sorted({n for _, n in found})
    head = ["layer", *(cell for n in batches for cell in (f"n={n}, us", "of peak", "fastest dense, us", "speedup"))]
    rows = [[name, *(cell for n in batches for cell in _cells(found.get((name, n))))] for name in names]
    means = [geometric_mean(speedup(line) for line in lines if line["n"] == n) for n in batches]
    rows.append(["**geometric mean**", *(cell for mean in means for cell in ("", "", "", f"**{mean:.2f}x**"))])
    notes = [f"- {text}" for text in (*summaries(lines), *losses(lines))]
    return "\n".join([markdown(head, rows), "", caption(lines), "", *notes])


def threads_row(line: Line) -> tuple[str, ...]:
    """The cells under THREADS_HEAD."""
    return (line["layer"], str(line["n"]), f"{1e6 * statistics.mean(line['alone']):.0f}", f"{1e6 * line['all']:.0f}",
            *(f"{line[key]:.2f}x" for key in ("gain", "copies")))


def threads_table(lines: Sequence[Line]) -> str:
    """How many times faster ours is on several threads of a CPU than on one, as a Markdown table."""
    rows = [threads_row(line) for line in lines]
    for n in sorted({line["n"] for line in lines}):
        means = (f"**{geometric_mean(line[key] for line in lines if line['n'] == n):.2f}x**" for key in ("gain", "copies"))
        rows.append(("**geometric mean**", str(n), "", "", *means))
    last = lines[-1]
    return "\n".join([markdown(THREADS_HEAD, rows), "", f"{last['cpu']}, {last['isa']}, {last['threads']} threads, density "
                      f"{last['drawn']:g}. Measured {last['date'][:10]} at {last['commit']}."])


def densities_table(lines: Sequence[Line]) -> str:
    """Our microseconds at each density and those of XLA's dense one as a Markdown table.

    Args:
      lines: of one CPU, number of threads and instruction set.
    """
    drawn = sorted({line["drawn"] for line in lines})
    found = {(line["layer"], line["n"], line["drawn"]): line for line in lines}
    rows = []
    for layer, n in sorted(dict.fromkeys((layer, n) for layer, n, _ in found), key=lambda pair: pair[1]):
        own = [found.get((layer, n, density)) for density in drawn]
        dense = statistics.median(seconds(line)[1] for line in own if line)
        rows.append([layer, str(n), *(f"{1e6 * seconds(line)[0]:.0f}" if line else "" for line in own), f"{1e6 * dense:.0f}"])
    last = lines[-1]
    commits = ", ".join(dict.fromkeys(line["commit"] for line in lines))
    origin = f"{last['cpu']}, {last['isa']}, 1 thread. Measured {last['date'][:10]} at {commits}."
    head = ["layer", "n", *(f"{density:g}" for density in drawn), "XLA dense"]
    return "\n".join([markdown(head, rows), "", origin])


def _chosen(path: Path, layers: str, threads: int, density: float, isa: str | None) -> list[Line]:
    lines = [line for line in newest(read(path)) if (line["set"], line["threads"]) == (layers, threads)
             and line["drawn"] in (density, None) and isa in (line["isa"], None)]
    if not lines:
        raise ValueError(f"{path} holds none of the layers {layers!r} with {threads} threads at density {density:g}: measure "
                         "them with `python -m experiments.benchmark layers` and --threads, --density, --corners or --matrices")
    last = max(lines, key=lambda line: line["date"])
    return [line for line in lines if (line["isa"], line["memory"]) == (last["isa"], last["memory"])]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """A Markdown table, its first columns, so many as hold words, to the left."""
    rule = ["---"] * words + ["---:"] * (len(head) - words)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def _cells(line: Line | None) -> tuple[str, str, str, str]:
    if line is None:
        return "", "", "", ""
    share, (ours, dense) = share_of_peak(line), seconds(line)
    return (f"{1e6 * ours:.0f}", f"{share:.0%}" if share else "", f"{1e6 * dense:.0f} ({fastest_dense(line)})",
            f"{speedup(line):.2f}x")


def caption(lines: Sequence[Line]) -> str:
    """On what, when and against whom the lines were measured."""
    last, threads = lines[-1], lines[-1]["threads"]
    rivals = dict.fromkeys(name for line in lines for name in line["times"] if name != OURS)
    return (f"{last['cpu']}, {last['isa']}, {threads} thread{'s' * (threads > 1)}, float32, bias and ReLU fused. "
            f"Rivals: {', '.join(rivals)} ({versions(last)}). "
            f"Measured {last['date'][:10]} at {', '.join(dict.fromkeys(line['commit'] for line in lines))}.")
