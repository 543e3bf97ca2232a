"""A network's ONNX file in eight bits, as ONNX Runtime's own tool makes it: what other engines are given."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np

PER_CHANNEL = 13  # the operator set from which on a scale may be one for each output channel

def quantized(model: bytes, examples: np.ndarray, batch: int) -> bytes:
    """The network with QuantizeLinear and DequantizeLinear pairs: uint8 activations, int8 weights by output channel.

    Args:
      model: its ONNX file, in float32.
      examples: inputs that ranges are taken from, in the file's own layout.
      batch: of the file; what is left over of the examples is not used.

    Raises:
      ImportError: onnx or onnxruntime is not installed.
    """
    import onnx
    import onnx.version_converter
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self):
            count = len(examples) // batch
            self._batches = iter(np.split(examples[:count * batch], count))

        def get_next(self):
            images = next(self._batches, None)
            return None if images is None else {name: images}

    file = onnx.load_model_from_string(model)
    if any(opset.domain in ("", "ai.onnx") and opset.version < PER_CHANNEL for opset in file.opset_import):
        file = onnx.version_converter.convert_version(file, PER_CHANNEL)
    constants = {tensor.name for tensor in file.graph.initializer}
    name = next(entry.name for entry in file.graph.input if entry.name not in constants)
    with tempfile.TemporaryDirectory() as folder:
        plain, prepared, made = (Path(folder) / name for name in ("plain.onnx", "prepared.onnx", "int8.onnx"))
        plain.write_bytes(file.SerializeToString())
        logging.disable(logging.WARNING)  # that a vector has no output channels
        try:
            quant_pre_process(str(plain), str(prepared), skip_symbolic_shape=True)
            quantize_static(str(prepared), str(made), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)
        finally:
            logging.disable(logging.NOTSET)
        return made.read_bytes()
