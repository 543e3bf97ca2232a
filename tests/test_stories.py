"""The stories' judges on cases done by hand, and what is made to be judged."""

import re

import numpy as np
import pytest

from experiments.benchmark import results
from experiments.stories import detection, digits, recognition, text
from experiments.stories.story import write_pictures
from experiments.stories.table import stories_table
from sparseflax.job.times import Times

pillow = pytest.importorskip("PIL.Image")
with_fonts = pytest.mark.skipif(not any((text.FONTS / "dejavu").glob("*.ttf")), reason="needs Debian's fonts-dejavu")


def test_boxes_grow_by_what_their_kernels_were_shrunk():
    chances = np.zeros((40, 60))
    chances[10:20, 20:40] = 0.9  # grows by 1.6 * 200 / 60
    chances[30:34, 5:9] = 0.4  # not sure enough
    chances[30:32, 50:58] = 0.9  # too thin
    more = 1.6 * 200 / 60
    np.testing.assert_allclose(detection.boxes_of(chances), [[20 - more, 10 - more, 40 + more, 20 + more]])
    assert detection.boxes_of(np.zeros((4, 4))).shape == (0, 4)


def test_a_box_matches_once():
    there = np.array([[0, 0, 10, 10], [20, 0, 30, 10.0]])
    found = np.array([[0, 0, 10, 9], [0, 0, 10, 10], [20, 0, 30, 4.9], [20, 0, 30, 5.0]])  # the third overlaps by 0.49
    assert detection.matches(found, there) == 2
    assert detection.matches(found[:3], there) == 1
    assert detection.matches(found[:0], there) == 0


@with_fonts
def test_detection_is_judged_by_the_boxes_of_all_scenes():
    some = [scene for scene in text.scenes(0, 4) if len(scene.boxes)]

    def shrunk(number):
        """A map whose kernels grow to the true boxes, without one of them."""
        chances = np.zeros((1, text.SIDE, text.SIDE, 1))
        for left, top, right, bottom in some[number].boxes.astype(int)[1:]:
            # (w + 2 d)(h + 2 d) is the box's area for d = 1.6 w h / (2 (w + h)): d about a quarter of its height
            d = round(0.25 * (bottom - top))
            chances[0, top + d:bottom - d, left + d:right - d] = 1
        return chances

    calls = iter(range(len(some)))
    found, count = detection.judged(lambda x: shrunk(next(calls)), some), sum(len(scene.boxes) for scene in some)
    assert found["precision"] == 100
    assert found["recall"] == pytest.approx(100 * (count - len(some)) / count)
    assert found["F score"] == pytest.approx(200 / (1 + 100 / found["recall"]))


def test_lines_are_read():
    alphabet = ["", "a", "b", " "]
    chances = np.eye(4)[[0, 1, 1, 0, 1, 2, 2, 3, 3, 0, 2]]
    assert recognition.decoded(chances, alphabet) == "aab b"
    for a, b, wanted in (("", "abc", 3), ("kitten", "sitting", 3), ("abc", "abc", 0), ("ab", "ba", 2), ("abcd", "acd", 1)):
        assert recognition.distance(a, b) == recognition.distance(b, a) == wanted
    pictures = np.zeros((2, 2, 2, 3), np.uint8)
    found = recognition.judged(lambda x: chances[None], pictures, ["aab b", "aabb"], alphabet)
    assert found == {"characters right": pytest.approx(100 * (1 - 1 / 9)), "lines right": 50}


def test_characters_stand_in_the_file(tmp_path):
    onnx = pytest.importorskip("onnx")
    model = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    onnx.save(model, tmp_path / "silent.onnx")
    with pytest.raises(ValueError, match="no list of characters in its metadata, wanted the recogniser of PP-OCRv4"):
        recognition.characters(tmp_path / "silent.onnx")
    onnx.helper.set_model_props(model, {"character": "a\n\u3000\nb"})
    onnx.save(model, tmp_path / "speaks.onnx")
    assert recognition.characters(tmp_path / "speaks.onnx") == ["", "a", "\u3000", "b", " "]


@with_fonts
def test_words_stand_where_it_is_said():
    first, again = text.scenes(5, 2), text.scenes(5, 2)
    for scene, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(scene.pixels, other.pixels)
        assert scene.pixels.shape == (text.SIDE, text.SIDE, 3) and len(scene.boxes) <= 8
        assert (scene.boxes[:, :2] >= 0).all() and (scene.boxes[:, 2:] <= text.SIDE).all()
        for i, (left, top, right, bottom) in enumerate(scene.boxes):
            others = np.delete(scene.boxes, i, 0)
            assert ((others[:, 0] >= right) | (others[:, 2] <= left) | (others[:, 1] >= bottom) | (others[:, 3] <= top)).all()
    pictures, texts = text.lines(5, 3)
    assert pictures.shape == (3, *text.LINE, 3)
    assert all(re.fullmatch(r"[A-Za-z0-9]+( [A-Za-z0-9]+){0,2}", said) for said in texts)


def test_fonts_that_are_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(text, "FONTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="install Debian's fonts-dejavu and fonts-liberation"):
        text.scenes(0, 1)


def test_pictures_are_written_once(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    write_pictures(tmp_path / "a", pixels)
    write_pictures(tmp_path / "a", 0 * pixels)
    with pillow.open(tmp_path / "a" / "0001.png") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels[1])


def test_ten_folds_are_one_line(monkeypatch, tmp_path):
    def told(fold, folder, precision):
        assert precision == "float32" and folder == tmp_path / f"fold{fold}"
        engines = {"onnxruntime": 2e-3} if fold else {"onnxruntime": 2e-3, "openvino": 1e-3}
        return {"layer": "digits", "network": "digits.onnx", "before": {"accuracy": 97.0 + fold % 2},
                "after": {"accuracy": 97.0}, "kept": 20 + fold, "weights": 100,
                "seconds": {"dense": 4e-3, "folded": 3e-3, "packed": (1 + fold) * 1e-4, **engines},
                "coarser": {"openvino bf16": {"seconds": 1.1e-3, "error": 0.001 * (fold % 3)}},
                "where": {"pruned layers": 1.0}, "highest": {"speedup": 9.0, "where": ""},
                "pictures": {"seen": 750}, "cpu": "a CPU", "threads": 2, "isa": "avx2", "versions": {}, "date": "2026-01-01",
                "commit": "abc"}

    monkeypatch.setattr(digits, "story", lambda folder, fold, asked, over: fold)
    monkeypatch.setattr(digits, "tell", told)
    line = digits.tenfold(tmp_path, "float32")
    assert line["before"] == {"accuracy": 97.5} and line["after"] == {"accuracy": 97.0} and line["kept"] == 24.5
    assert line["seconds"] == pytest.approx({"dense": 4e-3, "folded": 3e-3, "packed": 5.5e-4, "onnxruntime": 2e-3})
    text = stories_table([line])
    assert "| 2 | 98.0 % | 97.0 % | 1.0 | 0.20 | 15.00x | 10.00x | 21 % |" in text
    row = ("| digits | 3.00 | 2.00 (ONNX Runtime) | 0.55 | 5.45x | **3.64x** | 2.00x (OpenVINO, bf16, off by 0.1 %) | 24 % | "
           "97.50 % (accuracy) | 97.00 % | 0.50 |")
    assert row in text


def test_all_folds_ask_for_the_same(monkeypatch, tmp_path):
    taken = Times(4e-3, 3e-3, [], {"a": 1e-3, "b": 2e-3}, {}, {})
    monkeypatch.setattr(digits, "load_onnx", lambda path: None)
    monkeypatch.setattr(digits, "detect_machine", lambda: None)
    monkeypatch.setattr(digits, "afresh", lambda *_: taken)
    (tmp_path / "digits.onnx").write_bytes(b"")
    asked = tmp_path / "asked.json"
    assert digits.speedup_over_engines(tmp_path / "digits.onnx", np.zeros(1), asked, 2.2) == pytest.approx(6.6)
    monkeypatch.setattr(digits, "afresh", None)
    assert digits.speedup_over_engines(tmp_path / "digits.onnx", np.zeros(1), asked, 2.2) == pytest.approx(6.6)


def test_the_table_says_which_engine_was_the_fastest():
    lines = [line for lines in results.by_cpu(results.STORIES).values() for line in lines]
    line = lines[-1] | {"layer": "digits", "seconds": {"dense": 4e-3, "folded": 3e-3, "packed": 1e-3, "onnxruntime": 2e-3},
                        "before": {"accuracy": 99.0}, "after": {"accuracy": 98.5}, "kept": 25, "weights": 100,
                        "coarser": {}}
    row = "| digits | 3.00 | 2.00 (ONNX Runtime) | 1.00 | 3.00x | **2.00x** |  | 25 % | 99.00 % (accuracy) | 98.50 % | 0.50 |"
    assert row in stories_table([line])
