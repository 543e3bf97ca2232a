"""How far a network's outputs are from another's, on pictures that neither was made with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from sparseflax.job.pictures import Pictures

BEST = 5  # answers that are shown of a classifier


class Outputs(NamedTuple):
    """What a network says of some pictures: its outputs, each (n, ...)."""

    arrays: tuple[np.ndarray, ...]

    @property
    def answers(self) -> np.ndarray | None:
        """The top answer of a classifier (n,), of one that answers at several places (n, places); None for other networks."""
        first = self.arrays[0]
        return first.argmax(-1) if len(self.arrays) == 1 and first.ndim in (2, 3) and first.shape[-1] > 1 else None


class Fidelity(NamedTuple):
    """How close outputs are to the original's.

    Attributes:
      error: |y - original| / |original| over all pictures, of the output that is furthest off.
      errors: the same for each picture (n,).
      agreement: share of the same top answers; None for what is no classifier.
      accuracy, original_accuracy: share of right ones; None without labels.
      score, original_score: in percent, by the user's own measure; None without one.
      doubt: standard error of the points, in percent, where they count pictures: a few say little.
    """

    error: float
    errors: np.ndarray
    agreement: float | None = None
    accuracy: float | None = None
    original_accuracy: float | None = None
    score: float | None = None
    original_score: float | None = None
    doubt: float = 0.0

    def keeps_to(self, points: float) -> bool:
        """Whether no more points are lost, the standard error on top."""
        return self.points + self.doubt <= points

    @property
    def points(self) -> float:
        """What is lost, in percent: of the score or the accuracy if that is known, else of the agreement, else the error."""
        if self.score is not None and self.original_score is not None:
            return self.original_score - self.score
        if self.accuracy is not None and self.original_accuracy is not None:
            return 100 * (self.original_accuracy - self.accuracy)
        return 100 * (self.error if self.agreement is None else 1 - self.agreement)

    @property
    def measure(self) -> str:
        """What the points are of."""
        if self.score is not None:
            return "score"
        return "accuracy" if self.accuracy is not None else "relative error" if self.agreement is None else "agreement"


def outputs(model: nnx.Module, pictures: Pictures, batch: int) -> Outputs:
    """What a network says of the pictures, jitted, some at a time."""
    graph, state = nnx.split(model)
    run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
    parts = []
    for x, count in batches(pictures, batch):
        y = run(state, x)
        parts.append([np.asarray(array, np.float32)[:count] for array in jax.tree.leaves(y)])
    return Outputs(tuple(map(np.concatenate, zip(*parts, strict=True))))


def batches(pictures: Pictures, batch: int) -> Iterator[tuple[np.ndarray, int]]:
    """(images, how many of them count): all batches are of equal size, the last is filled up from the first pictures."""
    for first in range(0, len(pictures), batch):
        rows = np.arange(first, first + batch)
        yield pictures.inputs(rows % len(pictures)), int((rows < len(pictures)).sum())


def compare(new: Outputs, original: Outputs, labels: np.ndarray | None = None) -> Fidelity:
    """How close outputs are to the original's on the same pictures.

    Raises:
      ValueError: there are labels, and the network is no classifier.
    """
    errors = [_errors(y, before) for y, before in zip(new.arrays, original.arrays, strict=True)]
    total, each = max(errors, key=lambda error: error[0])
    answers, before = new.answers, original.answers
    if answers is None or before is None:
        if labels is not None:
            shapes = ", ".join(str(array.shape) for array in original.arrays)
            raise ValueError(f"labels are classes, and outputs of shape {shapes} are none: leave --labels out, and the outputs "
                             "are compared with the original's")
        return Fidelity(total, each)
    agreement = float((answers == before).mean())
    if labels is None:
        return Fidelity(total, each, agreement, doubt=_doubt(answers != before))
    if answers.ndim != 1 or labels.max() >= original.arrays[0].shape[-1]:
        raise ValueError(f"labels up to {labels.max()} for outputs of shape {original.arrays[0].shape}, wanted one class from "
                         f"0 to {original.arrays[0].shape[-1] - 1} for each picture")
    right, were = answers == labels, before == labels
    return Fidelity(total, each, agreement, float(right.mean()), float(were.mean()), doubt=_doubt(were.astype(int) - right))


def _doubt(lost: np.ndarray) -> float:
    """Standard error, in percent, of the mean over pictures of what is lost of each (n, ...)."""
    each = lost.reshape(len(lost), -1).mean(1)
    return 100 * float(each.std(ddof=1)) / len(each)**0.5 if len(each) > 1 else 0.0


def _errors(y: np.ndarray, before: np.ndarray) -> tuple[float, np.ndarray]:
    """The relative error over all pictures, and of each (n,)."""
    wrong, size = (np.sqrt(np.square(a.reshape(len(a), -1).astype(np.float64)).sum(1)) for a in (y - before, before))
    typical = np.sqrt(np.square(size).mean()) or 1.0
    return float(np.sqrt(np.square(wrong).mean()) / typical), wrong / np.maximum(size, 1e-3 * typical)
