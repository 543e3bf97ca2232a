"""What the predictions are worth: errors by kind, of whole networks, and the time lost to choices made by them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.benchmark.results import Line
from experiments.benchmark.table import markdown
from experiments.calibrate.layers import googlenet, resnet50
from sparseflax.calibration.fit import Errors
from sparseflax.cost.shape import ConvShape
from sparseflax.network.plan import MARGIN

CLEAR = 0.1  # times that differ by more have one right choice
NETWORKS = {"ResNet-50": resnet50, "GoogLeNet": googlenet}
CONSTANTS = {"predicted": "fitted in these rounds", "stored": "stored before"}  # by the key of a line
MEDIAN, HIGH, LOSS = 0.1, 0.25, 0.02  # what is promised
STEADY = 0.2  # distance of the quartiles / median: what repeats no better cannot be predicted better
HEAD = ("", "constants", "sparse: median error", "90th percentile", "dense: median error", "90th percentile",
        "network totals: median", "worst", "dense is faster", "wrong choices", "time lost")


@dataclass(frozen=True)
class Choices:
    """What choosing by the model costs.

    Attributes:
      wrong: choices of the slower one where the times differ by more than CLEAR.
      clear: pairs whose times do.
      dense: pairs whose dense time is the shorter one.
      count: pairs of a sparse and a dense time.
      loss: time of all choices / time of the right ones - 1.
    """

    wrong: int
    clear: int
    dense: int
    count: int
    loss: float


@dataclass(frozen=True)
class Judgement:
    """Of the lines of one CPU, batch and number of threads.

    Attributes:
      sparse, dense: errors of single layers.
      networks: {(network, density drawn): relative error of the sum of its layers}.
      choices: dense or sparse.
    """

    sparse: Errors
    dense: Errors
    networks: dict[tuple[str, float | None], float]
    choices: Choices

    @classmethod
    def of(cls, lines: Sequence[Line], key: str = "predicted") -> Judgement:
        sparse, dense = errors(lines, key)
        networks = {(name, drawn): error for name, network in NETWORKS.items()
                    for drawn, error in network_errors(lines, network(), key).items()}
        return cls(sparse, dense, networks, choices(lines, key))

    def missed(self) -> list[str]:
        """Which of the promised bounds do not hold."""
        totals = np.abs(list(self.networks.values()) or [0.0])
        found = (("the sparse median error", self.sparse.median, MEDIAN), ("the dense median error", self.dense.median, MEDIAN),
                 ("the sparse 90th percentile", self.sparse.high, HIGH), ("the dense 90th percentile", self.dense.high, HIGH),
                 ("the median error of network totals", np.median(totals), MEDIAN),
                 ("their 90th percentile", np.quantile(totals, 0.9), HIGH),
                 ("the time lost to choices", self.choices.loss, LOSS))
        return [f"{what} is {value:.1%}, above {bound:.0%}" for what, value, bound in found if value > bound]

    def cells(self) -> tuple[str, ...]:
        """Under HEAD, after its second column."""
        totals = np.abs(list(self.networks.values()) or [np.nan])
        made = self.choices
        return (*(f"{value:.1%}" for error in (self.sparse, self.dense) for value in (error.median, error.high)),
                f"{np.median(totals):.1%}", f"{totals.max():.1%}", f"{made.dense} of {made.count}",
                f"{made.wrong} of {made.clear}", f"{made.loss:.2%}")


def table(lines: Sequence[Line]) -> str:
    """A Markdown row for each batch, number of threads and origin of the constants, on the CPU measured last.

    The newest line of each time counts.
    """
    newest = {(line["isa"], line["n"], line["threads"], line.get("precision"), line["layer"], line["drawn"]): line
              for line in lines if line["cpu"] == lines[-1]["cpu"]}
    fields: dict[tuple, list[Line]] = {}
    for line in newest.values():
        fields.setdefault((line["isa"], line["n"], line["threads"]), []).append(line)
    rows: list[Sequence[str]] = []
    for (isa, n, threads), every in sorted(fields.items()):
        name, some = f"{isa}, n={n}, {threads} thread{'s' * (threads > 1)}", in_float32(every)
        rows += [(name, constants, *Judgement.of(some, key).cells()) for key, constants in CONSTANTS.items()
                 if all(line.get(key) is not None for line in some)]
        steady = [line for line in some if line["spread"] <= STEADY]
        if {line["density"] is None for line in steady} == {False, True}:
            cells = [f"{value:.1%}" for error in errors(steady) for value in (error.median, error.high)]
            which = f"fitted in these rounds; the {len(steady)} of {len(some)} times that repeat within {STEADY:.0%}"
            rows.append((name, which, *cells, *[""] * 5))
        for key, constants in CONSTANTS.items():
            times = [(line[key], line["measured"]) for line in every
                     if line.get("precision") == "int8" and line.get(key) is not None]
            if times:
                error = Errors.of(*np.array(times).T)
                rows.append((f"{name}, int8", constants, f"{error.median:.1%}", f"{error.high:.1%}", *[""] * 7))
    last = list(newest.values())[-1]
    return "\n".join([markdown(HEAD, rows, words=2), "", f"{last['cpu']}. Measured {last['date'][:10]} at {last['commit']}."])


def in_float32(lines: Sequence[Line]) -> list[Line]:
    """Those that are not of the kernel in eight bits."""
    return [line for line in lines if line.get("precision") != "int8"]


def errors(lines: Sequence[Line], key: str = "predicted") -> tuple[Errors, Errors]:
    """Of the sparse times and of the dense ones."""
    times = {kind: np.array([(line[key], line["measured"]) for line in lines if (line["density"] is None) == kind]).T
             for kind in (False, True)}
    return Errors.of(*times[False]), Errors.of(*times[True])


def choices(lines: Sequence[Line], key: str = "predicted") -> Choices:
    """Dense or sparse, for every sparse time of one CPU, batch and number of threads, chosen as `plan` does."""
    dense = {line["layer"]: line for line in lines if line["density"] is None}
    chosen = best = 0.0
    wrong = clear = slower = count = 0
    for line in lines:
        if line["density"] is not None:
            other = dense[line["layer"]]
            sparse = MARGIN * line[key] <= other[key]
            seconds, right = line["measured"] if sparse else other["measured"], min(line["measured"], other["measured"])
            differs = max(line["measured"], other["measured"]) > (1 + CLEAR) * right
            wrong, clear, count = wrong + (differs and seconds > right), clear + differs, count + 1
            slower += other["measured"] < line["measured"]
            chosen, best = chosen + seconds, best + right
    return Choices(wrong, clear, slower, count, chosen / best - 1)


def network_errors(lines: Sequence[Line], network: Counter[ConvShape], key: str = "predicted") -> dict[float | None, float]:
    """{density drawn: relative error of the sum over a network's layers}."""
    often = {str(shape): count for shape, count in network.items()}
    sums: dict[float | None, np.ndarray] = {}
    for line in lines:
        if line["layer"] in often:
            times = often[line["layer"]] * np.array([line[key], line["measured"]])
            sums[line["drawn"]] = sums.get(line["drawn"], np.zeros(2)) + times
    return {drawn: float(predicted / measured - 1) for drawn, (predicted, measured) in sums.items()}
