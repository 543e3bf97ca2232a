"""Whole networks in eight bits beside float32, as tables: on the terminal, and as Markdown from the file."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.benchmark.int8 import INT8
from experiments.benchmark.results import Line, versions
from experiments.benchmark.table import OURS, fastest_dense, fastest_in_fewer_bits, markdown

HEAD = ("network", "n", "threads", "float32 ms", "int8 ms", "off by", "fastest float32", "ms", "fastest in fewer bits", "ms",
        "off by", "speedup")


def row(line: Line) -> tuple[str, ...]:
    """The cells under HEAD; the speedup is that of our faster one over the fastest dense engine at any precision."""
    times = line["times"]
    dense, fewer = fastest_dense(line), fastest_in_fewer_bits(line)
    ours = min(times[name]["seconds"] for name in (OURS, INT8))
    theirs = min(times[name]["seconds"] for name in (dense, fewer) if name)
    other = (fewer, _ms(times[fewer]["seconds"]), f"{times[fewer]['error']:.1%}") if fewer else ("-", "-", "-")
    return (line["layer"], str(line["n"]), str(line["threads"]), _ms(times[OURS]["seconds"]), _ms(times[INT8]["seconds"]),
            f"{times[INT8]['error']:.1%}", dense, _ms(times[dense]["seconds"]), *other, f"{theirs / ours:.2f}x")


def table(lines: Sequence[Line]) -> str:
    """The results of a CPU as a Markdown table."""
    last = max(lines, key=lambda line: line["date"])
    rows = [list(row(line)) for line in sorted(lines, key=lambda line: (line["layer"], line["n"], line["threads"]))]
    commits = ", ".join(dict.fromkeys(line["commit"] for line in lines))
    caption = f"{last['cpu']}, {last['isa']} ({versions(last)}). Measured {last['date'][:10]} at {commits}."
    return "\n".join([markdown(list(HEAD), rows), "", caption])


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"
