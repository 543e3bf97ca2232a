"""Cluttered digits: drawn from scikit-learn's, deterministic from a seed, small enough to train on in minutes."""

import numpy as np
from sklearn.datasets import load_digits

from experiments.data.dataset import Dataset

SIDE = 48
CLASSES = 10
TEST_SOURCES = 500  # of scikit-learn's 1797 digits; canvases for testing are made from these and no others
MARGIN = 8  # pixels around the canvas while drawing, so that what is cut off at an edge needs no special case
MEAN, DEVIATION = 0.16, 0.29


def cluttered_digits(seed: int, train: int, test: int, fragments: int = 4, noise: float = 0.1) -> Dataset:
    """Digits of 8x8 pixels, enlarged, turned and shifted on 48x48 canvases among fragments of other digits and noise.

    No source image is used for both training and testing, neither as the digit nor as clutter.

    Args:
      seed: decides everything; the same seed gives the same bits.
      train, test: number of canvases.
      fragments: pieces of 3x3 source pixels, of other digits, pasted on each canvas.
      noise: standard deviation of the Gaussian noise added to pixels in [0, 1].

    Returns:
      A Dataset of images (count, 48, 48, 1), shifted and scaled by constants to about zero mean and unit variance.

    Source:
      scikit-learn's copy of the UCI "Optical recognition of handwritten digits" test set; clutter as in Mnih et al.,
      "Recurrent models of visual attention", 2014.
    """
    pixels, labels = load_digits(return_X_y=True)
    images, labels = (pixels.reshape(-1, 8, 8) / 16).astype(np.float32), labels.astype(np.int32)
    order = np.random.default_rng((seed, 0)).permutation(len(images))
    for_test, for_train = order[:TEST_SOURCES], order[TEST_SOURCES:]
    train_images, train_labels = _canvases(
        np.random.default_rng((seed, 1)), images[for_train], labels[for_train], train, fragments, noise
    )
    test_images, test_labels = _canvases(
        np.random.default_rng((seed, 2)), images[for_test], labels[for_test], test, fragments, noise
    )
    return Dataset(train_images, train_labels, test_images, test_labels)


def _canvases(rng, images, labels, count, fragments, noise):
    canvas = np.zeros((count, SIDE + 2 * MARGIN, SIDE + 2 * MARGIN), np.float32)
    chosen = rng.integers(len(images), size=count)
    # The digit's centre keeps 13 pixels from every edge: its strokes fill about 8 source pixels by 6.
    centre = rng.uniform(13, SIDE - 13, (count, 2))
    _paste(canvas, images[chosen], rng.uniform(2.6, 3.6, count), rng.uniform(-np.pi / 12, np.pi / 12, count), centre, 42)
    for _ in range(fragments):
        # Source pixels 1 to 6 hold the ink; the outer ones are nearly always empty.
        top, left = rng.integers(1, 5, (2, count, 1, 1))
        piece = images[rng.integers(len(images), size=(count, 1, 1)), top + np.arange(3)[:, None], left + np.arange(3)]
        centre = rng.uniform(0, SIDE, (count, 2))
        _paste(canvas, piece, rng.uniform(2.6, 3.6, count), rng.uniform(0, 2 * np.pi, count), centre, 16)
    canvas = canvas[:, MARGIN:-MARGIN, MARGIN:-MARGIN]
    canvas = canvas + noise * rng.standard_normal(canvas.shape, np.float32)
    # Constants, not statistics of the data: about the mean and the deviation of a canvas with four fragments.
    return ((canvas - MEAN) / DEVIATION)[..., None], labels[chosen]


def _paste(canvas, images, scale, angle, centre, box):
    """Draw images (count, side, side), enlarged and turned, at their centres; where two overlap the brighter pixel stays.

    `box` is the side in pixels of the square that is drawn. It must hold the turned image: 42 >= 8 * 3.6 * (cos 15 +
    sin 15 degrees) = 35.3 for digits and 16 >= 3 * 3.6 * sqrt(2) = 15.3 for fragments, and half of it beyond the nearest
    possible centre must lie within MARGIN of the canvas: 21 - 13 and 8 - 0.
    """
    count, side, _ = images.shape
    everyone = np.arange(count)[:, None, None]
    corner = np.round(centre).astype(np.int64) - box // 2
    y = corner[:, 0, None, None] + np.arange(box)[:, None]
    x = corner[:, 1, None, None] + np.arange(box)
    dy, dx = y - centre[:, 0, None, None], x - centre[:, 1, None, None]
    cos, sin = (np.cos(angle) / scale)[:, None, None], (np.sin(angle) / scale)[:, None, None]
    # Zeros around the source let bilinear sampling fade out at its edges; the second ones after it are read, weighed by 0.
    source = np.pad(images, ((0, 0), (1, 2), (1, 2)))
    source_y = np.clip(cos * dy - sin * dx + (side + 1) / 2, 0, side + 1)
    source_x = np.clip(sin * dy + cos * dx + (side + 1) / 2, 0, side + 1)
    y0, x0 = source_y.astype(np.int64), source_x.astype(np.int64)
    fy, fx = (source_y - y0).astype(np.float32), (source_x - x0).astype(np.float32)
    upper = source[everyone, y0, x0] * (1 - fx) + source[everyone, y0, x0 + 1] * fx
    lower = source[everyone, y0 + 1, x0] * (1 - fx) + source[everyone, y0 + 1, x0 + 1] * fx
    at = everyone, y + MARGIN, x + MARGIN
    canvas[at] = np.maximum(canvas[at], upper * (1 - fy) + lower * fy)
