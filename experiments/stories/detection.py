"""Text detection: PP-OCRv4's mobile detector finds words in scenes made here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from experiments.stories.story import Call, Story, rapidocr, write_pictures
from experiments.stories.text import Scene, scenes

NETWORK = "ch_PP-OCRv4_det_infer.onnx"
PICTURES, CHOOSING, JUDGING = 200, 100, 200  # scenes to prune by, to choose a speed by, and for the end
# Of the map, of a component's mean; how much a component grows, and how many pixels its sides have at least: as RapidOCR's.
THRESHOLD, SURE, UNCLIP, LEAST = 0.3, 0.5, 1.6, 3
MATCH = 0.5  # intersection over union


def story(folder: Path) -> Story:
    """The story, its pictures written into the folder."""
    pictures = write_pictures(folder / "pictures", (scene.pixels for scene in scenes(1, PICTURES)))
    choosing, judging = scenes(2, CHOOSING), scenes(3, JUDGING)

    def f_score(call: Call) -> float:
        return judged(call, choosing)["F score"]

    options = {"mean": (0.5,), "std": (0.5,), "score": f_score}
    return Story("detection", rapidocr(NETWORK), pictures, options, lambda call: judged(call, judging), _input(judging[0]))


def judged(call: Call, some: Sequence[Scene]) -> dict[str, float]:
    """F score, recall and precision of the boxes found in scenes, in percent."""
    right = found = there = 0
    for scene in some:
        boxes = boxes_of(np.asarray(call(_input(scene)))[0, :, :, 0])
        right, found, there = right + matches(boxes, scene.boxes), found + len(boxes), there + len(scene.boxes)
    return {"F score": 200 * right / (found + there), "recall": 100 * right / there, "precision": 100 * right / max(found, 1)}


def boxes_of(chances: np.ndarray) -> np.ndarray:
    """Boxes (n, 4), left, top, right, bottom, of a map (h, w) of the chance that a pixel is in the kernel of a word."""
    labelled: Any = ndimage.label(chances > THRESHOLD, np.ones((3, 3)))
    components, count = labelled
    means = ndimage.mean(chances, components, np.arange(1, count + 1)) if count else []
    boxes = []
    for (rows, columns), mean in zip(ndimage.find_objects(components), means, strict=True):
        height, width = rows.stop - rows.start, columns.stop - columns.start
        if mean < SURE or min(height, width) < LEAST:
            continue
        more = UNCLIP * height * width / (2 * (height + width))  # the kernel was shrunk so for the training
        boxes.append((columns.start - more, rows.start - more, columns.stop + more, rows.stop + more))
    return np.array(boxes, float).reshape(-1, 4)


def matches(found: np.ndarray, there: np.ndarray) -> int:
    """How many boxes meet one of the others, each one at most, the best first."""
    low, high = np.maximum(found[:, None, :2], there[None, :, :2]), np.minimum(found[:, None, 2:], there[None, :, 2:])
    common = (high - low).clip(0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (found, there)]
    overlap, count = common / (areas[0][:, None] + areas[1] - common), 0
    while overlap.size and overlap.max() >= MATCH:
        row, column = np.unravel_index(overlap.argmax(), overlap.shape)
        overlap[row], overlap[:, column] = 0, 0
        count += 1
    return count


def _input(scene: Scene) -> np.ndarray:
    return ((scene.pixels[None].astype(np.float32) / np.float32(255)) - np.float32(0.5)) / np.float32(0.5)
