"""What a whole network takes on this machine, so that a guide's speedup is that of the network and not of its layers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

# How far the fit trusts the performance model against the times, which repeat within some percent: that dense and sparse layers
# are off by one factor.
ALIKE = 0.2


class Packed(NamedTuple):
    """A packed network, measured.

    Attributes:
      dense: predicted seconds of its dense layers.
      sparse: predicted seconds of its sparse layers.
      seconds: measured, of all of it.
    """

    dense: float
    sparse: float
    seconds: float


class Whole(NamedTuple):
    """Of a network, measured: dense it takes `dense_seconds`, packed

        t = dense_scale * (predicted seconds of its dense layers) + scale * (those of its sparse layers) + other(t).

    Attributes:
      dense_seconds: of the dense network, in the faster of its two forms, as it is and with batch norms folded.
      other_seconds: of everything in the packed network that is no layer, where `points` say nothing better.
      scale: measured over predicted seconds of its sparse layers.
      dense_scale: measured over predicted seconds of its dense layers; None for that which leaves `other_seconds` of the dense
        network too.
      points: (seconds, other seconds) of packed networks as they were measured, the fastest first.
    """

    dense_seconds: float
    other_seconds: float = 0.0
    scale: float = 1.0
    dense_scale: float | None = None
    points: tuple[tuple[float, float], ...] = ()

    def checked(self) -> Whole:
        """Itself. Raises ValueError for a time or a scale that cannot be one."""
        for name, wanted, good in (
                ("dense_seconds", "positive", self.dense_seconds > 0), ("scale", "positive", self.scale > 0),
                ("other_seconds", "at least 0", self.other_seconds >= 0),
                ("dense_scale", "None or positive", self.dense_scale is None or self.dense_scale > 0)):
            if not (good and math.isfinite(getattr(self, name) or 0)):
                raise ValueError(f"{name} of the whole network must be {wanted} and finite, got {getattr(self, name)}")
        if self.dense_scale is None and self.other_seconds > self.dense_seconds:
            raise ValueError(f"other_seconds of the whole network must be at most the {self.dense_seconds} of the dense one, "
                             f"got {self.other_seconds}")
        return self

    def dense_factor(self, layers: float) -> float:
        """dense_scale, of a network whose dense layers are predicted to take `layers` seconds together."""
        return (self.dense_seconds - self.other_seconds) / layers if self.dense_scale is None else self.dense_scale

    def other(self, seconds: float) -> float:
        """Of a packed network that takes so many seconds, those of everything that is no layer."""
        if not self.points:
            return self.other_seconds
        times, other = np.array(self.points).T
        return float(np.interp(seconds, times, other))

    def seconds(self, layers: float) -> float:
        """Of a packed network whose layers take so many seconds together, scaled: those and `other`."""
        if not self.points:
            return layers + self.other_seconds
        seconds, other = np.array(self.points).T
        return layers + float(np.interp(layers, np.maximum.accumulate(seconds - other), other))

    def through(self, packed: Sequence[Packed]) -> Whole:
        """The same scales, with what they leave of the times of these packed networks as its points."""
        assert self.dense_scale is not None
        points = sorted((p.seconds, max(0.0, p.seconds - self.dense_scale * p.dense - self.scale * p.sparse)) for p in packed)
        return self._replace(other_seconds=points[0][1], points=tuple(points))


def fit(dense_seconds: float, packed: Sequence[Packed]) -> Whole:
    """The scales and the rest that explain the times of packed networks best, and what of each time they leave.

    Args:
      dense_seconds: of the dense network, measured.
      packed: one at least, of the same network: unpruned, and with layers running sparse at some densities.
    """
    rows = np.array([(p.dense, p.sparse, 1.0) for p in packed])
    times = np.array([p.seconds for p in packed])
    # Columns in typical seconds, so that the assumption weighs the same whatever the model is off by.
    unit, typical = np.exp(np.log(times / rows[:, :2].sum(1)).mean()), np.exp(np.log(times).mean())
    system = np.vstack([rows * (unit, unit, typical) / times[:, None], (ALIKE, -ALIKE, 0)])
    solution, _ = nnls(system, np.append(np.ones(len(times)), 0))
    dense_scale, scale = (max(float(x), 0.05) * unit for x in solution[:2])
    # The rest of none takes less than no time.
    most = min(1.0, *(p.seconds / (dense_scale * p.dense + scale * p.sparse) for p in packed))
    dense_scale, scale = float(most * dense_scale), float(most * scale)
    return Whole(dense_seconds, 0.0, scale, dense_scale).through(packed)
