"""A network's ONNX file in eight bits, as ONNX Runtime's own tool makes it: what an int8 rival is given."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from experiments.baselines import nchw


def quantized(model: bytes, examples: np.ndarray, batch: int) -> bytes:
    """The network with QuantizeLinear and DequantizeLinear pairs: uint8 activations, int8 weights by output channel.

    Args:
      model: its ONNX file, in float32.
      examples: images (n, h, w, c) that ranges are taken from.
      batch: of the file, a divisor of n.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            self._batches = iter(np.split(nchw(examples), len(examples) // batch))

        def get_next(self):
            images = next(self._batches, None)
            return None if images is None else {"x": images}

    with tempfile.TemporaryDirectory() as folder:
        plain, prepared, made = (Path(folder) / name for name in ("plain.onnx", "prepared.onnx", "int8.onnx"))
        plain.write_bytes(model)
        quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
        quantize_static(str(prepared), str(made), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
        return made.read_bytes()
