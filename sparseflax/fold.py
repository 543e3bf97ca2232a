"""Batch norm at inference is a scale and a shift per channel: where it follows a layer, and how it goes into the weights."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

# Names of the values that the trace marks: what a layer returns, what a foldable norm takes, what another norm takes.
OUTPUT, FOLDABLE, OTHER = (f"sparseflax {mark} of " for mark in ("output", "norm input", "other norm input"))


class Folded(nnx.Module):
    """What stands where a batch norm was folded into the layer before it: the identity, called like a batch norm."""

    def __call__(self, x: jax.Array, use_running_average: bool | None = None, *, mask: Any = None) -> jax.Array:
        return x

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Lets `nnx.view` set what it sets on a batch norm; without effect.

        Args:
          use_running_average: ignored, the statistics are folded.
        """


def following_norms(model: nnx.Module, x: Any, **call: Any) -> dict[str, str]:
    """The batch norms of `model(x)` that can be folded: {path of a convolution or linear layer: path of its norm}.

    A norm can be folded if every input of it is that layer's output, and nothing but the norm ever uses this output. The
    call is traced, not run, with each layer's values marked by name; what uses them is then read from the jaxpr.

    Args:
      model: in the mode in which it will run; a norm that takes its statistics from the batch cannot be folded.
      x: its input, an array, a `jax.ShapeDtypeStruct`, or a pytree of them.
      **call: further keyword arguments of the call.
    """
    graphdef, state = nnx.split(model)

    def run(state, x):
        copy: Any = nnx.merge(graphdef, state)
        modules: list[tuple[Any, Any]] = list(nnx.iter_modules(copy))
        for path, module in modules:
            marked = _marked(module)
            if marked is not None:
                module._path = "/".join(map(str, path))
                object.__setattr__(module, "__class__", marked)
        return copy(x, **call)

    return marked_norms(jax.make_jaxpr(run)(state, x).jaxpr)


def marked_norms(jaxpr: Any) -> dict[str, str]:
    """{path of a layer: path of the norm that can be folded into it}, from a trace whose values are named."""
    users: dict[str, set[str | None]] = defaultdict(set)  # of a layer's output: norms, None for anything else
    inputs: dict[str, set[str | None]] = defaultdict(set)  # of a norm: layers, None for anything else
    _read(jaxpr, users, inputs)
    found = ((layer, next(iter(norms))) for layer, norms in users.items() if len(norms) == 1)
    return {layer: norm for layer, norm in found if norm is not None and inputs[norm] == {layer}}


def fold(kernel: Any, bias: Any, norm: Any) -> tuple[np.ndarray, np.ndarray]:
    """The kernel and bias that do a layer's work and the norm's, computed in float64.

    scale (conv(x) + bias - mean) / sqrt(var + epsilon) + shift = conv'(x) + bias'
    kernel' = m kernel,   bias' = m (bias - mean) + shift,   m = scale / sqrt(var + epsilon)

    Args:
      kernel: (..., oc), zeros stay zeros.
      bias: (oc,) or None.
      norm: with `mean`, `var`, `scale`, `bias` (oc,), the last two or None, and `epsilon`.

    Returns:
      float32 kernel' (..., oc) and bias' (oc,).
    """
    mean, var = (np.asarray(stat[...], np.float64) for stat in (norm.mean, norm.var))
    scale = 1.0 if norm.scale is None else np.asarray(norm.scale[...], np.float64)
    shift = 0.0 if norm.bias is None else np.asarray(norm.bias[...], np.float64)
    multiplier = scale / np.sqrt(var + norm.epsilon)
    bias = 0.0 if bias is None else np.asarray(bias, np.float64)
    return ((np.asarray(kernel, np.float64) * multiplier).astype(np.float32),
            ((bias - mean) * multiplier + shift).astype(np.float32))


def _marked(module: nnx.Module) -> type | None:
    """The class that `module` has during the trace; None for its own."""
    if _has_scalable_output(module):
        return _mark_output(type(module))
    return _mark_input(type(module)) if isinstance(module, nnx.BatchNorm) else None


def _has_scalable_output(layer: nnx.Module) -> bool:
    """Whether `layer` is a float32 convolution of any rank or a linear layer, computed as Flax does."""
    if isinstance(layer, nnx.Conv) and type(layer).__call__ is nnx.Conv.__call__:
        rank, stock = len(layer.kernel_size) + 2, layer.conv_general_dilated is jax.lax.conv_general_dilated
    elif isinstance(layer, nnx.Linear) and type(layer).__call__ is nnx.Linear.__call__:
        rank, stock = 2, layer.dot_general is jax.lax.dot_general
    else:
        return False
    return stock and layer.kernel.ndim == rank and is_float32(layer)


def is_float32(layer: Any) -> bool:
    """Whether a layer or norm, nnx or Linen, computes in float32."""
    dtypes = (layer.dtype, layer.param_dtype, getattr(layer, "preferred_element_type", None))
    return all(dtype is None or jnp.dtype(dtype) == jnp.float32 for dtype in dtypes)


@functools.lru_cache
def _mark_output(layer_type: type) -> type:
    """A subclass that names what it returns: unlike a wrapper it keeps isinstance, attributes and nested jit working."""

    class Marked(layer_type):
        def __call__(self, *args, **kwargs):
            return checkpoint_name(super().__call__(*args, **kwargs), OUTPUT + self._path)

    return Marked


@functools.lru_cache
def _mark_input(norm_type: type) -> type:
    """A subclass that names what it takes."""

    class Marked(norm_type):
        def __call__(self, x, *args, **kwargs):
            running = args[0] if args else kwargs.get("use_running_average")
            running = self.use_running_average if running is None else running
            foldable = (norm_type.__call__ is nnx.BatchNorm.__call__ and running is True and is_float32(self)
                        and self.axis in (-1, x.ndim - 1) and self.mean.ndim == 1)
            return super().__call__(checkpoint_name(x, (FOLDABLE if foldable else OTHER) + self._path), *args, **kwargs)

    return Marked


def _read(jaxpr: Any, users: dict[str, set[str | None]], inputs: dict[str, set[str | None]]) -> None:
    """Collects who uses the outputs and what the norms take. A value that crosses into an inner jaxpr has another user."""
    outputs: dict[int, str] = {}  # id of a variable -> path of the layer that it is the output of
    for equation in jaxpr.eqns:
        name = str(equation.params.get("name")) if equation.primitive.name == "name" else ""
        for variable in equation.invars:
            layer = outputs.get(id(variable))
            if layer is not None:
                users[layer].add(name.removeprefix(FOLDABLE) if name.startswith(FOLDABLE) else None)
            if name.startswith(FOLDABLE):
                inputs[name.removeprefix(FOLDABLE)].add(layer)
            elif name.startswith(OTHER):
                inputs[name.removeprefix(OTHER)].add(None)
        if name.startswith(OUTPUT):
            outputs[id(equation.outvars[0])] = name.removeprefix(OUTPUT)
        for value in jax.tree.leaves(equation.params, is_leaf=lambda value: _as_jaxpr(value) is not None):
            inner = _as_jaxpr(value)
            if inner is not None:
                _read(inner, users, inputs)
    for variable in jaxpr.outvars:
        if id(variable) in outputs:
            users[outputs[id(variable)]].add(None)


def _as_jaxpr(value: Any) -> Any:
    """The jaxpr in an equation's parameter, open or closed; None for anything else."""
    value = getattr(value, "jaxpr", value)
    return value if hasattr(value, "eqns") else None
