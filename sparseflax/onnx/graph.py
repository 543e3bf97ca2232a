"""An ONNX graph as it was read: its nodes and constants."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Node(NamedTuple):
    """One operator. `name` is unique in the graph and can be an attribute's; `domain` is "" for ONNX's own operators."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]

    def __str__(self) -> str:
        return f"{f'{self.domain}.' if self.domain else ''}{self.op} {self.name!r}"


class Graph(NamedTuple):
    """What a file holds.

    Attributes:
      input: name of what is not constant.
      outputs: their names.
      nodes: each after those whose outputs it takes; without Constant and Identity, and without Dropout, at inference.
      constants: by name, initializers, Constant nodes and sizes that the graph computes.
      shapes: of the tensors as far as the file or onnx tell, ONNX's own NCHW order; None for an open size.
      opset: version of ONNX's operators.
    """

    input: str
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    constants: dict[str, np.ndarray]
    shapes: dict[str, tuple[int | None, ...]]
    opset: int
