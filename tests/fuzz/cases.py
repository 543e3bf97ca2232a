"""One damaged or edited file after another: `CASES[name](draw)` makes and reads one, and says what came of it."""

import functools
import json
import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import sparseflax
from experiments.export_onnx import to_onnx
from sparseflax.cost.machine import TYPICAL
from sparseflax.files.safetensors import seal, unseal
from tests.machines import HERE

FITTED = replace(HERE, fitted=TYPICAL)  # its plans ask the native side for counts
Draw = np.random.Generator
EDGES = (0, 1, -1, 2, 255, 256, 65535, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -(2**63), 2**64, 10**400)
RUN = 100  # one in so many networks that came through is run and not only traced: that takes the compiling


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(4, 8, (3, 3), use_bias=False, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.block = nnx.List([nnx.Conv(8, 8, (3, 3), feature_group_count=2, strides=2, rngs=rngs)])
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.block[0](nnx.relu(self.norm(self.conv(x))))).mean((1, 2)))


class Residual(nnx.Module):
    def __init__(self, rngs):
        self.first, self.second = nnx.Conv(3, 8, (3, 3), strides=2, rngs=rngs), nnx.Conv(8, 8, (3, 3), feature_group_count=2,
                                                                                         rngs=rngs)
        self.norm, self.head = nnx.BatchNorm(8, use_running_average=True, rngs=rngs), nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first(x))
        x = nnx.relu(self.norm(self.second(x)) + x)
        return self.head(nnx.max_pool(x, (2, 2), strides=(2, 2)).mean((1, 2)))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3), use_bias=False)(x)))
        return nn.Dense(3)(x.mean((1, 2)))


X = np.ones((1, 6, 6, 4), np.float32)


@functools.cache
def folder() -> Path:
    made = tempfile.TemporaryDirectory()
    folder.made = made  # type: ignore[attr-defined]  # lives as long as the process
    return Path(made.name)


def thinned(params: Any) -> Any:
    draw = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, a: a * (draw.random(a.shape) < 0.2).astype(np.float32) if "kernel" in str(path) else a, params)


@functools.cache
def packed() -> tuple[tuple[bytes, Any], ...]:
    """Files of packed networks, and what they are read into."""
    model = Net(nnx.Rngs(0))
    nnx.update(model, thinned(nnx.state(model, nnx.Param)))
    plan = sparseflax.plan(model, X, HERE)
    sparseflax.save(folder() / "nnx", sparseflax.pack_model(model, plan), plan)
    module = LinenNet()
    variables = module.init(jax.random.key(0), X)
    pair = module, {**variables, "params": thinned(variables["params"])}
    plan = replace(sparseflax.plan(pair, X, HERE), machine=FITTED)
    sparseflax.save(folder() / "linen", sparseflax.pack_model(pair, plan, X), plan)
    abstract = nnx.eval_shape(lambda: Net(nnx.Rngs(0))), (module, jax.eval_shape(module.init, jax.random.key(0), X))
    return tuple(((folder() / name).read_bytes(), like) for name, like in zip(("nnx", "linen"), abstract, strict=True))


@functools.cache
def program() -> bytes:
    model = Net(nnx.Rngs(0))
    nnx.update(model, thinned(nnx.state(model, nnx.Param)))
    return sparseflax.export(sparseflax.pack_model(model, sparseflax.plan(model, X, HERE)), X, any_batch=True)


@functools.cache
def network() -> Any:
    """An ONNX model with a convolution of each kind, a batch norm, an addition, a pool and a fully connected layer."""
    import onnx

    return onnx.load_from_string(to_onnx(Residual(nnx.Rngs(0)), jnp.ones((1, 8, 8, 3))))


def pick(draw: Draw, items: Any) -> Any:
    return items[int(draw.integers(len(items)))]


def number(draw: Draw, old: Any) -> Any:
    """What a number might become."""
    kind = int(draw.integers(4))
    return (pick(draw, EDGES), old + int(draw.integers(-2, 3)), int(draw.integers(0, 300)), old * float(draw.normal()))[kind]


def damaged(draw: Draw, data: bytes) -> bytes:
    """Bytes flipped, cut off, put in or taken out."""
    content = bytearray(data)
    for _ in range(int(draw.integers(1, 4))):
        at = int(draw.integers(len(content) + 1))
        if draw.random() < 0.5:
            at = min(at, int(draw.integers(400)))  # headers lie in front
        kind = int(draw.integers(4))
        if kind == 0 and at < len(content):
            content[at] ^= int(draw.integers(1, 256))
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            content[at:at] = draw.bytes(int(draw.integers(1, 9)))
        else:
            del content[at:at + int(draw.integers(1, 9))]
    return bytes(content)


def edited_array(draw: Draw, array: np.ndarray) -> np.ndarray:
    """Other numbers, another length, shape or type."""
    kind = int(draw.integers(5))
    if kind == 0 and array.size:
        array = array.copy()
        old = array.reshape(-1)[at := int(draw.integers(array.size))]
        try:
            array.reshape(-1)[at] = number(draw, old.item())
        except (OverflowError, ValueError):
            array.reshape(-1)[at] = 255
    elif kind == 1 and array.ndim:
        array = array[:int(draw.integers(len(array) + 1))]
    elif kind == 2:
        array = np.concatenate([array.reshape(-1)] * 2)
    elif kind == 3:
        array = array.astype(pick(draw, (np.uint8, np.int64, np.float32, np.float64, np.bool_)))
    else:
        array = array.reshape(pick(draw, ((-1,), (1, -1), (-1, 1))))
    return array


def edited_json(draw: Draw, tree: Any) -> Any:
    """A JSON tree, changed in place at one to three places."""
    for _ in range(int(draw.integers(1, 4))):
        places = [(parent, key) for parent in _parents(tree)
                  for key in (parent if isinstance(parent, dict) else range(len(parent)))]
        if not places:
            return tree
        parent, key = pick(draw, places)
        old = parent[key]
        kind = int(draw.integers(6))
        if kind == 0:
            del parent[key]
        elif kind == 1:
            parent[key] = pick(draw, (None, True, "", "conv", [], {}, [old], {"a": old}, 1.5, float("inf"), "head"))
        elif kind == 2 and isinstance(parent, list):
            parent.append(old)
        elif kind == 3:
            other, there = pick(draw, places)
            parent[key] = other[there] if there in (other if isinstance(other, dict) else range(len(other))) else None
        elif isinstance(old, (int, float)) and not isinstance(old, bool):
            parent[key] = number(draw, old)
    return tree


def _parents(tree: Any, depth: int = 0):
    if isinstance(tree, (dict, list)) and depth < 20:
        yield tree
        for inner in tree.values() if isinstance(tree, dict) else tree:
            yield from _parents(inner, depth + 1)


def resealed(draw: Draw, kind: str, data: bytes) -> bytes:
    """A sealed file with an edited array or text, and a digest that fits."""
    arrays, text = unseal(kind, data)
    name = pick(draw, sorted(arrays))
    if draw.random() < 0.1:
        other = pick(draw, (name + "x", "conv/gaps", "weight 0"))
        arrays[other] = arrays.pop(name)
    elif draw.random() < 0.1:
        del arrays[name]
    else:
        arrays[name] = edited_array(draw, arrays[name])
    if "plan" not in text and draw.random() < 0.3:
        text[pick(draw, sorted(text))] = pick(draw, ("", "x", "[]", "sparseflax_conv_v1"))
    return seal(kind, arrays, text)


def replanned(draw: Draw, data: bytes) -> bytes:
    arrays, text = unseal("network", data)
    try:
        plan = json.dumps(edited_json(draw, json.loads(text["plan"])))
    except (ValueError, RecursionError):  # a circle, or a number too long to print
        plan = "[" * int(draw.integers(3000))
    return seal("network", arrays, {**text, "plan": plan})


def packed_file(draw: Draw) -> str:
    data, like = pick(draw, packed())
    kind = int(draw.integers(3))
    data = (damaged(draw, data) if kind == 0 else resealed(draw, "network", data) if kind == 1 else replanned(draw, data))
    path = folder() / f"case-{os.getpid()}"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that it is another machine's
        try:
            loaded, plan = sparseflax.load(path, like)
        except ValueError as error:
            return f"refused: {_first_words(error, path)}"
    str(plan)
    run = loaded if isinstance(loaded, nnx.Module) else functools.partial(loaded[0].apply, loaded[1])
    y = run(X) if draw.integers(RUN) == 0 else jax.eval_shape(run, X)
    assert y.shape == (1, 3), y.shape
    return "runs"


def exported_program(draw: Draw) -> str:
    kind = int(draw.integers(2))
    data = damaged(draw, program()) if kind == 0 else resealed(draw, "program", program())
    try:
        run = sparseflax.load_program(data, other_kernels=bool(draw.integers(2)))
    except ValueError as error:
        return f"refused: {_first_words(error)}"
    if draw.integers(RUN) == 0:
        try:
            y = run(X)
        except ValueError as error:
            return f"refused when called: {_first_words(error)}"
        assert y.shape == (1, 3), y.shape
        return "runs"
    return "read"


def onnx_file(draw: Draw) -> str:
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(network())
    path = folder() / f"case-{os.getpid()}.onnx"
    if draw.random() < 0.3:
        path.write_bytes(damaged(draw, model.SerializeToString()))
    else:
        for _ in range(int(draw.integers(1, 4))):
            _edit_onnx(draw, model)
        path.write_bytes(model.SerializeToString())
    try:
        loaded = sparseflax.onnx.load_onnx(path)
        x = jax.ShapeDtypeStruct(X.shape[:1] + (8, 8, 3), jnp.float32)
        jax.eval_shape(loaded, x)
    except ValueError as error:
        return f"refused: {_first_words(error, path)}"
    return "runs"


def _edit_onnx(draw: Draw, model: Any) -> None:
    graph = model.graph
    kind = int(draw.integers(9))
    node, tensor = pick(draw, graph.node), pick(draw, graph.initializer)
    names = sorted({name for each in graph.node for name in (*each.input, *each.output)})
    if kind == 0 and node.attribute:
        attribute = pick(draw, node.attribute)
        low, high = -(2**63), 2**63 - 1
        if attribute.ints:
            at = int(draw.integers(len(attribute.ints)))
            attribute.ints[at] = min(high, max(low, int(number(draw, attribute.ints[at]))))
        else:
            attribute.i = min(high, max(low, int(number(draw, attribute.i))))
    elif kind == 1 and node.attribute:
        attribute = pick(draw, node.attribute)
        if draw.integers(2):
            node.attribute.remove(attribute)
        else:
            attribute.type = int(draw.integers(0, 15))
    elif kind == 2:
        known = [each.op_type for each in graph.node]
        node.op_type = pick(draw, [*known, "Gemm", "MatMul", "Reshape", "Pad", "Concat", "If", ""])
    elif kind == 3 and node.input:
        at = int(draw.integers(len(node.input)))
        node.input[at] = pick(draw, [*names, "", "nothing"])
    elif kind == 4:
        (graph.node.remove if draw.integers(2) else lambda each: graph.node.append(each))(node)
    elif kind == 5:
        at = int(draw.integers(max(1, len(tensor.dims))))
        if tensor.dims:
            tensor.dims[at] = min(2**63 - 1, max(-(2**63), int(number(draw, tensor.dims[at]))))
        else:
            tensor.dims.append(3)
    elif kind == 6:
        tensor.raw_data = tensor.raw_data[:int(draw.integers(len(tensor.raw_data) + 1))]
    elif kind == 7:
        tensor.data_type = int(draw.integers(0, 25))
    else:
        sizes = pick(draw, [*graph.input, *graph.output]).type.tensor_type.shape.dim
        if sizes:
            pick(draw, sizes).dim_value = min(2**63 - 1, max(-(2**63), int(number(draw, 3))))


def _first_words(error: Exception, path: Path | None = None) -> str:
    text = str(error).replace(str(path), "FILE")
    return f"{type(error).__name__}: {''.join('#' if c.isdigit() else c for c in text)[:40]}"


CASES: dict[str, Callable[[Draw], str]] = {"packed": packed_file, "program": exported_program, "onnx": onnx_file}
