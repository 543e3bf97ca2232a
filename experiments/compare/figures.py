"""The comparison's figures, as SVG text to stand inside an HTML page.

A method has one marker and one colour in all of them, the same with the guide (filled) and without (open), so that pairs are
seen as such and all stay apart when printed in grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axis import Axis
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from experiments.benchmark.results import Line
from experiments.compare.summary import EQUAL, Point, layer_densities, points
from experiments.methods import METHODS
from experiments.plots import GREY, STYLE, svg

# Okabe and Ito's palette without yellow, which is too light to print; markers repeat later than colours.
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"
MARKERS = (*"osD^vP*X<>phd8H", (4, 1, 0))  # the last a star of four points
NEAR = 8.0  # points of accuracy below the best that the Pareto plot shows


def styles(lines: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """matplotlib's keywords for every method in the lines, the same whichever others are there."""
    guided = {line["method"]: line["guided"] for line in lines}
    names = [*METHODS, *(name for name in guided if name not in METHODS)]
    family = {name: METHODS[name].twin or name if name in METHODS else name for name in names}
    rank = {name: i for i, name in enumerate(dict.fromkeys(family.values()))}

    def style(i: int, filled: bool) -> dict[str, Any]:
        colour = COLOURS[i % len(COLOURS)]
        return {"marker": MARKERS[i % len(MARKERS)], "color": colour, "markersize": 7, "markeredgewidth": 1.5,
                "markerfacecolor": colour if filled else "white", "linestyle": "-" if filled else "--"}

    return {name: style(rank[family[name]], guided[name]) for name in names if name in guided}


def pareto(lines: Sequence[Line], network: str, batch: int = 1) -> str:
    """Accuracy over that of the seed's dense network against measured speedup over it; up and to the right is better."""
    look = styles(lines)
    lines = [line for line in lines if line["network"] == network and "times" in line]
    found = points(lines)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.8), layout="constrained")
        axes = figure.subplots()
        axes.axhspan(-EQUAL, 0, color="#E4E4E4", zorder=0)
        axes.plot(1, 0, "s", color=GREY, markersize=10, label="dense", linestyle="none")
        for method in dict.fromkeys(point.method for point in found):
            own = sorted((point for point in found if point.method == method), key=lambda point: point.speedup(batch))
            low, high = zip(*(_reach(lines, point) for point in own), strict=True)
            x, y = [point.speedup(batch) for point in own], [-point.lost for point in own]
            below, above = ([abs(a - b) for a, b in zip(y, end, strict=True)] for end in (low, high))
            axes.errorbar(x, y, yerr=(below, above), elinewidth=0.8, ecolor=to_rgba(look[method]["color"], 0.35), linewidth=1.2,
                          label=method, **look[method])
        shown = max([0.0, *(-point.lost for point in found)])
        axes.set_ylim(max(shown - NEAR, min(-point.lost for point in found) - 1), shown + 0.7)
        axes.annotate(f"within {EQUAL} points of dense", (0.06, -EQUAL / 2), xycoords=("axes fraction", "data"),
                      va="center", fontsize=8)
        axes.set_xscale("log")
        speedups = [1.0, *(point.speedup(batch) for point in found)]
        axes.set_xlim(0.9 * min(speedups), 1.3 * max(speedups))
        _plain_ticks(axes.xaxis)
        axes.set_xlabel(f"measured speedup over dense at batch {batch}")
        axes.set_ylabel("test accuracy minus dense, points")
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        return svg(figure)


def densities(lines: Sequence[Line], network: str, requested: float, methods: Sequence[str]) -> str:
    """Density of every layer under each method, mean over seeds, and the range in which pruning pays, shaded."""
    look = styles(lines)
    lines = [line for line in lines if (line["network"], line["requested"]) == (network, requested) and "layers" in line]
    first = lines[0]["layers"]
    methods = [method for method in methods if any(line["method"] == method for line in lines)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(max(8.0, 0.55 * len(first) + 2), 5), layout="constrained")
        axes = figure.subplots()
        for i, layer in enumerate(first):
            lower, upper = layer["useful"]
            if lower < upper:
                axes.bar(i, upper - lower, 0.9, bottom=lower, color="#E4E4E4", edgecolor=GREY, linewidth=0.6, zorder=1,
                         label="useful range")
        for k, method in enumerate(methods):
            means = layer_densities([line for line in lines if line["method"] == method])
            offset = 0.7 * ((k + 0.5) / len(methods) - 0.5)
            kind: dict[str, Any] = look[method] | {"linestyle": "none"}
            axes.plot([i + offset for i in range(len(first))], means, label=method, zorder=3, **kind)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        smallest = min(layer["density"] for line in lines for layer in line["layers"])
        axes.set_ylim(max(0.6 * smallest, 1e-3), 1.4)
        for edge in range(1, len(first)):
            axes.axvline(edge - 0.5, color="#BBBBBB", linewidth=0.5, zorder=0)
        axes.set_xlim(-0.5, len(first) - 0.5)
        axes.set_xticks(range(len(first)), [layer["path"].removesuffix("/conv") for layer in first], rotation=45, ha="right")
        axes.set_ylabel("density = kept / all weights")
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(unique.values(), unique, loc="outside upper center", ncols=4, frameon=False, fontsize=9)
        return svg(figure)


def over_steps(lines: Sequence[Line], network: str, requested: float, methods: Sequence[str]) -> str:
    """Density and predicted speedup of the whole network over the updates of pruning, of each method's first seed."""
    look = styles(lines)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 5.5), layout="constrained")
        top, bottom = figure.subplots(2, sharex=True)
        for k, method in enumerate(methods):
            curves = [line["curve"] for line in lines if line.get("curve") and
                      (line["network"], line["requested"], line["method"]) == (network, requested, method)]
            if curves:
                steps, density, speedup = zip(*curves[0], strict=True)
                kind: dict[str, Any] = look[method] | {"markevery": (k % 3, 3), "linewidth": 1.2}
                top.plot(steps, density, label=method, **kind)
                bottom.plot(steps, speedup, **kind)
        bottom.axhline(requested, color=GREY, linewidth=1, linestyle=":")
        bottom.annotate("requested", (0.01, requested), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
        top.set_yscale("log")
        top.set_ylim(top=1.2)
        _plain_ticks(top.yaxis)
        top.set_ylabel("density of the network")
        bottom.set_ylabel("predicted speedup")
        bottom.set_xlabel("updates of pruning")
        figure.legend(loc="outside right upper", frameon=False, fontsize=9)
        return svg(figure)


def _reach(lines: Sequence[Line], point: Point) -> tuple[float, float]:
    """Lowest and highest accuracy of a point's seeds over that of their dense networks, in points."""
    own = [100 * (line["packed_accuracy"] - line["dense_accuracy"]) for line in lines
           if (line["method"], line["requested"]) == (point.method, point.requested) and "times" in line]
    return min(own), max(own)


def _plain_ticks(axis: Axis) -> None:
    """Plain numbers on a logarithmic axis."""
    axis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())
