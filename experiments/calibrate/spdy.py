"""The model's form on an engine and a machine that are not ours: times published with SPDY (Frantar and Alistarh, 2022).

Its files hold a time against sparsity for every convolution of ResNet-18 and ResNet-50. The constants are fitted on the first
and used for the second. Engine, machine and batch are not in the files: 64 images on 24 cores is what the paper says.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from experiments.calibrate.fit import Errors, fit, predict
from experiments.calibrate.measure import Sample
from experiments.layers import layer
from sparseflax import ffi
from sparseflax.machine import TYPICAL, Machine
from sparseflax.shapes import ConvShape

BATCH, CORES = 64, 24
FILES = {"ResNet-18": "rn18_unstr.txt", "ResNet-50": "rn50_unstr.txt"}
# Sizes of a core of the Xeon in the paper's cloud instance.
ENGINE = Machine(
    name="the engine of SPDY's timings", isa="avx512", lanes=16, cores=CORES, threads=CORES, l1_bytes=32 << 10,
    l2_bytes=1 << 20, l3_bytes=36 << 20, peak=1e12, bandwidth=1e11, alpha=3.0, beta=1.5, source="published timings",
    fitted=TYPICAL)


def run(folder: Path, out: Path) -> None:
    """Fits on ResNet-18, predicts ResNet-50, prints the errors.

    Raises:
      FileNotFoundError: a file is missing.
      ValueError: a file is not in SPDY's format, or the AVX-512 kernel, whose counts are used, does not run here.
    """
    if ENGINE.isa not in ffi.kernels():
        raise ValueError(f"the counts are those of the {ENGINE.isa} kernel, which does not run here, only {ffi.kernels()}")
    samples = {name: read(folder / file, shapes(name)) for name, file in FILES.items()}
    machine = fit(samples["ResNet-18"], ENGINE)
    assert machine.fitted is not None
    # What the engine gains from sparsity and what it loses by layers: the paper's alone, for comparison.
    for title, found in (("counts of a tiled kernel", machine),
                         ("the paper's form", _roofline(samples["ResNet-18"]))):
        for name, some in samples.items():
            measured = np.array([s.seconds for s in some])
            predicted = predict(some, found)
            sparse = np.array([s.density is not None for s in some])
            print(f"{title}, {name}: sparse {Errors.of(predicted[sparse], measured[sparse])}; "
                  f"dense {Errors.of(predicted[~sparse], measured[~sparse])}")


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
      ValueError: a layer that is not known, or a line that is neither.
    """
    samples, shape = [], None
    for at, line in enumerate(file.read_text().splitlines(), 1):
        words = line.split()
        if len(words) == 1 and words[0] in shapes:
            shape = shapes[words[0]]
        elif len(words) == 1 and samples == [] and shape is None:
            continue  # the head: totals of the network
        elif len(words) == 2 and shape is not None:
            seconds, sparsity = map(float, words)
            samples.append(Sample(shape, 1 - sparsity if sparsity > 0 else None, seconds, 0.0))
        else:
            raise ValueError(f"{file}, line {at}: {line!r} is neither a layer of the network nor seconds and sparsity")
    return samples
