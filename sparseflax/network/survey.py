"""What is in a model, nnx or Linen: its layers and their weights, the norms that follow them, who else reads what is theirs."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.core import unfreeze
from flax.traverse_util import flatten_dict
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer

from sparseflax.conv.packing import PackedKernel
from sparseflax.cost.shape import ConvShape
from sparseflax.layers.nnx import Sparse, SparseConv, SparseConvTranspose, SparseStack
from sparseflax.layers.planes import rank
from sparseflax.layers.rules import is_stack, masked, unsupported
from sparseflax.layers.stack import PackedStack
from sparseflax.network.fold import is_float32
from sparseflax.network.linen import trace as linen_trace
from sparseflax.network.marks import FOLDABLE, OTHER, OUTPUT, WEIGHT, Shown, shown
from sparseflax.network.shapes import conv_shapes


class Layer(NamedTuple):
    """A layer as it stands in a model, or another module that has weights.

    Attributes:
      path, kind: where it stands, and its class.
      convolution: whether it is one, of any rank.
      kernel: its dense kernel times its mask, NumPy, or a PackedKernel; of a stack those of all its layers; another weight of a
        module that has no kernel.
      refusal: why it has to stay as it is; None if it can become sparse.
      shape: what it computes in the call; None if no single 2-D convolution describes that.
      norm: path of the batch norm that can be folded into it, or None.
      note: why the norm that follows it cannot, or "".
      module: what it is, nnx or Linen, whose attributes say how it is computed; None where it is not known.
    """

    path: str
    kind: str
    convolution: bool
    kernel: Any
    refusal: str | None
    shape: ConvShape | None = None
    norm: str | None = None
    note: str = ""
    module: Any = None


def survey(model: nnx.Module | tuple[nn.Module, Any], x: Any, **call: Any) -> list[Layer]:
    """The layers of a model, in call order, then those that the call does not run.

    Args:
      model: an nnx module, taken as at inference, or a pair (Linen module, its variables).
      x: the input, an array, a `jax.ShapeDtypeStruct`, or a pytree of them.
      **call: further keyword arguments of the call.

    Raises:
      TypeError: `model` is neither, its call cannot be traced, or its weights are not concrete.
    """
    try:
        if isinstance(model, nnx.Module):
            model = nnx.clone(model)
            model.eval()
            shapes, tuples = conv_shapes(model, x, **call), _in_tuples(model)
            norms, alone = trace(model, x, **call)
            # Flax cannot replace what stands in a tuple.
            norms = {path: norm for path, norm in norms.items() if not {parent(path), parent(norm)} & tuples}
            layers = _nnx_layers(model, tuples)
        else:
            shapes = conv_shapes(model, x, **call)  # refuses what is no pair
            modules, (norms, alone) = linen_trace.trace(model[0], model[1], x, **call)
            layers = _linen_layers(modules, model[1])
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        kind = type(model if isinstance(model, nnx.Module) else model[0]).__name__
        raise TypeError(f"the call of {kind} cannot be traced, wanted a model that runs under jax.jit: make its Python "
                        f"independent of the values of arrays, with jnp.where or jax.lax.cond ({error})") from error
    found = {layer.path: _called(layer, shapes.get(layer.path), norms.get(layer.path), alone) for layer in layers}
    return [found[path] for path in dict.fromkeys([*(path for path in shapes if path in found), *found])]


def trace(model: nnx.Module, x: Any, **call: Any) -> Shown:
    """What `model(x)` shows when its layers and norms mark their values: traced, not run.

    Args:
      model: in the mode in which it will run; a norm that takes its statistics from the batch cannot be folded.
      x: its input.
      **call: further keyword arguments of the call.
    """
    graphdef, state = nnx.split(model)
    paths, leaves = zip(*nnx.to_flat_state(state), strict=True)
    outputs = 0

    def run(arrays: Sequence[Any], x: Any) -> Any:
        nonlocal outputs
        copy: Any = nnx.merge(graphdef, nnx.from_flat_state(
            [(path, with_value(leaf, array)) for path, leaf, array in zip(paths, leaves, arrays, strict=True)]))
        modules: list[tuple[Any, Any]] = list(nnx.iter_modules(copy))
        for path, module in modules:
            if mark := _mark(module):
                # A new partial each time, so that a jit inside the model cannot answer from its cache.
                module._run = functools.partial(mark, join(path))
                object.__setattr__(module, "__class__", _marked(type(module)))
        y = copy(x, **call)
        after = dict(nnx.to_flat_state(nnx.state(copy)))
        kept = [value(after.pop(path)) for path in paths]
        y = y, jax.tree.leaves(list(after.values()))
        outputs = len(jax.tree.leaves(y))
        return y, kept

    jaxpr = jax.make_jaxpr(run)([value(leaf) for leaf in leaves], x).jaxpr
    return shown(jaxpr, outputs)


def join(path: Any) -> str:
    return "/".join(map(str, path))


def parent(path: str) -> str:
    return path.rpartition("/")[0]


def value(leaf: Any) -> Any:
    """The array of a Variable, or the array itself."""
    return leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf


def with_value(leaf: Any, array: Any) -> Any:
    return leaf.replace(array) if isinstance(leaf, nnx.Variable) else array


def weight_of(module: Any) -> Any:
    """A module's kernel, else the first of its own Params that is a matrix or more; None if it has neither."""
    if isinstance(module, nnx.BatchNorm):  # a stack of them has matrices
        return None
    kernel = getattr(module, "kernel", None)
    if hasattr(kernel, "shape"):
        return kernel
    return next((leaf for leaf in vars(module).values() if isinstance(leaf, nnx.Param) and np.ndim(value(leaf)) > 1), None)


def _called(layer: Layer, shape: ConvShape | None, norm: str | None, alone: dict[str, bool]) -> Layer:
    """The layer with what the trace of a call has shown of it."""
    packed = isinstance(layer.kernel, PackedKernel | PackedStack)
    if shape is not None and layer.refusal is None and not packed and not alone.get(f"{layer.path}/kernel"):
        layer = layer._replace(refusal="the call uses its kernel elsewhere, too")
    weights = [(layer.path, "kernel"), (layer.path, "bias"), *((norm, name) for name in ("mean", "var", "scale", "bias"))]
    shared = [f"{path}/{name}" for path, name in weights if not alone.get(f"{path}/{name}", name in ("bias", "scale"))]
    if norm is not None and shared:
        return layer._replace(shape=shape, note=f"{norm} stays, as the call uses {' and '.join(shared)} elsewhere, too")
    return layer._replace(shape=shape, norm=norm)


def _nnx_layers(model: nnx.Module, tuples: set[str]) -> Iterator[Layer]:
    for path, module in nnx.iter_modules(model):
        name, kind, weight = join(path), type(module).__name__, weight_of(module)
        convolution = isinstance(module, (nnx.Conv, nnx.ConvTranspose, SparseConv, SparseConvTranspose)) or (
            isinstance(module, SparseStack) and rank(module) > 0)
        if isinstance(module, Sparse):
            yield Layer(name, kind, convolution, weight, None)
        elif weight is not None:
            known = isinstance(module, (nnx.Conv, nnx.ConvTranspose, nnx.Linear))
            refusal = unsupported(module) if known else f"{kind} has no sparse form"
            if refusal is None and parent(name) in tuples:
                refusal = "it stands in a tuple, which cannot be changed: use an nnx.List"
            kernel = np.asarray(masked(module, _concrete(name, value(weight))))
            yield Layer(name, kind, convolution, kernel, refusal, module=module)


def _linen_layers(modules: Mapping[str, nn.Module], variables: Any) -> Iterator[Layer]:
    params = nn.unbox(unfreeze(variables.get("params", {})))
    for name in dict.fromkeys(join(path[:-1]) for path in flatten_dict(params)):
        weight = linen_trace.weight_of(linen_trace.at(params, name))
        module = modules.get(name)
        if weight is None or isinstance(module, nn.BatchNorm):
            continue
        kind = type(module).__name__ if module is not None else "what is not called"
        refusal = unsupported(module) if isinstance(module, linen_trace.LAYERS) else f"{kind} has no sparse form"
        convolution = np.ndim(weight) == 4 or isinstance(module, (nn.Conv, nn.ConvTranspose))
        yield Layer(name, kind, convolution, np.asarray(masked(module, _concrete(name, weight))), refusal, module=module)


def _concrete(path: str, weight: Any) -> np.ndarray:
    if isinstance(weight, Tracer) or not isinstance(weight, (jax.Array, np.ndarray)):
        raise TypeError(f"the kernel of {path!r} is a {type(weight).__name__}, wanted concrete weights: plan outside jit, "
                        "with the trained model")
    return np.asarray(weight)


def _in_tuples(model: nnx.Module) -> set[str]:
    return {join(path) for path, node in nnx.iter_graph(model) if isinstance(node, tuple)}


def _mark(module: nnx.Module) -> Any:
    """What marks a call of `module`; None for one that is neither a layer that may be packed or folded nor a batch norm."""
    if isinstance(module, nnx.BatchNorm):
        return _mark_input
    return _mark_output if _has_scalable_output(module) else None


@functools.lru_cache
def _marked(kind: type) -> type:
    """A subclass whose calls are marked: unlike a wrapper it keeps isinstance, attributes and nested jit working."""

    class Marked(kind):
        def __call__(self, *args, **kwargs):
            return self._run(self, super().__call__, *args, **kwargs)

    return Marked


def _mark_output(path: str, layer: Any, call: Any, *args: Any, **kwargs: Any) -> Any:
    """Names what the layer returns."""
    with _weights(layer, path):
        return checkpoint_name(call(*args, **kwargs), OUTPUT + path)


def _mark_input(path: str, norm: Any, call: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Names what the norm takes."""
    running = args[0] if args else kwargs.get("use_running_average")
    running = norm.use_running_average if running is None else running
    foldable = (call.__func__ is nnx.BatchNorm.__call__ and running is True and is_float32(norm)
                and norm.axis in (-1, x.ndim - 1) and norm.mean.ndim == 1)
    with _weights(norm, path):
        return call(checkpoint_name(x, (FOLDABLE if foldable else OTHER) + path), *args, **kwargs)


@contextmanager
def _weights(module: Any, path: str) -> Iterator[None]:
    """Names the weights that `module` reads. Its attributes are changed, not its Variables: these may be shared, and belong to
    an outer trace."""
    before = {name: leaf for name, leaf in vars(module).items() if isinstance(leaf, nnx.Variable)}
    vars(module).update({name: leaf.replace(checkpoint_name(value(leaf), f"{WEIGHT}{path}/{name}"))
                         for name, leaf in before.items()})
    try:
        yield
    finally:
        vars(module).update(before)


def _has_scalable_output(layer: nnx.Module) -> bool:
    """Whether `layer` is a float32 convolution of any rank, transposed or not, a linear layer or a stack of these, computed as
    Flax does."""
    if isinstance(layer, nnx.Conv) and type(layer).__call__ is nnx.Conv.__call__:
        stock = layer.conv_general_dilated is jax.lax.conv_general_dilated
    elif isinstance(layer, nnx.Linear) and type(layer).__call__ is nnx.Linear.__call__:
        stock = layer.dot_general is jax.lax.dot_general
    elif isinstance(layer, nnx.ConvTranspose) and type(layer).__call__ is nnx.ConvTranspose.__call__:
        stock = not layer.transpose_kernel  # which has its outputs before its inputs
    else:
        return False
    dimensions = layer.kernel.ndim
    return stock and (dimensions == rank(layer) + 2 or is_stack(layer, dimensions)) and is_float32(layer)
