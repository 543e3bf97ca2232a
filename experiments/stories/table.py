"""The stories' results as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.benchmark.results import Line, versions
from experiments.benchmark.table import markdown
from sparseflax.job.report import engine_name

ENGINES = "onnxruntime", "openvino"
HEAD = ("", "dense, JAX, ms", "fastest dense engine, ms", "now, ms", "over JAX", "over that engine",
        "over the fastest in fewer bits", "weights kept", "before", "after", "points lost")
FOLD = ("fold", "before", "after", "points lost", "ms", "over JAX", "over the fastest engine", "weights kept")
CURVE = ("asked", "ms", "over JAX", "over the fastest engine", "points lost, choosing")


def stories_table(lines: Sequence[Line]) -> str:
    """Of a CPU, the newest line of each story: what came out, what bounds it, what can be had for what."""
    parts = [markdown(HEAD, map(_row, lines)), ""]
    for line in lines:
        rows = markdown(FOLD, _folds(line)) if "folds" in line else markdown(CURVE, _curve(line))
        parts += [f"### {line['layer'].capitalize()}", "", _says(line), "", rows, ""]
    last = lines[-1]
    return "\n".join([*parts, f"{last['cpu']}, {last['threads']} thread{'s' * (last['threads'] > 1)}, {last['isa']}, "
                      f"{versions(last)}. Measured {last['date'][:10]} at {last['commit']}."])


def _row(line: Line) -> tuple[str, ...]:
    (dense, engine, name), now, measure = _dense(line), line["seconds"]["packed"], next(iter(line["before"]))
    before, after = line["before"][measure], line["after"][measure]
    return (line["layer"], f"{1e3 * dense:.2f}", f"{1e3 * engine:.2f} ({name})", f"{1e3 * now:.2f}", f"{dense / now:.2f}x",
            f"**{engine / now:.2f}x**", _over_coarser(line), f"{100 * line['kept'] / line['weights']:.0f} %",
            f"{before:.2f} % ({measure})", f"{after:.2f} %", f"{before - after:.2f}")


def _dense(line: Line) -> tuple[float, float, str]:
    """Seconds of the faster dense form under JAX, of the fastest engine, and that one's name."""
    seconds = line["seconds"]
    dense = min(seconds["dense"], seconds["folded"])
    found = {engine_name(name): seconds[name] for name in ENGINES if name in seconds} or {"JAX": dense}
    fastest = min(found, key=lambda name: found[name])
    return dense, found[fastest], fastest


def _over_coarser(line: Line) -> str:
    """Over the engine that is fastest in fewer bits than float32, where one was timed."""
    coarser = line.get("coarser") or {}
    if not coarser:
        return ""
    name = min(coarser, key=lambda name: coarser[name]["seconds"])
    return (f"{coarser[name]['seconds'] / line['seconds']['packed']:.2f}x ({engine_name(name)}, off by "
            f"{100 * coarser[name]['error']:.2g} %)")


def _says(line: Line) -> str:
    where = ", ".join(f"{100 * share:.0f} % {kind}" for kind, share in line["where"].items())
    measures = ", ".join(f"{name} {before:.2f} → {line['after'][name]:.2f} %" for name, before in line["before"].items())
    highest, pictures = line["highest"], line["pictures"]
    bound = f": then {highest['where']}" if highest["where"] else ""
    bits = f" {line['int8']} of its {line['layers']} layers are in eight bits." if line.get("int8") else ""
    return (f"`{line['network']}`, pruned by {pictures['seen']} pictures: {measures}.{bits} Of its time now {where}. The most "
            f"that the performance model grants, whatever it costs, is {highest['speedup']:.2f} times as fast as JAX's dense "
            f"one{bound}.")


def _folds(line: Line) -> list[tuple[str, ...]]:
    rows = []
    for number, fold in enumerate(line["folds"], 1):
        (dense, engine, _), now = _dense(fold), fold["seconds"]["packed"]
        ((measure, before),) = fold["before"].items()
        after = fold["after"][measure]
        rows.append((f"{number}", f"{before:.1f} %", f"{after:.1f} %", f"{before - after:.1f}", f"{1e3 * now:.2f}",
                     f"{dense / now:.2f}x", f"{engine / now:.2f}x", f"{100 * fold['kept'] / line['weights']:.0f} %"))
    return rows


def _curve(line: Line) -> list[tuple[str, ...]]:
    dense, engine, _ = _dense(line)
    return [(f"{one['asked']:.2f}x", f"{1e3 * one['seconds']:.2f}", f"{dense / one['seconds']:.2f}x",
             f"{engine / one['seconds']:.2f}x", f"{one['points']:.2f}" + (
                 f" ± {one['doubt']:.2f}" if one.get("doubt") else "") + (" (written)" if one["chosen"] else ""))
            for one in line["curve"]]
