"""An ONNX graph as it was read: its nodes and constants."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int | None, ...]


class Node(NamedTuple):
    """One operator. `name` is unique in the graph and can be an attribute's; `domain` is "" for ONNX's own operators; an input
    or output that is left out is ""."""

    op: str
    domain: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]

    def __str__(self) -> str:
        return f"{f'{self.domain}.' if self.domain else ''}{self.op} {self.name!r}"


class Body(NamedTuple):
    """A graph that a node holds.

    Attributes:
      inputs, outputs: names.
      nodes: each after those whose outputs it takes.
      constants: by name.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    constants: dict[str, np.ndarray]

    @property
    def captured(self) -> tuple[str, ...]:
        """What it takes of the graph around it."""
        own = {*self.inputs, *self.constants, *(name for node in self.nodes for name in node.outputs)}
        taken = [*(name for node in self.nodes for name in node.inputs), *self.outputs]
        return tuple(dict.fromkeys(name for name in taken if name and name not in own))


class Graph(NamedTuple):
    """What a file holds.

    Attributes:
      inputs: names of what is not constant.
      types: of the inputs, ONNX's number of it.
      outputs: their names.
      nodes: each after those whose outputs it takes; without Constant.
      constants: by name, initializers and Constant nodes; floating point as float32.
      shapes: of the tensors as far as the file or onnx tell, ONNX's own NCHW order; None for an open size.
      opset: version of ONNX's operators.
    """

    inputs: tuple[str, ...]
    types: dict[str, int]
    outputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    constants: dict[str, np.ndarray]
    shapes: dict[str, Shape]
    opset: int

    def users(self, name: str) -> list[Node]:
        return [node for node in self.nodes if name in node.inputs]

    def channels_last(self, name: str) -> bool:
        """Whether an input of rank 4 is NHWC in the file already: all that takes it makes it NCHW."""
        users = self.users(name)
        return bool(users) and all(user.op == "Transpose" and user.attributes.get("perm") == [0, 3, 1, 2] for user in users)

    def image(self, name: str) -> bool:
        """Whether an output of rank 4 is NCHW in the file: no node makes it NHWC."""
        return not any(name in node.outputs and node.op == "Transpose" and node.attributes.get("perm") == [0, 2, 3, 1]
                       for node in self.nodes)
