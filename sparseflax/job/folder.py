"""The folder of a job: what it was asked, and what it has found, so that it goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sparseflax.calibration.calibrate import calibrate
from sparseflax.conv import ffi
from sparseflax.cost import profile
from sparseflax.cost.atomic import write_atomically
from sparseflax.cost.cpu import client_threads, instruction_set, processor
from sparseflax.cost.detect import detect_machine
from sparseflax.cost.machine import Machine, from_dict, to_dict
from sparseflax.job.afresh import afresh
from sparseflax.network.plan import elsewhere
from sparseflax.prune.whole import Whole

CONFIG, MACHINE, WHOLE, DAMAGE, AIMED = (f"{name}.json" for name in ("config", "machine", "whole", "damage", "aimed"))
ALIKE = "layers", "threads", "precision", "sparseflax"  # of the settings: what was measured is the same if these are


def claim(out: Path, settings: Mapping[str, Any]) -> None:
    """Makes a job's folder, or finds it made by the same settings.

    Args:
      out: the folder.
      settings: what decides the result, in plain values.

    Raises:
      ValueError: it holds another job.
    """
    path = out / CONFIG
    if not path.exists():
        write_json(path, dict(settings))
        return
    found, wanted = json.loads(path.read_text()), json.loads(json.dumps(settings))
    different = [f"{key} {found.get(key)!r} instead of {wanted.get(key)!r}"
                 for key in found | wanted if found.get(key) != wanted.get(key)]
    if different:
        raise ValueError(f"{out} holds a run with {', '.join(different)}: give another --out, or delete the folder")


def measured_by(like: Path, settings: Mapping[str, Any]) -> dict[str, bytes]:
    """{file: what it holds} of what was measured for a job of the same layers, for `keep`.

    Args:
      like: the folder of that job.
      settings: of this one.

    Raises:
      ValueError: that folder holds no job, or one for something else, or on another machine.
    """
    if not (like / CONFIG).exists():
        raise ValueError(f"{like} holds no job: wanted the folder of one for a network of the same layers")
    theirs = json.loads((like / CONFIG).read_text())
    different = [f"{key} {theirs.get(key)!r} instead of {settings[key]!r}" for key in ALIKE if theirs.get(key) != settings[key]]
    if different:
        raise ValueError(f"{like} holds a job with {', '.join(different)}: wanted one for a network of the same layers")
    if (like / MACHINE).exists() and (where := elsewhere(_machine(like))):
        raise ValueError(f"{like} was measured {where}: leave it out, and it is measured here")
    same = all(theirs.get(key) == settings[key] for key in ("speedup", "milliseconds"))
    return {name: (like / name).read_bytes() for name in (MACHINE, WHOLE, DAMAGE, *[AIMED] * same) if (like / name).exists()}


def keep(out: Path, measured: Mapping[str, bytes]) -> None:
    """Writes into a job's folder what was measured for another, where this one has not measured it."""
    for name, content in measured.items():
        if not (out / name).exists():
            write_atomically(out / name, content)


def machine_of(out: Path) -> Machine:
    """This machine, as measured when the job began: the guide has to stay the same when the job goes on.

    Where nothing is stored of it that may be believed, it is calibrated.
    """
    path = out / MACHINE
    if not path.exists():
        try:
            machine = profile.load(processor(), instruction_set(), client_threads())
        except profile.Unusable as error:
            if ffi.kernels():
                print(f"calibrating, which takes a minute: {error.why}", flush=True)
            machine = afresh(calibrate) if ffi.kernels() else detect_machine()
        write_json(path, to_dict(machine))
    return _machine(out)


def _machine(out: Path) -> Machine:
    return from_dict(json.loads((out / MACHINE).read_text()))


def whole_of(path: Path, measure: Callable[[], Whole]) -> Whole:
    """What the network takes, as measured when the file was made, likewise."""
    if not path.exists():
        write_json(path, measure()._asdict())
    found = Whole(**json.loads(path.read_text()))
    return found._replace(points=tuple((seconds, other) for seconds, other in found.points)).checked()


def write_json(path: Path, value: Any) -> None:
    """Writes plain values, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(value, indent=1))
