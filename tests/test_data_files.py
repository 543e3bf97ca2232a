"""CIFAR-10 and images in folders: read as they were written, augmented within bounds, damage named."""

import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from experiments.data import cifar10 as load_cifar10
from experiments.data import image_folder
from experiments.data.augment import centre, pad_crop_flip
from experiments.data.cifar10 import FILES, MEAN, RECORD, Cifar10
from experiments.data.image_folder import ImageFolder
from experiments.data.streamed import Streamed

Image = pytest.importorskip("PIL.Image")
RECORDS = 6  # in each file, instead of 10,000


@pytest.fixture
def cifar(tmp_path):
    """A folder of CIFAR-10's files, and the images (36, 32, 32, 3) and labels (36,) in them."""
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (6 * RECORDS, 32, 32, 3), np.uint8)
    labels = draw.integers(0, 10, 6 * RECORDS)
    inner = tmp_path / "cifar-10-batches-bin"
    inner.mkdir()
    for at, name in enumerate((*FILES[True], *FILES[False])):
        content = b""
        for i in range(at * RECORDS, (at + 1) * RECORDS):
            content += bytes([labels[i]]) + b"".join(images[i, :, :, channel].tobytes() for channel in range(3))
        (inner / name).write_bytes(content)
    return tmp_path, images, labels


@pytest.fixture
def pictures(tmp_path):
    """A folder of train and val, each of two classes; every picture is of one colour, which is its class's."""
    for part in ("train", "val"):
        for label, name in enumerate(("ant", "bee")):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(3):
                size = (20, 30) if i else (48, 20)
                Image.new("RGB", size, (200 * label, 10, 100)).save(tmp_path / part / name / f"{i}.png")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("not an image")
    return tmp_path


@pytest.mark.parametrize("train, chosen", [(True, slice(0, 5 * RECORDS)), (False, slice(5 * RECORDS, None))])
def test_cifar_10_is_read_as_it_was_written(cifar, train, chosen):
    folder, images, labels = cifar
    for place in (folder, folder / "cifar-10-batches-bin"):
        source = Cifar10(place, train, RECORDS)
        assert len(source) == len(labels[chosen])
        np.testing.assert_array_equal(source.labels, labels[chosen])
        for i, (image, label) in enumerate(zip(images[chosen], labels[chosen], strict=True)):
            np.testing.assert_array_equal(source[i][0], image)
            assert source[i][1] == label


def test_cifar_10_is_missing_cut_short_or_something_else(cifar):
    folder = cifar[0] / "cifar-10-batches-bin"
    with pytest.raises(FileNotFoundError, match="there is no .*nowhere/data_batch_1.bin: get https://.*binary.tar.gz"):
        Cifar10(folder / "nowhere", True)
    with pytest.raises(ValueError, match=rf"data_batch_1.bin has {RECORDS * RECORD} bytes, wanted 30730000 \(10000 records"):
        Cifar10(folder, True)
    file = folder / "data_batch_4.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match="data_batch_4.bin has .*it is cut short or another file; get https"):
        Cifar10(folder, True, RECORDS)
    file.write_bytes(b"\x0a" + whole[1:])
    with pytest.raises(ValueError, match="data_batch_4.bin has a label 10, wanted at most 9: it is no file of CIFAR-10"):
        Cifar10(folder, True, RECORDS)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="data_batch_4.bin"):
        load_cifar10(folder, RECORDS)


def test_test_images_are_scaled_and_made_when_asked_for(cifar):
    folder, images, labels = cifar
    data = load_cifar10(folder, RECORDS)
    assert data.train_images.shape == (5 * RECORDS, 32, 32, 3) and len(data.test_images) == RECORDS
    np.testing.assert_array_equal(data.test_labels, labels[5 * RECORDS :])
    taken = data.test_images[1:4]
    expected = (images[5 * RECORDS + 1 : 5 * RECORDS + 4] / 255 - MEAN) / [0.2470, 0.2435, 0.2616]
    assert taken.dtype == np.float32
    # Three roundings to float32, of values of at most 2.8.
    np.testing.assert_allclose(taken, expected, atol=3 * 2.8 * 2**-23)
    np.testing.assert_array_equal(data.test_images[RECORDS - 2 : RECORDS + 9], data.test_images[RECORDS - 2 :])


@pytest.mark.parametrize("height, width, side, pad", [(8, 8, 8, 2), (8, 8, 6, 0), (9, 7, 7, 0), (5, 5, 9, 2), (4, 4, 4, 0)])
def test_augmentation_takes_every_square_and_its_mirror_image_and_no_other(height, width, side, pad):
    image = 1 + np.arange(height * width * 2, dtype=np.uint8).reshape(height, width, 2)
    padded = np.zeros((height + 2 * pad, width + 2 * pad, 2), np.uint8)
    padded[pad : pad + height, pad : pad + width] = image
    squares = {}
    for top in range(height + 2 * pad - side + 1):
        for left in range(width + 2 * pad - side + 1):
            square = padded[top : top + side, left : left + side]
            squares |= {square.tobytes(): 0, square[:, ::-1].tobytes(): 0}
    draw = np.random.default_rng(0)
    for _ in range(40 * len(squares)):
        square = pad_crop_flip(image, draw, side, pad)
        assert square.shape == (side, side, 2) and square.dtype == np.uint8
        squares[square.tobytes()] += 1  # a KeyError for any other
    # Each is drawn 40 times on average: under 5 has a chance of 1e-11.
    assert min(squares.values()) >= 5


def test_the_square_in_the_middle_and_one_too_large():
    image = np.arange(6 * 5).reshape(6, 5, 1)
    np.testing.assert_array_equal(centre(image, 4), image[1:5, 0:4])
    for take in (centre, partial(pad_crop_flip, draw=np.random.default_rng(0))):
        with pytest.raises(ValueError, match="an image of 6x5 pixels holds no square of 6: choose a smaller one or"):
            take(image, side=6)


def test_a_folder_of_images(pictures):
    source = ImageFolder(pictures / "train", shorter=16)
    assert source.classes == ["ant", "bee"] and len(source) == 6
    np.testing.assert_array_equal(source.labels, [0, 0, 0, 1, 1, 1])
    for i in range(6):
        image, label = source[i]
        assert image.shape == ((24, 16, 3) if i % 3 else (16, 38, 3)) and label == i // 3  # 48 of 20 rows: 38.4 of 16
        assert (image == (200 * label, 10, 100)).all() and image.dtype == np.uint8
    data = image_folder(pictures, side=12, shorter=16)
    assert data.test_images.shape == (6, 12, 12, 3) and data.test_images[2:5].shape == (3, 12, 12, 3)


def test_a_damaged_folder_of_images(pictures):
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere/train: it has to hold a folder of images"):
        image_folder(pictures / "nowhere")
    with pytest.raises(ValueError, match="holds no folders: it has to hold one of images for each class"):
        ImageFolder(pictures / "train" / "ant")
    (pictures / "train" / "cat").mkdir()
    with pytest.raises(ValueError, match=r"train has no image \(.jpeg, .jpg, .png\) of cat: was it unpacked in full"):
        image_folder(pictures)
    Image.new("RGB", (8, 8)).save(pictures / "train" / "cat" / "x.png")
    with pytest.raises(ValueError, match="differ in 1 classes, such as 'cat': both need the same"):
        image_folder(pictures)
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    file = pictures / "val" / "ant" / "0.png"
    Image.fromarray(noise).save(file)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no image"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"ant/0.png cannot be read \(.*\): it is cut short or no image; get it again"):
            ImageFolder(pictures / "val")[0]


def test_without_grain_or_pillow(cifar, pictures, monkeypatch):
    data = load_cifar10(cifar[0], RECORDS)
    monkeypatch.setitem(sys.modules, "grain", None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"training on files needs grain: pip install 'sparseflax\[data\]'"):
        data.train_batch(0, 0, 4)
    with pytest.raises(ImportError, match=r"reading images needs pillow: pip install 'sparseflax\[data\]'"):
        ImageFolder(pictures / "train")[0]
    with pytest.raises(ValueError, match="a batch of 31 cannot be drawn from 30 training examples; choose batch"):
        data.train_batch(0, 0, 31)


def test_batches_through_grain_are_a_function_of_seed_and_step(cifar):
    pytest.importorskip("grain")
    folder, images, labels = cifar

    def fresh() -> Streamed:
        return load_cifar10(Path(folder), RECORDS)

    straight = fresh()
    steps = [straight.train_batch(3, step, 10) for step in range(6)]
    for batch_images, batch_labels in steps:
        assert batch_images.shape == (10, 32, 32, 3) and batch_images.dtype == np.float32 and batch_labels.dtype == np.int32
    for epoch in (steps[:3], steps[3:]):
        assert sorted(np.concatenate([part for _, part in epoch])) == sorted(labels[: 5 * RECORDS])
    later = fresh()
    for step in (4, 5, 1):
        for wanted, found in zip(steps[step], later.train_batch(3, step, 10), strict=True):
            np.testing.assert_array_equal(wanted, found)
    assert not np.array_equal(steps[0][0], straight.train_batch(4, 0, 10)[0])
