"""How far constants carry: fitted with the kernel of one instruction set, used for another's after changing its facts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from experiments.benchmark.results import Line, append, provenance
from experiments.benchmark.table import markdown
from sparseflax.calibration.calibrate import describe
from sparseflax.calibration.fit import errors, fit
from sparseflax.calibration.layers import fitting
from sparseflax.calibration.samples import measure
from sparseflax.conv import ffi


def run(seconds: float, out: Path) -> None:
    """Fits on AVX2 and on AVX-512 and predicts both with both; only the counts, which the kernel gives, change.

    Raises:
      ValueError: one of them does not run here.
    """
    isas = ("avx2", "avx512")
    if missing := [isa for isa in isas if isa not in ffi.kernels()]:
        raise ValueError(f"the kernels {missing} do not run here, only {ffi.kernels()}: nothing to transfer")
    measured = {isa: measure(fitting(), seconds / 2, isa=isa, dense=False) for isa in isas}
    start = describe()
    machines = {isa: fit(samples, replace(start, isa=isa)) for isa, samples in measured.items()}
    print("fitted on -> used for: error")
    for fitted, machine in machines.items():
        for used, samples in measured.items():
            found = errors(samples, replace(machine, isa=used))
            print(f"{fitted} -> {used}: {found}")
            append(out / "transfer.jsonl", {"fitted": fitted, "used": used, "threads": machine.threads} | vars(found)
                   | provenance({"jax", "jaxlib"}))
    for isa, machine in machines.items():
        assert machine.fitted is not None
        print(isa, json.dumps({name: float(f"{rate:.3g}") for name, rate in machine.fitted.sparse._asdict().items()}))


def table(lines: Sequence[Line]) -> str:
    """The newest errors of each pair as Markdown."""
    newest = {(line["fitted"], line["used"]): line for line in lines}
    last, threads = lines[-1], lines[-1]["threads"]
    return "\n".join([markdown(("fitted on", "used for", "median error", "90th percentile", "bias"), [
        (fitted, used, f"{line['median']:.1%}", f"{line['high']:.1%}", f"{line['bias']:+.1%}")
        for (fitted, used), line in newest.items()], words=2), "",
        f"{last['cpu']}, {threads} thread{'s' * (threads > 1)}. Measured {last['date'][:10]} at {last['commit']}."])
