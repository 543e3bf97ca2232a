"""A model packed as planned: batch norms folded, the chosen layers replaced, and an ordinary Flax model again."""

from __future__ import annotations

import warnings
from typing import Any, TypeVar

from flax import linen as nn
from flax import nnx

from sparseflax.layers.int8 import in_int8
from sparseflax.layers.nnx import Sparse, SparseConv, SparseConvTranspose, SparseDense, SparseStack
from sparseflax.layers.rules import is_stack
from sparseflax.network.call import fuse_call
from sparseflax.network.fold import Folded, with_norm
from sparseflax.network.linen.packed import pack_linen
from sparseflax.network.plan import describe, elsewhere
from sparseflax.network.plan import plan as make_plan
from sparseflax.network.planned import Plan
from sparseflax.network.survey import join, weight_of

Model = TypeVar("Model", bound=nnx.Module | tuple[nn.Module, Any])


def pack_model(model: Model, plan: Plan | None = None, x: Any = None, *, fuse: bool = True, chunk: int | None = None,
               **call: Any) -> Model:
    """The model as planned, for inference: batch norms folded, the chosen layers replaced by their sparse forms.

    Its outputs are those of `model` in evaluation mode up to rounding; running statistics are what is folded, and
    batch norms that could not be folded use them too. A plan for another machine gives the same outputs here, but layers
    chosen for that one: a RuntimeWarning says so.

    Args:
      model: the nnx module the plan was made for; it stays as it is and shares no Variable with the result. Or a pair
        (Linen module, its variables).
      plan: from `plan(model, x)`; None makes one, for `x` and this machine.
      x: the input that it will run on, here: a plan for another input or machine is refused then. A Linen model needs one,
        as its layers are there only during a call, and may be packed for another machine all the same.
      fuse: whether calls of the result run through `sparseflax.fuse`, so that activations and residuals join the sparse
        layers, and what else XLA compiles badly for the CPU takes faster forms.
      chunk: images that a thread takes through a fused call's program at a time: what lies between its layers then stays in the
        caches. None takes the plan's.
      **call: further keyword arguments of the call, e.g. `train=False`, for a Linen model or where `plan` is None.

    Returns:
      A new module, in evaluation mode, of the same class; where fused, of a subclass of it with the same name. It can
      be pickled and copied where `model` can. Of a Linen model the pair (module, variables), to be called as before:
      `module.apply(variables, x, **call)`.

    Raises:
      TypeError: `model` is neither, `x` is missing, `plan` is no Plan, or weights are traced.
      ValueError: the plan was made for another model, input or machine, or a kernel is not finite.
    """
    linen: Any = model if isinstance(model, tuple) and len(model) == 2 and isinstance(model[0], nn.Module) else None
    if linen is None and not isinstance(model, nnx.Module):
        raise TypeError(f"model is a {type(model).__name__}, wanted an nnx.Module or a pair (linen module, variables)")
    if not (chunk is None or chunk >= 1):
        raise ValueError(f"chunk={chunk}, wanted a number of images or None for the plan's")
    if not isinstance(plan, Plan | None):
        raise TypeError(f"plan is a {type(plan).__name__}, wanted what sparseflax.plan(model, x) returns")
    if x is None and plan is None:
        raise TypeError("plan and x are None, wanted a plan, or the input to make one for")
    if x is None and linen is not None:
        raise TypeError("x is None, wanted the input of the Linen model: its layers are there only during a call")
    if plan is None:
        plan = make_plan(model, x, **call)
    away, here = elsewhere(plan.machine), None if x is None else describe(x)
    if here and (away and linen is None or plan.inputs != here):
        wrong = [f"for the input {plan.inputs}, this is {here}"] if plan.inputs != here else []
        raise ValueError(f"the plan was made {'; '.join([*wrong, *filter(None, [away])])}: call sparseflax.plan(model, x) "
                         "again, or pass plan=None, which does")
    if away:
        warnings.warn(f"the plan was made {away}: outputs will be right, but layers are chosen for the other machine. To run "
                      "it here, pass the input and plan=None", RuntimeWarning, stacklevel=2)
    if linen is not None:
        return pack_linen(linen[0], linen[1], x, plan, fuse, chunk, call)  # type: ignore[return-value]
    return pack_nnx(model, plan, fuse, chunk)  # type: ignore[type-var]


def pack_nnx(model: nnx.Module, plan: Plan, fuse: bool = True, chunk: int | None = None) -> Any:
    """What `pack_model` does for an nnx module, whatever the plan's machine."""
    copy: Any = nnx.clone(model)
    modules: dict[str, Any] = {join(path): module for path, module in nnx.iter_modules(copy)}
    _check_same_model(modules, plan)
    rows = {row.path: row for row in plan.layers}
    folded = {row.norm for row in plan.layers if row.norm is not None}

    def replace(path, node: Any) -> Any:
        name = join(path)
        row = rows.get(name) if isinstance(node, nnx.Module) else None
        if isinstance(node, nnx.BatchNorm) and name in folded:
            return Folded()
        if row is None or isinstance(node, Sparse):
            return node
        layer: Any = node if row.norm is None else with_norm(node, modules[row.norm])
        if row.choice == "dense":
            return layer
        try:
            if row.inputs is not None:
                return in_int8(layer, row.inputs, row.correction or None, row.outputs)
            if is_stack(layer, layer.kernel.ndim):
                return SparseStack(layer)
            if isinstance(node, nnx.ConvTranspose):
                return SparseConvTranspose(layer)
            return (SparseConv if isinstance(node, nnx.Conv) else SparseDense).from_dense(layer)
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from error

    packed = nnx.recursive_map(replace, copy)
    packed.eval()
    if not fuse or "" in rows:  # a model that is itself a layer has nothing to fuse
        return packed
    return fuse_call(packed, chunk or plan.chunk)


def _check_same_model(modules: dict[str, Any], plan: Plan) -> None:
    """Raises ValueError unless the model has exactly the plan's layers, with the plan's kernels, and its norms."""
    weights = {path: weight_of(module) for path, module in modules.items()}
    here = {path: tuple(weight.shape) for path, weight in weights.items() if weight is not None}
    planned = {row.path: row.kernel_shape for row in plan.layers}
    wrong = [f"{path!r} is {here.get(path, 'missing')}, planned as {shape}" for path, shape in planned.items()
             if here.get(path) != shape]
    wrong += [f"{path!r} is not in the plan" for path in here if path not in planned]
    wrong += [f"batch norm {row.norm!r} is missing" for row in plan.layers
              if row.norm is not None and not isinstance(modules.get(row.norm), nnx.BatchNorm)]
    if wrong:
        raise ValueError("the plan was made for another model: " + "; ".join(wrong) + "; call sparseflax.plan(model, x) again")
