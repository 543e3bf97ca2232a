"""The judgement: predicted against measured, on layers of real networks that nothing was fitted on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.benchmark.results import ROOT, Line, append, provenance, read
from experiments.calibrate.fit import Errors, predict
from experiments.calibrate.layers import googlenet, held_out, resnet50
from experiments.calibrate.measure import Sample, measure
from sparseflax import ffi, profile
from sparseflax.machine import Machine, client_threads, processor
from sparseflax.shapes import ConvShape

LINES = ROOT / "experiments" / "results" / "calibration.jsonl"
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.5)
CLEAR = 0.1  # times that differ by more have one right choice
NETWORKS = {"ResNet-50": resnet50, "GoogLeNet": googlenet}


@dataclass(frozen=True)
class Choices:
    """What choosing by the model costs.

    Attributes:
      wrong: choices of the slower one where the times differ by more than CLEAR.
      clear: pairs whose times do.
      count: pairs of a sparse and a dense time.
      loss: time of all choices / time of the right ones - 1.
    """

    wrong: int
    clear: int
    count: int
    loss: float

    def __str__(self) -> str:
        return (f"{self.wrong} wrong of {self.clear} that differ by more than {CLEAR:.0%} ({self.count} in all), "
                f"time lost {self.loss:.2%}")


def run(batches: Sequence[int], seconds: float, isa: str | None, out: Path) -> None:
    """Measures the held-out layers, appends them to the results and draws all of this machine's.

    Raises:
      ValueError: this machine has no calibration that may be believed.
    """
    machine = profile.load(processor(), isa or ffi.isa(), client_threads())
    print(machine)
    origin, lines = provenance({"jax", "jaxlib"}), []
    for n in batches:
        samples = measure([(shape.with_batch(n), DENSITIES) for shape in held_out()], seconds, isa=isa)
        new = [line | origin for line in compare(samples, machine)]
        for line in new:
            append(out / "calibration.jsonl", line)
        lines += new
        print(f"\nspread of the times {np.median([s.spread for s in samples]):.0%}\n{table(new)}")
        for name, network in NETWORKS.items():
            print(f"{name} in all: " + ", ".join(f"{'dense' if density is None else density} {error:+.1%}"
                                                 for density, error in network_errors(new, network()).items()))
    same = [line for line in read(out / "calibration.jsonl") if line["cpu"] == lines[-1]["cpu"] and line["isa"] == machine.isa]
    newest = {(line["layer"], line["n"], line["threads"], line["drawn"]): line for line in same}
    plot(list(newest.values()), out / "calibration.svg")
    print(f"wrote {out / 'calibration.jsonl'} and {out / 'calibration.svg'}")


def compare(samples: Sequence[Sample], machine: Machine) -> list[Line]:
    """A line of the results for each sample."""
    return [{"layer": str(s.shape.with_batch(1)), "n": s.shape.n, "threads": machine.threads, "isa": machine.isa,
             "density": s.density, "drawn": s.density and nearest(s.density), "measured": s.seconds, "predicted": float(p),
             "spread": s.spread} for s, p in zip(samples, predict(samples, machine), strict=True)]


def table(lines: Sequence[Line]) -> str:
    """Errors and choices as Markdown, a row for each CPU, batch and number of threads; the newest line of each time counts."""
    newest = {(line["cpu"], line["isa"], line["n"], line["threads"], line["layer"], line["drawn"]): line for line in lines}
    fields: dict[tuple, list[Line]] = {}
    for key, line in newest.items():
        fields.setdefault(key[:4], []).append(line)
    rows = ["| | sparse: median error | 90th percentile | dense: median error | 90th percentile | wrong choices | time lost |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    for (cpu, isa, n, threads), some in sorted(fields.items()):
        sparse, dense = (Errors.of(*np.array([(line["predicted"], line["measured"]) for line in some
                                              if (line["density"] is None) == kind]).T) for kind in (False, True))
        found = choices(some)
        rows.append(f"| {cpu}, {isa}, n={n}, {threads} thread{'s' * (threads > 1)} | {sparse.median:.1%} | {sparse.high:.1%} | "
                    f"{dense.median:.1%} | {dense.high:.1%} | {found.wrong} of {found.clear} | {found.loss:.2%} |")
    return "\n".join(rows)


def choices(lines: Sequence[Line]) -> Choices:
    """Dense or sparse, for every sparse time of one CPU, batch and number of threads, by the predicted times."""
    dense = {line["layer"]: line for line in lines if line["density"] is None}
    chosen = best = 0.0
    wrong = clear = count = 0
    for line in lines:
        if line["density"] is not None:
            other = dense[line["layer"]]
            sparse = line["predicted"] < other["predicted"]
            seconds, right = line["measured"] if sparse else other["measured"], min(line["measured"], other["measured"])
            differs = max(line["measured"], other["measured"]) > (1 + CLEAR) * right
            wrong, clear, count = wrong + (differs and seconds > right), clear + differs, count + 1
            chosen, best = chosen + seconds, best + right
    return Choices(wrong, clear, count, chosen / best - 1)


def network_errors(lines: Sequence[Line], network: Counter[ConvShape]) -> dict[float | None, float]:
    """{density drawn: relative error of the sum over a network's layers}."""
    often = {str(shape): count for shape, count in network.items()}
    sums: dict[float | None, np.ndarray] = {}
    for line in lines:
        if line["layer"] in often:
            times = often[line["layer"]] * np.array([line["predicted"], line["measured"]])
            sums[line["drawn"]] = sums.get(line["drawn"], np.zeros(2)) + times
    return {drawn: float(predicted / measured - 1) for drawn, (predicted, measured) in sums.items()}


def nearest(density: float) -> float:
    """The density that a random pattern was drawn with."""
    return min(DENSITIES, key=lambda drawn: abs(np.log(drawn / density)))


def plot(lines: Sequence[Line], file: Path) -> None:
    """Predicted against measured microseconds, a field for each batch and number of threads."""
    from matplotlib.figure import Figure

    fields = sorted({(line["n"], line["threads"]) for line in lines})
    figure = Figure(figsize=(4.2 * len(fields), 4.4), layout="constrained")
    for axes, (n, threads) in zip(figure.subplots(1, len(fields), squeeze=False)[0], fields, strict=True):
        for label, marker, colour in (("dense", "s", "#D55E00"), ("sparse", "o", "#0072B2")):
            points = [(1e6 * line["measured"], 1e6 * line["predicted"]) for line in lines
                      if (line["n"], line["threads"]) == (n, threads) and (line["density"] is None) == (label == "dense")]
            axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=3, alpha=0.6, label=label)
        ends = axes.get_xlim()
        axes.set(xscale="log", yscale="log", title=f"n={n}, {threads} thread{'s' * (threads > 1)}", xlabel="measured, µs",
                 ylabel="predicted, µs")
        low, high = 1.0, ends[1] * 1.3
        for factor, style in ((1, "-"), (1.1, ":"), (1 / 1.1, ":")):
            axes.plot([low, high], [low * factor, high * factor], style, color="#666666", linewidth=0.8)
        axes.legend(frameon=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
