"""Layers of a Linen model as nnx ones: what is done with these can then be done with Linen's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.core import unfreeze

from sparseflax.layers.rules import masked
from sparseflax.network.fold import fold
from sparseflax.network.linen.trace import at, given, trace

SETTINGS = "strides", "padding", "kernel_dilation"


class Norm(NamedTuple):
    """A batch norm at inference: statistics, scale and shift (oc,), the last two or None."""

    mean: Any
    var: Any
    scale: Any
    bias: Any
    epsilon: float


def norm_of(module: Any, variables: Any, path: str) -> Norm:
    """The batch norm at a path of the variables."""
    params, statistics = (at(nn.unbox(variables.get(name, {})), path) for name in ("params", "batch_stats"))
    return Norm(statistics["mean"], statistics["var"], params.get("scale"), params.get("bias"), module.epsilon)


def as_nnx(layer: Any, params: Mapping[str, Any], norm: Norm | None = None) -> Any:
    """An nnx layer that computes what a linen.Conv, ConvTranspose or Dense does, and the batch norm after it."""
    kernel, bias = np.asarray(masked(layer, params["kernel"])), params.get("bias")
    if norm is not None:
        kernel, bias = fold(kernel, bias, norm)
    *size, inputs, outputs = kernel.shape
    common = {"use_bias": bias is not None, "dtype": layer.dtype, "precision": layer.precision}
    if isinstance(layer, nn.Dense):
        made: Any = nnx.eval_shape(lambda: nnx.Linear(inputs, outputs, rngs=nnx.Rngs(0), **common))
    else:
        common |= {name: 1 if (value := getattr(layer, name)) is None else value for name in SETTINGS}
        kind: Any = nnx.ConvTranspose
        if isinstance(layer, nn.Conv):
            kind, inputs = nnx.Conv, layer.feature_group_count * inputs
            common |= {"feature_group_count": layer.feature_group_count, "input_dilation": layer.input_dilation or 1}
        made = nnx.eval_shape(lambda: kind(inputs, outputs, size, rngs=nnx.Rngs(0), **common))
    made.kernel = nnx.Param(jnp.asarray(kernel))
    if bias is not None:
        made.bias = nnx.Param(jnp.asarray(bias))
    return made


class WithLayers(nnx.Module):
    """A Linen model at inference some of whose layers are nnx ones, attributes named by their paths; all else is Linen's.

    Args:
      module: the model, unbound.
      variables: of it.
      norms: {path of a layer: path of the batch norm that is folded into it, or None}.
      x: an input.
      **call: further keyword arguments of its call.
    """

    def __init__(self, module: nn.Module, variables: Any, norms: Mapping[str, str | None], x: Any, **call: Any):
        modules, _ = trace(module, variables, x, **call)
        tree = unfreeze(nn.unbox(variables))
        self.paths, self.folded = frozenset(norms), frozenset(norm for norm in norms.values() if norm is not None)
        for path, norm in norms.items():
            setattr(self, path, as_nnx(modules[path], at(tree["params"], path),
                                       None if norm is None else norm_of(modules[norm], tree, norm)))

        def run(*args: Any, **kwargs: Any) -> Any:
            return module.apply(variables, *args, **kwargs)

        self.run = run

    def __call__(self, x: Any, **call: Any) -> Any:
        def replace(run: Any, args: Any, kwargs: Any, context: Any) -> Any:
            path = "/".join(context.module.path)
            if context.method_name == "__call__" and path in self.folded:
                return given(args, kwargs)[0][0]
            if context.method_name == "__call__" and path in self.paths:
                return getattr(self, path)(next(iter((*args, *kwargs.values()))))
            return run(*args, **kwargs)

        with nn.intercept_methods(replace):
            return self.run(x, **call)
