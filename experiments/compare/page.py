"""The comparison for people: one HTML page, and tables in Markdown."""

from __future__ import annotations

import html
from collections.abc import Sequence

from experiments import report
from experiments.benchmark.results import Line
from experiments.benchmark.table import markdown
from experiments.compare import figures, summary
from experiments.compare.published import PUBLISHED
from experiments.compare.summary import EQUAL, Point
from sparseflax.job.page import page as html_page
from sparseflax.job.page import table as html_table

SHOWN = 6  # methods in the figures of densities, which show each of them once per layer
HEAD = ("method", "asked", "accuracy, %", "spread", "against dense", "weights kept", "packed", "compression", "batch 1, ms",
        "speedup", "batch 16, ms", "speedup", "predicted", "training, CPU s")
GAINS = ("method", "network, data", "top-1, dense → pruned", "weights kept", "memory", "speed", "source")


def page(lines: Sequence[Line]) -> str:
    """One self-contained HTML page about all runs.

    Raises:
      ValueError: nothing was timed yet, or on different CPUs or numbers of threads.
    """
    found = _checked(lines)
    said = summary.conclusions(lines)
    parts = ["<h2>What came out</h2>", "<ul>", *(f"<li>{html.escape(sentence)}</li>" for sentence in said), "</ul>",
             "<h2>Gains in speed and memory, beside published ones</h2>", html_table(GAINS, _gains(found)),
             "<p class=note>Rows marked published are numbers of the papers named, on ImageNet, on their machines: no two rows "
             "share a network, a machine or a rival, so they say what each method was shown to do, not which is better. "
             "Memory is compression of the file where measured, else all over kept weights. Measured rows: the fastest "
             f"within {EQUAL} points of dense.</p>"]
    for network in dict.fromkeys(point.network for point in found):
        here = [point for point in found if point.network == network]
        own = [line for line in lines if line["network"] == network]
        requested = max({point.requested for point in here}, key=lambda r: (sum(p.requested == r for p in here), r))
        methods = _representative([point for point in here if point.requested == requested])
        parts += [f"<h2>{html.escape(network)}</h2>", figures.pareto(lines, network, 1), figures.pareto(lines, network, 16),
                  "<p class=note>Points of a method are its requested speedups; bars reach from the lowest to the highest "
                  "seed. Guided methods are filled and drawn through, unguided ones open and dashed.</p>",
                  html_table(HEAD, map(_row, here)),
                  f"<h3>Density of every layer, {requested:g}x asked</h3>",
                  figures.densities(own, network, requested, methods),
                  "<p class=note>Shaded: where pruning pays on this machine at batch 1, as the performance model says. A layer "
                  "without shade gains from no pruning.</p>",
                  f"<h3>Over the updates of pruning, {requested:g}x asked, first seed</h3>",
                  figures.over_steps(own, network, requested, methods)]
    conditions = _conditions(lines)
    parts.append(f"<p class=note>{html.escape(conditions)} Times are medians of whole networks under jax.jit, dense and packed "
                 "in turn, their outputs compared; the speedup is over the faster of two dense forms, as trained and with "
                 "batch norms folded. Accuracy and times are means over seeds.</p>")
    return html_page("Pruning methods compared", said[0], "\n".join(parts))


def gains(lines: Sequence[Line]) -> str:
    """The fastest methods as accurate as dense beside published ones, as a Markdown table. Raises as `page`."""
    return "\n".join([markdown(GAINS, _gains(_checked(lines)), words=len(GAINS)), "", _conditions(lines),
                      "Rows marked published are the papers' own numbers, on their machines."])


def tables(lines: Sequence[Line]) -> str:
    """What came out in sentences, and all points of each network as a Markdown table. Raises as `page`."""
    found = _checked(lines)
    parts = ["\n".join(f"- {sentence}" for sentence in summary.conclusions(lines)), _conditions(lines)]
    for network in dict.fromkeys(point.network for point in found):
        parts += [f"### {network}", markdown(HEAD, [_row(point) for point in found if point.network == network])]
    return "\n\n".join(parts)


def terminal(lines: Sequence[Line]) -> str:
    """All points as lines of text, and the conclusions."""
    found = summary.points(lines)
    rows = [("network", *HEAD), *((point.network, *_row(point)) for point in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ["  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True)))
            for row in rows]
    return "\n".join([*text, *summary.conclusions(lines)])


def _row(point: Point) -> tuple[str, ...]:
    times = [text for batch in point.seconds for text in (f"{1e3 * point.seconds[batch]:.3g}", f"{point.speedup(batch):.2f}x")]
    return (_name(point), f"{point.requested:g}x",
            f"{point.accuracy:.2f}", f"{point.spread:.2f}", f"{-point.lost:+.2f}", f"{100 * point.density:.1f} %",
            report._megabytes(round(point.bytes)), f"{point.compression:.1f}x", *times, f"{point.predicted:.2f}x",
            f"{point.training:.0f}")


def _gains(found: Sequence[Point]) -> list[tuple[str, ...]]:
    rows = []
    for network in dict.fromkeys(point.network for point in found):
        for guided, precision in ((True, "int8"), (True, "float32"), (False, "float32")):
            if point := summary.fastest(found, network, guided, precision):
                rows.append((
                    f"{_name(point)}: measured here", f"{network}, cluttered digits",
                    f"{point.accuracy + point.lost:.1f} → {point.accuracy:.1f} %", f"{100 * point.density:.1f} %",
                    f"{point.compression:.1f}x", _speeds(point), f"{point.seeds} seeds"))
    for row in PUBLISHED:
        density, where = row.density
        dense, pruned = ("—" if value is None else f"{value:g}" for value in (row.dense, row.pruned))
        rows.append((f"{row.method}: published", f"{row.network}, ImageNet", f"{dense} → {pruned} %" if row.pruned else "—",
                     f"{100 * density:.2g} % ({where})", f"{1 / density:.1f}x fewer weights", row.speed or "—", row.source))
    return rows


def _name(point: Point) -> str:
    return point.method + (" (guided)" if point.guided and "guided" not in point.method else "")


def _speeds(point: Point) -> str:
    batch, *others = point.seconds
    first = f"{point.speedup(batch):.2f}x dense at batch {batch}"
    return ", ".join([first, *(f"{point.speedup(n):.2f}x at batch {n}" for n in others)])


def _representative(here: Sequence[Point]) -> list[str]:
    """At most SHOWN methods, the most accurate ones of both kinds."""
    ranked = [sorted((p for p in here if p.guided == guided), key=lambda p: -p.accuracy) for guided in (True, False)]
    return [point.method for kind in ranked for point in kind[: SHOWN // 2]]


def _checked(lines: Sequence[Line]) -> list[Point]:
    if not lines:
        raise ValueError("no run was timed yet: run python -m experiments.compare")
    machines = {(line["cpu"], line["threads"]) for line in lines if "times" in line}
    if len(machines) > 1:
        raise ValueError(f"the results come from different machines, {sorted(machines)}: keep those of one")
    return summary.points(lines)


def _conditions(lines: Sequence[Line]) -> str:
    timed = [line for line in lines if "times" in line]
    commits = ", ".join(dict.fromkeys(line["commit"] for line in timed))
    return report._conditions(timed[-1] | {"commit": commits}) if timed else "Every run was refused: nothing was measured."
