"""The model, packed: which layers run sparse on a machine, why, and the model rebuilt that way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
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
from sparseflax.fuse import fuse_call
from sparseflax.layer import unsupported
from sparseflax.linen_model import LAYERS, Traced, masked, pack_linen, trace
from sparseflax.machine import Machine, client_threads, detect_machine, processor
from sparseflax.measure import Measured, time_layers
from sparseflax.nnx import SparseConv, SparseDense
from sparseflax.packing import PackedKernel
from sparseflax.shapes import ConvShape, conv_shapes

Model = TypeVar("Model", bound=nnx.Module | tuple[nn.Module, Any])
# The predicted gain from which a layer goes sparse unmeasured: the model is about that far off.
MARGIN = 1.1


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
      dense_measured, sparse_measured: seconds on this machine; None where nothing was measured.
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
    dense_measured: float | None = None
    sparse_measured: float | None = None

    @property
    def seconds(self) -> float:
        """Predicted for the choice; 0 where nothing is predicted."""
        return (self.sparse_seconds if self.choice == "sparse" else self.dense_seconds) or 0.0


@dataclass(frozen=True)
class Plan:
    """One LayerPlan per layer, in call order, and the machine and the input they are for; `print(plan)` is a table."""

    layers: tuple[LayerPlan, ...]
    machine: Machine
    inputs: str = ""

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

        timed = [layer for layer in self.layers if layer.dense_measured and layer.sparse_measured]
        rows = [("layer", "shape", "density", "choice", "kernel", "dense ms", "sparse ms",
                 *(("measured", "measured") if timed else ()), "reason")]
        for layer in self.layers:
            shape = str(layer.shape or f"{layer.kind} {'x'.join(map(str, layer.kernel_shape))}")
            reason = layer.reason + (f"; folds {layer.norm}" if layer.norm is not None else "")
            rows.append((layer.path or ".", shape, f"{layer.density:.3f}", layer.choice, layer.kernel,
                         ms(layer.dense_seconds), ms(layer.sparse_seconds),
                         *((ms(layer.dense_measured), ms(layer.sparse_measured)) if timed else ()), reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        numbers = (2, *range(5, len(rows[0]) - 1))
        lines = ["  ".join(cell.rjust(width) if i in numbers else cell.ljust(width)
                           for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]

        def total(word: str, dense: float, planned: float) -> str:
            gain = dense / planned if planned else 1.0
            return f"{word} {ms(dense)} ms dense, {ms(planned)} ms as planned ({gain:.3g}x)"

        lines.append(f"{total('predicted', self.dense_seconds, self.seconds)} on {self.machine}")
        if timed:
            lines.append(total(f"measured in {len(timed)} layers", sum(row.dense_measured or 0 for row in timed), sum(
                (row.sparse_measured if row.choice == "sparse" else row.dense_measured) or 0 for row in timed)))
        return "\n".join(lines)


class _Layer(NamedTuple):
    """A layer as it stands in a model; `refusal` says why it has to stay as it is."""

    path: str
    kind: str
    convolution: bool
    kernel: Any  # the dense kernel times its mask, NumPy, or a PackedKernel
    refusal: str | None


def plan(model: nnx.Module | tuple[nn.Module, Any], x: Any, machine: Machine | None = None, *, measure: bool = False,
         seconds: float = 0.25, **call: Any) -> Plan:
    """Chooses dense or sparse for every layer of a pruned model: sparse where that takes less time.

    The cost model decides, if it predicts a gain of MARGIN in a layer that was pruned at all; or a measurement of both, on
    this machine with the layer's own weights. The model is taken as at inference (`model.eval()`), and traced, not run.

    Args:
      model: an nnx module, or a pair (Linen module, its variables); pruned weights are zeros.
      x: the input, of the batch size to plan for: an array or a `jax.ShapeDtypeStruct` (n, ...), or a pytree of them.
      machine: where it will run; None measures this one.
      measure: times every layer that can be sparse, both ways, and keeps the faster; let nothing else run meanwhile.
      seconds: for each layer to be measured, compiling apart; four times that again where the model expected otherwise.
      **call: further keyword arguments of the call, e.g. `train=False`.

    Raises:
      TypeError: `model` is neither, cannot be traced, or its weights are not concrete.
      ValueError: a model without convolution; `measure` for another machine than this one.
    """
    if measure and machine is not None and elsewhere(machine):
        raise ValueError(f"measure=True times on this machine, but {elsewhere(machine)}: leave `machine` out, or `measure`")
    norms, shapes, layers = _read(model, x, call)
    found = {layer.path: layer for layer in layers}
    if not any(layer.convolution for layer in found.values()):
        raise ValueError(f"found no convolution in {_contents(model)}; a fully connected layer alone is packed by "
                         "SparseDense.from_dense")
    native = machine is not None or ffi.available
    machine = machine or detect_machine()
    order = [*shapes, *(path for path in found if path not in shapes)]
    rows = [_choose(found[path], shapes.get(path), norms.get(path), machine, native) for path in order]
    if measure and ffi.available:
        open_rows = {row.path: (row.shape, found[row.path].kernel) for row in rows if row.shape and row.sparse_seconds
                     and found[row.path].refusal is None and not isinstance(found[row.path].kernel, PackedKernel)}
        times = time_layers(open_rows, seconds)
        # Other programs may have disturbed what nobody expected: that is timed again, and longer.
        unlike = {row.path for row in rows
                  if row.path in times and _confirm(row, times[row.path], machine).choice != row.choice}
        times |= time_layers({path: layer for path, layer in open_rows.items() if path in unlike}, 4 * seconds)
        rows = [_confirm(row, times[row.path], machine) if row.path in times else row for row in rows]
    return Plan(tuple(rows), machine, _describe(x))


def pack_model(model: Model, plan: Plan, x: Any = None, *, fuse: bool = True, **call: Any) -> Model:
    """The model as planned, for inference: batch norms folded, the chosen layers replaced by SparseConv and SparseDense.

    Its outputs are those of `model` in evaluation mode up to rounding; running statistics are what is folded, and
    batch norms that could not be folded use them too.

    Args:
      model: the nnx module the plan was made for; it stays as it is and shares no Variable with the result. Or a pair
        (Linen module, its variables).
      plan: from `plan(model, x)`.
      x: the input that it will run on, here; makes sure that the plan is for it and for this machine. None trusts the plan.
        A Linen model needs one, as its layers are there only during a call.
      fuse: whether calls of the result run through `sparseflax.fuse`, so that activations and residuals join the sparse
        layers, and pooling, grouped and depthwise convolutions run in the forms that are fast on the CPU.
      **call: further keyword arguments of a Linen model's call, e.g. `train=False`.

    Returns:
      A new module, in evaluation mode, of the same class; where fused, of a subclass of it with the same name. Of a Linen
      model the pair (module, variables), to be called as before: `module.apply(variables, x, **call)`.

    Raises:
      TypeError: `model` is neither, a Linen model comes without `x`, `plan` is no Plan, or weights are traced.
      ValueError: the plan was made for another model, input or machine, or a kernel is not finite.
    """
    linen: Any = model if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], nn.Module) else None
    if linen is None and not isinstance(model, nnx.Module):
        raise TypeError(f"model is a {type(model).__name__}, wanted an nnx.Module or a pair (linen module, variables)")
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is a {type(plan).__name__}, wanted what sparseflax.plan(model, x) returns")
    if x is not None and (plan.inputs != _describe(x) or elsewhere(plan.machine)):
        wrong = [f"for the input {plan.inputs}, this is {_describe(x)}"] if plan.inputs != _describe(x) else []
        raise ValueError(f"the plan was made {'; '.join([*wrong, *filter(None, [elsewhere(plan.machine)])])}: call "
                         "sparseflax.plan(model, x) again")
    if linen is not None:
        if x is None:
            raise TypeError("x is None, wanted the input of the Linen model: its layers are there only during a call")
        return pack_linen(linen[0], linen[1], x, plan, fuse, call)  # type: ignore[return-value]
    copy: Any = nnx.clone(model)
    modules: dict[str, Any] = {_join(path): module for path, module in nnx.iter_modules(copy)}
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

    packed = nnx.recursive_map(replace, copy)
    packed.eval()
    return fuse_call(packed) if fuse and "" not in rows else packed  # a model that is itself a layer has nothing to fuse


def elsewhere(machine: Machine) -> str | None:
    """Which machine that is and which one this is, if they differ in processor, kernel or threads; else None."""
    there, here = (machine.name, machine.isa, machine.threads), (processor(), ffi.isa(), client_threads())
    name = "{} ({}, {} threads)".format
    return None if there == here else f"for {name(*there)}, this is {name(*here)}"


def _read(model: Any, x: Any, call: dict[str, Any]) -> tuple[dict[str, str], dict[str, ConvShape], Iterator[_Layer]]:
    """The foldable norms by layer, the shapes in call order, and the layers."""
    try:
        if not isinstance(model, nnx.Module):
            shapes = conv_shapes(model, x, **call)  # refuses what is no pair
            traced = trace(model[0], model[1], x, **call)
            return traced.norms, shapes, _linen_layers(traced, model[1])
        model = nnx.clone(model)
        model.eval()
        norms = following_norms(model, x, **call)
        # Flax cannot replace what stands in a tuple.
        tuples = {_join(path) for path, node in nnx.iter_graph(model) if isinstance(node, tuple)}
        norms = {path: norm for path, norm in norms.items() if not {_parent(path), _parent(norm)} & tuples}
        return norms, conv_shapes(model, x, **call), _nnx_layers(model, tuples)
    except (jax.errors.JAXTypeError, jax.errors.JAXIndexError) as error:
        kind = type(model if isinstance(model, nnx.Module) else model[0]).__name__
        raise TypeError(f"the call of {kind} cannot be traced, wanted a model that runs under jax.jit: make its Python "
                        f"independent of the values of arrays, with jnp.where or jax.lax.cond ({error})") from error


def _choose(layer: _Layer, shape: ConvShape | None, norm: str | None, machine: Machine, native: bool) -> LayerPlan:
    kernel = layer.kernel
    packed = isinstance(kernel, PackedKernel)
    density = kernel.density if packed else np.count_nonzero(kernel) / max(1, kernel.size)
    dense = sparse = None
    reason = "this call does not run it as a 2-D convolution or a fully connected layer"
    if shape is not None:
        dense = float(dense_seconds(shape, machine))
        try:
            sparse = float(conv_seconds(shape, max(density, 1 / shape.weights), machine))
        except ValueError as error:  # not a layer for the kernel, or not the machine for it
            reason = str(error)
    choice: Literal["dense", "sparse"] = "dense"
    if packed:
        choice, reason = "sparse", "already packed"
    elif layer.refusal is not None:
        reason = layer.refusal
    elif shape is None or dense is None or sparse is None:
        pass
    elif shape.groups > 1 and shape.groups == shape.ic:
        reason = "depthwise: 1 input channel per group"
    elif not native:
        reason = f"the native kernel is not available: {ffi.reason}"
    elif sparse >= dense:
        reason = f"denser than the break-even {float(useful_range(shape, machine).upper):.2f}"
    elif density == 1:
        reason = f"not pruned, and not measured: predicted {dense / sparse:.3g}x"
    elif dense < MARGIN * sparse:
        reason = f"predicted {dense / sparse:.3g}x, less than the margin of {MARGIN:g}x"
    else:
        choice, reason = "sparse", f"predicted {dense / sparse:.3g}x"
    return LayerPlan(layer.path, layer.kind, tuple(kernel.shape), shape, density, choice,
                     machine.isa if choice == "sparse" else "xla", dense, sparse, norm, reason)


def _confirm(row: LayerPlan, times: Measured, machine: Machine) -> LayerPlan:
    """The row with its measured times, and the faster as its choice."""
    choice: Literal["dense", "sparse"] = "sparse" if times.sparse < times.dense else "dense"
    reason = f"measured {times.dense / times.sparse:.3g}x"
    if choice != row.choice:
        reason += f", unlike the model ({row.reason})"
    return replace(row, choice=choice, kernel=machine.isa if choice == "sparse" else "xla", reason=reason,
                   dense_measured=times.dense, sparse_measured=times.sparse)


def _describe(x: Any) -> str:
    """The dtypes and shapes of an input: "float32[1,28,28,64]"."""
    arrays = jax.tree.leaves(jax.eval_shape(lambda x: x, x))
    return " ".join(f"{a.dtype.name}[{','.join(map(str, a.shape))}]" for a in arrays)


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


def _linen_layers(traced: Traced, variables: Any) -> Iterator[_Layer]:
    params: dict[Any, Any] = flatten_dict(nn.unbox(variables.get("params", {})))
    for path, kernel in params.items():
        name = _join(path[:-1])
        layer = traced.modules.get(name)
        if path[-1] == "kernel" and layer is not None:
            kind = type(layer).__name__
            refusal = unsupported(layer) if isinstance(layer, LAYERS) else f"{kind} has no sparse form"
            yield _Layer(name, kind, kernel.ndim == 4, np.asarray(masked(layer, _concrete(name, kernel))), refusal)


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
