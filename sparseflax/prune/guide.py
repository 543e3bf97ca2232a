"""What a guide is: which layers to prune, how far, when to stop, when to give a layer its dense weights back, and why.

A method asks nothing else of a guide, so the same method runs with the performance model behind it (`guided`) or without
(`constant`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from sparseflax.cost.machine import Machine
from sparseflax.cost.shape import ConvShape
from sparseflax.prune.whole import Whole

Layers = Iterable[str] | Callable[[str], bool]
LEAST = 1e-6  # of a network's time: less is rounding


@dataclass(frozen=True)
class LayerGuide:
    """What the guide says of one layer.

    Attributes:
      density: to prune to, kept / all; 1.0 = the layer stays dense.
      reason: for it, in words.
      lower, upper: stop pruning at `lower`: the lower end of the useful range, below which fewer weights save no time worth
        having, or less where the time asked for needs it. A layer that stays above `upper` was pruned in vain: give it its
        dense weights back.
      shape: of the layer, if it has a performance model.
      dense_seconds, seconds: predicted time dense in float32, and at `density` in the guide's precision, in a network that was
        measured times its scales; nan without a performance model.
      slope: d(seconds)/d(density) at `density`, what pruning on would save; nan without a performance model.
    """

    density: float
    reason: str
    lower: float = 0.0
    upper: float = 1.0
    shape: ConvShape | None = None
    dense_seconds: float = math.nan
    seconds: float = math.nan
    slope: float = math.nan


@dataclass(frozen=True)
class Guidance:
    """Which layers to prune, how far and why; prints as a table.

    Attributes:
      layers: {layer: LayerGuide} in the network's order.
      whole: the network as it was measured, or what is predicted of its layers; None without a performance model.
      machine: of the performance model, if there is one.
      seconds: predicted of the network at the guide's densities; nan without a performance model.
      shortfall: how far it falls short of what was asked for, and where the time goes; empty where it does not.
      precision: in which its sparse layers are to run: "float32", or "int8", pruned in blocks of four.
    """

    layers: Mapping[str, LayerGuide]
    whole: Whole | None = None
    machine: Machine | None = None
    seconds: float = math.nan
    shortfall: str = ""
    precision: str = "float32"

    @property
    def densities(self) -> dict[str, float]:
        """{layer: density} of the layers to prune."""
        return {name: layer.density for name, layer in self.layers.items() if layer.density < 1}

    @property
    def strengths(self) -> dict[str, float]:
        """{layer: relative strength of the pressure on it}: its slope over their mean, 1 for all without a performance model.

        The layers are those of `densities`; all others feel no pressure.
        """
        slopes = {name: self.layers[name].slope for name in self.densities}
        known = [slope for slope in slopes.values() if not math.isnan(slope)]
        mean = sum(known) / max(len(known), 1)
        return {name: 1.0 if math.isnan(slope) or mean == 0 else slope / mean for name, slope in slopes.items()}

    @property
    def dense_seconds(self) -> float:
        """Time of the dense network: measured, or else predicted."""
        return self.whole.dense_seconds if self.whole else math.nan

    @property
    def other_seconds(self) -> float:
        """Of `seconds`, those of everything that is not one of the layers; 0 if that was not measured."""
        return self.seconds - sum(layer.seconds for layer in self.layers.values())

    @property
    def speedup(self) -> float:
        """Time dense over predicted time at the guide's densities."""
        return self.dense_seconds / self.seconds

    def __str__(self) -> str:
        rows = [("layer", "shape", "density", "dense us", "us", "why")]
        for name, layer in self.layers.items():
            shape = "" if layer.shape is None else str(layer.shape)
            rows.append((name, shape, f"{layer.density:.3f}", _us(layer.dense_seconds), _us(layer.seconds), layer.reason))
        dense_other = self.dense_seconds - sum(layer.dense_seconds for layer in self.layers.values())
        if max(dense_other, self.other_seconds) > LEAST * self.dense_seconds:
            rows.append(("(other)", "", "", _us(dense_other), _us(self.other_seconds), "not a layer of the guide"))
        if not math.isnan(self.seconds):
            rows.append(("total", "", "", _us(self.dense_seconds), _us(self.seconds), f"{self.speedup:.2f}x as fast as dense"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        align = (str.ljust, str.ljust, str.rjust, str.rjust, str.rjust, str.ljust)
        cells = ([a(cell, w) for a, cell, w in zip(align, row, widths, strict=True)] for row in rows)
        return "\n".join([*("  ".join(row).rstrip() for row in cells), *([self.shortfall] if self.shortfall else [])])


def _us(seconds: float) -> str:
    return "" if math.isnan(seconds) else f"{seconds * 1e6:.1f}"


def constant(densities: Mapping[str, float]) -> Guidance:
    """The guide that knows no performance model: prune each layer to the density given.

    Raises:
      ValueError: for a density outside (0, 1].
    """
    for layer, density in densities.items():
        if not 0 < density <= 1:
            raise ValueError(f"density of layer {layer!r} must be in (0, 1], got {density}")
    return Guidance({layer: LayerGuide(density, "as given") for layer, density in densities.items()})


def named(chosen: Layers, layers: Iterable[str]) -> set[str]:
    """Those of the layers that are chosen: by a predicate, or by names or patterns such as "stages/0/*" and "*/shortcut".

    Raises:
      ValueError: for a name or pattern that none of the layers has.
    """
    layers = list(layers)
    if callable(chosen):
        return {layer for layer in layers if chosen(layer)}
    patterns = [chosen] if isinstance(chosen, str) else list(chosen)
    found = {pattern: {layer for layer in layers if layer == pattern or fnmatchcase(layer, pattern)} for pattern in patterns}
    if missing := sorted(pattern for pattern, matching in found.items() if not matching):
        raise ValueError(f"cannot exclude layers {missing}: the network has {layers}")
    return set().union(*found.values())
