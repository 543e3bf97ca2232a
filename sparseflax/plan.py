"""The model, packed: which layers run sparse on a machine, why, and the model rebuilt that way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.core import Tracer

from sparseflax import ffi
from sparseflax.cost import conv_seconds, dense_seconds, useful_range
from sparseflax.fold import Folded, fold, following_norms
from sparseflax.layer import unsupported
from sparseflax.machine import Machine, detect_machine
from sparseflax.nnx import SparseConv, SparseDense
from sparseflax.packing import PackedKernel
from sparseflax.shapes import ConvShape, conv_shapes

Model = TypeVar("Model", bound=nnx.Module)


@dataclass(frozen=True)
class LayerPlan:
    """What becomes of one layer.

    Attributes:
      path: of the layer in the model, "block1/conv2".
      kind: its class, "Conv".
      kernel_shape: of its dense kernel.
      shape: what it computes for the planned input; None if no single 2-D convolution describes that.
      density: kept / all of its weights, times its mask.
      choice: "dense" or "sparse".
      kernel: what will run it: an instruction set of the sparse kernel, or "xla".
      dense_seconds, sparse_seconds: predicted; None without a shape.
      norm: path of the batch norm that is folded into it, or None.
      reason: of the choice, in words.
    """

    path: str
    kind: str
    kernel_shape: tuple[int, ...]
    shape: ConvShape | None
    density: float
    choice: Literal["dense", "sparse"]
    kernel: str
    dense_seconds: float | None
    sparse_seconds: float | None
    norm: str | None
    reason: str

    @property
    def seconds(self) -> float:
        """Predicted for the choice; 0 where nothing is predicted."""
        return (self.sparse_seconds if self.choice == "sparse" else self.dense_seconds) or 0.0


@dataclass(frozen=True)
class Plan:
    """One LayerPlan per layer, in call order, and the machine they are for; `print(plan)` is a table."""

    layers: tuple[LayerPlan, ...]
    machine: Machine

    @property
    def dense_seconds(self) -> float:
        """Predicted for all layers, dense."""
        return sum(layer.dense_seconds or 0.0 for layer in self.layers)

    @property
    def seconds(self) -> float:
        """Predicted for all layers as planned."""
        return sum(layer.seconds for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """The plan in plain dicts, lists, strings and numbers, for `json.dump`."""
        return asdict(self)

    def __str__(self) -> str:
        def ms(seconds: float | None) -> str:
            return "" if seconds is None else f"{1e3 * seconds:.3f}"

        rows = [("layer", "shape", "density", "choice", "kernel", "dense ms", "sparse ms", "reason")]
        for layer in self.layers:
            shape = str(layer.shape or f"{layer.kind} {'x'.join(map(str, layer.kernel_shape))}")
            reason = layer.reason + (f"; folds {layer.norm}" if layer.norm is not None else "")
            rows.append((layer.path or ".", shape, f"{layer.density:.3f}", layer.choice, layer.kernel,
                         ms(layer.dense_seconds), ms(layer.sparse_seconds), reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        numbers = (2, 5, 6)
        lines = ["  ".join(cell.rjust(width) if i in numbers else cell.ljust(width)
                           for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]
        gain = self.dense_seconds / self.seconds if self.seconds else 1.0
        return "\n".join([*lines, f"predicted {ms(self.dense_seconds)} ms dense, {ms(self.seconds)} ms as planned "
                                  f"({gain:.3g}x) on {self.machine}"])


class _Layer(NamedTuple):
    """A layer as it stands in a model; `refusal` says why it has to stay as it is."""

    path: str
    kind: str
    convolution: bool
    kernel: Any  # the dense kernel times its mask, NumPy, or a PackedKernel
    refusal: str | None


def plan(model: nnx.Module | tuple[nn.Module, Any], x: Any, machine: Machine | None = None, **call: Any) -> Plan:
    """Chooses dense or sparse for every layer of a pruned model: sparse where the cost model predicts less time.

    The model is taken as at inference (`model.eval()`), and traced, not run.

    Args:
      model: an nnx module, or a pair (Linen module, its variables); pruned weights are zeros.
      x: the input, of the batch size to plan for: an array or a `jax.ShapeDtypeStruct` (n, ...), or a pytree of them.
      machine: where it will run; None measures this one.
      **call: further keyword arguments of the call, e.g. `train=False`.

    Raises:
      TypeError: `model` is neither, or its weights are not concrete.
      ValueError: a model without convolution.
    """
    norms: dict[str, str] = {}
    if isinstance(model, nnx.Module):
        model = nnx.clone(model)
        model.eval()
        norms = following_norms(model, x, **call)
        # Flax cannot replace what stands in a tuple.
        tuples = {_join(path) for path, node in nnx.iter_graph(model) if isinstance(node, tuple)}
        norms = {path: norm for path, norm in norms.items() if not {_parent(path), _parent(norm)} & tuples}
        shapes, layers = conv_shapes(model, x, **call), _nnx_layers(model, tuples)
    else:
        shapes = conv_shapes(model, x, **call)  # refuses what is no pair
        layers = _linen_layers(*model)
    found = {layer.path: layer for layer in layers}
    if not any(layer.convolution for layer in found.values()):
        raise ValueError(f"found no convolution in {_contents(model)}; a fully connected layer alone is packed by "
                         "SparseDense.from_dense")
    native = machine is not None or ffi.available
    machine = machine or detect_machine()
    order = [*shapes, *(path for path in found if path not in shapes)]
    return Plan(tuple(_choose(found[path], shapes.get(path), norms.get(path), machine, native) for path in order), machine)


def pack_model(model: Model, plan: Plan) -> Model:
    """The model as planned, for inference: batch norms folded, the chosen layers replaced by SparseConv and SparseDense.

    Its outputs are those of `model` in evaluation mode up to rounding; running statistics are what is folded, and
    batch norms that could not be folded use them too.

    Args:
      model: the nnx module the plan was made for; it stays as it is and shares no Variable with the result.
      plan: from `plan(model, x)`.

    Returns:
      A new module of the same class, in evaluation mode.

    Raises:
      TypeError: `model` is no nnx module, `plan` is no Plan, or weights are traced.
      ValueError: the plan was made for another model, or a kernel is not finite.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model is a {type(model).__name__}, wanted an nnx.Module: in a Linen model put in "
                        "sparseflax.linen.SparseConv.from_dense(layer, params) yourself")
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is a {type(plan).__name__}, wanted what sparseflax.plan(model, x) returns")
    model = nnx.clone(model)
    modules: dict[str, Any] = {_join(path): module for path, module in nnx.iter_modules(model)}
    _check_same_model(modules, plan)
    rows = {row.path: row for row in plan.layers}
    folded = {row.norm for row in plan.layers if row.norm is not None}

    def replace(path, node: Any) -> Any:
        name = _join(path)
        row = rows.get(name) if isinstance(node, nnx.Module) else None
        if isinstance(node, nnx.BatchNorm) and name in folded:
            return Folded()
        if row is None or isinstance(node, (SparseConv, SparseDense)):
            return node
        layer: Any = node if row.norm is None else _with_norm(node, modules[row.norm])
        if row.choice == "dense":
            return layer
        try:
            return (SparseConv if isinstance(node, nnx.Conv) else SparseDense).from_dense(layer)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error

    packed = nnx.recursive_map(replace, model)
    packed.eval()
    return packed


def _choose(layer: _Layer, shape: ConvShape | None, norm: str | None, machine: Machine, native: bool) -> LayerPlan:
    kernel = layer.kernel
    packed = isinstance(kernel, PackedKernel)
    density = kernel.density if packed else np.count_nonzero(kernel) / max(1, kernel.size)
    dense = sparse = None
    if shape is not None:
        dense = float(dense_seconds(shape, machine))
        sparse = float(conv_seconds(shape, max(density, 1 / shape.weights), machine))
    choice: Literal["dense", "sparse"] = "dense"
    if packed:
        choice, reason = "sparse", "already packed"
    elif layer.refusal is not None:
        reason = layer.refusal
    elif shape is None or dense is None or sparse is None:
        reason = "this call does not run it as a 2-D convolution or a fully connected layer"
    elif shape.groups > 1 and shape.groups == shape.ic:
        reason = "depthwise: 1 input channel per group"
    elif not native:
        reason = f"the native kernel is not available: {ffi.reason}"
    elif sparse < dense:
        choice, reason = "sparse", f"predicted {dense / sparse:.3g}x"
    else:
        reason = f"denser than the break-even {float(useful_range(shape, machine).upper):.2f}"
    return LayerPlan(layer.path, layer.kind, tuple(kernel.shape), shape, density, choice,
                     machine.isa if choice == "sparse" else "xla", dense, sparse, norm, reason)


def _nnx_layers(model: nnx.Module, tuples: set[str]) -> Iterator[_Layer]:
    for path, layer in nnx.iter_modules(model):
        name, kind, kernel = _join(path), type(layer).__name__, getattr(layer, "kernel", None)
        convolution = isinstance(layer, (nnx.Conv, nnx.ConvTranspose, SparseConv))
        if isinstance(layer, (SparseConv, SparseDense)):
            yield _Layer(name, kind, convolution, kernel, None)
        elif hasattr(kernel, "shape"):
            refusal = unsupported(layer) if isinstance(layer, (nnx.Conv, nnx.Linear)) else f"{kind} has no sparse form"
            if _parent(name) in tuples:
                refusal = "it stands in a tuple, which cannot be changed: use an nnx.List"
            values = _concrete(name, kernel)
            mask = getattr(layer, "mask", None)
            yield _Layer(name, kind, convolution, values if mask is None else values * np.asarray(mask), refusal)


def _linen_layers(module: nn.Module, variables: Any) -> Iterator[_Layer]:
    params: dict[Any, Any] = flatten_dict(nn.unbox(variables.get("params", {})))
    for path, kernel in params.items():
        if path[-1] == "kernel":
            name = _join(path[:-1])
            kind = {2: "Dense", 4: "Conv"}.get(kernel.ndim, "layer")
            yield _Layer(name, kind, kernel.ndim == 4, _concrete(name, kernel), None)


def _concrete(path: str, kernel: Any) -> np.ndarray:
    values = kernel.get_value() if isinstance(kernel, nnx.Variable) else kernel
    if isinstance(values, Tracer) or not isinstance(values, (jax.Array, np.ndarray)):
        raise TypeError(f"the kernel of {path!r} is a {type(values).__name__}, wanted concrete weights: plan outside jit, "
                        "with the trained model")
    return np.asarray(values)


def _with_norm(layer: Any, norm: nnx.BatchNorm) -> Any:
    """A copy of a convolution or linear layer that does its batch norm's work, with Params of its own."""
    copy = nnx.clone(layer)
    mask = getattr(copy, "mask", None)
    kernel = np.asarray(copy.kernel[...]) * (1 if mask is None else np.asarray(mask))
    kernel, bias = fold(kernel, None if copy.bias is None else copy.bias[...], norm)
    copy.kernel, copy.bias, copy.use_bias = nnx.Param(jnp.asarray(kernel)), nnx.Param(jnp.asarray(bias)), True
    return copy


def _check_same_model(modules: dict[str, Any], plan: Plan) -> None:
    """Raises ValueError unless the model has exactly the plan's layers, with the plan's kernels, and its norms."""
    kernels: dict[str, Any] = {path: getattr(module, "kernel", None) for path, module in modules.items()}
    here = {path: tuple(kernel.shape) for path, kernel in kernels.items() if hasattr(kernel, "shape")}
    planned = {row.path: row.kernel_shape for row in plan.layers}
    wrong = [f"{path!r} is {here.get(path, 'missing')}, planned as {shape}" for path, shape in planned.items()
             if here.get(path) != shape]
    wrong += [f"{path!r} is not in the plan" for path in here if path not in planned]
    wrong += [f"batch norm {row.norm!r} is missing" for row in plan.layers
              if row.norm is not None and not isinstance(modules.get(row.norm), nnx.BatchNorm)]
    if wrong:
        raise ValueError("the plan was made for another model: " + "; ".join(wrong) + "; call sparseflax.plan(model, x) again")


def _contents(model: Any) -> str:
    """What a model consists of, for an error message."""
    if not isinstance(model, nnx.Module):
        return f"{type(model[0]).__name__} with the params {sorted(map(_join, flatten_dict(model[1].get('params', {}))))}"
    kinds = Counter(type(module).__name__ for path, module in nnx.iter_modules(model) if path)
    return f"{type(model).__name__} with " + (", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "no module in it")


def _join(path: Any) -> str:
    return "/".join(map(str, path))


def _parent(path: str) -> str:
    return path.rpartition("/")[0]
