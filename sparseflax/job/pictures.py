"""A folder of pictures, as a network takes them: read, converted, resized, and shared out."""

from __future__ import annotations

import csv
import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from sparseflax.cost.progress import progress

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
MODES = {1: "L", 3: "RGB"}
LEAST, FEW, MOST = 8, 50, 1024  # pictures: that there must be, below which a warning is due, and that are looked at
BYTES = 1 << 29  # of pixels that are held at most
HELD_OUT = 4  # one picture in so many is kept from the pruning, to compare the outputs on
STEP = 32  # of a size that the network leaves open: what most networks halve five times


@dataclass(frozen=True)
class Pictures:
    """What was read.

    Attributes:
      names: of the files, relative to the folder.
      pixels: uint8 (n, h, w, c), in the order in which they are used: shuffled, always alike.
      mean, std: float32 (c,) or (1,), of pixels in [0, 1].
      notes: what was done to them, in sentences.
    """

    names: tuple[str, ...]
    pixels: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, part: slice) -> Pictures:
        return replace(self, names=self.names[part], pixels=self.pixels[part])

    def inputs(self, rows: Any) -> np.ndarray:
        """float32 (n, h, w, c): (pixel / 255 - mean) / std."""
        return (self.pixels[rows].astype(np.float32) / np.float32(255) - self.mean) / self.std

    def share(self) -> tuple[Pictures, Pictures]:
        """Those to prune by, and those to compare the outputs on."""
        seen = len(self) - max(1, len(self) // HELD_OUT)
        return self[:seen], self[seen:]

    @property
    def digest(self) -> str:
        """Of all that the network gets to see."""
        content = hashlib.sha256(repr((self.names, self.pixels.shape, self.mean.tolist(), self.std.tolist())).encode())
        content.update(np.ascontiguousarray(self.pixels).data)
        return content.hexdigest()[:16]


def read_pictures(folder: Path, shape: Sequence[int | None], *, size: tuple[int, int] | None = None,
                  mean: Sequence[float] = (0.0,), std: Sequence[float] = (1.0,)) -> Pictures:
    """The pictures of a folder and of those in it, as a network wants them.

    Args:
      folder: holds them.
      shape: (h, w, c) of the network's input, None for what it leaves open.
      size: (h, w), where the network leaves it open; None takes that of most pictures, in steps of 32.
      mean, std: subtracted from, and divided by, once pixels are in [0, 1]: one for all channels, or one each.

    Raises:
      ImportError: pillow is not installed.
      FileNotFoundError: there is no such folder.
      ValueError: there are too few pictures, or the network takes no pictures, or other ones than it is told to.
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError("reading pictures needs the package pillow: pip install 'sparseflax[faster]'") from error
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    if len(shape) != 3 or shape[2] not in MODES:
        channels = shape[2] if len(shape) == 3 else None
        raise ValueError(f"the network takes inputs of shape {tuple(shape)} with {channels} channels, pictures have 1 (grey) "
                         "or 3 (RGB): this command is for networks that look at pictures")
    mean_, std_ = (np.asarray(values, np.float32) for values in (mean, std))
    for name, values in (("mean", mean_), ("std", std_)):
        if values.shape not in ((1,), (shape[2],)) or not np.isfinite(values).all() or (name == "std" and (values <= 0).any()):
            wanted = "positive, " if name == "std" else ""
            raise ValueError(f"{name} is {values.tolist()}, wanted {wanted}one number or one for each of {shape[2]} channels")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if len(files) < LEAST:
        raise ValueError(f"{folder} holds {len(files) or 'no'} pictures ({', '.join(sorted(SUFFIXES))}), wanted at least "
                         f"{LEAST}, better {FEW} and more, of the kind that the network will see")
    files = [files[i] for i in np.random.default_rng(0).permutation(len(files))[:MOST]]
    found, names, damaged, mode = list[np.ndarray](), list[str](), list[str](), MODES[shape[2]]
    sizes, modes = Counter[tuple[int, int]](), Counter[str]()
    height, width = _size(shape, size, files, Image)
    with progress("reading pictures", len(files)) as advance:
        for done, file in enumerate(files, 1):
            try:
                with Image.open(file) as opened:
                    image = ImageOps.exif_transpose(opened)
                    sizes[image.height, image.width] += 1
                    modes[image.mode] += image.mode != mode
                    if image.mode.startswith(("I", "F")):  # pillow cuts 16 bits off where they should be scaled
                        grey = np.asarray(image, np.float32)
                        image = Image.fromarray((grey * (255 / max(1.0, float(grey.max())))).astype(np.uint8))
                    image = image.convert(mode).resize((width, height), Image.Resampling.BILINEAR)
                    found.append(np.asarray(image).reshape(height, width, shape[2]))
                    names.append(str(file.relative_to(folder)))
            except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
                damaged.append(f"{file.name} ({error})")
            advance(done)
            if len(found) * height * width * shape[2] >= BYTES:
                break
    if len(found) < LEAST:
        raise ValueError(f"of the pictures of {folder} only {len(found)} can be read, wanted at least {LEAST}; not "
                         f"{damaged[0]}")
    notes = [f"{len(found)} pictures, as {mode}, in the file's NCHW: (pixel / 255 - mean) / std, mean {_list(mean_)}, std "
             f"{_list(std_)}."]
    if other := sum(sizes.values()) - sizes[height, width]:
        notes.append(f"{other} of them resized to {height} x {width} (bilinear, sides not kept in proportion): they are "
                     f"{_most(sizes)}.")
    if modes.total():
        notes.append(f"{modes.total()} of them converted to {mode}: they are {', '.join(m for m, n in modes.items() if n)}.")
    if damaged:
        notes.append(f"{len(damaged)} left out, as they cannot be read: {', '.join(damaged[:3])}.")
    if len(found) < FEW:
        notes.append(f"Only {len(found)} pictures: layers are fitted to these few, and the comparison says little. Wanted at "
                     f"least {FEW}, better some hundreds.")
    return Pictures(tuple(names), np.stack(found), mean_, std_, tuple(notes))


def read_labels(file: Path, names: Sequence[str]) -> np.ndarray:
    """The class (n,) of each picture, from lines "picture,class", class a number from 0.

    Raises:
      OSError: the file cannot be read.
      ValueError: a line is none of these, or a picture has none.
    """
    known: dict[str, int] = {}
    with file.open(newline="") as lines:
        for number, row in enumerate(csv.reader(lines), 1):
            if not row:
                continue
            if len(row) != 2 or not row[1].strip().isdigit():
                raise ValueError(f"line {number} of {file} is {','.join(row)!r}, wanted picture,class, the class a number")
            known[row[0].strip()] = int(row[1])
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(f"{file} has no label for {len(missing)} of {len(names)} pictures, the first {missing[0]!r}: name "
                         "them as they lie in the folder")
    return np.array([known[name] for name in names])


def _size(shape: Sequence[int | None], size: tuple[int, int] | None, files: list[Path], image: Any) -> tuple[int, int]:
    """(h, w) to resize to."""
    fixed = tuple(shape[:2])
    if size is not None and any(side not in (None, wanted) for side, wanted in zip(fixed, size, strict=True)):
        raise ValueError(f"the network fixes its input to {fixed[0]} x {fixed[1]}, the size asked for is {size[0]} x {size[1]}")
    if None not in fixed or size is not None:
        height, width = size or fixed
        return int(height or 0), int(width or 0)
    seen = Counter[tuple[int, int]]()
    for file in files[:FEW]:
        try:
            with image.open(file) as opened:
                seen[opened.height, opened.width] += 1
        except (OSError, SyntaxError, ValueError):
            continue
    most = seen.most_common(1)[0][0] if seen else (STEP, STEP)
    height, width = (side or max(STEP, STEP * round(common / STEP)) for side, common in zip(fixed, most, strict=True))
    return height, width


def _most(sizes: Counter[tuple[int, int]]) -> str:
    shown = [f"{height} x {width} ({count})" for (height, width), count in sizes.most_common(3)]
    return ", ".join(shown) + (f" and {len(sizes) - 3} other sizes" if len(sizes) > 3 else "")


def _list(values: np.ndarray) -> str:
    return ", ".join(f"{value:g}" for value in values.tolist())
