"""An ONNX file read and checked: nodes in an order in which they can run, and all constants, dense."""

from __future__ import annotations

import graphlib
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from sparseflax.onnx.graph import Body, Graph, Node, Shape
from sparseflax.onnx.value import bounded

# What an attribute of a type is in Python, and whether it is a list of that.
_ATTRIBUTES = {"INT": (int, False), "FLOAT": (float, False), "STRING": (str, False), "INTS": (int, True),
               "FLOATS": (float, True)}
OLDEST = 6  # operator set: before it, attributes were other ones


def read(path: str | PathLike[str]) -> Graph:
    """Reads and checks a file.

    Raises:
      ImportError: the package onnx is not installed.
      FileNotFoundError: no such file.
      ValueError: it is no ONNX model, is incomplete, or has a cycle.
    """
    onnx = _package()
    path = Path(path)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # protobuf's DecodeError, which only protobuf exports
        raise ValueError(f"{path} is no ONNX model ({type(error).__name__}: {error}): is it whole?") from error
    if not model.graph.node or not model.graph.output:
        raise ValueError(f"{path} holds no ONNX graph: is it whole?")
    try:
        onnx.load_external_data_for_model(model, str(path.parent))
    except Exception as error:  # FileNotFoundError, or onnx's ValidationError for a path that leads elsewhere
        raise ValueError(f"weights of {path} lie in another file that cannot be read ({error}): put it beside the "
                         "model") from error
    versions = {entry.domain: entry.version for entry in model.opset_import}
    opset = versions.get("", versions.get("ai.onnx", 0))
    if opset < OLDEST:
        raise ValueError(f"{path} uses operator set {opset}, wanted {OLDEST} or later: convert it by onnx.version_converter")
    try:
        constants = _initializers(onnx, model.graph)
        nodes: Sequence[Node] = list(_nodes(onnx, model.graph, constants))
    except Exception as error:  # onnx's own, whatever they are, as it decodes
        raise ValueError(f"{path} holds a weight or an attribute that cannot be decoded ({error}): it was damaged, export it "
                         "again") from error
    inputs = tuple(entry.name for entry in model.graph.input if entry.name not in constants)
    outputs = tuple(entry.name for entry in model.graph.output)
    if not inputs:
        raise ValueError(f"{path} takes nothing, wanted an input besides the weights")
    types = {entry.name: entry.type.tensor_type.elem_type for entry in model.graph.input}
    nodes = _ordered(nodes, {*inputs, *constants}, outputs)
    return Graph(inputs, types, outputs, nodes, constants, _shapes(onnx, model), opset)


def malformed(node: Node, opset: int) -> str | None:
    """How a node of ONNX's own breaks the operator's definition, in inputs or attributes; None if it does not."""
    onnx = _package()
    try:
        schema = onnx.defs.get_schema(node.op, opset)
    except onnx.defs.SchemaError:
        return None  # an operator that ONNX does not have
    least, most = schema.min_input, schema.max_input
    own = node.inputs[:len(node.inputs) - len(node.attributes.get("captured", ()))]
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    left_out = any(not name and formal.option == single for name, formal in zip(own, schema.inputs, strict=False))
    if not least <= len(own) <= most or left_out:
        wanted = f"{least}" if least == most else f"{least} to {most}" if most < 2**31 - 1 else f"at least {least}"
        return f"it has {sum(map(bool, own))} inputs, wanted {wanted}"
    for name, wanted in schema.attributes.items():
        kind, many = _ATTRIBUTES.get(wanted.type.name, (object, False))
        value = node.attributes.get(name)
        if value is None and wanted.required or wanted.type.name == "GRAPH" and not isinstance(value, Body):
            return f"it has no attribute {name!r}"
        if value is None:
            continue
        if isinstance(value, list) != many or not all(isinstance(item, kind) for item in (value if many else [value])):
            return f"its attribute {name} is {value!r}, wanted {wanted.type.name.lower()}"
    return None


def _package() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise ImportError("reading ONNX models needs the package onnx: pip install 'sparseflax[onnx]'") from error
    return onnx


def _initializers(onnx: Any, graph: Any) -> dict[str, np.ndarray]:
    found = {tensor.name: _array(onnx, tensor) for tensor in graph.initializer}
    return found | {tensor.values.name: _dense(onnx, tensor) for tensor in graph.sparse_initializer}


def _array(onnx: Any, tensor: Any) -> np.ndarray:
    """A TensorProto; floating point of 16 bits or more as float32."""
    array = onnx.numpy_helper.to_array(tensor)
    return array.astype(np.float32, copy=False) if array.dtype.name in ("float16", "bfloat16", "float64") else array


def _dense(onnx: Any, tensor: Any) -> np.ndarray:
    """A SparseTensorProto, its indices (nnz,) into the flattened tensor or (nnz, rank)."""
    values, indices = _array(onnx, tensor.values), _array(onnx, tensor.indices)
    dense = np.zeros(bounded(tuple(tensor.dims)), values.dtype)
    if indices.ndim == 2:
        indices = np.ravel_multi_index(tuple(indices.T), dense.shape)  # ValueError beyond the shape
    if indices.size and not 0 <= indices.min() <= indices.max() < dense.size:
        raise ValueError(f"the sparse initializer {tensor.values.name!r} of shape {dense.shape} has indices beyond it")
    dense.reshape(-1)[indices] = values
    return dense


def _nodes(onnx: Any, graph: Any, constants: dict[str, np.ndarray]) -> Iterable[Node]:
    """The nodes that compute; notes Constant nodes in `constants`."""
    taken: set[str] = set()
    for index, proto in enumerate(graph.node):
        attributes = {entry.name: _attribute(onnx, entry) for entry in proto.attribute}
        name = (proto.name or next(iter(proto.output), "")).strip("/").replace("/", ".") or f"{proto.op_type}_{index}"
        name = name if name not in taken else f"{name}_{index}"
        taken.add(name)
        inputs = _names(proto.input)
        bodies = [body for body in attributes.values() if isinstance(body, Body)]
        if bodies:  # what these take is taken by the node, behind its own inputs
            captured = tuple(dict.fromkeys(name for body in bodies for name in body.captured))
            inputs, attributes["captured"] = (*inputs, *captured), captured
        node = Node(proto.op_type, "" if proto.domain == "ai.onnx" else proto.domain, name, inputs, _names(proto.output),
                    attributes)
        if (node.domain, node.op, len(node.outputs)) != ("", "Constant", 1):
            yield node
            continue
        if (value := _value(attributes)) is None:
            raise ValueError(f"{node} holds no numbers")
        constants[node.outputs[0]] = value


def _names(names: Sequence[str]) -> tuple[str, ...]:
    """Without those left out at the end."""
    length = max((i + 1 for i, name in enumerate(names) if name), default=0)
    return tuple(names[:length])


def _attribute(onnx: Any, entry: Any) -> Any:
    value = onnx.helper.get_attribute_value(entry)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list):
        return [item.decode() if isinstance(item, bytes) else item for item in value]
    kinds = {onnx.TensorProto: _array, onnx.SparseTensorProto: _dense, onnx.GraphProto: _body}
    return kinds[type(value)](onnx, value) if type(value) in kinds else value


def _body(onnx: Any, graph: Any) -> Body:
    constants = _initializers(onnx, graph)
    nodes = tuple(_nodes(onnx, graph, constants))
    return Body(_names([entry.name for entry in graph.input]), _names([entry.name for entry in graph.output]), nodes, constants)


def _value(attributes: dict[str, Any]) -> np.ndarray | None:
    """Of a Constant node; None for strings."""
    for name, value in attributes.items():
        if name in ("value", "sparse_value"):
            return value
        if name in ("value_float", "value_floats"):
            return np.asarray(value, np.float32)
        if name in ("value_int", "value_ints"):
            return np.asarray(value, np.int64)
    return None


def _ordered(nodes: Sequence[Node], known: set[str], outputs: tuple[str, ...]) -> tuple[Node, ...]:
    """The nodes, each after those that it needs: as the file has them, if it keeps to that. What belongs together, such as the
    rectifier of a sum, stands together there."""
    maker = {output: node.name for node in nodes for output in node.outputs if output}
    missing = {name: str(node) for node in nodes for name in node.inputs if name and name not in maker and name not in known}
    missing |= {name: "the graph's output" for name in outputs if name not in maker and name not in known}
    if missing:
        wanted = ", ".join(f"{name!r} of {user}" for name, user in missing.items())
        raise ValueError(f"nothing in the graph makes or holds {wanted}: an initializer is missing, export the model with them")
    made = set(known)
    for node in nodes:
        if not made.issuperset(filter(None, node.inputs)):
            break
        made.update(node.outputs)
    else:
        return tuple(nodes)
    order = graphlib.TopologicalSorter({node.name: {maker[i]: None for i in node.inputs if i in maker} for node in nodes})
    by_name = {node.name: node for node in nodes}
    try:
        return tuple(by_name[name] for name in order.static_order())
    except graphlib.CycleError as error:
        raise ValueError(f"the graph has a cycle through {' -> '.join(error.args[1])}: it was damaged, export it "
                         "again") from None


def _shapes(onnx: Any, model: Any) -> dict[str, Shape]:
    try:
        graph = onnx.shape_inference.infer_shapes(model).graph
    except Exception:  # it gives up on operators that it does not know: these are refused later, all at once
        graph = model.graph
    return {entry.name: tuple(dim.dim_value or None for dim in entry.type.tensor_type.shape.dim)
            for entry in (*graph.input, *graph.value_info, *graph.output) if entry.type.tensor_type.HasField("shape")}
