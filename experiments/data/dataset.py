"""What a training asks of its data: the batch of a step, as a function of (seed, step) and nothing else, and test images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np


class Images(Protocol):
    """Prepared images float32 (count, height, width, channels): an array, or whatever makes them when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> np.ndarray: ...


class Data(Protocol):
    """Images to learn from and to test on, with labels int32 (count,)."""

    @property
    def train_images(self) -> Images: ...

    @property
    def test_images(self) -> Images: ...

    @property
    def test_labels(self) -> np.ndarray: ...

    def train_batch(self, seed: int, step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Images (size, h, w, c) and labels (size,) of a step, from 0."""
        ...


class Dataset(NamedTuple):
    """Images float32 (count, height, width, channels) and labels int32 (count,) in memory, learned from as they are."""

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    def train_batch(self, seed: int, step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Data.train_batch`; raises as `batch_indices`."""
        chosen = batch_indices(seed, step, size, len(self.train_labels))
        return self.train_images[chosen], self.train_labels[chosen]


class Source(Protocol):
    """Images as they were published, uint8 (h, w, 3), and their labels: grain's RandomAccessDataSource."""

    @property
    def labels(self) -> Sequence[int] | np.ndarray: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> tuple[np.ndarray, int]: ...


def batch_indices(seed: int, step: int, batch: int, count: int) -> np.ndarray:
    """Which examples are the batch of a step: a new permutation every epoch, a function of (seed, step) and nothing else.

    Args:
      seed: of the run.
      step: from 0.
      batch: examples per step; the remainder of an epoch is left out.
      count: examples in the training set.

    Returns:
      int64 (batch,), without repetition within an epoch.

    Raises:
      ValueError: if the batch is larger than the training set.
    """
    if not 0 < batch <= count:
        raise ValueError(
            f"a batch of {batch} cannot be drawn from {count} training examples; choose batch between 1 and {count}"
        )
    epoch, position = divmod(step, count // batch)
    order = np.random.default_rng((seed, 3, epoch)).permutation(count)
    return order[position * batch : (position + 1) * batch]
