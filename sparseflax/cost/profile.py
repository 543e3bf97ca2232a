"""What was measured of a machine, in files: where a calibration stays, when it is believed, and how it is taken elsewhere."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sparseflax.conv import ffi
from sparseflax.cost import cpu
from sparseflax.cost.atomic import write_atomically
from sparseflax.cost.machine import Machine, from_dict, to_dict

REMEDY = "run python -m sparseflax calibrate, which takes a minute"


class Unusable(ValueError):
    """There is no calibration of this machine that may be believed; says why, and what to do."""

    def __init__(self, why: str):
        super().__init__(f"{why}: {REMEDY}")
        self.why = why


def folder() -> Path:
    """The user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "sparseflax")


def path(name: str, isa: str, threads: int) -> Path:
    """Of the calibration of one CPU, instruction set and number of threads."""
    return folder() / f"{re.sub('[^a-z0-9]+', '-', name.lower())}-{isa}-{threads}.json"


def key(name: str, isa: str, threads: int) -> dict[str, Any]:
    """What a calibration depends on: another CPU, cache, kernel, number of threads or version makes it stale."""
    return {"cpu": name, **cpu.identity(), "isa": isa, "threads": threads, "kernels": ffi.kernels(),
            "native module": _digest(), "jaxlib": version("jaxlib"), "sparseflax": _version()}


def save(machine: Machine, errors: dict[str, Any]) -> Path:
    """Stores a calibrated machine, all of it or nothing.

    Args:
      machine: with fitted rates.
      errors: of the fit, for people to read.

    Returns:
      The file, in the user's cache directory.
    """
    file = path(machine.name, machine.isa, machine.threads)
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"key": key(machine.name, machine.isa, machine.threads), "errors": errors, "machine": to_dict(machine)}
    write_atomically(file, json.dumps(content, indent=1))
    return file


def load(name: str, isa: str, threads: int) -> Machine:
    """The calibrated machine.

    Raises:
      Unusable: there is none, the file is damaged, or it is of another CPU, kernel, number of threads or version.
    """
    file = path(name, isa, threads)
    try:
        content = json.loads(file.read_text())
    except FileNotFoundError:
        raise Unusable(f"this machine was not calibrated for {threads} threads") from None
    except (OSError, ValueError, RecursionError) as error:
        raise Unusable(f"ignored {file}, it cannot be read ({error})") from None
    try:
        wanted = key(name, isa, threads)
        other = {part: (content["key"].get(part), value) for part, value in wanted.items() if content["key"].get(part) != value}
        if not other:
            machine = from_dict(content["machine"])
            if (machine.name, machine.isa, machine.threads) != (name, isa, threads):
                raise ValueError(f"its machine is {machine.name}, {machine.isa}, {machine.threads} threads, its key another")
            if machine.fitted is None:
                raise ValueError("its machine has no fitted rates")
            return machine
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Unusable(f"ignored {file}, it is no calibration ({type(error).__name__}: {error})") from None
    changes = "; ".join(f"{part} was {was}, is {now}" for part, (was, now) in other.items())
    raise Unusable(f"ignored {file}, it is of another machine or version ({changes})")


def save_machine(path: str | os.PathLike[str], machine: Machine) -> None:
    """Writes a machine, e.g. what `detect_machine()` found where a network will run, for `load_machine` elsewhere.

    Args:
      path: the file, JSON, which is replaced, whole or not at all.
      machine: any.
    """
    write_atomically(path, json.dumps(to_dict(machine), indent=1))


def load_machine(path: str | os.PathLike[str]) -> Machine:
    """The machine of a file that `save_machine` or `python -m sparseflax machine` wrote, there or here.

    It need not be one that this build knows: layers whose kernel it cannot count are planned dense, with the reason.

    Args:
      path: the file; one that a calibration stored is taken too.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged, or holds no machine as this version describes one.
    """
    remedy = "write it again where the network will run, by python -m sparseflax machine FILE of this version"
    try:
        content = json.loads(Path(path).read_text())
        return from_dict(content.get("machine", content))
    except FileNotFoundError:
        raise
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no machine ({type(error).__name__}: {error}): {remedy}") from error


@functools.lru_cache
def _digest() -> str:
    """Of the native module: another build may choose and run its tiles differently."""
    file = getattr(ffi.native, "__file__", None)
    return hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest() if file else "missing"


def _version() -> str:
    try:
        return version("sparseflax")
    except PackageNotFoundError:
        return "unknown"
