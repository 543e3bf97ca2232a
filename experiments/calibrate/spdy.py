"""The model's form on an engine and a machine that are not ours: times published with SPDY (Frantar and Alistarh, 2022).

Its files hold a time against sparsity for every convolution of ResNet-18 and ResNet-50. The constants are fitted on the first
and used for the second. Engine, machine and batch are not in the files: 64 images on 24 cores is what the paper says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments.benchmark.results import Line, append, provenance
from experiments.benchmark.table import markdown
from experiments.layers import layer
from sparseflax.calibration.fit import Errors, fit, predict
from sparseflax.calibration.samples import Sample
from sparseflax.conv import ffi
from sparseflax.cost.cpu import LANES
from sparseflax.cost.machine import TYPICAL, Machine
from sparseflax.cost.shape import ConvShape

BATCH, CORES = 64, 24
FILES = {"ResNet-18": "rn18_unstr.txt", "ResNet-50": "rn50_unstr.txt"}
# Sizes of a core of the Xeon in the paper's cloud instance.
ENGINE = Machine(
    name="the engine of SPDY's timings", isa="avx512", lanes=16, cores=CORES, threads=CORES, l1_bytes=32 << 10,
    l2_bytes=1 << 20, l3_bytes=36 << 20, peak=1e12, bandwidth=1e11, alpha=3.0, beta=1.5, source="published timings",
    fitted=TYPICAL)


def run(folder: Path, out: Path) -> None:
    """Fits on ResNet-18, predicts ResNet-50, prints the errors and appends them to the results.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is not in SPDY's format, or no kernel whose counts could be used runs here.
    """
    if not ffi.kernels():
        raise ValueError(f"the counts are asked of the native kernel, which does not run here: {ffi.reason}")
    # The tiles of the AVX-512 kernel are the likeliest to be like theirs.
    engine = ENGINE if ENGINE.isa in ffi.kernels() else replace(ENGINE, isa=ffi.isa(), lanes=LANES[ffi.isa()])
    samples = {name: read(folder / file, shapes(name)) for name, file in FILES.items()}
    # What the engine gains from sparsity and what it loses by layers: the paper's alone, for comparison.
    forms = {f"counts of the {engine.isa} kernel": fit(samples["ResNet-18"], engine),
             "the paper's form": _roofline(samples["ResNet-18"])}
    origin, lines = provenance({"jax", "jaxlib"}), []
    for form, machine in forms.items():
        for name, some in samples.items():
            measured, predicted = np.array([s.seconds for s in some]), predict(some, machine)
            sparse = np.array([s.density is not None for s in some])
            kinds = {"sparse": sparse, "dense": ~sparse}
            lines.append({"form": form, "network": name} | {
                kind: vars(Errors.of(predicted[rows], measured[rows])) for kind, rows in kinds.items()})
            append(out / "spdy.jsonl", lines[-1] | origin)
    print(table(lines))


def table(lines: Sequence[Line]) -> str:
    """The newest errors of each form and network as Markdown."""
    newest = {(line["form"], line["network"]): line for line in lines}
    kinds, what = ("sparse", "dense"), {"median": "median error", "high": "90th percentile"}
    return markdown(("form", "network", *(f"{kind}: {text}" for kind in kinds for text in what.values())), [
        (form, network + (", fitted" if network == "ResNet-18" else ", predicted"),
         *(f"{line[kind][key]:.1%}" for kind in kinds for key in what))
        for (form, network), line in newest.items()], words=2)


def _roofline(samples: list[Sample]) -> Machine:
    """The machine of the paper that errs least on samples: peak, bandwidth, alpha by search, beta as it is."""
    dense = [s for s in samples if s.density is None]
    peak = max(s.shape.flops / s.seconds for s in dense)
    measured = np.array([s.seconds for s in samples])

    def error(machine: Machine) -> float:
        return float(np.abs(predict(samples, machine) / measured - 1).mean())

    grid = [replace(ENGINE, peak=peak * p, bandwidth=b, alpha=a, fitted=None)
            for p in (0.4, 0.6, 0.8, 1.0) for b in np.geomspace(1e10, 1e12, 9).tolist()
            for a in np.geomspace(0.5, 8, 9).tolist()]
    return min(grid, key=error)


def shapes(network: str) -> dict[str, ConvShape]:
    """The convolutions of a ResNet by torchvision's names, with the batch."""
    found = {"conv1": ConvShape(1, 224, 224, 3, 64, 7, 7, (2, 2), ((3, 3), (3, 3)))}
    deep = network == "ResNet-50"
    ic, image = 64, 56
    for stage, (width, blocks) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3) if deep else (2, 2, 2, 2), strict=True), 1):
        for block in range(blocks):
            step = 2 if stage > 1 and block == 0 else 1
            at, oc = f"layer{stage}.{block}.", 4 * width if deep else width
            if deep:
                found |= {at + "conv1": layer(ic, image, width, 1), at + "conv2": layer(width, image, width, 3, step),
                          at + "conv3": layer(width, image // step, oc, 1)}
            else:
                found |= {at + "conv1": layer(ic, image, width, 3, step), at + "conv2": layer(width, image // step, width, 3)}
            if ic != oc:
                found[at + "downsample.0"] = layer(ic, image, oc, 1, step)
            ic, image = oc, image // step
    found["fc"] = layer(ic, 1, 1000, 1)
    return {name: shape.with_batch(BATCH) for name, shape in found.items()}


def read(file: Path, shapes: dict[str, ConvShape]) -> list[Sample]:
    """Samples from a file of names and lines of seconds and sparsity; a sparsity of 0 is the dense layer.

    Raises:
      ValueError: a layer that is not known, a line that is neither, a time or a sparsity that cannot be, or no times at all.
    """
    samples, shape = [], None
    for at, line in enumerate(file.read_text().splitlines(), 1):
        words = line.split()
        if len(words) == 1 and words[0] in shapes:
            shape = shapes[words[0]]
            continue
        if len(words) == 1 and samples == [] and shape is None:
            continue  # the head: totals of the network
        try:
            seconds, sparsity = map(float, words)
        except ValueError:
            seconds, sparsity = math.nan, math.nan
        if shape is None or not (0 < seconds < math.inf and 0 <= sparsity < 1):
            raise ValueError(f"{file}, line {at}: {line!r} is neither a layer of the network nor seconds above 0 and a "
                             "sparsity in [0, 1)")
        samples.append(Sample(shape, 1 - sparsity if sparsity > 0 else None, seconds, 0.0))
    if not samples:
        raise ValueError(f"{file} holds no times: wanted names of layers, each followed by lines of seconds and sparsity")
    return samples
