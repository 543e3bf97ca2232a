"""Kill -9 at random moments, for a nightly run:

    python -m tests.kills --times 100

The run `smoke` of experiments (training, pruning, packing, measuring), `faster` for a small network, and a calibration are
begun and killed, again and again. After each kill every file has to be whole; a job that came through in pieces has to have
made the same weights, masks and curves, to the bit, as one that nobody killed. Ends with 1 at the first difference.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np

from sparseflax.cost.machine import TYPICAL
from sparseflax.cost.profile import save, save_machine
from sparseflax.files.safetensors import parse, unseal
from tests.machines import HERE

LOG = "log"


@dataclass(frozen=True)
class Job:
    """What is killed.

    Attributes:
      command: its words, behind which comes the folder that it works in.
      environment: of it.
      kept: files of a run that nobody killed, which one that will be killed begins with: measured, and never the same twice.
      same: raises where the folders of two runs differ in anything that no clock decides.
    """

    command: tuple[str, ...]
    environment: dict[str, str]
    kept: tuple[str, ...]
    same: Callable[[Path, Path], None]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100, help="of each job, as a calibration half as often")
    parser.add_argument("--only", nargs="+", choices=JOBS, default=JOBS, metavar="JOB", help=f"of {', '.join(JOBS)}")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            if (make := JOBS[name]) is None:
                kills = args.times // 2
                begun = kill_calibrations(Path(folder) / "cache", kills, draw)
                print(f"calibration: {kills} kills of {begun} begun: all files whole", flush=True)
                continue
            runs = kill_runs(make(Path(folder)), Path(folder), args.times, draw)
            print(f"{name}: {args.times} kills in {runs} runs: all files whole, all results the same", flush=True)


def experiment(folder: Path) -> Job:
    """The run `smoke`."""
    (folder / "straight").mkdir()
    save_machine(folder / "straight" / "machine.json", HERE)  # or it would be calibrated

    def same(one: Path, other: Path) -> None:
        for name in ("dense.npz", "packed.npz"):
            with np.load(one / name) as a, np.load(other / name) as b:
                assert a.files == b.files, (name, a.files, b.files)
                for array in a.files:
                    np.testing.assert_array_equal(a[array], b[array], f"{name}, {array}")
        alike(one, other, ("accuracy", "curves", "kept", "weights", "bytes", "settings"))

    command = (sys.executable, "-m", "experiments.run", "smoke", "--out")
    return Job(command, {}, ("machine.json", "whole.json", "aimed.json"), same)


def faster(folder: Path) -> Job:
    """`faster` for two convolutions."""
    from tests.test_faster import write_network, write_pictures

    network, pictures = write_network(folder / "network.onnx"), write_pictures(folder / "pictures")
    cache = {"XDG_CACHE_HOME": str(folder / "cache")}
    with patch.dict(os.environ, cache):
        save(replace(HERE, fitted=TYPICAL), {})  # or it would be calibrated

    def same(one: Path, other: Path) -> None:
        files = sorted(path.relative_to(one) for path in one.rglob("*") if path.suffix in (".safetensors", ".onnx"))
        assert len(files) > 2, files
        for file in files:
            assert (one / file).read_bytes() == (other / file).read_bytes(), f"{file} differs between {one} and {other}"
        alike(one, other, ("fidelity", "kept", "weights"))

    command = (sys.executable, "-m", "sparseflax", "faster", str(network), "--images", str(pictures), "--speedup", "1.5",
               "--seconds", "0.2", "--out")
    return Job(command, cache, ("config.json", "machine.json", "whole.json", "aimed.json"), same)


def kill_runs(job: Job, folder: Path, times: int, draw: random.Random) -> int:
    """Runs killed so often in all; returns how many came through."""
    straight, out = folder / "straight", folder / "killed"
    begun = time.monotonic()
    survive([*job.command, str(straight)], folder, job.environment)
    duration, done, left = time.monotonic() - begun, 0, times
    while left:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for name in job.kept:
            shutil.copy(straight / name, out)
        while True:
            wait = draw.uniform(0, duration) if left else None
            finished = survive([*job.command, str(out)], folder, job.environment, wait)
            whole(out)
            if finished:
                break
            left -= 1
            print(f"killed after {wait:.1f} s, {left} left", flush=True)
        job.same(straight, out)
        done += 1
    return done


def kill_calibrations(cache: Path, times: int, draw: random.Random) -> int:
    """Calibrations killed so often; after each, what is stored can be read. Returns how many were begun."""
    code = "from sparseflax.calibration.calibrate import calibrate; calibrate(2.0)"
    command, environment = [sys.executable, "-W", "ignore", "-c", code], {"XDG_CACHE_HOME": str(cache)}
    killed, begun, wait, duration = 0, 0, None, 0.0
    while killed < times:
        start = time.monotonic()
        if survive(command, cache.parent, environment, wait):
            duration = time.monotonic() - start  # the first one's, or a later one's that was faster than it was to be killed
        else:
            killed += 1
        begun += 1
        whole(cache)
        assert list(cache.rglob("*.json")), f"what was stored in {cache} is gone"
        wait = duration * draw.uniform(0.9 if begun % 2 else 0.0, 1.05)  # every second one about when it stores
    return begun


def survive(command: Sequence[str], folder: Path, environment: dict[str, str], seconds: float | None = None) -> bool:
    """Runs a command and kills it after so many seconds; whether it had finished before.

    Raises:
      RuntimeError: it failed by itself.
    """
    with (folder / LOG).open("w") as log:
        child = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment)
        try:
            child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
            return False
    if child.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}:\n{(folder / LOG).read_text()[-3000:]}")
    return True


def whole(folder: Path) -> None:
    """Raises where a file of a name that is read is not whole; temporary ones have other names."""
    for file in folder.rglob("*.json"):
        if file.name.startswith(("_", ".")) or any("orbax-checkpoint-tmp" in part for part in file.parts):
            continue  # orbax's own, complete once our note with their digests is there
        json.loads(file.read_text())
    for file in folder.rglob("*.npz"):
        with np.load(file) as arrays:
            for name in arrays.files:
                arrays[name]
    for file in folder.rglob("*.safetensors"):
        data = file.read_bytes()
        unseal(parse(data)[1]["format"].removeprefix("sparseflax "), data)


def alike(one: Path, other: Path, names: Sequence[str]) -> None:
    """Raises where entries of two results differ."""
    a, b = (json.loads((folder / "result.json").read_text()) for folder in (one, other))
    different = [name for name in names if a[name] != b[name]]
    assert not different, f"{different} differ between {one} and {other}"


JOBS: dict[str, Callable[[Path], Job] | None] = {"experiment": experiment, "faster": faster, "calibration": None}


if __name__ == "__main__":
    main()
