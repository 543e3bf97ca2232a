"""Networks from ONNX files."""

from sparseflax.onnx.model import OnnxModel as OnnxModel
from sparseflax.onnx.model import load_onnx as load_onnx
