"""Fuzzing, for a nightly run:

    python -m tests.fuzz                            # an hour, shared by all
    python -m tests.fuzz --minutes 5 --only packed onnx
    python -m tests.fuzz --only packed --first 1234 --cases 1   # a failure again

Each case is a function of the seed and its number, and runs in a process of its own kind: Python for packed files, exported
programs and ONNX files, and C++ under AddressSanitizer and UndefinedBehaviorSanitizer for what reaches the native side through
the FFI: convolutions ("border") and network programs ("steps"). A case fails if it ends its process, hangs, or raises what is
not documented. Ends with 1 if any did.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HANGS = 120.0  # seconds that one case may take
WORKER = "import sys; from tests.fuzz.__main__ import work; work(*sys.argv[1:])"
# An image's memory may be refused; a list that a program makes longer than this ends the process.
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "ASAN_OPTIONS": "allocator_may_return_null=1:max_allocation_size_mb=512"}
NATIVE = {"border": "handler_fuzz.cc", "steps": "program_fuzz.cc"}  # of tests/cpp
TARGETS = ("packed", "program", "onnx", *NATIVE)
TOLD = 1000  # cases after which a worker says what came of them: what it did not say is lost if it has to be killed
SHOWN = 30  # kinds of outcome, the commonest


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="for all together (default: %(default)g)")
    parser.add_argument("--only", nargs="+", choices=TARGETS, default=TARGETS, metavar="TARGET",
                        help=f"of {', '.join(TARGETS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--cases", type=int, default=sys.maxsize, help="of each target, at most")
    args = parser.parse_args()
    failed = False
    for target in args.only:
        outcomes, failures = fuzz(target, args.seed, args.first, 60 * args.minutes / len(args.only), args.cases)
        print(f"\n{target}: {outcomes.total()} cases, {len(failures)} kinds of failure")
        commonest = outcomes.most_common()
        for outcome, count in commonest[:SHOWN]:
            print(f"{count:>9}  {outcome}")
        if rest := commonest[SHOWN:]:
            print(f"{sum(count for _, count in rest):>9}  of {len(rest)} other kinds")
        for text in failures:
            print(f"FAILED {text}")
        failed |= bool(failures)
    sys.exit(failed)


def fuzz(target: str, seed: int, first: int, seconds: float, cases: int) -> tuple[collections.Counter[str], list[str]]:
    """Cases of a target for a while; ({outcome: count}, one text for each kind of failure)."""
    outcomes, failures, last = collections.Counter[str](), list[str](), first + cases
    with tempfile.TemporaryDirectory() as folder:
        program = native(target, Path(folder)) if target in NATIVE else [sys.executable, "-c", WORKER, target]
        end = time.monotonic() + seconds  # compiling apart, which alone may take longer
        while first < last and (left := end - time.monotonic()) > 0:
            with open(Path(folder, "log"), "w+") as log, open(Path(folder, "out"), "w+") as out:
                child = subprocess.Popen([*program, str(seed), str(first), str(left), str(last - first)], stdout=out,
                                         stderr=log, env=os.environ | ENVIRONMENT)
                hung = _wait(child, log.name)
                text = Path(log.name).read_text(errors="replace")
                at = max((int(line.split()[1]) for line in text.splitlines() if line.startswith("at ")), default=first)
                for line in Path(out.name).read_text().splitlines():
                    found = json.loads(line)
                    if "failed" in found:
                        failures.append(f"case {found['failed']}: {found['text']}")
                    else:
                        outcomes[found["outcome"]] += found["count"]
            if child.returncode == 0:
                break
            what = f"hung for {HANGS:g} s" if hung else f"ended with {child.returncode}"
            rest = "\n".join(line for line in text.splitlines() if not line.startswith("at "))
            failures.append(f"case {at}: {what}\n{rest[-2000:]}")
            outcomes["crashed"] += 1
            first = at + 1
    return outcomes, failures


def _wait(child: subprocess.Popen, log: str) -> bool:
    """Waits for a worker; True if it had to be killed, since it has said nothing for too long."""
    said, since = -1, time.monotonic()
    while True:
        try:
            child.wait(timeout=1.0)
            return False
        except subprocess.TimeoutExpired:
            if (size := os.stat(log).st_size) != said:
                said, since = size, time.monotonic()
            elif time.monotonic() - since > HANGS:
                child.kill()
                child.wait()
                return True


def native(target: str, folder: Path) -> list[str]:
    """A C++ program, built as `tests/test_cpp.py` builds its tests."""
    from tests import test_cpp

    name = "address,undefined"
    parts = test_cpp.parts(name, test_cpp.TEST.with_name(NATIVE[target]))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda part: test_cpp.compiled(*test_cpp.BUILDS[part[1]][:2], part[0], folder), parts.items()))
    compiler, flags, _ = test_cpp.BUILDS[name]
    test_cpp.run(compiler, *flags, "-pthread", *objects, "-o", folder / "fuzz")
    return [str(folder / "fuzz")]


def work(target: str, seed: str, first: str, seconds: str, cases: str) -> None:
    """A worker: says "at N" before each case; what fails, once for each kind; and how many cases had which outcome."""
    import numpy as np

    from tests.fuzz.cases import CASES

    outcomes, failed, end = collections.Counter[str](), set[str](), time.monotonic() + float(seconds)
    for number in range(int(first), int(first) + int(cases)):
        if time.monotonic() > end:
            break
        print(f"at {number}", file=sys.stderr, flush=True)
        try:
            outcome = CASES[target](np.random.default_rng((int(seed), number)))
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            outcome = f"FAILED {type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
            if outcome not in failed:
                print(json.dumps({"failed": number, "text": traceback.format_exc()[-3000:]}), flush=True)
            failed.add(outcome)
        outcomes[outcome] += 1
        if outcomes.total() == TOLD:
            _tell(outcomes)
    _tell(outcomes)


def _tell(outcomes: collections.Counter[str]) -> None:
    for outcome, count in outcomes.items():
        print(json.dumps({"outcome": outcome, "count": count}), flush=True)
    outcomes.clear()


if __name__ == "__main__":
    main()
