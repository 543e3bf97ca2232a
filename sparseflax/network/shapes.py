"""The sizes of every convolution that a model runs."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import jax
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

from sparseflax.conv.window import explicit_padding, pair
from sparseflax.cost.shape import ConvShape

_TRACES = itertools.count()
# The attributes by which a layer is known as a convolution, Flax's own or sparse.
WINDOW = ("kernel_size", "strides", "padding", "kernel_dilation", "feature_group_count")


def conv_shapes(model: nnx.Module | tuple[nn.Module, Any], x: Any, **call: Any) -> dict[str, ConvShape]:
    """The sizes of every convolution and fully connected layer that `model(x)` runs, in call order.

    The call is traced, not run: no arithmetic, and the model keeps its statistics and random state. Layers are known
    by Flax's attributes (`kernel`, `strides`, `padding`, ...): `nnx.Conv`, `nnx.Linear`, `linen.Conv`, `linen.Dense`,
    their subclasses and their sparse forms. Not listed, because no single 2-D convolution describes them: 1-D and 3-D
    convolutions, input dilation, layers stacked by vmap or scan, and subclasses that return another shape.

    A layer called several times is listed once and its calls add up: `n` counts the images of all calls. Where they
    have different sizes the largest stands for all, and `n` is the (rounded) number of such images with the same flops.

    Args:
      model: an nnx module, or a pair (Linen module, its variables).
      x: the input, (n, ...) as the model wants it: an array, a `jax.ShapeDtypeStruct`, or a pytree of them.
      **call: further keyword arguments of the call, e.g. `train=False`.

    Returns:
      {path: ConvShape}. The path ("block1/conv2"; "" for a model that is itself a layer) plus "/kernel" is that of the
      layer's kernel in `nnx.state(model, nnx.Param)` or in the Linen params. {} for a model without such layers.

    Raises:
      TypeError: `model` is neither.
      ValueError: an empty batch.
    """
    calls: dict[str, list[ConvShape]] = defaultdict(list)
    if isinstance(model, nnx.Module):
        _trace_nnx(model, x, call, calls)
    elif isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], nn.Module):
        _trace_linen(*model, x, call, calls)
    else:
        raise TypeError(f"model is a {type(model).__name__}, wanted an nnx.Module or a pair (linen module, variables)")
    return {path: _together(shapes) for path, shapes in calls.items()}


def _trace_nnx(model: nnx.Module, x, call, calls) -> None:
    graphdef, state = nnx.split(model)

    def run(state, x):
        copy: Any = nnx.merge(graphdef, state)
        modules: list[tuple[tuple, Any]] = list(nnx.iter_modules(copy))
        for path, layer in modules:
            kernel = getattr(layer, "kernel", None)
            if kernel is not None and hasattr(kernel, "shape"):
                # A new partial each time, so that a jit inside the model cannot answer from its cache.
                layer._observe = functools.partial(_observe, calls, "/".join(map(str, path)), kernel.shape)
                object.__setattr__(layer, "__class__", _observed(type(layer)))
        copy(x, **call)

    jax.eval_shape(run, state, x)


@functools.lru_cache
def _observed(layer_type: type) -> type:
    """A subclass that reports its calls: unlike a wrapper it keeps isinstance, attributes and nested jit working."""

    class Observed(layer_type):
        def __call__(self, *args, **kwargs):
            y = super().__call__(*args, **kwargs)
            self._observe(self, next(iter((*args, *kwargs.values())), None), y)
            return y

    return Observed


def _trace_linen(module: nn.Module, variables, x, call, calls) -> None:
    params: dict[tuple, Any] = flatten_dict(nn.unbox(variables.get("params", {})))
    kernels = {path[:-1]: kernel.shape for path, kernel in params.items() if path[-1] == "kernel"}

    def observe(call_layer: Callable, args, kwargs, context):
        y = call_layer(*args, **kwargs)
        path = context.module.path
        if context.method_name == "__call__" and path in kernels:
            x = next(iter((*args, *kwargs.values())), None)
            _observe(calls, "/".join(path), kernels[path], context.module, x, y)
        return y

    def run(variables, x):
        rngs = {name: jax.random.key(0) for name in ("params", "dropout")}  # for models left in training mode
        with nn.intercept_methods(observe):
            module.apply(variables, x, mutable=all_collections(), rngs=rngs, **call)

    jax.eval_shape(run, variables, x)


def all_collections() -> nn.DenyList:
    """What makes all collections mutable, unlike any before: an `nn.jit` inside a model cannot answer from its cache then."""
    return nn.DenyList(f"sparseflax trace {next(_TRACES)}")


def _observe(calls: dict[str, list[ConvShape]], path: str, kernel: tuple[int, ...], layer: Any, x: Any, y: Any) -> None:
    """Notes one call of a layer x -> y, if it is what its attributes say."""
    if not (hasattr(x, "shape") and hasattr(y, "shape")):
        return
    if all(hasattr(layer, name) for name in WINDOW):
        size = (layer.kernel_size,) if isinstance(layer.kernel_size, int) else tuple(layer.kernel_size)
        if len(size) != 2 or size != kernel[:-2] or pair(getattr(layer, "input_dilation", 1)) != (1, 1):
            return
        (kh, kw, _, oc), (ih, iw, ic) = kernel, x.shape[-3:]
        strides, dilation = pair(layer.strides), pair(layer.kernel_dilation)
        padding = explicit_padding(layer.padding, (ih, iw), (kh, kw), strides, dilation)
        shape = ConvShape(math.prod(x.shape[:-3]), ih, iw, ic, oc, kh, kw, strides, padding, dilation,
                          layer.feature_group_count)
        output = (*x.shape[:-3], shape.oh, shape.ow, oc)
    else:
        ic, oc = x.shape[-1], kernel[-1]
        if kernel not in ((ic, oc), (1, 1, ic, oc)):
            return
        shape = ConvShape(math.prod(x.shape[:-1]), 1, 1, ic, oc, 1, 1)
        output = (*x.shape[:-1], oc)
    if y.shape == output and shape.kernel_shape in (kernel, (1, 1, *kernel)):
        calls[path].append(shape)


def _together(calls: list[ConvShape]) -> ConvShape:
    largest = max(calls, key=lambda shape: shape.flops / shape.n)
    return largest.with_batch(max(1, round(sum(shape.flops for shape in calls) * largest.n / largest.flops)))
