"""Small random changes to training images, and the one view of an image for testing. All on uint8 (h, w, c)."""

from __future__ import annotations

import numpy as np


def pad_crop_flip(image: np.ndarray, draw: np.random.Generator, side: int, pad: int = 0) -> np.ndarray:
    """A random square of the image with zeros around it, mirrored half the time.

    Args:
      image: (h, w, c).
      draw: where randomness comes from.
      side: of the square, in pixels.
      pad: zeros added on every edge first; 4 for CIFAR-10 (He et al., 2016), none where images are larger than `side`.

    Returns:
      (side, side, c).

    Raises:
      ValueError: the padded image is smaller than the square.
    """
    if pad:
        image = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    top, left = (int(draw.integers(room + 1)) for room in _room(image, side))
    square = image[top : top + side, left : left + side]
    return square[:, ::-1] if draw.integers(2) else square


def centre(image: np.ndarray, side: int) -> np.ndarray:
    """The square (side, side, c) in the middle of an image (h, w, c). Raises as `pad_crop_flip`."""
    top, left = (room // 2 for room in _room(image, side))
    return image[top : top + side, left : left + side]


def _room(image: np.ndarray, side: int) -> tuple[int, int]:
    height, width = image.shape[:2]
    if min(height, width) < side:
        raise ValueError(f"an image of {height}x{width} pixels holds no square of {side}: choose a smaller one or more padding")
    return height - side, width - side
