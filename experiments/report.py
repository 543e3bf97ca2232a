"""What a run has shown, for people: an HTML page, a few lines for the terminal, and a table of several runs.

    python -m experiments.report runs/digits-seed0/result.json     writes report.html beside it
"""

import argparse
import html
import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from experiments import evaluate, plots
from experiments.benchmark.results import versions
from experiments.benchmark.table import markdown
from experiments.evaluate import DENSE, FOLDED, PACKED
from sparseflax.cost.atomic import write_atomically
from sparseflax.job.page import page as html_page
from sparseflax.job.page import table as html_table

MET = 0.1  # a measured speedup this close to the requested one, relatively, meets it
OFF = 1.5  # a prediction this many times wrong is worth a line

Result = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description="Render results.")
    parser.add_argument("result", type=Path, nargs="+", help="result.json of a run; report.html is written beside it")
    for path in parser.parse_args().result:
        write_atomically(path.with_name("report.html"), page(json.loads(path.read_text())))
        print(path.with_name("report.html"))


def page(result: Result) -> str:
    """One self-contained HTML page about a run."""
    parts = [
        "<h2>Result</h2>", html_table(("", *_NETWORKS), _overview(result)),
        f"<p class=note>{html.escape(_conditions(result))} Medians of calls of whole networks with the same weights, each one "
        "program under jax.jit, called in turn; ± is half the distance of the quartiles. Rounding error: of the logits, over "
        "the largest, against float64.</p>",
        "<h2>Where it loses</h2>", "<ul>", *(f"<li>{html.escape(line)}</li>" for line in losses(result)), "</ul>",
        "<h2>Densities</h2>", plots.densities(result),
        "<p class=note>Shaded: where pruning pays on this machine at batch 1, as the performance model says. Above it the "
        "dense layer is faster; below it the sparse layer is bound by memory and gains nothing from fewer weights.</p>",
    ]
    for n, layers in result["layers"].items():
        parts += [f"<h2>Layers at batch {n}: predicted and measured microseconds</h2>",
                  html_table(("layer", "shape", "density", "runs", "dense, predicted", "dense, measured", "sparse, predicted",
                          "sparse, measured", "measured speedup"), map(_layer_row, layers))]
    parts += [
        "<h2>The performance model</h2>", plots.predictions(result),
        "<p class=note>The layers that were pruned, each timed alone, with its bias.</p>",
        "<h2>Training</h2>", plots.curves(result),
        f"<p class=note>{html.escape(', '.join(f'{key} {value}' for key, value in result['settings'].items()))}</p>",
    ]
    return html_page(f"{result['name']}, seed {result['seed']}", headline(result), "\n".join(parts))


def summary(result: Result) -> str:
    """A few lines for the terminal."""
    rows = [("", *_NETWORKS), *_overview(result)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in
                       enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]
    return "\n".join([*lines, *losses(result), headline(result)])


def headline(result: Result) -> str:
    """What came out, in a sentence."""
    accuracy, size = result["accuracy"], result["bytes"]
    points = 100 * (accuracy["packed"] - accuracy["dense"])
    accurate = f"{abs(points):.2f} points {'less' if points < 0 else 'more'} accurate" if points else "as accurate"
    short = result.get("shortfall", "")
    asked = f"{short[0].upper()}{short[1:]}; pruned" if short else (
        f"Asked for {result['requested']:g}x at batch {next(iter(result['times']))}: pruned")
    return (f"{asked} to "
            f"{100 * result['kept'] / result['weights']:.1f} % of its weights and packed, the network is "
            f"{' and '.join(f'{speedup(result, n):.1f} times as fast at batch {n}' for n in result['times'])} as the faster of "
            f"its dense forms under jax.jit, {size['dense']['disk'] / size['packed']['disk']:.1f} times smaller on disk, and "
            f"{accurate}.")


def speedup(result: Result, n: str) -> float:
    """Time of the fastest dense network over that of the packed one, at batch n."""
    return evaluate.speedup(result["times"][n])


def losses(result: Result) -> list[str]:
    """Where sparsity does not help, and where the performance model is wrong, in sentences."""
    lines = []
    points = 100 * (result["accuracy"]["dense"] - result["accuracy"]["packed"])
    if points > 0:
        lines.append(f"{points:.2f} points of test accuracy are lost ({result['test_images']} test images).")
    first = next(iter(result["times"]))
    if abs(speedup(result, first) / result["requested"] - 1) > MET:
        lines.append(f"Asked for {result['requested']:g}x at batch {first}: measured {speedup(result, first):.2f}x.")
    for n in result["times"]:
        if speedup(result, n) < 1:
            lines.append(f"At batch {n} the packed network is slower than the dense one: {speedup(result, n):.2f}x.")
    batches = list(result["layers"].items())
    lines += [f"{layer['path']} stays dense: {layer['reason']}." for layer in batches[0][1] if layer["choice"] == "dense"]
    for n, layers in batches:
        packed = result["times"][n][PACKED]["seconds"]
        for layer in layers:
            gain = layer["dense"][1] / layer["sparse"][1]
            if layer["choice"] == "sparse" and round(gain, 2) < 1:
                lines.append(f"{layer['path']} runs sparse but is slower so at batch {n}: {gain:.2f}x.")
            if layer["choice"] == "dense" and layer["dense"][1] - layer["sparse"][1] > 0.05 * packed:
                lines.append(f"{layer['path']} runs dense but would be {gain:.1f}x as fast sparse at batch {n}.")
        for kind in ("dense", "sparse"):
            off = [layer[kind][1] / layer[kind][0] for layer in layers if layer["choice"] == "sparse"]
            if off and not 1 / OFF <= statistics.median(off) <= OFF:
                lines.append(f"At batch {n} the {kind} pruned layers take {statistics.median(off):.1f}x the predicted time "
                             "(median).")
        rest = 1 - sum(layer[layer["choice"]][1] for layer in layers) / packed
        if rest > 0.25:
            lines.append(f"At batch {n} {100 * rest:.0f} % of the packed network's time goes to what is no layer: pooling, "
                         "ReLU, copies, calls.")
    return lines


def table(lines: Sequence[Result]) -> str:
    """The newest result of every run and seed, in Markdown, and where it loses.

    Raises:
      ValueError: there are no results, or they come from different CPUs or numbers of threads.
    """
    if not lines:
        raise ValueError("there are no results to make a table of: run python -m experiments.run --results FILE first")
    newest = {(line["name"], line["seed"]): line for line in lines}
    machines = {(line["cpu"], line["threads"]) for line in newest.values()}
    if len(machines) > 1:
        raise ValueError(f"the results come from different machines, {sorted(machines)}: keep those of one")
    rows = []
    for line in newest.values():
        cells = [f"{line['name']}, seed {line['seed']}", f"{line['requested']:g}x",
                 f"{100 * line['accuracy']['dense']:.1f} → {100 * line['accuracy']['packed']:.1f} %",
                 f"{100 * line['kept'] / line['weights']:.1f} %",
                 f"{_megabytes(line['bytes']['dense']['disk'])} → {_megabytes(line['bytes']['packed']['disk'])}"]
        for n in line["times"]:
            times = line["times"][n]
            cells.append(f"{_ms(times[DENSE])} / {_ms(times[FOLDED])} → {_ms(times[PACKED])} ms, **{speedup(line, n):.1f}x**")
        rows.append(cells)
    batches = list(next(iter(newest.values()))["times"])
    head = ["run", "asked", "test accuracy", "weights kept", "on disk", *(f"batch {n}" for n in batches)]
    last = list(newest.values())[-1]
    return "\n".join([
        f"{_conditions(last)} Times are dense as trained / dense with batch norm folded → packed; the speedup is over the "
        "faster of the two dense ones, and asked for at batch 1.", "", markdown(head, rows), "",
        f"Where it loses (seed {last['seed']}):", "", *(f"- {line}" for line in losses(last))])


def starts(lines: Iterable[Result]) -> str:
    """Runs that were started several times by one commit, in Markdown: what was measured each time; "" if there are none.

    Calibrations are counted: with one for each start, each was a first one.
    """
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for line in lines:
        groups.setdefault((line["name"], line["seed"], line["requested"], line["commit"]), []).append(line)
    rows = []
    for (name, seed, asked, commit), some in groups.items():
        measured = sorted(speedup(line, "1") for line in some)
        met = sum(abs(got / asked - 1) <= MET for got in measured)
        short = sum(bool(line.get("shortfall")) for line in some)
        if len(some) > 1:
            machines = len({json.dumps(line["machine"]) for line in some})
            rows.append([f"{name}, seed {seed}", str(len(some)), str(machines), f"{asked:g}x",
                         ", ".join(f"{got:.2f}" for got in measured), str(met), str(short), commit])
    head = ["run", "starts", "calibrations", "asked", "measured at batch 1", f"within {100 * MET:.0f} %", "out of reach",
            "commit"]
    return "\n".join(["Started again and again:", "", markdown(head, rows)]) if rows else ""


_NETWORKS = DENSE, FOLDED, PACKED


def _overview(result: Result) -> list[tuple[str, ...]]:
    """Rows (label, dense, folded, packed)."""
    accuracy, bytes_ = result["accuracy"], result["bytes"]
    rows = [("test accuracy", f"{100 * accuracy['dense']:.2f} %", "", f"{100 * accuracy['packed']:.2f} %"),
            ("weights kept", "100 %", "100 %", f"{100 * result['kept'] / result['weights']:.2f} %")]
    rows += [(label, _megabytes(bytes_["dense"][key]), "", _megabytes(bytes_["packed"][key]))
             for label, key in (("on disk", "disk"), ("in memory", "memory"))]
    for n, times in result["times"].items():
        cells = [times[name] for name in _NETWORKS]
        rows += [(f"batch {n}, per image", *(f"{_ms(cell, int(n))} ms ± {50 * cell['spread']:.0f} %" for cell in cells)),
                 (f"batch {n}, over dense", *(f"{times[DENSE]['seconds'] / cell['seconds']:.2f}x" for cell in cells)),
                 (f"batch {n}, rounding error", *(f"{cell['error']:.0e}" for cell in cells))]
    return rows


def _layer_row(layer: dict[str, Any]) -> tuple[str, ...]:
    (dense_predicted, dense), (sparse_predicted, sparse) = layer["dense"], layer["sparse"]
    micro = (f"{1e6 * seconds:.0f}" for seconds in (dense_predicted, dense, sparse_predicted, sparse))
    return (layer["path"], layer["shape"], f"{layer['density']:.3f}", layer["choice"], *micro, f"{dense / sparse:.2f}x")


def _conditions(result: Result) -> str:
    threads = result["threads"]
    return (f"Measured on {result['cpu']}, {threads} thread{'s' * (threads > 1)}, with {versions(result)}, "
            f"commit {result['commit']}, {result['date'][:10]}.")


def _ms(timing: dict[str, float], images: int = 1) -> str:
    return f"{1e3 * timing['seconds'] / images:.3g}"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f} MB"


if __name__ == "__main__":
    main()
