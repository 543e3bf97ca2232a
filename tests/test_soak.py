"""The soak: what it makes of what its processes found, and one of them for a second."""

import numpy as np
import pytest

from experiments import soak


def test_processes_are_put_together():
    one = {"seconds": {n: np.array([0.001, 0.002]) for n in soak.BATCHES}, "wrong": 1, "grown": 10, "resident": 100}
    line = soak.line_of("sparseflax", 3, 9.0, [one, one])
    assert (line["processes"], line["calls"], line["wrong"], line["grown"], line["resident"]) == (2, 16, 2, 20, 200)
    assert line["latency"]["1"]["p50"] == 0.0015
    assert "16 calls, 2 wrong" in soak.summary(line)
    line["latency"] = {"1": line["latency"]["1"]}
    line |= {"cpu": "C", "versions": {"jax": "1"}, "date": "2026-01-01", "commit": "abc"}
    assert soak.table([line]).splitlines()[2:] == [
        "| sparseflax | 16 | 2 | 0 | 0.0 | 1.5, 2 |  |  |  |", "",
        "C, 2 processes of 3 threads for 9 s each, jax 1. Measured 2026-01-01 at abc."]


def test_nothing_is_wrong_for_a_second(monkeypatch):
    pytest.importorskip("onnxruntime")

    class Barrier:
        def wait(self):
            pass

    class Pipe:
        def send(self, found):
            self.found = found

    monkeypatch.setattr(soak, "use_threads", lambda threads: None)  # of this process they are given
    pipe = Pipe()
    soak._work(pipe, Barrier(), "onnxruntime", soak._onnx_files(), 0, 3, 1.0)
    assert pipe.found["wrong"] == 0 and sum(map(len, pipe.found["seconds"].values())) > 0
