"""The fuzzing command on a few cases of each kind; `python -m tests.fuzz` runs them by the hour."""

import json

import numpy as np
import pytest

from tests.fuzz import __main__ as command
from tests.fuzz.cases import CASES


@pytest.mark.parametrize("target, cases", [("packed", 30), ("program", 150), ("onnx", 150)])
def test_refused_or_harmless(target, cases):
    if target == "onnx":
        pytest.importorskip("onnx")
    outcomes = {CASES[target](np.random.default_rng((0, number))) for number in range(cases)}
    assert any(outcome.startswith("refused: ValueError") for outcome in outcomes) and outcomes & {"runs", "read"}


def test_a_case_that_fails_is_told_with_its_number(monkeypatch):
    """And the cases after it are run."""
    worker = ("import json, os, sys\nseed, first, seconds, cases = sys.argv[1:]\n"
              "for n in range(int(first), int(first) + int(cases)):\n"
              "    print(f'at {n}', file=sys.stderr, flush=True)\n    if n == 3: os.abort()\n"
              "print(json.dumps({'outcome': 'runs', 'count': int(cases)}))")
    monkeypatch.setattr(command, "WORKER", f"import sys; sys.argv.pop(1)\n{worker}")
    outcomes, failures = command.fuzz("packed", 0, 0, 60, 8)
    assert outcomes == {"crashed": 1, "runs": 4} and failures[0].startswith("case 3: ended with -6")


def test_what_a_worker_says(monkeypatch, capsys):
    """A kind of failure once, and counts every now and then: what comes after may have to be killed."""
    numbers = iter(range(8))
    monkeypatch.setitem(CASES, "packed", lambda draw: "runs" if next(numbers) % 4 else 1 / 0)
    monkeypatch.setattr(command, "TOLD", 3)
    command.work("packed", "0", "0", "60", "8")
    failed, *told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert failed["failed"] == 0 and "ZeroDivisionError" in failed["text"]
    found = [(line["outcome"].split(" at ")[0], line["count"]) for line in told]
    bad = "FAILED ZeroDivisionError"
    assert found == [(bad, 1), ("runs", 2), ("runs", 2), (bad, 1), ("runs", 2)]
