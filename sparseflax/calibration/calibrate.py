"""The calibration: layers timed on this machine, constants fitted to their times, and stored for `detect_machine`."""

from __future__ import annotations

import datetime
import statistics
import warnings
from dataclasses import replace

from sparseflax.calibration.fit import Errors, by_kind, errors, fit
from sparseflax.calibration.layers import fitting
from sparseflax.calibration.samples import Sample, measure
from sparseflax.conv import ffi
from sparseflax.cost import cpu, detect, profile
from sparseflax.cost.estimate import estimate_machine
from sparseflax.cost.machine import TYPICAL, Machine

# Beyond them the machine was too busy, or is one that the model does not describe: relative errors of the fit, and how much
# the times of one program differ. On a quiet machine about half of each or less.
MEDIAN, HIGH, SPREAD = 0.15, 0.4, 0.15


def calibrate(seconds: float = 50.0, isa: str | None = None) -> Machine:
    """Measures this machine for the threads of this process, and stores what `detect_machine` finds from then on.

    Stored in the user's cache directory, by CPU, instruction set and number of threads (NPROC in the environment, set before
    Python starts, is that number). Let nothing else run meanwhile: where the times or the fit show that something did, the
    result is kept all the same, and its `source` and a RuntimeWarning say how far it may be off.

    Args:
      seconds: for making and timing some 400 programs.
      isa: instruction set of the sparse kernel; None takes the one that runs.

    Raises:
      ValueError: the native kernel does not run here, or not for `isa`.
    """
    start = describe(isa)
    # None: as it will run, among all tables that the machine has. The kernel in eight bits runs beside that one alone.
    samples = measure(fitting(), seconds, isa=isa, int8=start.isa == ffi.isa() and bool(ffi.kernels("int8")))
    machine = fit(samples, start)
    found = judge(samples, machine)
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    source = f"calibrated {date}, median error {', '.join(f'{error.median:.0%} {kind}' for kind, error in found.items())}"
    if wrong := doubts(samples, found):
        source += f"; in doubt, as {' and '.join(wrong)}: calibrate again when nothing else runs"
        warnings.warn(f"the machine was busy, or the model does not describe it: {' and '.join(wrong)}. Stored all the same; "
                      "calibrate again when nothing else runs", RuntimeWarning, stacklevel=2)
    machine = replace(machine, source=source)
    try:
        profile.save(machine, {kind: vars(error) for kind, error in found.items()})
    except OSError as error:
        warnings.warn(f"the calibration could not be stored ({error}): it holds for whoever takes what is returned. Set "
                      "XDG_CACHE_HOME to a folder that can be written", RuntimeWarning, stacklevel=2)
    detect.forget()
    return machine


def describe(isa: str | None = None) -> Machine:
    """This machine with the built-in rates to start from.

    Raises:
      ValueError: the native kernel does not run here, or not for `isa`.
    """
    if not ffi.kernels():
        raise ValueError(f"there is no kernel to calibrate: {ffi.reason}")
    if isa not in (None, *ffi.kernels()):
        raise ValueError(f"isa={isa!r} does not run here, wanted one of {ffi.kernels()}")
    machine = estimate_machine(cpu.client_threads(), 1.0, isa or ffi.isa(), "to be calibrated")
    return replace(machine, fitted=TYPICAL, l3_bytes=cpu.caches()[2])  # how much of it is ours, the fit tells


def judge(samples: list[Sample], machine: Machine) -> dict[str, Errors]:
    """Errors of the fit by kind."""
    return {kind: errors(some, machine) for kind, some in by_kind(samples).items() if some}


def doubts(samples: list[Sample], found: dict[str, Errors]) -> list[str]:
    """Why a calibration may be off: a median error, a 90th percentile or a median spread above its bound."""
    wrong = []
    for kind in found:
        spread = statistics.median(s.spread for s in by_kind(samples)[kind])
        wrong += [f"{what} ({kind}) is {value:.0%}, above {bound:.0%}" for what, value, bound in (
            ("the fit's median error", found[kind].median, MEDIAN), ("its 90th percentile", found[kind].high, HIGH),
            ("the spread of one program's times", spread, SPREAD)) if value > bound]
    return wrong
