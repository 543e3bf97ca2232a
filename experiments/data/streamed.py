"""Images that are read and augmented by grain while a network trains."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from experiments.data.dataset import Source

WORKERS = 4  # threads that read ahead, a batch each


class Streamed:
    """Training batches through grain, a function of (seed, step) and nothing else; test images when they are asked for.

    Args:
      train, test: images uint8 and labels.
      side: of the squares that the network sees, in pixels.
      mean, deviation: of each channel in [0, 1]; images are shifted and scaled by them.
      augment: (image, random generator) -> square, for training.
      view: image -> square, for testing.

    Raises:
      ImportError: when a batch is asked for, if grain is not installed.
    """

    def __init__(self, train: Source, test: Source, *, side: int, mean: tuple[float, ...], deviation: tuple[float, ...],
                 augment: Callable[[np.ndarray, np.random.Generator], np.ndarray], view: Callable[[np.ndarray], np.ndarray]):
        self._train, self._augment = train, augment
        self._mean, self._deviation = np.array(mean, np.float32), np.array(deviation, np.float32)
        self.train_images = Prepared(train, lambda image: self._scaled(view(image)), side)
        self.test_images = Prepared(test, lambda image: self._scaled(view(image)), side)
        self.test_labels = np.asarray(test.labels, np.int32)
        self._next: tuple[int, int, int] | None = None  # (seed, step, size) of what _batches yields
        self._batches: Iterator[tuple[np.ndarray, np.ndarray]] = iter(())

    def train_batch(self, seed: int, step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Images float32 (size, side, side, 3) and labels int32 (size,); steps in a row are read ahead."""
        if not 0 < size <= len(self._train):
            raise ValueError(f"a batch of {size} cannot be drawn from {len(self._train)} training examples; choose batch "
                             f"between 1 and {len(self._train)}")
        if self._next != (seed, step, size):
            self._batches = iter(self._pipeline(seed, step, size))
        batch = next(self._batches)
        self._next = seed, step + 1, size
        return batch

    def _pipeline(self, seed: int, step: int, size: int) -> Any:
        try:
            grain = importlib.import_module("grain")
        except ImportError:
            raise ImportError("training on files needs grain: pip install 'sparseflax[data]'") from None
        examples = grain.MapDataset.source(self._train).seed(seed).shuffle().repeat().random_map(self._example)
        ahead = grain.ReadOptions(num_threads=WORKERS, prefetch_buffer_size=2 * WORKERS)
        return examples.batch(size, drop_remainder=True)[step:].to_iter_dataset(ahead)

    def _example(self, example: tuple[np.ndarray, int], draw: np.random.Generator) -> tuple[np.ndarray, np.int32]:
        image, label = example
        return self._scaled(self._augment(image, draw)), np.int32(label)

    def _scaled(self, image: np.ndarray) -> np.ndarray:
        return (image.astype(np.float32) / 255 - self._mean) / self._deviation


class Prepared:
    """Images float32 (count, side, side, 3) of a source, made when a slice of them is taken."""

    def __init__(self, source: Source, prepare: Callable[[np.ndarray], np.ndarray], side: int):
        self._source, self._prepare = source, prepare
        self.shape = (len(source), side, side, 3)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: slice) -> np.ndarray:
        chosen = range(*index.indices(len(self)))
        return np.stack([self._prepare(self._source[i][0]) for i in chosen])
