"""Images in files, one folder per class: how ImageNet lies on disk."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np

from experiments.data.augment import centre, pad_crop_flip
from experiments.data.streamed import Streamed

SUFFIXES = ".jpeg", ".jpg", ".png"
# Of ImageNet's training images' channels, in [0, 1].
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFolder:
    """Images uint8 (h, w, 3) from folder/<class>/<image>, read when asked for; labels number the classes in sorted order.

    Args:
      folder: of the classes.
      shorter: side in pixels to which the shorter side of every image is scaled.

    Raises:
      FileNotFoundError: there is no such folder.
      ValueError: it has no classes, or a class has no image; and when an image is read, if its file is cut short or no image.
      ImportError: pillow is not installed.
    """

    def __init__(self, folder: Path, shorter: int = 256):
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}: it has to hold a folder of images for each class")
        self.classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        if not self.classes:
            raise ValueError(f"{folder} holds no folders: it has to hold one of images for each class")
        files = {name: sorted(file for file in (folder / name).iterdir() if file.suffix.lower() in SUFFIXES)
                 for name in self.classes}
        if empty := [name for name, found in files.items() if not found]:
            raise ValueError(f"{folder} has no image ({', '.join(SUFFIXES)}) of {', '.join(empty)}: was it unpacked in full?")
        self.files = [file for found in files.values() for file in found]
        self.labels = np.repeat(np.arange(len(files), dtype=np.int32), [len(found) for found in files.values()])
        self.shorter = shorter

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return _decoded(self.files[index], self.shorter), int(self.labels[index])


def image_folder(folder: Path, side: int = 224, shorter: int = 256) -> Streamed:
    """Images of folder/train and folder/val, to train on random squares, mirrored half the time, and test on central ones.

    Args:
      folder: with train and val, each with a folder per class.
      side: of the squares, in pixels.
      shorter: side to which the shorter side of every image is scaled before.

    Raises:
      ValueError: train and val do not have the same classes, and as `ImageFolder`, like the other errors.
    """
    train, test = (ImageFolder(folder / name, shorter) for name in ("train", "val"))
    if different := sorted(set(train.classes) ^ set(test.classes)):
        raise ValueError(f"{folder}/train and {folder}/val differ in {len(different)} classes, such as {different[0]!r}: both "
                         "need the same, also for ImageNet, whose validation images are published without folders")
    return Streamed(train, test, side=side, mean=MEAN, deviation=DEVIATION, augment=partial(pad_crop_flip, side=side),
                    view=partial(centre, side=side))


def _decoded(file: Path, shorter: int) -> np.ndarray:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("reading images needs pillow: pip install 'sparseflax[data]'") from None
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except OSError as error:  # an UnidentifiedImageError is one
        raise ValueError(f"{file} cannot be read ({error}): it is cut short or no image; get it again, or remove it") from None
    scale = shorter / min(image.size)
    width, height = (max(shorter, round(scale * size)) for size in image.size)
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
