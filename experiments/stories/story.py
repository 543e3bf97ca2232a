"""What all stories have in common: a network made faster, one point lost at most, and judged on pictures it has not seen."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from flax import nnx
from PIL import Image

import sparseflax
from experiments.benchmark.results import Line, provenance
from experiments.benchmark.where import where_time_goes
from sparseflax.conv import ffi
from sparseflax.onnx import load_onnx

JOB = "faster"  # the folder of a story's job, in the story's
POINTS = 1.0  # that may be lost, where a story's options say nothing else
Call = Callable[[Any], Any]  # of a network
Precision = Literal["float32", "int8"]


class Story(NamedTuple):
    """A network and its task.

    Attributes:
      name: of the story.
      network: an ONNX file.
      pictures: a folder of them, to prune by.
      options: of `sparseflax.faster`.
      judge: what a network is worth, in percent, on pictures for the end; the points are of the first.
      input: (1, h, w, c).
    """

    name: str
    network: Path
    pictures: Path
    options: Mapping[str, Any]
    judge: Callable[[Call], dict[str, float]]
    input: np.ndarray


def tell(story: Story, folder: Path, precision: Precision) -> Line:
    """Makes the network faster in the folder, in that precision; a line of the results.

    Raises:
      ImportError, OSError, ValueError: as `sparseflax.faster`.
    """
    found = sparseflax.faster(story.network, story.pictures, out=folder / JOB, precision=precision,
                               **{"points": POINTS, **story.options})
    dense = load_onnx(story.network)
    packed, plan = sparseflax.load(folder / JOB / "network.safetensors", load_onnx(story.network))
    before, after = story.judge(_call(dense)), story.judge(_call(packed))
    kept = ("seconds", "coarser", "failed", "speedup", "weights", "kept", "pictures", "curve", "highest", "fidelity",
            "shortfall")
    engines = [package for package in ("onnxruntime", "openvino") if importlib.util.find_spec(package)]
    return {
        "set": "stories", "layer": story.name if precision == "float32" else f"{story.name}, {precision}",
        "precision": precision, "int8": sum(row.inputs is not None for row in plan.layers), "layers": len(plan.layers),
        "network": story.network.name, "n": found["batch"], "threads": found["threads"],
        "isa": ffi.isa(), "before": before, "after": after, "where": _where(packed, plan, story.input),
        **{key: found[key] for key in kept},
    } | provenance(["flax", "jax", "jaxlib", "numpy", *engines])


def _call(network: nnx.Module) -> Call:
    graph, state = nnx.split(network)
    run = nnx.jit(lambda state, x: nnx.merge(graph, state)(x))
    return lambda x: run(state, x)


def _where(packed: nnx.Module, plan: sparseflax.Plan, x: np.ndarray) -> dict[str, float]:
    """Shares of the packed network's time, by the kind of what takes it."""
    layers, others, _ = where_time_goes(packed, x)
    rows = {row.path: row for row in plan.layers}
    shares: dict[str, float] = dict.fromkeys(("pruned layers", "depthwise layers", "other layers"), 0.0)
    for path, seconds in layers.items():
        row = rows.get(path)
        sparse, depthwise = row and row.choice == "sparse", row and row.shape and 1 < row.shape.groups == row.shape.ic
        shares["pruned layers" if sparse else "depthwise layers" if depthwise else "other layers"] += seconds
    shares["what is no layer"] = sum(others.values())
    total = sum(shares.values())
    return {kind: seconds / total for kind, seconds in shares.items()}


def write_pictures(folder: Path, pictures: Any) -> Path:
    """Writes pictures uint8 (n, h, w) or (n, h, w, 3), numbered, where they are not yet; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(pictures):
        file = folder / f"{number:04}.png"
        if not file.exists():
            Image.fromarray(pixels).save(file)
    return folder


def rapidocr(name: str) -> Path:
    """A network of the package rapidocr_onnxruntime, which need not be imported.

    Raises:
      ImportError: it is not installed.
    """
    package = importlib.util.find_spec("rapidocr_onnxruntime")
    if package is None or package.origin is None:
        raise ImportError("the network is that of a package: pip install --no-deps rapidocr_onnxruntime==1.4.4")
    return Path(package.origin).parent / "models" / name
