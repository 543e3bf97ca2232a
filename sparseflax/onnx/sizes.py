"""Sizes that an ONNX graph computes from its tensors' shapes, as exporters write `x.view(x.size(0), -1)`: made constants."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sparseflax.onnx.graph import Node

MOST = 64  # numbers in a list of sizes: what is longer is a weight


def fold_sizes(nodes: Sequence[Node], shapes: dict[str, tuple[int | None, ...]],
               constants: dict[str, np.ndarray]) -> tuple[Node, ...]:
    """The nodes that are left when the others' outputs are noted in `constants`.

    Args:
      nodes: in an order in which they can run.
      shapes: of tensors; an open batch counts as 0, which in a Reshape means the input's own.
      constants: by name; added to.
    """
    left = []
    for node in nodes:
        try:
            value = None if node.domain else _value(node, shapes, constants)
        except (IndexError, KeyError, TypeError, ValueError):  # a malformed node, which is named later
            value = None
        if value is None:
            left.append(node)
        else:
            constants[node.outputs[0]] = value
    return tuple(left)


def _value(node: Node, shapes: dict[str, tuple[int | None, ...]], constants: dict[str, np.ndarray]) -> np.ndarray | None:
    """The node's output if it is a list of sizes, or one of them."""
    if node.op == "Shape":
        batch, *sizes = shapes[node.inputs[0]]
        every = [0 if batch is None else batch, *sizes]
        return None if None in sizes else np.array(every[node.attributes.get("start", 0):node.attributes.get("end")], np.int64)
    if any(name and name not in constants for name in node.inputs):
        return None
    first, *more = (constants[name] for name in node.inputs if name)
    if not all(value.dtype.kind == "i" and value.ndim <= 1 and value.size <= MOST for value in (first, *more)):
        return None
    match node.op:
        case "Gather" if node.attributes.get("axis", 0) == 0:
            return np.asarray(first[more[0]])
        case "Cast":  # an index beyond 64 bits is none
            return first.astype(np.int64)
        case "Concat":
            return np.concatenate([first, *more])
        case "Squeeze":
            return first.reshape(())
        case "Unsqueeze":
            return first.reshape(1)
        case "Slice" if len(more) >= 2 and all(np.all(value == at) for value, at in zip(more[2:], (0, 1), strict=False)):
            return first[int(more[0].item()):int(more[1].item())]
    return None
