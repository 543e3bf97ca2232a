"""A Linen model with packed layers: its own calls are intercepted, since Linen has no attribute to put a layer into."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from sparseflax import layer as sparse
from sparseflax.fold import FOLDABLE, OTHER, OUTPUT, fold, is_float32, marked_norms
from sparseflax.fuse import fuse
from sparseflax.packing import PackedKernel, Pattern

if TYPE_CHECKING:
    from sparseflax.plan import Plan

LAYERS = nn.Conv, nn.Dense


class Norm(NamedTuple):
    """A batch norm at inference: statistics, scale and shift (oc,), the last two or None."""

    mean: Any
    var: Any
    scale: Any
    bias: Any
    epsilon: float


class Traced(NamedTuple):
    """What a call of a model shows: {path: module} of everything called, and the norm that follows a layer, by paths."""

    modules: dict[str, nn.Module]
    norms: dict[str, str]


def trace(module: nn.Module, variables: Any, x: Any, **call: Any) -> Traced:
    """The modules that `module.apply(variables, x, **call)` calls, and the batch norms that can be folded, as in `fold`."""
    modules: dict[str, nn.Module] = {}

    def mark(run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name != "__call__":
            return run(*args, **kwargs)
        path = "/".join(context.module.path)
        modules[path] = context.module
        if isinstance(context.module, nn.BatchNorm):
            args, kwargs = _given(args, kwargs)
            label = FOLDABLE if _foldable(context.module, args[0], *args[1:], **kwargs) else OTHER
            return run(checkpoint_name(args[0], label + path), *args[1:], **kwargs)
        y = run(*args, **kwargs)
        scalable = isinstance(context.module, LAYERS) and sparse.unsupported(context.module) is None
        return checkpoint_name(y, OUTPUT + path) if scalable else y

    def run(variables, x):
        rngs = {name: jax.random.key(0) for name in ("params", "dropout")}  # for models left in training mode
        with nn.intercept_methods(mark):
            return module.apply(variables, x, mutable=True, rngs=rngs, **call)[0]

    return Traced(modules, marked_norms(jax.make_jaxpr(run)(variables, x).jaxpr))


@dataclass(frozen=True)
class PackedModel:
    """A Linen model whose planned layers run packed, for inference; `sparseflax.pack_model` makes it and its variables.

    The variables are the model's, but for sparse layers, which have the params `values` (nnz,) and `bias` (oc,) instead of
    `kernel` and `bias`, and for folded batch norms, which have none.

    Attributes:
      module: the model, unbound.
      patterns: the weights that each sparse layer keeps, as pairs (path, pattern).
      biased: paths of dense layers that have a bias only since a batch norm was folded into them.
      folded: paths of the folded batch norms.
      fused: whether `apply` runs through `sparseflax.fuse`; a call with `mutable` collections never does.
    """

    module: nn.Module
    patterns: tuple[tuple[str, Pattern], ...]
    biased: frozenset[str]
    folded: frozenset[str]
    fused: bool = True

    def apply(self, variables: Any, *args: Any, mutable: Any = False, **kwargs: Any) -> Any:
        """As `flax.linen.Module.apply`."""
        def run(variables, *args, **kwargs):
            with nn.intercept_methods(self._replace):
                return self.module.apply(variables, *args, mutable=mutable, **kwargs)

        return (fuse(run) if self.fused and mutable is False else run)(variables, *args, **kwargs)

    @functools.cached_property
    def _pattern(self) -> dict[str, Pattern]:
        return dict(self.patterns)

    def _replace(self, run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        module, path = context.module, "/".join(context.module.path)
        if context.method_name != "__call__":
            return run(*args, **kwargs)
        if path in self.folded:
            return _given(args, kwargs)[0][0]
        if path not in self._pattern:
            y = run(*args, **kwargs)
            return y + module.get_variable("params", "bias").reshape(*[1] * (y.ndim - 1), -1) if path in self.biased else y
        kernel = PackedKernel(module.get_variable("params", "values"), self._pattern[path])
        bias = module.get_variable("params", "bias") if module.has_variable("params", "bias") else None
        x = next(iter((*args, *kwargs.values())))
        if not hasattr(module, "kernel_size"):
            return sparse.multiply(SimpleNamespace(dtype=module.dtype, activation=None), kernel, bias, x, None)
        window = {name: getattr(module, name)
                  for name in ("strides", "padding", "kernel_dilation", "feature_group_count", "dtype")}
        return sparse.convolve(SimpleNamespace(**window, activation=None), kernel, bias, x, None)


def norm_of(module: Any, variables: Any, path: str) -> Norm:
    """The batch norm at a path of the variables."""
    params, statistics = (at(nn.unbox(variables.get(name, {})), path) for name in ("params", "batch_stats"))
    return Norm(statistics["mean"], statistics["var"], params.get("scale"), params.get("bias"), module.epsilon)


def at(tree: Any, path: str) -> Mapping[str, Any]:
    """What a tree of dictionaries holds at a path; nothing if it has no such path."""
    for name in path.split("/") if path else ():
        tree = tree.get(name, {})
    return tree


def _given(args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a batch norm with its input as the first positional one."""
    return (list(args), kwargs) if args else ([kwargs["x"]], {name: v for name, v in kwargs.items() if name != "x"})


def _foldable(norm: nn.BatchNorm, x: Any, use_running_average: bool | None = None, **_: Any) -> bool:
    running = norm.use_running_average if use_running_average is None else use_running_average
    return (type(norm).__call__ is nn.BatchNorm.__call__ and running is True and is_float32(norm)
            and norm.axis in (-1, jnp.ndim(x) - 1))


def pack_linen(module: nn.Module, variables: Any, x: Any, plan: Plan, fused: bool, call: Mapping[str, Any]
               ) -> tuple[PackedModel, dict[str, Any]]:
    """What `sparseflax.pack_model` returns for a Linen model: the packed one and its variables.

    Raises:
      ValueError: the plan was made for another model, or a kernel is not finite.
    """
    traced = trace(module, variables, x, **call)
    tree: dict[str, Any] = jax.tree.map(lambda leaf: leaf, nn.unbox(dict(variables)))  # dictionaries of its own
    patterns, biased, folded = [], set(), set()
    for row in plan.layers:
        layer, params = traced.modules.get(row.path), at(tree["params"], row.path)
        found = params["kernel"].shape if "kernel" in params else None
        if layer is None or found != row.kernel_shape or row.norm not in (None, traced.norms.get(row.path)):
            raise ValueError(f"the plan was made for another model: {row.path!r} is {found or 'missing'}, planned as "
                             f"{row.kernel_shape} before {row.norm or 'no norm'}; call sparseflax.plan(model, x) again")
        assert isinstance(params, dict)
        if row.norm is not None:
            norm = norm_of(traced.modules[row.norm], tree, row.norm)
            kernel, bias = fold(np.asarray(masked(layer, params["kernel"])), params.get("bias"), norm)
            biased |= set() if "bias" in params else {row.path}
            folded.add(row.norm)
            params |= {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
        if row.choice == "sparse":
            try:
                packed = sparse.pack_dense(layer, params["kernel"], getattr(layer, "feature_group_count", 1))
            except ValueError as error:
                raise ValueError(f"layer {row.path!r}: {error}") from error
            del params["kernel"]
            params["values"] = packed.values
            patterns.append((row.path, packed.pattern))
            biased.discard(row.path)
    for path in folded:
        for collection in ("params", "batch_stats"):
            *parents, last = path.split("/")
            at(tree.get(collection, {}), "/".join(parents)).pop(last, None)  # type: ignore[union-attr]
    return PackedModel(module, tuple(patterns), frozenset(biased), frozenset(folded), fused), tree


def masked(layer: nn.Module, kernel: Any) -> Any:
    """A layer's kernel times its mask, if it has one."""
    mask = getattr(layer, "mask", None)
    return kernel if mask is None else kernel * jnp.asarray(mask, kernel.dtype)
