"""Speed against density, as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median

from matplotlib.figure import Figure

from experiments.benchmark.results import Line
from experiments.benchmark.table import OURS, fastest_dense


def plot_speed(lines: Sequence[Line]) -> Figure:
    """Effective Gflop/s against density, both logarithmic, a field for each layer and batch.

    Dense rivals are lines, since zeros do not help them. The ideal is FMAs from registers at their peak, on kept weights
    only; where that peak was not measured, the fastest dense rival's speed divided by the density.

    Args:
      lines: results, of one machine and number of threads.

    Raises:
      ValueError: no layer was measured at two densities.
    """
    fields: dict[tuple[str, int], list[Line]] = {}
    for line in lines:
        fields.setdefault((line["layer"], line["n"]), []).append(line)
    fields = {key: sorted(group, key=lambda line: line["density"]) for key, group in fields.items() if len(group) > 1}
    if not fields:
        raise ValueError("no layer was measured at two densities: run `python -m experiments.benchmark layers` with, for "
                         "example, --density 0.05 0.1 0.2")
    columns = min(3, len(fields))
    rows = math.ceil(len(fields) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    names = list(dict.fromkeys(name for group in fields.values() for line in group for name in line["times"] if name != OURS))
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    for axis, ((layer, n), group) in zip(axes.flat, fields.items(), strict=False):
        _draw(axis, group, colours)
        axis.set_title(f"{layer}, n={n}", fontsize=9)
        axis.set_xlabel("density: kept / all weights", fontsize=8)
    for axis in axes.flat[len(fields):]:
        axis.remove()
    handles = {label: handle for axis in figure.axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    figure.supylabel("effective Gflop/s (dense-equivalent)", fontsize=9)
    return figure


def _draw(axis, group: Sequence[Line], colours: dict[str, str]) -> None:
    density = [line["density"] for line in group]
    ends = [density[0], density[-1]]

    def effective(name: str) -> list[float]:
        return [line["flops"] / line["times"][name]["seconds"] / 1e9 if name in line["times"] else math.nan for line in group]

    for name, colour in colours.items():
        speeds = effective(name)
        if all(map(math.isnan, speeds)):
            continue
        if next(line["times"][name]["dense"] for line in group if name in line["times"]):
            axis.plot(ends, [median(s for s in speeds if not math.isnan(s))] * 2, color=colour, linewidth=1, label=name)
        else:
            axis.plot(density, speeds, color=colour, linewidth=1, marker=".", label=f"{name} (sparse)")
    full = median(line["peak"] or line["flops"] / line["times"][fastest_dense(line)]["seconds"] for line in group) / 1e9
    axis.plot(ends, [full / d for d in ends], color="gray", linestyle="--", linewidth=1, label="ideal 1/density")
    axis.plot(density, effective(OURS), color="black", marker="o", markersize=3, label=OURS)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(density, [f"{d:.2g}" for d in density])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=8)
