"""The paper's Figures 3 and 5, drawn from the model with the paper's three machines."""

from __future__ import annotations

import numpy as np

from experiments.benchmark.table import markdown
from experiments.layers import ALEXNET, layer
from experiments.plots import svg
from sparseflax.cost.machine import ATOM_C2750, XEON_E5_2697V4, XEON_PHI_7250, Machine
from sparseflax.cost.model import Work, conv_seconds, dense_seconds, useful_range
from sparseflax.cost.shape import ConvShape

DENSITY = np.geomspace(0.005, 1, 200).astype(np.float32)
REDUCE = layer(480, 14, 16, 1)  # inception_4a/5x5_reduce of GoogLeNet
# Speedups that the paper measured over its conv2-5 at density 0.09.
MEASURED = {ATOM_C2750: 7.3, XEON_E5_2697V4: 3.4, XEON_PHI_7250: 3.1}


def lowered(shape: ConvShape, machine: Machine) -> Work:
    """A convolution whose input is copied once for every position of the kernel, then read as a matrix."""
    work = Work.of(shape, machine)
    return work._replace(tiles=tuple(
        tile._replace(input_bytes=tile.input_bytes * shape.kh * shape.kw) for tile in work.tiles))


def table() -> str:
    """What the model says of conv5 on the paper's machines, beside what the paper measured, as a Markdown table."""
    conv5, rows = ALEXNET["conv5"], []
    for machine, measured in MEASURED.items():
        found = useful_range(conv5, machine)
        at = float(dense_seconds(conv5, machine) / conv_seconds(conv5, 0.09, machine))
        rows.append((machine.name, f"{float(found.lower):.4f} to {float(found.upper):.3f}", f"{at:.2f}x", f"{measured}x"))
    head = "machine", "conv5 of AlexNet useful at densities", "predicted at 0.09", "the paper measured, conv2 to conv5"
    return markdown(head, rows)


def figure3() -> str:
    """Projected effective flop/s and speedup against density, on Xeon and Atom."""
    from matplotlib.figure import Figure

    conv5 = ALEXNET["conv5"]
    figure = Figure(figsize=(9, 7), layout="constrained")
    for column, machine in zip(figure.subplots(2, 2).T, (XEON_E5_2697V4, ATOM_C2750), strict=True):
        for name, shape, work, style in (("conv5 direct", conv5, Work.of(conv5, machine), "-"),
                                         ("conv5 lowered", conv5, lowered(conv5, machine), "--"),
                                         ("inception_4a/5x5_reduce", REDUCE, Work.of(REDUCE, machine), ":")):
            seconds = np.asarray(conv_seconds(work, DENSITY, machine))
            column[0].plot(DENSITY, shape.flops / seconds / 1e9, style, label=name)
            column[1].plot(DENSITY, float(dense_seconds(shape, machine)) / seconds, style, label=name)
        column[0].set(title=machine.name, xscale="log", yscale="log", ylabel="effective Gflop/s")
        column[1].set(xscale="log", yscale="log", xlabel="density: kept / all weights", ylabel="speedup over dense")
        column[1].axhline(1, color="#666666", linewidth=0.8)
        column[0].legend(frameon=False)
    return svg(figure)


def figure5() -> str:
    """Effective flop/s of AlexNet's conv2-5 against density on the three machines, and what the paper measured at 0.09."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    for axes, (machine, speedup) in zip(figure.subplots(1, 3), MEASURED.items(), strict=True):
        for name, shape in ALEXNET.items():
            axes.plot(DENSITY, shape.flops / np.asarray(conv_seconds(shape, DENSITY, machine)) / 1e9, label=name)
        axes.axhline(machine.peak / 1e9, color="#666666", linewidth=0.8, label="SGEMM")
        axes.plot(0.09, speedup * machine.peak / 1e9, "k*", markersize=10, label="the paper's measurement")
        axes.set(title=machine.name, xscale="log", yscale="log", xlabel="density: kept / all weights",
                 ylabel="effective Gflop/s")
        axes.legend(frameon=False, fontsize=7)
    return svg(figure)
