"""The sizes of every convolution that a model runs."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.ad_checkpoint import checkpoint_name

from sparseflax.conv.int8 import QuantizedKernel
from sparseflax.conv.packing import PackedKernel
from sparseflax.conv.window import each
from sparseflax.cost.shape import ConvShape
from sparseflax.layers.planes import is_transposed, not_planar, output_size, rank, shape_of, size_of
from sparseflax.layers.rules import positions
from sparseflax.layers.stack import PackedStack
from sparseflax.network.marks import CALL, calls

_TRACES = itertools.count()
# The attributes by which a layer is known as a convolution, Flax's own or sparse.
WINDOW = ("kernel_size", "strides", "padding", "kernel_dilation")
KIND = "feature_group_count", "transpose_kernel"  # a convolution has the one, a transposed one the other


def conv_shapes(model: nnx.Module | tuple[nn.Module, Any], x: Any, **call: Any) -> dict[str, ConvShape]:
    """The sizes of every convolution and fully connected layer that `model(x)` runs, in call order.

    The call is traced, not run: no arithmetic, and the model keeps its statistics and random state. Layers are known
    by Flax's attributes (`kernel`, `strides`, `padding`, ...): `nnx.Conv`, `nnx.ConvTranspose`, `nnx.Linear`, Linen's,
    their subclasses and their sparse forms. A 1-D convolution is one of images of a row, a 3-D one of an image for each depth
    of its outputs, and a transposed one makes blocks of pixels. Not listed, because no single 2-D convolution describes them:
    convolutions of more dimensions, input dilation, layers stacked by vmap, and subclasses that return another shape.

    A layer called several times is listed once and its calls add up: `n` counts the images of all calls. Where they
    have different sizes the largest stands for all, and `n` is the (rounded) number of such images with the same flops.
    A stack of equal layers that scan runs one after the other, each with weights of its own, is listed once, with its `layers`.

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
    noted: list[_Noted] = []
    if isinstance(model, nnx.Module):
        jaxpr = _trace_nnx(model, x, call, noted)
    elif isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], nn.Module):
        jaxpr = _trace_linen(*model, x, call, noted)
    else:
        raise TypeError(f"model is a {type(model).__name__}, wanted an nnx.Module or a pair (linen module, variables)")
    # Flax may trace a function twice: what is called is what stands in the program.
    ran: dict[str, list[ConvShape]] = defaultdict(list)
    for made in calls(jaxpr):
        path, shape, size = noted[made.number]
        times = math.prod(made.scans)
        if shape.layers == 1:
            ran[path].append(shape.with_batch(shape.n * times * made.size // size))
        elif shape.layers in made.scans and made.size == size:
            ran[path].append(shape.with_batch(shape.n * times // shape.layers))
    return {path: _together(shapes) for path, shapes in ran.items()}


class _Noted(NamedTuple):
    """A call of a layer as it was traced: its path, what it computes, the size of what it returns."""

    path: str
    shape: ConvShape
    size: int


def _trace_nnx(model: nnx.Module, x, call, noted) -> Any:
    graphdef, state = nnx.split(model)

    def run(state, x):
        copy: Any = nnx.merge(graphdef, state)
        modules: list[tuple[tuple, Any]] = list(nnx.iter_modules(copy))
        for path, layer in modules:
            kernel = _dense_shape(layer)
            if kernel is not None:
                # A new partial each time, so that a jit inside the model cannot answer from its cache.
                layer._observe = functools.partial(_observe, noted, "/".join(map(str, path)), kernel)
                object.__setattr__(layer, "__class__", _observed(type(layer)))
        copy(x, **call)

    return jax.make_jaxpr(run)(state, x).jaxpr


@functools.lru_cache
def _observed(layer_type: type) -> type:
    """A subclass that reports its calls: unlike a wrapper it keeps isinstance, attributes and nested jit working."""

    class Observed(layer_type):
        def __call__(self, *args, **kwargs):
            y = super().__call__(*args, **kwargs)
            return self._observe(self, next(iter((*args, *kwargs.values())), None), y)

    return Observed


def _trace_linen(module: nn.Module, variables, x, call, noted) -> Any:
    params: dict[tuple, Any] = flatten_dict(nn.unbox(variables.get("params", {})))
    kernels = {path[:-1]: kernel.shape for path, kernel in params.items() if path[-1] == "kernel"}

    def observe(call_layer: Callable, args, kwargs, context):
        y = call_layer(*args, **kwargs)
        path = context.module.path
        if context.method_name == "__call__" and path in kernels:
            x = next(iter((*args, *kwargs.values())), None)
            return _observe(noted, "/".join(path), kernels[path], context.module, x, y)
        return y

    def run(variables, x):
        rngs = {name: jax.random.key(0) for name in ("params", "dropout")}  # for models left in training mode
        with nn.intercept_methods(observe):
            module.apply(variables, x, mutable=all_collections(), rngs=rngs, **call)

    return jax.make_jaxpr(run)(variables, x).jaxpr


def all_collections() -> nn.DenyList:
    """What makes all collections mutable, unlike any before: an `nn.jit` inside a model cannot answer from its cache then."""
    return nn.DenyList(f"sparseflax trace {next(_TRACES)}")


def _observe(noted: list[_Noted], path: str, kernel: tuple[int, ...], layer: Any, x: Any, y: Any) -> Any:
    """Notes one call of a layer x -> y, if it is what its attributes say; returns y, marked."""
    if not (hasattr(x, "shape") and hasattr(y, "shape")):
        return y
    known = all(hasattr(layer, name) for name in WINDOW) and any(hasattr(layer, name) for name in KIND)
    dimensions = rank(layer) if known else 0
    layers, single = (kernel[0], kernel[1:]) if len(kernel) == dimensions + 3 else (1, kernel)
    if len(single) != dimensions + 2 or dimensions > 3 or x.ndim <= dimensions:
        return y
    *size, icg, oc = single
    batch, image, ic = x.shape[:-1 - dimensions], x.shape[-1 - dimensions:-1], x.shape[-1]
    if dimensions and (size_of(layer) != tuple(size) or not_planar(layer)):
        return y
    if dimensions:
        shape = replace(shape_of(layer, (math.prod(batch), *image, ic), oc), layers=layers)
        output = (*batch, *output_size(layer, image), oc)
    else:
        shape = ConvShape(*positions(x.shape[:-1]), ic, oc, 1, 1, layers=layers)
        output = (*x.shape[:-1], oc)
    if y.shape != output or ic != icg * getattr(layer, "feature_group_count", 1):
        return y
    noted.append(_Noted(path, shape, y.size))
    return checkpoint_name(y, f"{CALL}{len(noted) - 1}")


def _together(calls: list[ConvShape]) -> ConvShape:
    largest = max(calls, key=lambda shape: shape.flops / shape.n)
    return largest.with_batch(max(1, round(sum(shape.flops for shape in calls) * largest.n / largest.flops)))


def _dense_shape(layer: Any) -> tuple[int, ...] | None:
    """Of a layer's kernel, a packed one's included; None if it has none."""
    kernel = getattr(layer, "kernel", None)
    if not isinstance(kernel, PackedKernel | PackedStack | QuantizedKernel):
        return getattr(kernel, "shape", None)
    size, (*_, channels, oc) = size_of(layer), kernel.shape
    if is_transposed(layer):
        return *size, channels, oc // math.prod(each(layer.strides, len(size)))
    return *kernel.shape[:-4], *size, channels // (size[0] if len(size) == 3 else 1), oc
