"""Numbers that are quantized and dequantized again as one operation on float32, whose range is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparseflax.conv.int8 import Quantization
from sparseflax.onnx.graph import Node

# What may stand between a QuantizeLinear and its DequantizeLinear: all that only moves numbers, or takes the largest, with the
# number of inputs that are moved; None for all.
MOVES = {"Concat": None, **dict.fromkeys((
    "DepthToSpace", "Dropout", "Expand", "Flatten", "FlattenChannelsLast", "Gather", "Identity", "MaxPool", "Reshape", "Slice",
    "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"), 1)}


class Rule(NamedTuple):
    """How a tensor is quantized: by one scale and zero point, to uint8 or int8."""

    scale: float
    zero: int
    dtype: np.dtype

    @property
    def quantization(self) -> Quantization:
        """The same as uint8: an int8 is that less 128."""
        return Quantization(self.scale, self.zero + (128 if self.dtype == np.int8 else 0))


def joined(steps: Sequence[Any], constants: Mapping[str, np.ndarray], outputs: Sequence[str]) -> list[Any]:
    """The steps with each pair of QuantizeLinear and DequantizeLinear as one RoundedTo, what is between them on float32.

    A pair has one scale and one zero point, which are constants; others stay as they are, and so do integers that something
    else takes, too.

    Args:
      steps: of a program, each after those whose outputs it takes.
      constants: by name.
      outputs: of the program.
    """
    makers = {name: step for step in steps for name in step.node.outputs if name}
    before: dict[int, list[Any]] = {}
    floats: dict[tuple[str, Rule], str | None] = {}

    def as_float(name: str, rule: Rule) -> str | None:
        """The name of a tensor of integers as float32; None where they are of another rule or unknown."""
        if (name, rule) not in floats:
            floats[name, rule] = make(name, rule)
        return floats[name, rule]

    def make(name: str, rule: Rule) -> str | None:
        step = makers.get(name)
        if step is None:
            return None
        node, suffix = step.node, f"as float32, {rule.scale} {rule.zero}"
        if node.op == "QuantizeLinear":
            if _rule(node, constants) != rule:
                return None
            made = node._replace(op="RoundedTo", inputs=node.inputs[:1], attributes={"quantization": rule.quantization})
        elif node.op in MOVES and not node.domain and len(node.outputs) - node.outputs.count("") == 1 or node.op == "Split":
            count = len(node.inputs) if MOVES[node.op] is None else MOVES[node.op]
            moved = [as_float(given, rule) for given in node.inputs[:count]]
            if None in moved:
                return None
            made = node._replace(inputs=(*moved, *node.inputs[count:]))
        else:
            return None
        renamed = tuple(given and f"{given} {suffix}" for given in node.outputs)
        made = made._replace(name=f"{node.name} {suffix}", outputs=renamed)
        if made.name not in {step.node.name for step in before.get(id(step), ())}:
            before.setdefault(id(step), []).append(step._replace(node=made))
        return f"{name} {suffix}"

    instead: dict[int, Any] = {}
    for step in steps:
        if step.node.op == "DequantizeLinear" and (rule := _rule(step.node, constants)) is not None:
            found = as_float(step.node.inputs[0], rule)
            if found is not None:
                instead[id(step)] = step._replace(node=step.node._replace(op="Identity", inputs=(found,), attributes={}))
    if not instead:
        return list(steps)
    wanted, kept = set(outputs), list[Any]()
    everything = [made for step in steps for made in (*before.get(id(step), ()), instead.get(id(step), step))]
    for step in reversed(everything):
        if wanted.intersection(step.node.outputs):  # the integers may be nobody's now
            wanted.update(step.node.inputs)
            kept.append(step)
    return kept[::-1]


def _rule(node: Node, constants: Mapping[str, np.ndarray]) -> Rule | None:
    """Of a QuantizeLinear or a DequantizeLinear; None where it has several scales, or they are computed, or other integers."""
    scale, zero = (constants.get(name) if name else None for name in (*node.inputs, "", "")[1:3])
    if scale is None or scale.size != 1 or len(node.inputs) > 2 and node.inputs[2] and zero is None:
        return None
    if node.attributes.get("output_dtype", 0) or node.attributes.get("block_size", 0):
        return None
    zero = np.zeros((), np.uint8) if zero is None else zero
    if zero.size != 1 or zero.dtype not in (np.uint8, np.int8) or not 2.0**-100 < scale.item() < 2.0**100:
        return None
    return Rule(float(np.float32(scale.item())), int(zero.item()), zero.dtype)
