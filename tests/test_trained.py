"""What the table of a trained network in eight bits says, on a line done by hand."""

from experiments.benchmark import trained
from experiments.benchmark.int8 import INT8
from experiments.benchmark.table import OURS


def test_points_lost():
    line = {"layer": "digits", "n": 16, "threads": 2, "seeds": [0, 1], "pictures": 200, "density": 0.1, "cpu": "some CPU",
            "isa": "avx2", "versions": {"jax": "0.1"}, "date": "2026-01-02T03", "commit": "abc",
            "off": {"one": 0.01, "two": 0.025},
            "right": {trained.DENSE: [0.98, 0.96], OURS: [0.97, 0.96], INT8: [0.97, 0.94]},
            "times": {trained.DENSE: {"seconds": 0.01}, OURS: {"seconds": 0.002}, INT8: {"seconds": 0.001}}}
    assert trained.rows(line) == [
        ("digits", "16", "2", trained.DENSE, "97.00", "", "", "10"),
        ("digits", "16", "2", OURS, "96.50", "0.50 (worst 1.00)", "", "2"),
        ("digits", "16", "2", INT8, "95.50", "1.50 (worst 2.00)", "1.00 (worst 2.00)", "1")]
    text = trained.table([line])
    assert "2 layers in eight bits, each off by 1.0% (one) to 2.5% (two)" in text and "Measured 2026-01-02 at abc" in text
