"""The report's figures, as SVG text to stand inside an HTML page: legible in print, and for colour-blind readers."""

import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Okabe and Ito's palette; no figure tells anything by colour alone.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#666666"
STYLE: dict[Any, Any] = {"font.size": 10, "lines.linewidth": 1.8, "axes.spines.top": False, "axes.spines.right": False,
         "svg.hashsalt": "sparseflax"}  # the same figure, the same text


def densities(result: dict[str, Any]) -> str:
    """Density of every layer, and the range of densities in which pruning pays on this machine, shaded."""
    layers = result["layers"]["1"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4))
        axes = figure.subplots()
        for i, layer in enumerate(layers):
            lower, upper = layer["useful"]
            if lower < upper:
                axes.bar(i, upper - lower, 0.8, bottom=lower, color="#DDDDDD", edgecolor=GREY, linewidth=0.8, zorder=1,
                         label="useful range")
            sparse = layer["choice"] == "sparse"
            axes.plot(i, layer["density"], "o" if sparse else "s", color=BLUE if sparse else "white", markersize=9,
                      markeredgecolor=BLUE if sparse else ORANGE, markeredgewidth=2, linestyle="none", zorder=3,
                      label="pruned, runs sparse" if sparse else "runs dense")
            axes.annotate(f"{layer['density']:.3f}", (i, layer["density"]), (0, 8), textcoords="offset points", ha="center")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_ylim(min(0.008, *(0.5 * layer["density"] for layer in layers)), 2)
        axes.set_xticks(range(len(layers)), [f"{layer['path']}\n{_sizes(layer)}" for layer in layers], rotation=30, ha="right")
        axes.set_ylabel("density = kept / all weights")
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        figure.legend(unique.values(), unique, loc="upper center", ncols=3, frameon=False)
        figure.tight_layout(rect=(0, 0, 1, 0.93))
        return svg(figure)


def predictions(result: dict[str, Any]) -> str:
    """Measured against predicted time of every layer, dense and sparse, at every batch size."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5))
        axes = figure.subplots()
        markers = iter("os^Dv<")
        everything = []
        for n, layers in result["layers"].items():
            for kind, colour in (("dense", ORANGE), ("sparse", BLUE)):
                points = [[1e6 * seconds for seconds in layer[kind]] for layer in layers if layer["choice"] == "sparse"]
                everything += [value for point in points for value in point]
                if points:
                    axes.plot(*zip(*points, strict=True), next(markers), color=colour, linestyle="none", markersize=7,
                              markerfacecolor=colour if n == "1" else "white", markeredgewidth=1.8, label=f"{kind}, batch {n}")
        if everything:
            ends = [0.8 * min(everything), 1.25 * max(everything)]
            axes.plot(ends, ends, "--", color=GREY, linewidth=1.2, label="as predicted", zorder=0)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("predicted, microseconds")
        axes.set_ylabel("measured, microseconds")
        axes.legend(frameon=False)
        figure.tight_layout()
        return svg(figure)


def curves(result: dict[str, Any]) -> str:
    """Training loss and test accuracy over the updates of dense training and pruning."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8, 4.5))
        top, bottom = figure.subplots(2, sharex=True)
        begin = 0
        for (title, curve), colour, marker in zip(result["curves"].items(), (ORANGE, BLUE), "so", strict=True):
            for axes, points, scale in ((top, curve["losses"], 1), (bottom, curve["accuracies"], 100)):
                steps, values = zip(*points, strict=True)
                axes.plot([begin + step for step in steps], [scale * value for value in values], marker=marker, color=colour,
                          label=title)
            if begin:
                for axes in (top, bottom):
                    axes.axvline(begin, color=GREY, linestyle=":", linewidth=1.2)
            begin += curve["losses"][-1][0]
        top.set_ylabel("training loss")
        bottom.set_ylabel("test accuracy, %")
        bottom.set_xlabel("updates")
        top.legend(frameon=False)
        figure.tight_layout()
        return svg(figure)


def _sizes(layer: dict[str, Any]) -> str:
    return layer["shape"].removeprefix("n1 ").replace(" -> ", "→")


def svg(figure: Figure) -> str:
    """The figure as text to stand inside an HTML page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    content = text.getvalue()
    return content[content.index("<svg") :]  # without the XML head, which names a DTD on the net
