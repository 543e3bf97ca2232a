"""A packed network as a file: its arrays and its plan, without any code, read back into the model's structure."""

from __future__ import annotations

import json
import math
import os
import types
import typing
import warnings
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

from sparseflax.conv.int8 import QuantizedKernel
from sparseflax.cost.atomic import write_atomically
from sparseflax.files import linen as linen_store
from sparseflax.files.linen import PATTERN
from sparseflax.files.safetensors import mismatches, seal, unseal
from sparseflax.layers.int8 import Int8Conv, Sums
from sparseflax.layers.nnx import Sparse, SparseStack
from sparseflax.layers.stack import from_arrays
from sparseflax.network.linen.packed import PackedModel, Words
from sparseflax.network.pack import pack_nnx
from sparseflax.network.plan import elsewhere
from sparseflax.network.planned import Plan

Model = TypeVar("Model", bound=nnx.Module)
Linen = tuple[nn.Module, Any]
Packed = Sparse | Int8Conv


def save(path: str | os.PathLike[str], packed: nnx.Module | tuple[PackedModel, Any], plan: Plan) -> None:
    """Writes a packed network and its plan, whole or not at all; `load` is the inverse.

    A kept weight takes 5 bytes, where a dense one takes 4; in eight bits 5 bytes are a word of four. The file is a
    safetensors file: "conv1/values" (nnz,), "conv1/gaps" and "conv1/layout" of a sparse layer, "conv1/words" (nnz,) and
    "conv1/scale" (oc,) in place of values in eight bits, and every other array of the model by its path, but random state.

    Args:
      path: the file, which is replaced.
      packed: from `pack_model(model, plan)`, fine-tuned or not; of a Linen model the pair (module, variables).
      plan: what it was packed by.

    Raises:
      TypeError: `plan` is no Plan, or the model holds arrays that the format does not have.
      ValueError: the model was not packed by this plan.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is a {type(plan).__name__}, wanted the one that the model was packed by")
    if isinstance(packed, tuple):
        layers = {path: static.inputs if isinstance(static, Words) else None for path, static in packed[0].patterns}
        arrays = linen_store.arrays_of(*packed)
    else:
        layers = {path: layer.inputs if isinstance(layer, Int8Conv) else None for path, layer in _sparse_layers(packed)}
        arrays = _arrays_of(packed)
    planned = {row.path: row.inputs for row in plan.layers if row.choice == "sparse"}
    if set(layers) != set(planned):
        raise ValueError(f"the model was not packed by this plan: its sparse layers are {sorted(layers)}, the plan has "
                         f"{sorted(planned)}")
    if other := [path for path in layers if layers[path] != planned[path]]:
        raise ValueError(f"the model was not packed by this plan: the inputs of {other} are rounded by "
                         f"{[layers[path] for path in other]}, the plan has {[planned[path] for path in other]}")
    write_atomically(path, seal("network", arrays, {"plan": json.dumps(plan.to_dict())}))


@overload
def load(path: str | os.PathLike[str], model: Model) -> tuple[Model, Plan]: ...
@overload
def load(path: str | os.PathLike[str], model: Linen) -> tuple[tuple[PackedModel, Any], Plan]: ...
def load(path: Any, model: Any) -> Any:
    """A packed network from its file, and its plan.

    A file from another machine computes the same here, perhaps not as fast: a RuntimeWarning names both.

    Args:
      path: a file that `save` wrote.
      model: the dense module that was packed, for its structure: its weights do not count, and may be abstract
        (`nnx.eval_shape(lambda: Net(rngs))`). Or a pair (Linen module, its variables), which may be abstract too
        (`jax.eval_shape(module.init, key, x)`).

    Returns:
      (packed, plan): a new module as from `pack_model`, in evaluation mode, to be called or given to `jax.jit`; of a Linen
      model the pair (module, variables).

    Raises:
      FileNotFoundError: there is no such file.
      TypeError: `model` is no nnx module and no pair.
      ValueError: the file is cut, damaged, edited, of another version, or does not fit the model; names all that do not.
    """
    linen = isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], nn.Module)
    if not linen and not isinstance(model, nnx.Module):
        raise TypeError(f"model is a {type(model).__name__}, wanted the nnx.Module that was packed, or a pair (linen module, "
                        "variables)")
    whole: Any = model
    kind = type(whole[0] if linen else whole).__name__
    try:
        tensors, metadata = unseal("network", Path(path).read_bytes())
        plan = _decode(Plan, json.loads(metadata.get("plan", "null")))
    except (ArithmeticError, RecursionError, ValueError) as error:
        raise ValueError(f"{path} is no packed network: {error}") from error
    packed: Any
    if linen:
        packed, wrong = linen_store.restore(whole[0], whole[1], plan, tensors)
    else:
        try:
            packed = pack_nnx(_blank(whole), plan)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:  # the plan may have been edited
            raise ValueError(f"{path} does not fit {kind}: {error}") from error
        wrong = _fill(packed, tensors)
    if wrong:
        raise ValueError(f"{path} does not fit {kind}: {'; '.join(wrong)}")
    away = elsewhere(plan.machine)
    if away:
        warnings.warn(f"{path} was packed {away}: its outputs are right, but its layers were chosen for the other machine; "
                      "plan and pack the dense model here, so that none is slower than dense", RuntimeWarning, stacklevel=2)
    return packed, plan


def _arrays_of(packed: nnx.Module) -> dict[str, Any]:
    arrays = {name: _value(leaf) for name, (_, leaf) in _leaves(packed).items()}
    for name, layer in _sparse_layers(packed):
        parts = layer.kernel.to_arrays()
        arrays |= {f"{name}/{part}": parts[part] for part in PATTERN}
    return arrays


def _sparse_layers(model: nnx.Module) -> Iterator[tuple[str, Packed]]:
    for path, module in nnx.iter_modules(model):
        if isinstance(module, Packed):
            yield "/".join(map(str, path)), module


def _leaves(model: nnx.Module) -> dict[str, tuple[tuple[Any, ...], Any]]:
    """{name: (path, Variable or array)} of all that is stored of a model but patterns, and what follows from them."""
    return {"/".join(map(str, path)): (path, leaf) for path, leaf in nnx.to_flat_state(nnx.state(model))
            if not isinstance(leaf, (nnx.RngState, Sums))}


def _value(leaf: Any) -> Any:
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def _with_value(leaf: Any, value: Any) -> Any:
    return leaf.replace(value) if isinstance(leaf, nnx.Variable) else value


def _blank(model: Model) -> Model:
    """A copy with kernels of zeros, and ones elsewhere, that take no memory; random state, in no file, is kept or new."""
    graphdef, state = nnx.split(model)

    def blank(path, leaf: Any) -> Any:
        if isinstance(leaf, nnx.RngState) and not isinstance(_value(leaf), jax.ShapeDtypeStruct):
            return leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return _with_value(leaf, jnp.broadcast_to(jax.random.key(0), leaf.shape))
        if isinstance(leaf, nnx.RngState):
            return _with_value(leaf, jnp.zeros(leaf.shape, leaf.dtype))
        return _with_value(leaf, np.broadcast_to(np.asarray(path[-1] != "kernel", leaf.dtype), leaf.shape))

    return nnx.merge(graphdef, nnx.from_flat_state([(path, blank(path, leaf)) for path, leaf in nnx.to_flat_state(state)]))


def _fill(packed: nnx.Module, tensors: dict[str, np.ndarray]) -> list[str]:
    """Gives a packed model its arrays; returns what does not fit, in words."""
    tensors, wrong = dict(tensors), []
    for name, layer in _sparse_layers(packed):
        stored = {part: tensors.pop(f"{name}/{part}") for part in PATTERN if f"{name}/{part}" in tensors}
        weights = ("words", "scale") if isinstance(layer, Int8Conv) else ("values",)
        stored |= {part: tensors[f"{name}/{part}"] for part in weights if f"{name}/{part}" in tensors}
        try:
            _refill(layer, stored)
        except ValueError as error:
            wrong.append(f"{name!r}: {error}")
            tensors |= {f"{name}/{part}": np.asarray(getattr(layer, part)[...]) for part in weights}  # told already
    found = _leaves(packed)
    wrong += mismatches(tensors, {name: (leaf.shape, leaf.dtype) for name, (_, leaf) in found.items()})
    if not wrong:
        nnx.update(packed, nnx.from_flat_state([(path, _with_value(leaf, jax.device_put(tensors[name])))
                                                for name, (path, leaf) in found.items()]))
    return wrong


def _refill(layer: Packed, stored: dict[str, np.ndarray]) -> None:
    """Gives a packed layer another kernel of its size.

    Raises:
      ValueError: the arrays are no kernel's, or one of another size.
    """
    wanted: Any = layer.kernel
    kernel: Any
    if isinstance(layer, Int8Conv):
        rounding = wanted.to_arrays()
        kernel = QuantizedKernel.from_arrays(stored | {name: rounding[name] for name in ("inputs", "outputs")})
    else:
        kernel = from_arrays(stored)
    if (kernel.shape, kernel.groups) != (wanted.shape, wanted.groups):
        raise ValueError(f"its kernel is {kernel.shape} in {kernel.groups} groups, the model's {wanted.shape} in "
                         f"{wanted.groups}")
    if isinstance(layer, SparseStack):
        layer.patterns = kernel.patterns
    else:
        layer.pattern = kernel.pattern
    for part in ("words", "scale", "sums") if isinstance(layer, Int8Conv) else ("values",):
        getattr(layer, part).set_value(getattr(kernel, part))


def _decode(kind: Any, value: Any) -> Any:
    """What JSON made of a value of the type `kind`, back: a dataclass, a NamedTuple, a tuple, a number or a text.

    Raises:
      ValueError: it is none.
    """
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    names = getattr(kind, "_fields", None)
    if names and isinstance(value, list) and len(value) == len(names):
        return kind(*map(_decode, typing.get_type_hints(kind).values(), value))
    if is_dataclass(kind) and isinstance(value, dict):
        known, hints = {field.name for field in fields(kind)}, typing.get_type_hints(kind)
        if value.keys() != known:
            raise ValueError(f"a {kind.__name__} with {sorted(value.keys() ^ known)} missing or unknown")  # type: ignore
        return kind(**{name: _decode(hints[name], part) for name, part in value.items()})  # type: ignore[operator]
    if origin is tuple and isinstance(value, list):
        parts = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
        if len(parts) == len(value):
            return tuple(map(_decode, parts, value))
    if origin in (types.UnionType, typing.Union):
        for option in arguments:
            if (value is None) == (option is types.NoneType):
                return None if value is None else _decode(option, value)
    if origin is typing.Literal and value in arguments:
        return value
    if kind in (float, typing.Any) and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise ValueError(f"{str(value)[:100]!r} in its plan is no {getattr(kind, '__name__', kind)}")
