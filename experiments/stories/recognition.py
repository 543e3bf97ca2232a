"""Text recognition: PP-OCRv4's mobile recogniser reads lines made here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.stories.story import Call, Story, rapidocr, write_pictures
from experiments.stories.text import LINE, lines

NETWORK = "ch_PP-OCRv4_rec_infer.onnx"
PICTURES, CHOOSING, JUDGING = 320, 100, 300  # lines to prune by, to choose a speed by, and for the end


def story(folder: Path) -> Story:
    """The story, its pictures written into the folder."""
    network = rapidocr(NETWORK)
    pictures = write_pictures(folder / "pictures", lines(1, PICTURES)[0])
    alphabet, choosing, judging = characters(network), lines(2, CHOOSING), lines(3, JUDGING)

    def right_characters(call: Call) -> float:
        return judged(call, *choosing, alphabet)["characters right"]

    options = {"size": LINE, "mean": (0.5,), "std": (0.5,), "score": right_characters}
    return Story("recognition", network, pictures, options, lambda call: judged(call, *judging, alphabet),
                 _input(judging[0][0]))


def judged(call: Call, pictures: np.ndarray, texts: Sequence[str], alphabet: list[str]) -> dict[str, float]:
    """Characters and lines that are read right, in percent; a character less, more or another one is a wrong one."""
    read = [decoded(np.asarray(call(_input(pixels)))[0], alphabet) for pixels in pictures]
    wrong = sum(distance(text, said) for text, said in zip(texts, read, strict=True))
    return {"characters right": 100 * (1 - wrong / sum(map(len, texts))),
            "lines right": 100 * float(np.mean([text == said for text, said in zip(texts, read, strict=True)]))}


def characters(network: Path) -> list[str]:
    """What each of the network's outputs stands for: the first for nothing, the last for a space.

    Raises:
      ValueError: the file does not say.
    """
    import onnx

    stored = {entry.key: entry.value for entry in onnx.load(str(network)).metadata_props}
    if "character" not in stored:
        raise ValueError(f"{network} has no list of characters in its metadata, wanted the recogniser of PP-OCRv4")
    return ["", *stored["character"].split("\n"), " "]


def decoded(chances: np.ndarray, alphabet: list[str]) -> str:
    """The text of chances (places, characters): the best of each place, one for those that follow each other (CTC)."""
    best = chances.argmax(-1)
    return "".join(alphabet[i] for i in best[np.diff(best, prepend=-1) != 0])


def distance(text: str, other: str) -> int:
    """Levenshtein's."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(text, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def _input(pixels: np.ndarray) -> np.ndarray:
    return ((pixels[None].astype(np.float32) / np.float32(255)) - np.float32(0.5)) / np.float32(0.5)
