"""Pictures of words, made here, so that it is known where each word stands and what it says.

Made-up words and numbers in the fonts DejaVu and Liberation (Debian's fonts-dejavu and fonts-liberation), a little skewed and
blurred, on grounds with a texture.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

FONTS = Path("/usr/share/fonts/truetype")
SIDE = 320  # of a scene
LINE = 48, 320  # of a line of text
SKEW = 6.0  # degrees at most
GAP = 0.8  # of a word's height that is left free around it
ONSETS, VOWELS, ENDS = "b c d f g h k l m n p r s t v w z st tr pl ch sh".split(), list("aeiou"), ["", "n", "r", "s", "t", "l"]


class Scene(NamedTuple):
    """A picture of some words.

    Attributes:
      pixels: uint8 (SIDE, SIDE, 3).
      boxes: (words, 4), of each word's ink: left, top, right, bottom, the last two beyond it.
    """

    pixels: np.ndarray
    boxes: np.ndarray


def fonts() -> list[Path]:
    """Those that are installed, upright ones with Latin letters.

    Raises:
      FileNotFoundError: there are none.
    """
    found = [file for folder in ("dejavu", "liberation") for file in sorted((FONTS / folder).glob("*.ttf"))
             if not any(part in file.stem for part in ("Oblique", "Italic", "Math", "ExtraLight"))]
    if not found:
        raise FileNotFoundError(f"there is no font in {FONTS}/dejavu or liberation: install Debian's fonts-dejavu and "
                                "fonts-liberation")
    return found


def word(draw: np.random.Generator) -> str:
    """A word of one to three syllables, or a number."""
    if draw.random() < 0.2:
        return str(draw.integers(10, 10 ** draw.integers(2, 6)))
    syllables = ["".join(draw.choice(part) for part in (ONSETS, VOWELS, ENDS)) for _ in range(draw.integers(1, 4))]
    text = "".join(syllables)
    return (text, text.capitalize(), text.upper())[draw.choice(3, p=(0.5, 0.35, 0.15))]


def scenes(seed: int, count: int) -> list[Scene]:
    """So many scenes, of three to eight words each."""
    draw, files = np.random.default_rng((seed, 1)), fonts()
    return [_scene(draw, files) for _ in range(count)]


def lines(seed: int, count: int) -> tuple[np.ndarray, list[str]]:
    """So many lines of one to three words, uint8 (count, 48, 320, 3), grey to the right of the text; and what they say."""
    draw, files = np.random.default_rng((seed, 2)), fonts()
    found, texts = [], []
    while len(found) < count:
        text = " ".join(word(draw) for _ in range(draw.integers(1, 4)))
        ink = _ink(text, files[draw.integers(len(files))], 40, draw)
        height, width = ink.shape[0] + draw.integers(4, 14), ink.shape[1] + draw.integers(8, 24)
        scaled = round(LINE[0] * width / height)
        if scaled > LINE[1]:
            continue
        mask = np.zeros((height, width), np.float32)
        top, left = (height - ink.shape[0]) // 2, (width - ink.shape[1]) // 2
        mask[top:top + ink.shape[0], left:left + ink.shape[1]] = ink
        picture = Image.fromarray(_painted(_ground(draw, height, width), mask, draw)).resize((scaled, LINE[0]))
        page = np.full((*LINE, 3), 128, np.uint8)
        page[:, :scaled] = np.asarray(picture)
        found.append(page)
        texts.append(text)
    return np.stack(found), texts


def _scene(draw: np.random.Generator, files: list[Path]) -> Scene:
    pixels, taken = _ground(draw, SIDE, SIDE), np.zeros((SIDE, SIDE), bool)
    boxes = []
    for _ in range(draw.integers(3, 9)):
        ink = _ink(word(draw), files[draw.integers(len(files))], int(draw.integers(18, 44)), draw)
        (h, w), free = ink.shape, int(GAP * ink.shape[0])
        if h + 8 > SIDE or w + 8 > SIDE:
            continue
        for _ in range(20):
            top, left = draw.integers(4, SIDE - h - 3), draw.integers(4, SIDE - w - 3)
            around = slice(max(0, top - free), top + h + free), slice(max(0, left - free), left + w + free)
            if taken[around].any():
                continue
            taken[top:top + h, left:left + w] = True
            mask = np.zeros((SIDE, SIDE), np.float32)
            mask[top:top + h, left:left + w] = ink
            pixels = _painted(pixels, mask, draw)
            boxes.append((left, top, left + w, top + h))
            break
    return Scene(pixels, np.array(boxes, float).reshape(-1, 4))


def _ink(text: str, font: Path, size: int, draw: np.random.Generator) -> np.ndarray:
    """A word's mask in [0, 1], skewed and blurred, cut to its ink."""
    face = ImageFont.truetype(str(font), size)
    left, top, right, bottom = face.getbbox(text)
    room = size
    image = Image.new("L", (int(right - left) + 2 * room, int(bottom - top) + 2 * room))
    ImageDraw.Draw(image).text((room - left, room - top), text, fill=255, font=face)
    image = image.rotate(draw.uniform(-SKEW, SKEW) / max(1, len(text) / 6), Image.Resampling.BICUBIC)
    image = image.filter(ImageFilter.GaussianBlur(draw.uniform(0, size / 36)))
    mask = np.asarray(image, np.float32) / 255
    rows, columns = (np.flatnonzero((mask > 0.15).any(axis=axis)) for axis in (1, 0))
    return mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]


def _ground(draw: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A texture uint8 (height, width, 3): a colour that changes slowly, and grain."""
    coarse = draw.normal(0, 14, (draw.integers(2, 7), draw.integers(2, 7), 3)) + draw.uniform(60, 200, 3)
    image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    grain = draw.normal(0, draw.uniform(1, 8), (height, width, 1))
    return (np.asarray(image) + grain).clip(0, 255).astype(np.uint8)


def _painted(ground: np.ndarray, mask: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """The ground with a mask in a colour that stands out from it."""
    light = ground[mask > 0.5].mean() if (mask > 0.5).any() else ground.mean()
    grey = light + (1 if light < 128 else -1) * draw.uniform(70, 120)
    colour = (grey + draw.normal(0, 20, 3)).clip(0, 255)
    return (ground + mask[..., None] * (colour - ground)).clip(0, 255).astype(np.uint8)
