"""What a call of a Linen model shows: its modules, which norm follows which layer, and who else reads their weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.ad_checkpoint import checkpoint_name

from sparseflax.layers import rules as sparse
from sparseflax.network.fold import is_float32
from sparseflax.network.marks import FOLDABLE, OTHER, OUTPUT, WEIGHT, Shown, shown
from sparseflax.network.shapes import all_collections

LAYERS = nn.Conv, nn.ConvTranspose, nn.Dense
COLLECTIONS = "params", "batch_stats"  # where weights of layers and norms are


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
            args, kwargs = given(args, kwargs)
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


def at(tree: Any, path: str) -> Mapping[str, Any]:
    """What a tree of dictionaries holds at a path; nothing if it has no such path."""
    for name in path.split("/") if path else ():
        tree = tree.get(name, {})
    return tree


def weight_of(params: Mapping[str, Any]) -> Any:
    """A module's kernel, else the first of its own params that is a matrix or more; None if it has neither."""
    own = (leaf for leaf in params.values() if not isinstance(leaf, Mapping) and jnp.ndim(leaf) > 1)
    return params["kernel"] if hasattr(params.get("kernel"), "shape") else next(own, None)


def given(args: Any, kwargs: Any) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a batch norm with its input as the first positional one."""
    return (list(args), kwargs) if args else ([kwargs["x"]], {name: v for name, v in kwargs.items() if name != "x"})


def _foldable(norm: nn.BatchNorm, x: Any, use_running_average: bool | None = None, **_: Any) -> bool:
    running = norm.use_running_average if use_running_average is None else use_running_average
    return (type(norm).__call__ is nn.BatchNorm.__call__ and running is True and is_float32(norm)
            and norm.axis in (-1, jnp.ndim(x) - 1))
