"""Which layers of a model run sparse on a machine, in which precision, and why."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any, Literal, get_args

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict

from sparseflax.conv import ffi
from sparseflax.conv.packing import PackedKernel
from sparseflax.cost.cpu import client_threads, instruction_set, processor
from sparseflax.cost.detect import detect_machine
from sparseflax.cost.int8 import int8_seconds
from sparseflax.cost.machine import Machine
from sparseflax.cost.model import conv_seconds, dense_seconds, useful_range
from sparseflax.layers.stack import PackedStack
from sparseflax.network.linen.layers import WithLayers
from sparseflax.network.measure import Measured, time_layers
from sparseflax.network.planned import LayerPlan, Plan
from sparseflax.network.ranges import Rounded, round_layers
from sparseflax.network.stated import round_stated, stated_ranges
from sparseflax.network.survey import Layer, join, survey

# The predicted gain from which a layer goes sparse unmeasured: the model is about that far off.
MARGIN = 1.1
Precision = Literal["float32", "int8", "auto"]


def plan(model: nnx.Module | tuple[nn.Module, Any], x: Any, machine: Machine | None = None, *, measure: bool = False,
         seconds: float = 0.25, precision: Precision = "float32", examples: Any = None,
         **call: Any) -> Plan:
    """Chooses dense or sparse for every layer of a pruned model: sparse where that takes less time.

    The cost model decides, where it predicts a gain of MARGIN in a layer that was pruned at all; or a measurement of both, on
    this machine with the layer's own weights. Dense convolutions join the program of the sparse ones. The model is taken as at
    inference (`model.eval()`), and traced, not run.

    Args:
      model: an nnx module, or a pair (Linen module, its variables); pruned weights are zeros.
      x: the input, of the batch size to plan for: an array or a `jax.ShapeDtypeStruct` (n, ...), or a pytree of them.
      machine: where it will run; None measures this one.
      measure: times every layer that can be sparse, both ways, and keeps the faster; let nothing else run meanwhile.
      seconds: for each layer to be measured, compiling apart; four times that again where the model expected otherwise.
      precision: "int8" runs in eight bits, with uint8 inputs, what the sparse kernel can run, where that loses little and its
        weights are whole blocks of four input channels; "auto" where it is predicted to take less time as well.
      examples: for int8 a few hundred inputs, unlabelled, with a leading axis of examples: ranges and errors are theirs. Layers
        that the model itself rounds to eight bits, as a file does that was quantized, need none.
      **call: further keyword arguments of the call, e.g. `train=False`.

    Raises:
      TypeError: `model` is neither, cannot be traced, or its weights are not concrete.
      ValueError: a model without convolution; `measure` for another machine than this one; int8 without examples of a model
        that rounds nothing itself, or with values that are not finite.
    """
    if precision not in get_args(Precision):
        raise ValueError(f"precision={precision!r}, wanted one of {get_args(Precision)}")
    if measure and machine is not None and elsewhere(machine):
        raise ValueError(f"measure=True times on this machine, but {elsewhere(machine)}: leave `machine` out, or `measure`")
    layers = {layer.path: layer for layer in survey(model, x, **call)}
    if not any(layer.convolution for layer in layers.values()):
        raise ValueError(f"found no convolution in {_contents(model)}; a fully connected layer alone is packed by "
                         "SparseDense.from_dense")
    native = machine is not None or ffi.available
    machine = machine or detect_machine()
    rows = [_choose(layer, machine, native) for layer in layers.values()]
    if measure and ffi.available:
        open_rows = {row.path: (row.shape, layers[row.path].kernel, layers[row.path].module) for row in rows
                     if row.open and row.shape and row.sparse_seconds}
        times = time_layers(open_rows, seconds)
        # Other programs may have disturbed what nobody expected: that is timed again, and longer.
        unlike = {row.path for row in rows
                  if row.path in times and _confirm(row, times[row.path]).choice != row.choice}
        times |= time_layers({path: layer for path, layer in open_rows.items() if path in unlike}, 4 * seconds)
        rows = [_confirm(row, times[row.path]) if row.path in times else row for row in rows]
    rows = [replace(row, reason=f"{row.reason}; {note}") if (note := layers[row.path].note) else row for row in rows]
    planned = Plan(tuple(rows), machine, describe(x))
    if precision == "float32":
        return planned
    return in_eight_bits(planned, model, x, examples, faster=precision == "auto", **call)


def in_eight_bits(plan: Plan, model: Any, x: Any, examples: Any, faster: bool = False, **call: Any) -> Plan:
    """A plan in float32 with layers in eight bits, where that loses little and, if asked for, is predicted to be faster."""
    norms = {row.path: row.norm for row in plan.layers
             if row.open and row.sparse_seconds and row.shape and row.shape.layers == 1 and not row.shape.depthwise}
    if not isinstance(model, nnx.Module):
        module, variables = model
        model, norms = WithLayers(module, variables, norms, x, **call), dict[str, str | None].fromkeys(norms)
    stated = stated_ranges(model, norms, x, **call)
    layers = round_stated(model, norms, stated)
    others = {path: norm for path, norm in norms.items() if path not in layers}
    if examples is not None:
        layers |= round_layers(model, others, examples, stated, **call) if others or not layers else {}
    elif not layers:
        raise ValueError(f'precision="{"auto" if faster else "int8"}" wants examples=inputs, a few hundred like those that the '
                         "model will meet, as the model does not round its layers' inputs and weights itself")
    else:
        reason = "float32: the model does not round its inputs and weights to eight bits, give examples"
        layers |= {path: Rounded(None, None, (), reason) for path in others}
    rows = [_in_int8(row, layers[row.path], plan.machine, faster) if row.path in layers else row for row in plan.layers]
    return replace(plan, layers=tuple(rows))


def rounded_as(plan: Plan, other: Plan) -> Plan:
    """A plan in float32 with layers in eight bits where another plan of the network has them so and that is faster.

    By the ranges of the other, and so without examples: for whoever wants to know how fast a network is, and not what it says.
    """
    rounded = {row.path: Rounded(row.inputs, row.error, row.correction, "int8", 1.0, row.outputs)
               for row in other.layers if row.inputs is not None}
    rows = [_in_int8(row, rounded[row.path]._replace(density=row.density), plan.machine, faster=True)
            if row.path in rounded else row for row in plan.layers]
    return replace(plan, layers=tuple(rows))


def elsewhere(machine: Machine) -> str | None:
    """Which machine that is and which one this is, if they differ in processor, kernel or threads; else None."""
    there, here = (machine.name, machine.isa, machine.threads), (processor(), instruction_set(), client_threads())
    name = "{} ({}, {} threads)".format
    return None if there == here else f"for {name(*there)}, this is {name(*here)}"


def _choose(layer: Layer, machine: Machine, native: bool) -> LayerPlan:
    """The row of a layer."""
    kernel, shape = layer.kernel, layer.shape
    packed = isinstance(kernel, PackedKernel | PackedStack)
    kept = kernel.nnz if packed else np.count_nonzero(kernel)
    density = kept / max(1, shape.weights if shape is not None else math.prod(kernel.shape))
    dense = sparse = None
    reason = "this call does not run it as a 1-D, 2-D or 3-D convolution or a fully connected layer"
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
    elif shape.depthwise:
        reason = "depthwise: 1 input channel per group"
    elif not native:
        reason = f"the native kernel is not available: {ffi.reason}"
    elif sparse >= dense:
        upper = float(useful_range(shape, machine).upper)
        reason = f"denser than the break-even {upper:.2f}" if upper >= 0.01 else "at no density of 0.01 or more faster"
    elif density == 1:
        reason = f"not pruned, and not measured: predicted {dense / sparse:.3g}x"
    elif dense < MARGIN * sparse:
        reason = f"predicted {dense / sparse:.3g}x, less than the margin of {MARGIN:g}x"
    else:
        choice = "sparse"
        reason = f"predicted {dense / sparse:.3g}x"
    return LayerPlan(layer.path, layer.kind, tuple(kernel.shape), shape, density, choice,
                     machine.isa if packed or (native and shape is not None) else "xla", dense, sparse, layer.norm, reason,
                     open=not packed and layer.refusal is None)


def _confirm(row: LayerPlan, times: Measured) -> LayerPlan:
    """The row with its measured times, and the faster as its choice."""
    choice: Literal["dense", "sparse"] = "sparse" if times.sparse < times.dense else "dense"
    reason = f"measured {times.dense / times.sparse:.3g}x"
    if choice != row.choice:
        reason += f", unlike the model ({row.reason})"
    return replace(row, choice=choice, reason=reason, dense_measured=times.dense, sparse_measured=times.sparse)


def _in_int8(row: LayerPlan, rounded: Rounded, machine: Machine, faster: bool) -> LayerPlan:
    if rounded.inputs is None:
        return replace(row, error=rounded.error, reason=f"{row.reason}; {rounded.reason}")
    try:
        seconds = None if row.shape is None else int8_seconds(row.shape, rounded.density, machine)
    except ValueError:  # not the machine for it
        seconds = None
    if faster and (seconds is None or seconds >= row.seconds):
        reason = f"{row.reason}; float32: int8 predicted {row.seconds / seconds if seconds else math.nan:.3g}x"
        return replace(row, int8_seconds=seconds, error=rounded.error, reason=reason)
    reason = rounded.reason if row.choice == "dense" else f"{row.reason}; {rounded.reason}"
    return replace(row, choice="sparse", kernel=machine.isa, int8_seconds=seconds, inputs=rounded.inputs,
                   outputs=rounded.outputs, error=rounded.error, correction=rounded.correction, reason=reason)


def describe(x: Any) -> str:
    """The dtypes and shapes of an input: "float32[1,28,28,64]"."""
    arrays = jax.tree.leaves(jax.eval_shape(lambda x: x, x))
    return " ".join(f"{a.dtype.name}[{','.join(map(str, a.shape))}]" for a in arrays)


def _contents(model: Any) -> str:
    """What a model consists of, for an error message."""
    if not isinstance(model, nnx.Module):
        return f"{type(model[0]).__name__} with the params {sorted(map(join, flatten_dict(model[1].get('params', {}))))}"
    kinds = Counter(type(module).__name__ for path, module in nnx.iter_modules(model) if path)
    return f"{type(model).__name__} with " + (", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "no module in it")
