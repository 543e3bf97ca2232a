"""Where each weight of a network that was read stands in its ONNX file, so that changed ones can be written back.

A reader transposes weights, reorders their rows, takes constants for biases; what it does to a tensor it does whatever the
tensor holds. So the file is read again with each weight replaced by its number, and the model then says where all came from.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax import nnx

from sparseflax.onnx import load_onnx

LAYERS = {"Add", "BatchNormalization", "Conv", "ConvTranspose", "Gemm", "MatMul"}  # nodes whose constants are weights
DIGIT = 1 << 20  # numbers that float32 tells apart; larger ones take two readings


class Places(NamedTuple):
    """Where the model's weights stand.

    Attributes:
      names: of the file's tensors, one after the other.
      at: {path of a Variable: where each of its values is, in all these tensors, flat and concatenated}.
    """

    names: tuple[str, ...]
    at: Mapping[tuple[Any, ...], np.ndarray]


def places(file: Any, model: nnx.Module) -> Places:
    """Where the weights of `model` stand in the onnx.ModelProto that it was read from.

    A Variable that is not, value for value, in the file has no place.
    """
    tensors = {name: tensor for name, tensor in _tensors(file).items() if name in _weights(file)}
    sizes = [int(np.prod(tensor.dims)) for tensor in tensors.values()]
    starts = np.cumsum([0, *sizes])
    readings = [_read_with(file, {name: (np.arange(start, start + size) // part % DIGIT + 1).astype(np.float32)
                                  for name, start, size in zip(tensors, starts, sizes, strict=False)})
                for part in ((1, DIGIT) if starts[-1] > DIGIT else (1,))]
    values = np.concatenate([np.zeros(0, np.float32), *(_array(tensor).ravel() for tensor in tensors.values())])
    at = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        numbers = [reading.get(path, np.zeros(0)) for reading in readings]
        where = sum((np.asarray(number, np.float64) - 1) * scale for number, scale in zip(numbers, (1, DIGIT), strict=False))
        weight = _value(leaf)
        if np.shape(where) != weight.shape or not weight.size:
            continue
        index = np.clip(np.nan_to_num(where), 0, max(0, len(values) - 1)).astype(np.int64)
        if len(values) and (index == where).all() and np.array_equal(values[index].astype(weight.dtype), weight):
            at[path] = index
    return Places(tuple(tensors), at)


def with_weights(file: Any, places: Places, model: nnx.Module, original: nnx.Module) -> Any:
    """A copy of the onnx.ModelProto with the weights of a model that has others than the original.

    Raises:
      ValueError: weights were changed that have no place in the file, or share one with others.
    """
    from onnx import numpy_helper

    written = copy.deepcopy(file)
    tensors = {name: tensor for name, tensor in _tensors(written).items() if name in places.names}
    arrays = [_array(tensors[name]) for name in places.names]
    values = np.concatenate([np.zeros(0, np.float32), *(array.ravel() for array in arrays)])
    before = dict(nnx.to_flat_state(nnx.state(original)))
    changed = {path: _value(leaf) for path, leaf in nnx.to_flat_state(nnx.state(model))
               if not np.array_equal(_value(leaf), _value(before[path]))}
    for path, value in changed.items():
        if path in places.at:
            values[places.at[path]] = value
    lost = ["/".join(map(str, path)) for path, value in changed.items()
            if path not in places.at or not np.array_equal(values[places.at[path]], value)]
    if lost:
        raise ValueError(f"the file holds no weights of their own for {', '.join(lost)}: it computes them, or they are another "
                         "layer's too")
    for name, array, part in zip(places.names, arrays, np.split(values, np.cumsum([array.size for array in arrays])[:-1]),
                                 strict=True):
        tensors[name].CopyFrom(numpy_helper.from_array(part.reshape(array.shape).astype(array.dtype), tensors[name].name))
    return written


def _read_with(file: Any, values: Mapping[str, np.ndarray]) -> dict[tuple[Any, ...], np.ndarray]:
    """{path of a Variable: its value} of the network with other values in its tensors; {} where it cannot be read so."""
    import onnx

    changed = copy.deepcopy(file)
    for name, tensor in _tensors(changed).items():
        if name in values:
            tensor.CopyFrom(onnx.numpy_helper.from_array(values[name].reshape(tuple(tensor.dims)), tensor.name))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "numbered.onnx"
        onnx.save(changed, str(path), save_as_external_data=changed.ByteSize() > 1 << 30)
        try:
            model = load_onnx(path)
        except ValueError:
            return {}
    return {path: _value(leaf) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def _tensors(file: Any) -> dict[str, Any]:
    """The file's constants, {name: TensorProto}: initializers and what Constant nodes hold."""
    constants = {node.output[0]: entry.t for node in file.graph.node if node.op_type == "Constant"
                 for entry in node.attribute if entry.name == "value"}
    return {tensor.name: tensor for tensor in file.graph.initializer} | constants


def _weights(file: Any) -> set[str]:
    """Names of the floating-point tensors, of more than one value, that layers take."""
    taken = {name for node in file.graph.node if node.op_type in LAYERS for name in node.input}
    return {name for name, tensor in _tensors(file).items() if name in taken and tensor.data_type in (1, 10, 16)
            and int(np.prod(tensor.dims)) > 1}


def _array(tensor: Any) -> np.ndarray:
    from onnx import numpy_helper

    return numpy_helper.to_array(tensor)


def _value(leaf: Any) -> np.ndarray:
    return np.asarray(leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf)
