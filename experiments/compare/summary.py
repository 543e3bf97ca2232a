"""What the runs say together: means over seeds, which method wins at equal accuracy, and whether requests were met."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from experiments.benchmark.results import Line, geometric_mean
from experiments.evaluate import DENSE, FOLDED, PACKED
from experiments.methods import METHODS
from experiments.report import MET

EQUAL = 0.5  # points of accuracy below dense, mean over seeds, that still count as equal
SENSIBLE = 5.0  # points: where both of two networks lost more, neither is of use
NEARLY_ALL = 0.95  # of a layer's weights: a layer that keeps more runs sparse because that kernel is faster, and loses nothing


class Point(NamedTuple):
    """A method at a requested speedup on a network; means over the seeds, geometric ones of times and ratios.

    Attributes:
      network, method, guided, precision, requested: which.
      seeds: number of runs.
      accuracy: of the packed network, in %.
      spread: largest minus smallest accuracy, in points.
      lost: accuracy of the dense network minus that of the packed one, in points.
      rounding: accuracy of the pruned network minus that of the packed one, in points: what eight bits lose.
      density: kept / all weights.
      bytes: of the packed network's file.
      compression: dense file over packed file.
      predicted: speedup at batch 1.
      seconds: {batch: of the packed network}.
      dense_seconds: {batch: of the faster of its two dense forms, in the same run}.
      training: CPU seconds of pruning and recovering.
    """

    network: str
    method: str
    guided: bool
    precision: str
    requested: float
    seeds: int
    accuracy: float
    spread: float
    lost: float
    rounding: float
    density: float
    bytes: float
    compression: float
    predicted: float
    seconds: dict[int, float]
    dense_seconds: dict[int, float]
    training: float

    def speedup(self, batch: int = 1) -> float:
        """Measured, over dense in the same run."""
        return self.dense_seconds[batch] / self.seconds[batch]


def points(lines: Iterable[Line]) -> list[Point]:
    """A Point for every method, network and requested speedup that was timed, in the order of the lines."""
    groups: dict[tuple[str, str, float], list[Line]] = {}
    for line in lines:
        if "times" in line:
            groups.setdefault((line["network"], line["method"], line["requested"]), []).append(line)
    return [_point(group) for group in groups.values()]


def fastest(found: Iterable[Point], network: str, guided: bool | None, precision: str = "float32",
            batch: int = 1) -> Point | None:
    """The point measured fastest of those that lose at most EQUAL points, over as many seeds as any; None: guided or not."""
    here = [point for point in found if point.network == network]
    seeds = max((point.seeds for point in here), default=0)
    equal = [point for point in here if guided in (None, point.guided) and point.precision == precision
             and point.lost <= EQUAL and point.seeds == seeds]
    return max(equal, key=lambda point: point.speedup(batch), default=None)


def equal_speedup(found: Iterable[Point], batch: int = 1) -> float:
    """The speedup at which one method loses EQUAL points, between its points: a line in log speedup.

    It starts at the dense network, which loses nothing; beyond the last point nothing is claimed.
    """
    speedup, lost = 1.0, 0.0
    for point in sorted(found, key=lambda point: point.speedup(batch)):
        if point.lost > EQUAL:
            return speedup * (point.speedup(batch) / speedup) ** ((EQUAL - lost) / (point.lost - lost))
        speedup, lost = point.speedup(batch), point.lost
    return speedup


def best(lines: Sequence[Line]) -> list[str]:
    """The unguided and the guided method of the highest mean accuracy over their runs; a refused run counts as 0.

    After them the guided one in blocks and in eight bits.
    """
    chosen = list[str]()
    for guided in (False, True):
        accuracies: dict[str, list[float]] = {}
        for line in lines:
            if line["guided"] == guided and METHODS[line["method"]].block == 1:
                accuracies.setdefault(line["method"], []).append(line.get("accuracy", 0.0))
        if accuracies:
            chosen.append(max(accuracies, key=lambda method: statistics.mean(accuracies[method])))
    last = METHODS[chosen[-1]] if chosen else None
    return chosen + [name for name, method in METHODS.items()
                     if last and method.block > 1 and (method.guide, method.prepare) == (last.guide, last.prepare)]


def layer_densities(lines: Sequence[Line]) -> list[float]:
    """Kept / all weights of every layer of a network, means over the lines of its timed runs; none without lines."""
    of_runs = [[layer["density"] for layer in line["layers"]] for line in lines]
    return [statistics.mean(own) for own in zip(*of_runs, strict=True)]


def conclusions(lines: Sequence[Line]) -> list[str]:
    """What came out, in sentences: a comparison for each network, and whether the requested speedups were met."""
    found = points(lines)
    networks = list(dict.fromkeys(point.network for point in found))
    return [*(sentence for network in networks
              for sentence in (_comparison(found, network), *_eight_bits(found, network), *_twins(found, network),
                               *_shares(found, lines, network))),
            *_requests(found), *_refusals(lines)]


def _point(group: list[Line]) -> Point:
    first, accuracies = group[0], [100 * line["packed_accuracy"] for line in group]
    batches = list(first["times"])

    def mean(value: Callable[[Line], float]) -> float:
        return statistics.mean(map(value, group))

    def geometric(value: Callable[[Line], float]) -> float:
        return geometric_mean(map(value, group))

    return Point(
        first["network"], first["method"], first["guided"], _precision(first), first["requested"], len(group),
        accuracy=statistics.mean(accuracies), spread=max(accuracies) - min(accuracies),
        lost=mean(lambda line: 100 * (line["dense_accuracy"] - line["packed_accuracy"])),
        rounding=mean(lambda line: 100 * (line["accuracy"] - line["packed_accuracy"])),
        density=mean(lambda line: line["kept"] / line["weights"]),
        bytes=mean(lambda line: line["bytes"][PACKED]["disk"]),
        compression=geometric(lambda line: line["bytes"][DENSE]["disk"] / line["bytes"][PACKED]["disk"]),
        predicted=geometric(lambda line: line["predicted"]),
        seconds={int(n): geometric(lambda line, n=n: line["times"][n][PACKED]["seconds"]) for n in batches},
        dense_seconds={int(n): geometric(lambda line, n=n: min(line["times"][n][form]["seconds"] for form in (DENSE, FOLDED)))
                       for n in batches},
        training=mean(lambda line: line["training_seconds"]),
    )


def _comparison(found: list[Point], network: str) -> str:
    unguided, guided = (fastest(found, network, kind) for kind in (False, True))
    if not (unguided and guided):
        missing = " and no ".join(kind for kind, point in (("unguided", unguided), ("guided", guided)) if not point)
        return f"{network}: no {missing} method stays within {EQUAL} points of the dense network's accuracy."
    ratio = guided.speedup() / unguided.speedup()
    seeds = f"mean of {guided.seeds} seeds" if guided.seeds > 1 else "one seed"
    verdict = (f"{ratio:.2f} times as fast as" if ratio > 1 else
               f"not faster ({ratio:.2f} times as fast: guidance does not win here) than")
    return (f"{network}: at equal accuracy (at most {EQUAL} points below dense, {seeds}) the best guided method, "
            f"{_named(guided)}, is measured {verdict} the best unguided one, {_named(unguided)}, at batch 1."
            f"{_interpolated(found, network, guided.seeds)}")


def _interpolated(found: list[Point], network: str, seeds: int) -> str:
    """The same at exactly EQUAL points below dense, where every method was timed at several speedups."""
    best = [_between(found, network, guided, seeds) for guided in (True, False)]
    if None in best:
        return ""
    (guided, fast), (unguided, slow) = filter(None, best)
    return (f" Between the measured points, at exactly {EQUAL} below dense: {guided} {fast:.2f}x dense, {unguided} {slow:.2f}x,"
            f" a ratio of {fast / slow:.2f}.")


def _between(found: list[Point], network: str, guided: bool, seeds: int) -> tuple[str, float] | None:
    """The float32 method that is fastest at exactly EQUAL points below dense, and that speedup."""
    methods = _by_method(point for point in found if (point.network, point.guided, point.seeds, point.precision) == (
        network, guided, seeds, "float32"))
    speedups = {method: equal_speedup(own) for method, own in methods.items() if len(own) > 1}
    return max(speedups.items(), key=lambda item: item[1], default=None)


def _eight_bits(found: list[Point], network: str) -> list[str]:
    """What eight bits gain over float32 at equal accuracy, and what they lose by themselves."""
    rounded = [point for point in found if (point.network, point.precision) == (network, "int8")]
    if not rounded:
        return []
    lines = []
    for batch in rounded[0].seconds:
        one, int8 = (fastest(found, network, None, precision, batch) for precision in ("float32", "int8"))
        if not (one and int8):
            return [f"{network}: no network in {'eight bits' if one else 'float32'} stays within {EQUAL} points of dense."]
        slow, fast = (max(equal_speedup(own, batch) for own in _by_method(
            point for point in found if (point.network, point.seeds, point.precision) == (network, one.seeds, precision)
        ).values()) for precision in ("float32", "int8"))
        ratio = int8.speedup(batch) / one.speedup(batch)
        lines.append(f"at batch {batch} {_named(int8, batch)} is measured {ratio:.2f} times as fast as {_named(one, batch)}, "
                     f"{fast / slow:.2f} times at exactly {EQUAL} below dense")
    worst = max(rounded, key=lambda point: point.rounding)
    mean = statistics.mean(point.rounding for point in rounded)
    return [f"{network}: eight bits over the fastest of float32 at equal accuracy: {'; '.join(lines)}. Eight bits by "
            f"themselves lose {mean:.2f} points in the mean to the same pruned weights in float32, at most "
            f"{worst.rounding:.2f} (at {worst.requested:g}x)."]


def _by_method(found: Iterable[Point]) -> dict[str, list[Point]]:
    methods: dict[str, list[Point]] = {}
    for point in found:
        methods.setdefault(point.method, []).append(point)
    return methods


def _precision(line: Line) -> str:
    return line.get("precision", "float32")  # early lines have no other


def _twins(found: list[Point], network: str) -> list[str]:
    """What the guide changes in a method, all else being equal: accuracy at the highest speedup that still makes sense."""
    here = {(point.method, point.requested): point for point in found if point.network == network}
    gains = []
    for name, method in METHODS.items():
        twin = method.twin or ""
        both = [(here[name, speedup], here[twin, speedup]) for of, speedup in here if of == name and (twin, speedup) in here
                and min(here[name, speedup].lost, here[twin, speedup].lost) <= SENSIBLE]
        if both:
            guided, unguided = max(both, key=lambda pair: pair[0].requested)
            gains.append(f"{name} {unguided.lost - guided.lost:+.2f} points at {guided.requested:g}x over {unguided.method}")
    if not gains:
        return []
    return [f"{network}: the same method with the guide and without: {'; '.join(gains)}. Those without are told the density at "
            "which the performance model predicts the requested speedup, so they lack only how to share it out over layers."]


def _shares(found: list[Point], lines: Sequence[Line], network: str) -> list[str]:
    """How far the guides of the fastest methods depart from one density for all, which bounds what they can gain."""
    point = fastest(found, network, True)
    if not point:
        return []
    other, unguided = (_between(found, network, guided, point.seeds) for guided in (True, False))
    twin = unguided[0] if unguided else METHODS[point.method].twin
    kept = dict[str, list[float]]()
    for method in dict.fromkeys(method for method in (point.method, other and other[0], twin) if method):
        own = [line for line in lines if "times" in line and
               (line["network"], line["method"], line["requested"]) == (network, method, point.requested)]
        kept[method] = [100 * density for density in layer_densities(own) if density < NEARLY_ALL]
    if not (twin and kept[point.method] and kept[twin]):
        return []
    said = "; ".join(f"{method} keeps {_listed(shares)} % of the {len(shares)} layers it prunes"
                     for method, shares in kept.items() if shares)
    return [f"{network}: at {point.requested:g}x {said}. The less these differ, the less a guide can gain."]


def _listed(shares: list[float]) -> str:
    """Percents in the order of the layers; of many, or of equal ones, the ends."""
    if max(shares) - min(shares) <= 1:
        return f"{max(shares):.0f}"
    return f"{min(shares):.0f} to {max(shares):.0f}" if len(shares) > 9 else ", ".join(f"{share:.0f}" for share in shares)


def _named(point: Point, batch: int = 1) -> str:
    return f"{point.method} ({point.speedup(batch):.2f}x dense, {-point.lost:+.2f} points)"


def _requests(found: list[Point]) -> list[str]:
    asked = [point for point in found if point.guided]
    if not asked:
        return []
    off = [point for point in asked if abs(point.speedup() / point.requested - 1) > MET]
    named = "; ".join(f"{point.network}, {point.method}: {point.requested:g}x asked, {point.speedup():.2f}x measured"
                      for point in off)
    return [f"Requested speedups met within {MET:.0%} as measured at batch 1: {len(asked) - len(off)} of {len(asked)} by "
            f"guided methods{f'. Not met: {named}.' if off else '.'}"]


def _refusals(lines: Sequence[Line]) -> list[str]:
    why: dict[tuple[str, str], dict[float, str]] = {}
    for line in lines:
        if "refused" in line:
            why.setdefault((line["network"], line["method"]), {})[line["requested"]] = line["refused"]
    return [f"{network}, {method}, {', '.join(f'{requested:g}x' for requested in sorted(reasons))}: {reasons[min(reasons)]}"
            for (network, method), reasons in why.items()]
