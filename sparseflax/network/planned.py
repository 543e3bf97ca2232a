"""What becomes of each layer of a model: a printable table, a row for each, and for what input and machine."""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from sparseflax.conv.int8 import Quantization
from sparseflax.cost.machine import Machine
from sparseflax.cost.model import Work, conv_seconds, dense_seconds
from sparseflax.cost.shape import ConvShape

# Images that a thread may take through a packed network at a time, and how much longer fewer of them may take for each: the
# model sees layers alone, and what lies between them leaves the caches. ResNet-50 at n=16 takes 178 ms by two, 204 by eight.
CHUNKS, WORTH = (1, 2, 4, 8, 16), 1.03


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Attributes:
      path: of the layer in the model, "block1/conv2".
      kind: its class, "Conv".
      kernel_shape: of its dense kernel, or of another weight of a module that has none.
      shape: what it computes for the planned input; None if no single 2-D convolution describes that.
      density: kept / all of its weights, times its mask.
      choice: "dense" or "sparse".
      kernel: what will run it: the instruction set of a kernel of ours, sparse or dense, or "xla".
      dense_seconds, sparse_seconds: predicted; None without a shape.
      norm: path of the batch norm that is folded into it, or None.
      reason: of the choice, in words.
      dense_measured, sparse_measured: seconds on this machine; None where nothing was measured.
      int8_seconds: predicted in eight bits; None where that was not looked at.
      inputs, outputs: what its uint8 inputs stand for, and its outputs if they are rounded, if it runs in eight bits; None in
        float32.
      error: relative error of its outputs in eight bits on the examples; None where it was not measured.
      correction: of its bias in eight bits, one for each output channel.
      open: whether it can become sparse, and is not so already.

    Raises:
      ValueError: `shape` is of another number of weights than `kernel_shape`.
    """

    path: str
    kind: str
    kernel_shape: tuple[int, ...]
    shape: ConvShape | None
    density: float
    choice: Literal["dense", "sparse"]
    kernel: str
    dense_seconds: float | None
    sparse_seconds: float | None
    norm: str | None
    reason: str
    dense_measured: float | None = None
    sparse_measured: float | None = None
    int8_seconds: float | None = None
    inputs: Quantization | None = None
    outputs: Quantization | None = None
    error: float | None = None
    correction: tuple[float, ...] = ()
    open: bool = True

    def __post_init__(self):
        # A transposed convolution once it is packed has places that hold no weight.
        if self.shape is not None and math.prod(self.kernel_shape) - self.shape.weights not in (0, self.shape.void):
            raise ValueError(f"layer {self.path!r} has a kernel {self.kernel_shape}, planned as {self.shape}: plan the model "
                             "again")

    @property
    def seconds(self) -> float:
        """Predicted for the choice; 0 where nothing is predicted."""
        if self.inputs is not None:
            return self.int8_seconds or 0.0
        return (self.sparse_seconds if self.choice == "sparse" else self.dense_seconds) or 0.0


@dataclass(frozen=True)
class Plan:
    """One LayerPlan per layer, in call order, and the machine and the input they are for; `print(plan)` is a table."""

    layers: tuple[LayerPlan, ...]
    machine: Machine
    inputs: str = ""

    @property
    def dense_seconds(self) -> float:
        """Predicted for all layers, dense."""
        return sum(layer.dense_seconds or 0.0 for layer in self.layers)

    @property
    def seconds(self) -> float:
        """Predicted for all layers as planned."""
        return sum(layer.seconds for layer in self.layers)

    @functools.cached_property
    def chunk(self) -> int:
        """Images that a thread takes through a packed network at a time: the fewest for which each takes about the least."""
        rows = [(row, row.shape) for row in self.layers if row.shape is not None]
        batch = self._batch

        def seconds(images: int) -> float:
            total = 0.0
            for choice, predict in (("dense", lambda work, _: dense_seconds(work, self.machine)),
                                    ("sparse", lambda work, density: conv_seconds(work, density, self.machine))):
                some = [(row, shape.with_batch(shape.n // batch * images)) for row, shape in rows
                        if (row.choice == "sparse" and row.sparse_seconds is not None) == (choice == "sparse")]
                if some:
                    density = np.array([max(row.density, 1 / shape.weights) for row, shape in some], np.float32)
                    total += float(predict(Work.stack([shape for _, shape in some], self.machine), density).sum())
            return total / images

        try:
            each = {images: seconds(images * self.machine.threads) for images in CHUNKS}
            return min(images for images in CHUNKS if each[images] <= WORTH * min(each.values()))
        except ValueError:  # the counts of another architecture's kernel are not known here
            return CHUNKS[0]

    @property
    def _batch(self) -> int:
        """Images of the planned input: what is common to the layers, as one may be called several times."""
        return math.gcd(*(row.shape.n for row in self.layers if row.shape is not None)) or 1

    @property
    def all_dense(self) -> Plan:
        """The same with every layer dense."""
        return replace(self, layers=tuple(replace(layer, choice="dense") for layer in self.layers))

    def to_dict(self) -> dict[str, Any]:
        """The plan in plain dicts, lists, strings and numbers, for `json.dump`."""
        return asdict(self)

    def __str__(self) -> str:
        def ms(seconds: float | None) -> str:
            return "" if seconds is None else f"{1e3 * seconds:.3f}"

        timed = [layer for layer in self.layers if layer.dense_measured and layer.sparse_measured]
        rounded = any(layer.int8_seconds is not None for layer in self.layers)
        rows = [("layer", "shape", "density", "choice", "kernel", "dense ms", "sparse ms", *(("int8 ms",) if rounded else ()),
                 *(("measured", "measured") if timed else ()), "reason")]
        for layer in self.layers:
            shape = str(layer.shape or f"{layer.kind} {'x'.join(map(str, layer.kernel_shape))}")
            reason = layer.reason + (f"; folds {layer.norm}" if layer.norm is not None else "")
            rows.append((layer.path or ".", shape, f"{layer.density:.3f}", layer.choice,
                         layer.kernel if layer.inputs is None else f"{layer.kernel} int8",
                         ms(layer.dense_seconds), ms(layer.sparse_seconds), *((ms(layer.int8_seconds),) if rounded else ()),
                         *((ms(layer.dense_measured), ms(layer.sparse_measured)) if timed else ()), reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        numbers = (2, *range(5, len(rows[0]) - 1))
        lines = ["  ".join(cell.rjust(width) if i in numbers else cell.ljust(width)
                           for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]

        def total(word: str, dense: float, planned: float) -> str:
            gain = dense / planned if planned else 1.0
            return f"{word} {ms(dense)} ms dense, {ms(planned)} ms as planned ({gain:.3g}x)"

        if self._batch > self.machine.threads and self.chunk < self._batch:
            lines.append(f"each thread takes {self.chunk} image{'s' * (self.chunk > 1)} at a time through the network")
        lines.append(f"{total('predicted', self.dense_seconds, self.seconds)} on {self.machine}")
        if timed:
            lines.append(total(f"measured in {len(timed)} layers", sum(row.dense_measured or 0 for row in timed), sum(
                (row.sparse_measured if row.choice == "sparse" else row.dense_measured) or 0 for row in timed)))
        return "\n".join(lines)
