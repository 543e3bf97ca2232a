"""Convolutions in eight bits that wait for what is done with their results: an activation, or the rounding of the next one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.extend.core import primitives

from sparseflax.conv.int8 import quantize_p
from sparseflax.conv.int8_primitive import bind_int8, int8_conv_p
from sparseflax.network.region import is_number


@dataclass(frozen=True)
class Rounding:
    """A convolution in eight bits that is not computed yet, with float32 outputs."""

    operands: Sequence[Any]
    params: dict[str, Any]

    def compute(self) -> jax.Array:
        return bind_int8(*self.operands, **self.params)

    def clamped(self, low: float, high: float) -> Rounding:
        rescale = self.params["rescale"]
        bounds = rescale._replace(low=max(rescale.low, low), high=min(rescale.high, high))
        return replace(self, params=self.params | {"rescale": bounds})

    def quantized(self, output: Any) -> jax.Array:
        x, words, sums, scale, *rest = self.operands
        scale = scale * np.float32(1 / output.scale)
        return bind_int8(x, words, sums, scale, *rest, **self.params | {"rescale": self.params["rescale"].quantized(output)})


def waits(equation: Any) -> bool:
    """Whether an equation is a convolution in eight bits whose results are float32."""
    return equation.primitive is int8_conv_p and equation.params["rescale"].to_float


def joined(equation: Any, operands: Sequence[Any]) -> Rounding | jax.Array | None:
    """What an equation makes of a convolution that waits; None if that has to be computed first."""
    primitive = equation.primitive
    conv = next(operand for operand in operands if isinstance(operand, Rounding))
    others = [operand for operand in operands if operand is not conv]
    if primitive is quantize_p:
        return conv.quantized(equation.params["quantization"])
    if not others or not all(map(is_number, others)):
        return None
    if primitive is primitives.max_p and others[0] == 0:
        return conv.clamped(0.0, np.inf)
    if primitive is primitives.min_p and conv.params["rescale"].low == 0 and others[0] == 6:
        return conv.clamped(0.0, 6.0)
    if primitive is primitives.clamp_p and operands[1] is conv and others == [0, 6]:
        return conv.clamped(0.0, 6.0)
    return None
