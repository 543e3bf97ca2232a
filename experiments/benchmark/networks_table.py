"""The results of whole networks as tables: on the terminal, and as Markdown from the file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments.benchmark.networks import XLA, XLA_FOLDED
from experiments.benchmark.results import Line, versions
from experiments.benchmark.table import OURS, fastest_dense, fastest_in_fewer_bits, markdown, speedup

HEAD = ("network", "n", "threads", "weights kept", "ms", "spread", "xla", "fastest dense", "ms", "spread", "speedup",
        "over xla", "over yardstick")


def over_xla(line: Line) -> float:
    """The faster of XLA's dense networks over ours."""
    times = line["times"]
    return min(times[name]["seconds"] for name in (XLA, XLA_FOLDED) if name in times) / times[OURS]["seconds"]


def row(line: Line) -> tuple[str, ...]:
    """The cells under HEAD."""
    ours, name = line["times"][OURS], fastest_dense(line)
    dense = line["times"][name]
    return (line["layer"], str(line["n"]), str(line["threads"]), f"{line['density']:.1%}", _ms(ours["seconds"]),
            f"{ours['spread']:.0%}", _ms(over_xla(line) * ours["seconds"]), name, _ms(dense["seconds"]),
            f"{dense['spread']:.0%}", f"{speedup(line):.2f}x", f"{over_xla(line):.2f}x",
            f"{line['yardstick']['speedup']:.2f}x" if "yardstick" in line else "-")


def breakdown(line: Line, most: int = 12) -> list[str]:
    """Where our time goes, in sentences and lines: the layers that take longest, and the rest by operation."""
    layers, rest = line["layers"], line["rest"]
    inside, outside = sum(layer["measured"] for layer in layers), sum(rest.values())
    text = [f"{line['layer']}, n={line['n']}: layers {_ms(inside)} ms (predicted "
            f"{_ms(sum(layer['predicted'] for layer in layers))}), the rest {_ms(outside)} ms"]
    for layer in sorted(layers, key=lambda layer: -layer["measured"])[:most]:
        text.append(f"  {layer['path']:32} {layer['shape']:36} {layer['choice']:6} {layer['density']:5.1%}  "
                    f"predicted {_ms(layer['predicted']):>7}  measured {_ms(layer['measured']):>7} ms")
    text += [f"  {name:32} {_ms(seconds):>7} ms" for name, seconds in list(rest.items())[:most] if seconds > 0.01 * inside]
    return text


def cpus_table(found: Mapping[str, Sequence[Line]]) -> str:
    """Before and after on one thread as a Markdown table, a row for each network and batch and two columns for each CPU.

    Args:
      found: {CPU: its newest results}.
    """
    lines = {(cpu, line["layer"], line["n"]): line for cpu in found for line in found[cpu] if line["threads"] == 1}
    head = ["network", "n"]
    for cpu, own in found.items():
        head += [f"{cpu}, {own[-1]['isa']}: before → after, ms", "over the fastest engine"]
    rows = []
    for name, n in sorted({(name, n) for _, name, n in lines}):
        rows.append([name, str(n)])
        for cpu in found:
            line = lines.get((cpu, name, n))
            rows[-1] += _change(line) if line else ("not measured", "")
    return markdown(head, rows)


def networks_table(lines: Sequence[Line]) -> str:
    """The results of a CPU as a Markdown table, a row for each network, batch and number of threads, and where they lose."""
    lines = sorted(lines, key=lambda line: (line["layer"], line["n"], line["threads"]))
    head = ["network", "n", "threads", "weights kept", "ms", "XLA dense, ms", "speedup", "fastest dense engine, ms", "speedup"]
    rows = []
    for line in lines:
        name = _engine(line)
        seconds, ours = line["times"][name]["seconds"], line["times"][OURS]["seconds"]
        rows.append([line["layer"], str(line["n"]), str(line["threads"]), f"{line['density']:.1%}", _ms(ours),
                     _ms(over_xla(line) * ours), f"{over_xla(line):.2f}x", f"{_ms(seconds)} ({name})",
                     f"**{seconds / ours:.2f}x**{_by_default(line)}"])
    last = lines[-1]
    commits = ", ".join(dict.fromkeys(line["commit"] for line in lines))
    caption = (f"{last['cpu']}, {last['isa']}, float32; batch norm folded for the engines and, where that is faster, for XLA "
               f"({versions(last)}). Measured {last['date'][:10]} at "
               f"{commits}.")
    return "\n".join([markdown(head, rows), "", caption, *_where(lines)])


def _change(line: Line) -> tuple[str, str]:
    """XLA's time and ours, and the fastest engine's over ours."""
    ours, engine = line["times"][OURS]["seconds"], line["times"][_engine(line)]["seconds"]
    return f"{_ms(over_xla(line) * ours)} → {_ms(ours)}", f"**{engine / ours:.2f}x**{_by_default(line)}"


def _by_default(line: Line) -> str:
    """In brackets, the speedup over an engine that takes fewer bits than float32 unasked; nothing where none is faster so."""
    times, name = line["times"], fastest_in_fewer_bits(line)
    if name is None or times[name]["seconds"] >= times[_engine(line)]["seconds"]:
        return ""
    return f" ({times[name]['seconds'] / times[OURS]['seconds']:.2f}x over {name})"


def _engine(line: Line) -> str:
    """The fastest of the dense engines beside XLA in float32; XLA where there are none."""
    engines = {name: time["seconds"] for name, time in line["times"].items()
               if time["dense"] and time.get("exact", True) and name not in (XLA, XLA_FOLDED)}
    return min(engines, key=engines.__getitem__) if engines else fastest_dense(line)


def _where(lines: Sequence[Line]) -> list[str]:
    """For each network: how much of its time is spent in layers, what of it was predicted, and what takes most of the rest."""
    text = []
    for line in lines:
        inside, outside = sum(layer["measured"] for layer in line["layers"]), sum(line["rest"].values())
        name = f"{line['layer']}, n={line['n']}, {line['threads']} thread{'s' * (line['threads'] > 1)}"
        if not inside:
            text.append(f"- {name}: ran some images at a time, in a loop of which the profiler does not tell the layers")
            continue
        most = ", ".join(f"{operation} {_ms(seconds)} ms" for operation, seconds in list(line["rest"].items())[:3])
        share = f"{inside / (inside + outside):.0%} of the time in layers"
        if steps := line.get("steps"):
            took = f", all steps take {steps['measured'] / steps['predicted']:.2f}x the prediction"
        elif line["n"] >= line["threads"] > 1:
            took = ", summed over threads"  # as lines were written before they had steps: no time that was predicted
        else:
            took = f", which takes {inside / sum(layer['predicted'] for layer in line['layers']):.2f}x the prediction"
        text.append(f"- {name}: {share}{took}; then {most}")
    return ["", *text] if text else []


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:.0f}"
