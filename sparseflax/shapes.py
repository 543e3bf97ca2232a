"""What a layer is: the sizes of one convolution, and those of every layer of a model."""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

from sparseflax.packing import DENSE_BLOCK, PackedKernel, channel_block, pack

FLOAT32 = 4  # bytes
_TRACES = itertools.count()
# The attributes by which a layer is known as a convolution, Flax's own or sparse.
WINDOW = ("kernel_size", "strides", "padding", "kernel_dilation", "feature_group_count")


@dataclass(frozen=True)
class ConvShape:
    """The sizes of one 2-D convolution, NHWC x HWIO -> NHWC, in the letters of the kernel and of the cost model.

    A fully connected layer is a 1x1 convolution on 1x1 images.

    Attributes:
      n, ih, iw, ic: images in the batch, rows, columns and channels of the input.
      oc, kh, kw: output channels, kernel rows and columns.
      strides: (rows, columns).
      padding: ((top, bottom), (left, right)), explicit.
      kernel_dilation: (rows, columns).
      groups: feature groups; each sees ic / groups channels.

    Raises:
      ValueError: a size below 1, groups that do not divide the channels, or a kernel larger than the padded image.
    """

    n: int
    ih: int
    iw: int
    ic: int
    oc: int
    kh: int
    kw: int
    strides: tuple[int, int] = (1, 1)
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0))
    kernel_dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in ("n", "ih", "iw", "ic", "oc", "kh", "kw", "groups")}
        sizes |= {"strides": min(self.strides), "kernel_dilation": min(self.kernel_dilation)}
        small = {name: size for name, size in sizes.items() if size < 1}
        if small:
            raise ValueError(f"a convolution with {small}, wanted at least 1: is the batch or the image empty?")
        if self.ic % self.groups or self.oc % self.groups:
            raise ValueError(f"groups={self.groups} has to divide both ic={self.ic} and oc={self.oc}")
        if min(self.oh, self.ow) < 1:
            raise ValueError(f"a {self.kh}x{self.kw} kernel with dilation {self.kernel_dilation} does not fit into a "
                             f"{self.ih}x{self.iw} image padded by {self.padding}: use a larger image or more padding")

    @property
    def oh(self) -> int:
        return (self.ih + sum(self.padding[0]) - (self.kh - 1) * self.kernel_dilation[0] - 1) // self.strides[0] + 1

    @property
    def ow(self) -> int:
        return (self.iw + sum(self.padding[1]) - (self.kw - 1) * self.kernel_dilation[1] - 1) // self.strides[1] + 1

    @property
    def kernel_shape(self) -> tuple[int, int, int, int]:
        """(kh, kw, ic / groups, oc): what a dense kernel of this layer reshapes to, a fully connected one too."""
        return self.kh, self.kw, self.ic // self.groups, self.oc

    @property
    def connected(self) -> bool:
        """Whether it is a fully connected layer, or as good as one."""
        return self.ih == self.iw == self.kh == self.kw == self.groups == 1

    @property
    def block(self) -> int:
        """Input channels per block of its packed kernel."""
        return min(DENSE_BLOCK if self.connected else channel_block(self.kh, self.kw), self.ic // self.groups)

    def pack(self, kernel: Any) -> PackedKernel:
        """Packs a dense kernel of this layer, of `kernel_shape` or (ic, oc). Raises as `sparseflax.pack`."""
        kernel = np.asarray(kernel, np.float32)
        return pack(kernel.reshape((self.ic, self.oc) if self.connected else self.kernel_shape), self.groups)

    @property
    def weights(self) -> int:
        """Number of weights, kept or not."""
        return math.prod(self.kernel_shape)

    @property
    def flops(self) -> int:
        """Operations of the dense convolution, a multiplication and an addition counted as two, padding included."""
        return 2 * self.n * self.oh * self.ow * self.weights

    @property
    def input_bytes(self) -> int:
        return FLOAT32 * self.n * self.ih * self.iw * self.ic

    @property
    def output_bytes(self) -> int:
        return FLOAT32 * self.n * self.oh * self.ow * self.oc

    @property
    def weight_bytes(self) -> int:
        """Bytes of the dense float32 kernel."""
        return FLOAT32 * self.weights

    def with_batch(self, n: int) -> ConvShape:
        return replace(self, n=n)

    def __str__(self) -> str:
        extras = "".join(f" {letter}{a}" if a == b else f" {letter}{a}x{b}"
                         for letter, (a, b) in (("s", self.strides), ("d", self.kernel_dilation)) if (a, b) != (1, 1))
        groups = f" g{self.groups}" if self.groups > 1 else ""
        return f"n{self.n} {self.ic}x{self.ih}x{self.iw} -> {self.oc} {self.kh}x{self.kw}{extras}{groups}"


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
        if len(size) != 2 or size != kernel[:-2] or _pair(getattr(layer, "input_dilation", 1)) != (1, 1):
            return
        (kh, kw, _, oc), (ih, iw, ic) = kernel, x.shape[-3:]
        strides, dilation = _pair(layer.strides), _pair(layer.kernel_dilation)
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


def explicit_padding(padding, image: tuple[int, int], kernel: tuple[int, int], strides: tuple[int, int],
                     dilation: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """((top, bottom), (left, right)) for any `padding` of Flax: a name, an int, or two of (int or (low, high)).

    What fills the border, zeros or a wrapped or reflected image, makes no difference to the sizes.
    """
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    if padding in ("CIRCULAR", "REFLECT"):
        pads: Any = [((r - 1) // 2, r // 2) for r in reach]
    elif isinstance(padding, str):
        pads = jax.lax.padtype_to_pads(image, reach, strides, padding)
    else:
        pads = [(p, p) if isinstance(p, int) else p for p in _pair(padding)]
    (top, bottom), (left, right) = pads
    return (int(top), int(bottom)), (int(left), int(right))


def _pair(value: Any) -> tuple[Any, Any]:
    """Flax's "one for all dimensions, or one each"; None is its old word for 1."""
    first, second = (1, 1) if value is None else (value, value) if isinstance(value, int) else value
    return first, second
