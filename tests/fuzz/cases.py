"""One damaged or edited file after another: `CASES[name](draw)` makes and reads one, and says what came of it."""

import functools
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx

import sparseflax
from sparseflax.cost.machine import TYPICAL
from sparseflax.files.safetensors import seal, unseal
from tests.fuzz.edits import Draw, damaged, edited_array, edited_json, first_words, folder, pick
from tests.fuzz.onnx_cases import onnx_file
from tests.machines import HERE

FITTED = replace(HERE, fitted=TYPICAL)  # its plans ask the native side for counts
RUN = 100  # one in so many networks that came through is run and not only traced: that takes the compiling


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv, self.norm = nnx.Conv(4, 8, (3, 3), use_bias=False, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)
        self.block = nnx.List([nnx.Conv(8, 8, (3, 3), feature_group_count=2, strides=2, rngs=rngs)])
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.block[0](nnx.relu(self.norm(self.conv(x))))).mean((1, 2)))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (3, 3), use_bias=False)(x)))
        return nn.Dense(3)(x.mean((1, 2)))


X = np.ones((1, 6, 6, 4), np.float32)


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
    plan = replace(plan, machine=FITTED)
    sparseflax.save(folder() / "fitted", sparseflax.pack_model(model, plan), plan)
    module = LinenNet()
    variables = module.init(jax.random.key(0), X)
    pair = module, {**variables, "params": thinned(variables["params"])}
    plan = replace(sparseflax.plan(pair, X, HERE), machine=FITTED)
    sparseflax.save(folder() / "linen", sparseflax.pack_model(pair, plan, X), plan)
    abstract = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    return (((folder() / "nnx").read_bytes(), abstract), ((folder() / "fitted").read_bytes(), abstract),
            ((folder() / "linen").read_bytes(), (module, jax.eval_shape(module.init, jax.random.key(0), X))))


@functools.cache
def program() -> bytes:
    model = Net(nnx.Rngs(0))
    nnx.update(model, thinned(nnx.state(model, nnx.Param)))
    return sparseflax.export(sparseflax.pack_model(model, sparseflax.plan(model, X, HERE)), X, any_batch=True)


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
            return f"refused: {first_words(error, path)}"
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
        return f"refused: {first_words(error)}"
    if draw.integers(RUN) == 0:
        try:
            y = run(X)
        except (ValueError, jax.errors.JaxRuntimeError) as error:
            if isinstance(error, jax.errors.JaxRuntimeError) and not str(error).startswith("INVALID_ARGUMENT"):
                raise
            return f"refused when called: {first_words(error)}"
        assert y.shape == (1, 3), y.shape
        return "runs"
    return "read"


CASES: dict[str, Callable[[Draw], str]] = {"packed": packed_file, "program": exported_program, "onnx": onnx_file}
