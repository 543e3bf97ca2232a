"""A Linen model with packed layers: its own calls are intercepted, since Linen has no attribute to put a layer into."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name

from sparseflax import layer as sparse
from sparseflax.fold import fold, is_float32
from sparseflax.fuse import fuse
from sparseflax.marks import FOLDABLE, OTHER, OUTPUT, WEIGHT, Shown, shown
from sparseflax.packing import PackedKernel, Pattern
from sparseflax.shapes import all_collections

if TYPE_CHECKING:
    from sparseflax.plan import Plan

LAYERS = nn.Conv, nn.Dense
COLLECTIONS = "params", "batch_stats"  # where weights of layers and norms are


class Norm(NamedTuple):
    """A batch norm at inference: statistics, scale and shift (oc,), the last two or None."""

    mean: Any
    var: Any
    scale: Any
    bias: Any
    epsilon: float


def trace(module: nn.Module, variables: Any, x: Any, **call: Any) -> tuple[dict[str, nn.Module], Shown]:
    """{path: module} of all that `module.apply(variables, x, **call)` runs, and what it shows: traced, not run."""
    modules: dict[str, nn.Module] = {}
    variables = unfreeze(nn.unbox(variables))
    leaves: dict[Any, Any] = flatten_dict({name: variables.get(name, {}) for name in COLLECTIONS})
    outputs = 0

    def mark(run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        called, path = context.module, "/".join(context.module.path)
        modules[path] = called
        layer = isinstance(called, LAYERS) and sparse.unsupported(called) is None
        if context.method_name != "__call__" or not (layer or isinstance(called, nn.BatchNorm)):
            return run(*args, **kwargs)
        with _weights(called, path):
            if not isinstance(called, nn.BatchNorm):
                return checkpoint_name(run(*args, **kwargs), OUTPUT + path)
            args, kwargs = _given(args, kwargs)
            label = FOLDABLE if _foldable(called, args[0], *args[1:], **kwargs) else OTHER
            return run(checkpoint_name(args[0], label + path), *args[1:], **kwargs)

    def run(arrays: list[Any], x: Any) -> Any:
        nonlocal outputs
        rngs = {name: jax.random.key(0) for name in ("params", "dropout")}  # for models left in training mode
        with nn.intercept_methods(mark):
            y, written = module.apply(variables | unflatten_dict(dict(zip(leaves, arrays, strict=True))), x,
                                      mutable=all_collections(), rngs=rngs, **call)
        y = y, {name: tree for name, tree in written.items() if name not in COLLECTIONS}
        outputs = len(jax.tree.leaves(y))
        return y

    jaxpr = jax.make_jaxpr(run)(list(leaves.values()), x).jaxpr
    return modules, shown(jaxpr, outputs)


@contextmanager
def _weights(module: nn.Module, path: str) -> Iterator[None]:
    """Names the weights that a module reads, where they can be changed."""
    scope: Any = module.scope
    before = {(collection, name): leaf for collection in filter(scope.is_mutable_collection, COLLECTIONS)
              for name, leaf in scope.variables().get(collection, {}).items() if isinstance(leaf, jax.Array)}
    for (collection, name), leaf in before.items():
        scope.put_variable(collection, name, checkpoint_name(leaf, f"{WEIGHT}{path}/{name}"))
    try:
        yield
    finally:
        for (collection, name), leaf in before.items():
            scope.put_variable(collection, name, leaf)


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


def weight_of(params: Mapping[str, Any]) -> Any:
    """A module's kernel, else the first of its own params that is a matrix or more; None if it has neither."""
    own = (leaf for leaf in params.values() if not isinstance(leaf, Mapping) and jnp.ndim(leaf) > 1)
    return params["kernel"] if hasattr(params.get("kernel"), "shape") else next(own, None)


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
