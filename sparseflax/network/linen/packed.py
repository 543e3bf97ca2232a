"""A Linen model with packed layers: its own calls are intercepted, since Linen has no attribute to put a layer into."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import unfreeze

from sparseflax.conv.int8 import Quantization, QuantizedKernel
from sparseflax.conv.packing import PackedKernel, Pattern
from sparseflax.layers import rules as sparse
from sparseflax.layers.int8 import in_int8
from sparseflax.layers.stack import of_step, steps
from sparseflax.network.fold import fold
from sparseflax.network.fuse import fuse
from sparseflax.network.linen.layers import as_nnx, norm_of
from sparseflax.network.linen.trace import at, given, trace, weight_of
from sparseflax.network.planned import LayerPlan, Plan
from sparseflax.network.shapes import KIND, WINDOW


class Words(NamedTuple):
    """What is static of a layer in eight bits: see QuantizedKernel."""

    pattern: Pattern
    channels: int
    inputs: Quantization
    outputs: Quantization | None


Static = Pattern | tuple[Pattern, ...] | Words


@dataclass(frozen=True)
class PackedModel:
    """A Linen model whose planned layers run packed, for inference; `sparseflax.pack_model` makes it and its variables.

    The variables are the model's, but for sparse layers, which have the params `values` (nnz,) and `bias` (oc,) instead of
    `kernel` and `bias`, in eight bits `words` (nnz,), `scale`, `sums` and `bias` (oc,); and for folded batch norms, which have
    none. A stack that `nn.scan` runs has `values` (layers, most), `bias` (layers, oc), and `step` (layers, layers), which says
    in a step which of them it is.

    Attributes:
      module: the model, unbound.
      patterns: the weights that each sparse layer keeps, as pairs (path, pattern); of a stack a pattern for each of its layers,
        of a layer in eight bits its Words.
      biased: paths of dense layers that have a bias only since a batch norm was folded into them.
      folded: paths of the folded batch norms.
      fused: whether `apply` runs through `sparseflax.fuse`; a call with `mutable` collections never does.
      chunk: images that a thread takes through such a call's program at a time.
    """

    module: nn.Module
    patterns: tuple[tuple[str, Static], ...]
    biased: frozenset[str]
    folded: frozenset[str]
    fused: bool = True
    chunk: int = 1

    def apply(self, variables: Any, *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        """As `flax.linen.Module.apply`."""
        def run(variables, *args, **kwargs):
            with nn.intercept_methods(self._replace):
                return self.module.apply(variables, *args, mutable=mutable, **kwargs)

        if not self.fused or mutable is not False:
            return run(variables, *args, **kwargs)

        return fuse(run, self.chunk)(variables, *args, **kwargs)

    @functools.cached_property
    def _pattern(self) -> dict[str, Static]:
        return dict(self.patterns)

    def _replace(self, run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module, path = context.module, "/".join(context.module.path)
        if context.method_name != "__call__":
            return run(*args, **kwargs)
        if path in self.folded:
            return given(args, kwargs)[0][0]
        if path not in self._pattern:
            y = run(*args, **kwargs)
            return y + module.get_variable("params", "bias").reshape(*[1] * (y.ndim - 1), -1) if path in self.biased else y
        pattern, param = self._pattern[path], functools.partial(module.get_variable, "params")
        bias = param("bias") if module.has_variable("params", "bias") else None
        x = next(iter((*args, *kwargs.values())))
        layer = SimpleNamespace(activation=None, dtype=module.dtype, **{
            name: getattr(module, name) for name in (*WINDOW, *KIND) if hasattr(module, name)})
        compute = sparse.convolve if sparse.rank(module) else sparse.multiply
        if isinstance(pattern, Words):
            return compute(layer, QuantizedKernel(param("words"), param("scale"), param("sums"), *pattern), bias, x, None)
        if isinstance(pattern, Pattern):
            return compute(layer, PackedKernel(param("values"), pattern), bias, x, None)
        return of_step(param("step"), param("values"), pattern, lambda kernel: compute(layer, kernel, bias, x, None))


def pack_linen(module: nn.Module, variables: Any, x: Any, plan: Plan, fused: bool, chunk: int | None, call: Mapping[str, Any]
               ) -> tuple[PackedModel, dict[str, Any]]:
    """What `sparseflax.pack_model` returns for a Linen model: the packed one and its variables.

    Raises:
      ValueError: the plan was made for another model, or a kernel is not finite.
    """
    modules, (norms, _) = trace(module, variables, x, **call)
    tree: dict[str, Any] = jax.tree.map(lambda leaf: leaf, unfreeze(nn.unbox(variables)))  # dictionaries of its own
    patterns, biased, folded = [], set(), set()
    for row in plan.layers:
        layer, params = modules.get(row.path), at(tree["params"], row.path)
        found = getattr(weight_of(params), "shape", None)
        if layer is None or found != row.kernel_shape or row.norm not in (None, norms.get(row.path)):
            raise ValueError(f"the plan was made for another model: {row.path!r} is {found or 'missing'}, planned as "
                             f"{row.kernel_shape} before {row.norm or 'no norm'}; call sparseflax.plan(model, x) again")
        assert isinstance(params, dict)
        if row.norm is not None:
            norm = norm_of(modules[row.norm], tree, row.norm)
            kernel, bias = fold(np.asarray(sparse.masked(layer, params["kernel"])), params.get("bias"), norm)
            biased |= set() if "bias" in params else {row.path}
            folded.add(row.norm)
            params |= {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
        if row.choice == "sparse":
            try:
                static, arrays = _packed(layer, params, row)
            except ValueError as error:
                raise ValueError(f"layer {row.path!r}: {error}") from error
            del params["kernel"]
            params |= arrays
            patterns.append((row.path, static))
            biased.discard(row.path)
    for path in folded:
        for collection in ("params", "batch_stats"):
            *parents, last = path.split("/")
            at(tree.get(collection, {}), "/".join(parents)).pop(last, None)  # type: ignore[union-attr]
    return PackedModel(module, tuple(patterns), frozenset(biased), frozenset(folded), fused,
                       chunk or plan.chunk), tree


def _packed(layer: Any, params: Mapping[str, Any], row: LayerPlan) -> tuple[Static, dict[str, Any]]:
    """What is static of a sparse layer, and its params that take the place of its kernel."""
    if row.inputs is not None:
        int8 = in_int8(as_nnx(layer, params), row.inputs, row.correction or None, row.outputs)
        kernel = int8.kernel
        return (Words(*kernel.tree_flatten()[1]),
                {"words": kernel.words, "scale": kernel.scale, "sums": kernel.sums, "bias": int8.bias[...]})
    groups = getattr(layer, "feature_group_count", 1)
    if sparse.is_stack(layer, params["kernel"].ndim):
        stack = sparse.pack_stack(layer, params["kernel"], groups)
        return stack.patterns, {"values": stack.values, "step": steps(len(stack.patterns))}
    packed = sparse.pack_dense(layer, params["kernel"], groups)
    return packed.pattern, {"values": packed.values}
