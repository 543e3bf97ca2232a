"""The constants: seconds per count, none negative, for which the cost model errs least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import lsq_linear

from sparseflax.calibration.samples import Sample
from sparseflax.cost.counts import dense_counts, tile_counts
from sparseflax.cost.int8 import of_words, work_in
from sparseflax.cost.machine import TYPICAL, Machine
from sparseflax.cost.model import conv_seconds, dense_seconds
from sparseflax.cost.rates import DenseCounts, SparseCounts

PER_WEIGHT = ("fma", "weight", "wait", "spill", "kernel_bytes")
FLOOR = 0.02  # errors below this weigh as this one
STEPS = 10  # of reweighting
MOST = 30.0  # times a typical rate
CACHES = tuple(1 << power for power in range(22, 30))  # 4 to 512 MB


@dataclass(frozen=True)
class Errors:
    """Relative errors of predictions, (predicted - measured) / measured.

    Attributes:
      median, high: of their absolute values: median and 90th percentile.
      bias: median, with its sign.
      count: of predictions.
    """

    median: float
    high: float
    bias: float
    count: int

    @classmethod
    def of(cls, predicted: np.ndarray, measured: np.ndarray) -> Errors:
        error = predicted / measured - 1
        median, high = np.quantile(abs(error), (0.5, 0.9)).tolist()
        return cls(median, high, float(np.median(error)), len(error))

    def __str__(self) -> str:
        return f"median {self.median:.1%}, 90th percentile {self.high:.1%}, bias {self.bias:+.1%} ({self.count} times)"


def fit(samples: Sequence[Sample], machine: Machine) -> Machine:
    """The machine with rates fitted to samples: the sum of absolute relative errors is minimal, no rate negative.

    The last cache is shared with cores, and on a virtual machine with guests, that nobody here can see: what it holds of a
    convolution is fitted too, as a power of two. Counts take a quarter of `l3_bytes` for that: four times as
    many are all of it.

    Args:
      samples: sparse ones, and of the other kinds some or none: then the rates of these stay as they are.
      machine: with rates whose overlap is 1, so that the model is linear in them.
    """
    assert machine.fitted is not None and machine.fitted.overlap == 1
    sizes = [size for size in CACHES if size // 4 <= machine.l3_bytes] or [machine.l3_bytes]
    fitted = [_with_rates(samples, replace(machine, l3_bytes=size)) for size in sizes]
    return min(fitted, key=lambda each: np.abs(predict(samples, each) / [s.seconds for s in samples] - 1).mean())


def _with_rates(samples: Sequence[Sample], machine: Machine) -> Machine:
    assert machine.fitted is not None
    rates, kinds = machine.fitted, by_kind(samples)
    for kind in ("sparse", "int8"):
        if some := kinds[kind]:
            rows = np.array([tile_counts(of_words(s.shape) if s.int8 else s.shape, s.density or 1.0, machine) for s in some])
            scale = np.array([[s.density if name in PER_WEIGHT else 1.0 for name in SparseCounts._fields] for s in some])
            rates = replace(rates, **{kind: SparseCounts(*_least(rows * scale, some, TYPICAL.sparse))})
    if dense := kinds["dense"]:
        rows = np.array([dense_counts(s.shape, machine) for s in dense])
        rates = replace(rates, dense=DenseCounts(*_least(rows, dense, TYPICAL.dense)))
    return replace(machine, fitted=rates)


def by_kind(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    """Samples of sparse and dense convolutions, and of those in eight bits."""
    return {kind: [s for s in samples if s.kind == kind] for kind in ("sparse", "dense", "int8")}


def errors(samples: Sequence[Sample], machine: Machine) -> Errors:
    return Errors.of(predict(samples, machine), np.array([s.seconds for s in samples]))


def predict(samples: Sequence[Sample], machine: Machine) -> np.ndarray:
    """Seconds (samples,) that the cost model gives."""
    seconds = np.empty(len(samples))
    for kind in by_kind(samples):
        if chosen := [i for i, s in enumerate(samples) if s.kind == kind]:
            work, its = work_in("int8" if kind == "int8" else "float32", [samples[i].shape for i in chosen], machine)
            density = np.array([samples[i].density or 1.0 for i in chosen], np.float32)
            seconds[chosen] = dense_seconds(work, its) if kind == "dense" else conv_seconds(work, density, its)
    return seconds


def _least(rows: np.ndarray, samples: Sequence[Sample], typical: Sequence[float]) -> list[float]:
    """Rates in [0, MOST * typical] that minimise the sum of |rows @ rates / seconds - 1|, by reweighted least squares.

    The upper bound keeps a count that is small in every sample from explaining their noise, and from then being believed
    where it is large.
    """
    relative = rows / np.array([s.seconds for s in samples])[:, None]
    most = MOST * np.array(typical)
    relative, weight = relative * most, np.ones(len(samples))
    share = np.zeros(len(most))
    for _ in range(STEPS):
        share = lsq_linear(relative * weight[:, None], weight, (0, 1)).x
        weight = 1 / np.sqrt(np.maximum(abs(relative @ share - 1), FLOOR))
    return (share * most).tolist()
