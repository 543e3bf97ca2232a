"""CIFAR-10 as published: binary files of 10,000 images each, in a folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from experiments.data.augment import centre, pad_crop_flip
from experiments.data.streamed import Streamed

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
FILES = {True: tuple(f"data_batch_{i}.bin" for i in range(1, 6)), False: ("test_batch.bin",)}
SIDE, CLASSES = 32, 10
RECORD = 1 + 3 * SIDE * SIDE  # bytes: a label, then the red, the green and the blue plane
# Of the training images' channels, in [0, 1].
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Cifar10:
    """The images uint8 (32, 32, 3) and labels of one half of the data set: 50,000 to train on, or 10,000 to test on.

    Args:
      folder: that holds the binary files, or the folder cifar-10-batches-bin with them.
      train: which half.
      records: images in each file.

    Raises:
      FileNotFoundError: a file is missing; says where to get it.
      ValueError: a file is cut short or is no file of CIFAR-10.

    Source:
      Krizhevsky, "Learning multiple layers of features from tiny images", 2009.
    """

    def __init__(self, folder: Path, train: bool, records: int = 10_000):
        inner = folder / "cifar-10-batches-bin"
        folder = inner if inner.is_dir() else folder
        content = np.concatenate([_read(folder / name, records) for name in FILES[train]])
        self.labels = content[:, 0].astype(np.int32)
        self._images = content[:, 1:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self._images[index], int(self.labels[index])


def cifar10(folder: Path, records: int = 10_000) -> Streamed:
    """CIFAR-10, to train on squares of images padded by 4, mirrored half the time. Arguments and errors as in `Cifar10`."""
    return Streamed(Cifar10(folder, True, records), Cifar10(folder, False, records), side=SIDE, mean=MEAN, deviation=DEVIATION,
                    augment=partial(pad_crop_flip, side=SIDE, pad=4), view=partial(centre, side=SIDE))


def _read(path: Path, records: int) -> np.ndarray:
    """Records uint8 (records, RECORD)."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: get {URL} (its binary version) and unpack it into {path.parent}")
    content = np.fromfile(path, np.uint8)
    if content.size != records * RECORD:
        raise ValueError(f"{path} has {content.size} bytes, wanted {records * RECORD} ({records} records of {RECORD}): it is "
                         f"cut short or another file; get {URL} again")
    content = content.reshape(records, RECORD)
    if content[:, 0].max() >= CLASSES:
        raise ValueError(f"{path} has a label {content[:, 0].max()}, wanted at most {CLASSES - 1}: it is no file of CIFAR-10 "
                         "(CIFAR-100 has another format)")
    return content
