"""Kill -9 at random moments, for a nightly run:

    python -m tests.kills --times 100

The run `smoke` of experiments (training, pruning, packing, measuring) and a calibration are begun and killed, again and again.
After each kill every file has to be whole; a run that came through in pieces has to have made the same weights, masks and
curves, to the bit, as one that nobody killed. Ends with 1 at the first difference.
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
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sparseflax.cost.profile import save_machine
from tests.machines import HERE

KEPT = "machine.json", "whole.json"  # measured when a run begins, and never the same twice
SAME = "accuracy", "curves", "kept", "weights", "bytes", "settings"  # of result.json: what no clock decides
LOG = "log"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.kills", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100, help="kills, of which every fifth is a calibration's")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        runs = kill_runs(Path(folder), args.times - args.times // 5, draw)
        calibrations = kill_calibrations(Path(folder) / "cache", args.times // 5, draw)
    print(f"{args.times - args.times // 5} kills in {runs} runs, {calibrations} of calibrations: all files whole, all results "
          "the same")


def kill_runs(folder: Path, times: int, draw: random.Random) -> int:
    """Runs killed so often in all; returns how many came through."""
    command = [sys.executable, "-m", "experiments.run", "smoke", "--out"]
    (folder / "straight").mkdir()
    save_machine(folder / "straight" / "machine.json", HERE)  # or it would be calibrated
    begun = time.monotonic()
    survive([*command, str(folder / "straight")], folder, {})
    duration, done, left = time.monotonic() - begun, 0, times
    while left:
        out = folder / "killed"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        for name in KEPT:
            shutil.copy(folder / "straight" / name, out)
        while True:
            wait = draw.uniform(0, duration) if left else None
            finished = survive([*command, str(out)], folder, {}, wait)
            whole(out)
            if finished:
                break
            left -= 1
            print(f"killed after {wait:.1f} s, {left} left", flush=True)
        same(folder / "straight", out)
        done += 1
    return done


def kill_calibrations(cache: Path, times: int, draw: random.Random) -> int:
    """Calibrations killed so often; after each, what is stored can be read. Returns how many were killed in time."""
    code = "from sparseflax.calibration.calibrate import calibrate; calibrate(2.0)"
    killed, longest = 0, 20.0
    for _ in range(times):
        begun = time.monotonic()
        if survive([sys.executable, "-W", "ignore", "-c", code], cache.parent, {"XDG_CACHE_HOME": str(cache)},
                   draw.uniform(0, longest)):
            longest = time.monotonic() - begun
        else:
            killed += 1
        whole(cache)
    return killed


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


def same(one: Path, other: Path) -> None:
    """Raises where two runs' results differ in anything but times."""
    for name in ("dense.npz", "packed.npz"):
        with np.load(one / name) as a, np.load(other / name) as b:
            assert a.files == b.files, (name, a.files, b.files)
            for array in a.files:
                np.testing.assert_array_equal(a[array], b[array], f"{name}, {array}")
    a, b = (json.loads((folder / "result.json").read_text()) for folder in (one, other))
    different = [name for name in SAME if a[name] != b[name]]
    assert not different, f"{different} differ between {one} and {other}"


if __name__ == "__main__":
    main()
