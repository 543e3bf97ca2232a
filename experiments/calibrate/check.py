"""The check: predicted against measured, on layers of real networks that nothing was fitted on.

A machine shared with others changes its speed within minutes, by more than the model errs. So the layers that constants are
fitted on are timed in the same rounds as those that they are judged by; a stored calibration is judged beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.benchmark.results import ROOT, Line, append, provenance
from experiments.calibrate.judgement import Judgement, in_float32, table
from experiments.calibrate.layers import held_out
from experiments.plots import svg
from sparseflax.calibration.calibrate import describe
from sparseflax.calibration.fit import fit, predict
from sparseflax.calibration.layers import fitting
from sparseflax.calibration.samples import Sample, measure
from sparseflax.conv import ffi
from sparseflax.cost import profile
from sparseflax.cost.machine import Machine

LINES = ROOT / "experiments" / "results" / "calibration.jsonl"
OTHER_LINES = LINES.with_name("calibration_xeon.jsonl"),  # of other CPUs
DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.5)


def run(batches: Sequence[int], seconds: float, isa: str | None, out: Path) -> None:
    """Measures, appends the held-out layers to the results and judges them.

    Raises:
      ValueError: the native kernel does not run here.
    """
    start = describe(isa)
    fitted, judged = fitting(), [(shape.with_batch(n), DENSITIES) for n in batches for shape in held_out()]
    samples = measure(fitted + judged, seconds, isa=isa, int8=start.isa == ffi.isa() and bool(ffi.kernels("int8")))
    known = {shape for shape, _ in fitted}
    machine = fit([s for s in samples if s.shape in known], start)
    held = [s for s in samples if s.shape not in known]
    try:
        stored = profile.load(start.name, start.isa, start.threads)
    except ValueError as error:
        print(f"no stored calibration to judge: {error}")
        stored = None
    origin = provenance({"jax", "jaxlib"})
    lines = [line | origin for line in compare(held, machine, stored)]
    for line in lines:
        append(out / "calibration.jsonl", line)
    print(f"\nspread of the times {np.median([s.spread for s in held]):.0%}\n{table(lines)}\n")
    for n in batches:
        judgement = Judgement.of([line for line in in_float32(lines) if line["n"] == n])
        for (name, drawn), error in judgement.networks.items():
            print(f"n={n}, {name} in all, {'dense' if drawn is None else f'density {drawn:g}'}: {error:+.1%}")
        print(f"n={n}: {'; '.join(judgement.missed()) or 'within every bound'}")
    print(f"wrote {out / 'calibration.jsonl'}")


def compare(samples: Sequence[Sample], machine: Machine, stored: Machine | None) -> list[Line]:
    """A line of the results for each sample, predicted by the machine and by a stored one."""
    before = predict(samples, stored).tolist() if stored else [None] * len(samples)
    return [{"layer": str(s.shape.with_batch(1)), "n": s.shape.n, "threads": machine.threads, "isa": machine.isa,
             "density": s.density, "drawn": s.density and nearest(s.density), "measured": s.seconds, "predicted": p,
             "stored": b, "spread": s.spread, "precision": "int8" if s.int8 else "float32"}
            for s, p, b in zip(samples, predict(samples, machine).tolist(), before, strict=True)]


def nearest(density: float) -> float:
    """The density that a random pattern was drawn with."""
    return min(DENSITIES, key=lambda drawn: abs(np.log(drawn / density)))


def plot(lines: Sequence[Line]) -> str:
    """Predicted against measured microseconds of a CPU as SVG, a field for each batch and number of threads.

    Args:
      lines: of a file of results; the newest of each layer, batch, density and number of threads counts.
    """
    from matplotlib.figure import Figure

    same = [line for line in in_float32(lines) if (line["cpu"], line["isa"]) == (lines[-1]["cpu"], lines[-1]["isa"])]
    lines = list({(line["layer"], line["n"], line["threads"], line["drawn"]): line for line in same}.values())
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
    return svg(figure)
