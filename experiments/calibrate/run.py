"""The calibration: measure, fit, say how well, and store it if it is good enough."""

from __future__ import annotations

import datetime
import statistics
from dataclasses import replace

from experiments.calibrate.fit import Errors, errors, fit
from experiments.calibrate.layers import fitting
from experiments.calibrate.measure import Sample, measure
from sparseflax.cost import profile
from sparseflax.cost.cpu import client_threads
from sparseflax.cost.detect import estimate_machine
from sparseflax.cost.machine import TYPICAL, Machine

# Beyond them the machine was too busy, or is one that the model does not describe: relative errors of the fit, and how much
# the times of one program differ. On a quiet machine about half of each or less.
MEDIAN, HIGH, SPREAD = 0.15, 0.4, 0.15


def calibrate(seconds: float, isa: str | None = None) -> Machine:
    """Fits and stores a profile of this machine, for the threads of this process.

    Raises:
      ValueError: the native kernel does not run here, or the fit is not good enough to store.
    """
    start = describe(isa)
    samples = measure(fitting(), seconds, isa=isa)
    machine = fit(samples, start)
    show(machine, samples)
    found = judge(samples, machine)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    source = f"calibrated {date}, median error {found['sparse'].median:.0%} sparse, {found['dense'].median:.0%} dense"
    machine = replace(machine, source=source)
    file = profile.save(machine, {kind: vars(error) for kind, error in found.items()})
    print(f"stored {file}")
    return machine


def describe(isa: str | None = None) -> Machine:
    """This machine with the built-in rates to start from.

    Raises:
      ValueError: the native kernel does not run here.
    """
    from sparseflax.conv import ffi

    if not ffi.kernels():
        raise ValueError(f"there is no kernel to calibrate: {ffi.reason}")
    machine = estimate_machine(client_threads(), 1.0, isa or ffi.isa(), "to be calibrated")
    return replace(machine, fitted=TYPICAL)


def judge(samples: list[Sample], machine: Machine) -> dict[str, Errors]:
    """Errors of the fit by kind, or why it must not be stored.

    Raises:
      ValueError: a median error, a 90th percentile or a median spread above its bound.
    """
    found, wrong = {}, []
    for kind in ("sparse", "dense"):
        some = [s for s in samples if (s.density is None) == (kind == "dense")]
        found[kind] = errors(some, machine)
        spread = statistics.median(s.spread for s in some)
        wrong += [f"{what} ({kind}) is {value:.0%}, above {bound:.0%}" for what, value, bound in (
            ("the fit's median error", found[kind].median, MEDIAN), ("its 90th percentile", found[kind].high, HIGH),
            ("the spread of one program's times (distance of the quartiles / median)", spread, SPREAD)) if value > bound]
    if wrong:
        raise ValueError(f"not stored: {'; '.join(wrong)}. Calibrate again when nothing else runs on the machine")
    return found


def show(machine: Machine, samples: list[Sample]) -> None:
    """Prints the rates and their errors."""
    assert machine.fitted is not None
    print(machine)
    for kind, rates in (("sparse", machine.fitted.sparse), ("dense", machine.fitted.dense)):
        print(f"{kind}, nanoseconds: " + ", ".join(f"{name} {1e9 * rate:.3g}" for name, rate in rates._asdict().items()))
        some = [s for s in samples if (s.density is None) == (kind == "dense")]
        if some:
            print(f"  {errors(some, machine)}, spread of the times {statistics.median(s.spread for s in some):.0%}")
