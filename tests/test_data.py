"""The cluttered digits: deterministic, drawn where they should be, and training apart from testing."""

import numpy as np
import pytest
from scipy import ndimage

from experiments import data
from experiments.data import digits as drawing


def test_the_seed_decides_every_bit():
    first, again, other = (data.cluttered_digits(seed, 40, 20) for seed in (3, 3, 4))
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


def test_shapes_and_statistics():
    digits = data.cluttered_digits(0, 300, 20)
    assert digits.train_images.shape == (300, 48, 48, 1) and digits.test_images.shape == (20, 48, 48, 1)
    assert digits.train_images.dtype == np.float32 and digits.train_labels.dtype == np.int32
    assert set(digits.train_labels) == set(range(data.CLASSES))
    # MEAN and DEVIATION are constants: the data follows them to a tenth, and to its own sampling error of about 0.01.
    assert abs(digits.train_images.mean()) < 0.1 and abs(digits.train_images.std() - 1) < 0.1


def test_training_and_testing_share_no_source_image(monkeypatch):
    pixels, _ = drawing.load_digits(return_X_y=True)
    everyone = np.arange(len(pixels))
    monkeypatch.setattr(drawing, "load_digits", lambda return_X_y: (pixels, everyone))
    digits = data.cluttered_digits(0, 2000, 200, noise=0)
    used = np.unique(digits.train_labels)
    assert len(used) > 900 and not np.isin(digits.test_labels, used).any()
    # Ink in the sources seen in training, and nowhere else: none of it may appear in a test canvas, not even as clutter.
    ink = np.zeros_like(pixels)
    ink[used] = 16
    monkeypatch.setattr(drawing, "load_digits", lambda return_X_y: (ink, everyone))
    digits = data.cluttered_digits(0, 2000, 200, noise=0)
    assert np.ptp(digits.test_images) == 0 and np.ptp(digits.train_images) > 1


@pytest.mark.parametrize("scale, degrees, centre", [
    (1.0, 0, (23.5, 23.5)), (1.0, 90, (23.5, 20.5)), (3.3, 11, (20.2, 30.7)), (2.7, 200, (14.0, 33.3))])
def test_pasting_agrees_with_scipy(scale, degrees, centre):
    image = np.random.default_rng(0).random((8, 8), np.float32)
    angle = np.deg2rad(degrees)
    side = drawing.SIDE + 2 * drawing.MARGIN
    canvas = np.zeros((1, side, side), np.float32)
    drawing._paste(canvas, image[None], np.array([scale]), np.array([angle]), np.array([centre]), 42)

    inverse = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / scale
    padded = np.pad(image, 1).astype(np.float64)
    offset = np.array([4.5, 4.5]) - inverse @ (np.array(centre) + drawing.MARGIN)
    expected = ndimage.affine_transform(padded, inverse, offset, (side, side), order=1, mode="constant")
    # Two interpolations, each of weights rounded to float32, two products and a sum, on pixels of at most 1.
    np.testing.assert_allclose(canvas[0], expected, atol=8 * 2**-24)
    if degrees == 90:
        np.testing.assert_allclose(canvas[0][28:36, 25:33], np.rot90(image, -1), atol=1e-5)


def test_pasting_keeps_the_brighter_pixel():
    canvas = np.full((1, 64, 64), 0.5, np.float32)
    image = np.array([[[0.2, 0.9], [0.9, 0.2]]], np.float32)
    drawing._paste(canvas, image, np.ones(1), np.zeros(1), np.array([[10.5, 10.5]]), 16)
    np.testing.assert_array_equal(canvas[0, 18:20, 18:20], np.float32([[0.5, 0.9], [0.9, 0.5]]))


def test_an_epoch_holds_every_example_once():
    steps = [data.batch_indices(5, step, 4, 20) for step in range(10)]
    first, second = np.concatenate(steps[:5]), np.concatenate(steps[5:])
    assert sorted(first) == sorted(second) == list(range(20))
    assert list(first) != list(second)
    np.testing.assert_array_equal(data.batch_indices(5, 7, 4, 20), second[8:12])
    assert len(data.batch_indices(5, 3, 8, 20)) == 8  # the last four of an epoch are left out


def test_a_batch_larger_than_the_training_set():
    with pytest.raises(ValueError, match="a batch of 21 cannot be drawn from 20 training examples; choose batch between 1"):
        data.batch_indices(0, 0, 21, 20)
