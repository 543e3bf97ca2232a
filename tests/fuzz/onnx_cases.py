"""ONNX files, damaged or edited: a residual network, one in eight bits, one with a branch and a loop,
and the networks of a few nodes in which tests/test_onnx.py has each operator."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import sparseflax
from experiments.export_onnx import to_onnx
from tests.fuzz.edits import Draw, damaged, edited_array, first_words, folder, number, pick

TYPES = 24  # of tensors, as ONNX numbers them


class Residual(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs), nnx.Conv(8, 8, (3, 3), feature_group_count=2,
                                                                                         rngs=rngs)
        self.norm, self.head = nnx.BatchNorm(8, use_running_average=True, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first(x))
        x = nnx.relu(self.norm(self.second(x)) + x)
        return self.head(nnx.max_pool(x, (2, 2), strides=(2, 2)).mean((1, 2)))


@functools.cache
def networks() -> tuple[Any, ...]:
    """ONNX models, the first few of them larger."""
    import onnx

    from tests.test_onnx import I64, IMAGE, OPERATORS, B, F, body, helper, node, random, save, sized

    x = {"xs": np.float32(0.05), "xz": np.uint8(120)}
    eight = {"w": np.random.default_rng(1).integers(-60, 60, (10, 6, 3, 3)).astype(np.int8), "wz": np.zeros(10, np.int8),
             "ws": np.full(10, 0.01, np.float32), "ys": np.float32(0.5), "yz": np.uint8(130),
             "b": np.arange(10, dtype=np.int32)}
    quantized = [node("QuantizeLinear", "x xs xz", "q"), node("QLinearConv", "q xs xz w ws wz ys yz b", "c", pads=[1] * 4),
                 node("DequantizeLinear", "c ys yz", "d"), node("DequantizeLinear", "w ws wz", "v", axis=0),
                 node("Conv", "x v", "e", pads=[1] * 4), node("Add", "d e", "y")]
    test, sizes = sized(IMAGE[1])
    then = body("then", [node("Conv", "r k", "c", pads=[1] * 4), node("Relu", "c", "t")], outputs={"t": F})
    other = body("else", [node("Mul", "r two", "m")], outputs={"m": F}, constants={"two": np.float32(2)})
    step = body("step", [node("Mul", "h half", "n"), node("Add", "n x", "m"), node("Less", "i last", "on")],
                inputs={"i": I64, "_": B, "h": F}, outputs={"on": B, "m": F},
                constants={"half": np.float32(0.5), "last": np.int64(2)})
    controlled = [*test, node("Relu", "x", "r"), node("If", "test", "a", then_branch=then, else_branch=other),
                  helper.make_node("Loop", ["", "", "a"], ["y"], name="the_loop", body=step)]
    files = [(quantized, x | eight), (controlled, sizes | {"k": random(6, 6, 3, 3)}), *OPERATORS.values()]
    read = [onnx.load(save(folder() / "sound.onnx", nodes, constants)) for nodes, constants in files]
    return onnx.load_from_string(to_onnx(Residual(nnx.Rngs(0)), jnp.ones((1, 8, 8, 3)))), *read


def onnx_file(draw: Draw) -> str:
    import onnx

    every = networks()
    sound = every[int(draw.integers(3))] if draw.random() < 0.3 else pick(draw, every)
    model = onnx.ModelProto()
    model.CopyFrom(sound)
    path = folder() / f"case-{os.getpid()}.onnx"
    if draw.random() < 0.2:
        path.write_bytes(damaged(draw, model.SerializeToString()))
    else:
        for _ in range(int(draw.integers(1, 4))):
            _edit(draw, model)
        path.write_bytes(model.SerializeToString())
    sizes = [dim.dim_value for dim in sound.graph.input[0].type.tensor_type.shape.dim]
    try:
        loaded = sparseflax.onnx.load_onnx(path)
        jax.eval_shape(loaded, jax.ShapeDtypeStruct((sizes[0], *sizes[2:], sizes[1]), jnp.float32))
    except ValueError as error:
        return f"refused: {first_words(error, path)}"
    return "runs"


def _int64(value: Any) -> int:
    return min(2**63 - 1, max(-(2**63), int(value)))


def _edit(draw: Draw, model: Any) -> None:
    inner = [entry.g for node in model.graph.node for entry in node.attribute if entry.HasField("g")]
    graph = pick(draw, [model.graph, *inner])
    names = sorted({name for each in graph.node for name in (*each.input, *each.output)})
    kind = int(draw.integers(8))
    if graph.node and kind < 4:
        _edit_node(draw, pick(draw, graph.node), graph, names)
    elif graph.initializer and kind < 7:
        _edit_tensor(draw, pick(draw, graph.initializer))
    elif model.opset_import and draw.integers(4) == 0:
        pick(draw, model.opset_import).version = _int64(number(draw, 13))
    elif entries := [*graph.input, *graph.output]:
        entry = pick(draw, entries)
        if sizes := entry.type.tensor_type.shape.dim:
            pick(draw, sizes).dim_value = _int64(number(draw, 3))
        if draw.integers(3) == 0:
            entry.type.tensor_type.elem_type = int(draw.integers(TYPES))
        if draw.integers(3) == 0 and names:
            entry.name = pick(draw, names)


def _edit_node(draw: Draw, node: Any, graph: Any, names: list[str]) -> None:
    from tests.test_onnx import OPERATORS

    kind = int(draw.integers(5))
    if kind == 0 and node.attribute:
        _edit_attribute(draw, node, pick(draw, node.attribute))
    elif kind == 1:
        node.op_type = pick(draw, [each.op_type for nodes, _ in OPERATORS.values() for each in nodes])
    elif kind == 2 and node.input:
        node.input[int(draw.integers(len(node.input)))] = pick(draw, [*names, "", "nothing"])
    elif kind == 3:
        (node.input.append if draw.integers(2) else node.output.append)(pick(draw, [*names, "", "more"]))
    elif draw.integers(2):
        graph.node.remove(node)
    else:
        graph.node.append(node)


def _edit_attribute(draw: Draw, node: Any, entry: Any) -> None:
    from onnx import helper

    kind = int(draw.integers(5))
    if kind == 0:
        node.attribute.remove(entry)
    elif kind == 1:
        entry.type = int(draw.integers(15))
    elif kind == 2:
        wrong = pick(draw, [-1, 0, 0.5, float("nan"), "text", [7], [0] * 4, [1.5, 2.5], ["a", "b"]])
        entry.CopyFrom(helper.make_attribute(entry.name, wrong))
    elif entry.ints:
        at = int(draw.integers(len(entry.ints)))
        entry.ints[at] = _int64(number(draw, entry.ints[at]))
        if draw.integers(3) == 0:
            del entry.ints[int(draw.integers(len(entry.ints)))]
    else:
        entry.i = _int64(number(draw, entry.i))


def _edit_tensor(draw: Draw, tensor: Any) -> None:
    from onnx import numpy_helper

    kind = int(draw.integers(6))
    if kind == 0 and tensor.dims:
        at = int(draw.integers(len(tensor.dims)))
        tensor.dims[at] = _int64(number(draw, tensor.dims[at]))
    elif kind == 1:
        tensor.raw_data = tensor.raw_data[:int(draw.integers(len(tensor.raw_data) + 1))]
    elif kind == 2:
        tensor.data_type = int(draw.integers(TYPES))
    else:
        try:
            array = edited_array(draw, numpy_helper.to_array(tensor))
        except Exception:  # was damaged before
            return
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))
