"""ONNX's operators by name: functions of values and attributes, in ONNX's order and by its names for what was either."""

from collections.abc import Callable
from typing import Any

from sparseflax.onnx.ops import attention, elementwise, image, movement, quantized, recurrent, reduction

OPERATORS: dict[str, Callable[..., Any]] = {
    **attention.OPERATORS, **elementwise.OPERATORS, **image.OPERATORS, **movement.OPERATORS, **quantized.OPERATORS,
    **recurrent.OPERATORS, **reduction.OPERATORS,
}
