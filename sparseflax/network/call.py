"""A packed nnx module that is called: in a trace its call is fused there; outside of any it is compiled once, and kept."""

from __future__ import annotations

import copyreg
import functools
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.core import Tracer

from sparseflax.network.fuse import fuse

Model = TypeVar("Model", bound=nnx.Module)
ARRAYS = jax.Array, np.ndarray, np.generic
KEPT = 32  # compiled calls of a module: of other flags each; jax.jit itself keeps those of other shapes


def fuse_call(model: Model, chunk: int = 1) -> Model:
    """Makes calls of an nnx module fused: the same object, now of a subclass of its class with a `__call__` of its own.

    It stays an ordinary module: submodules, state, `nnx.split`, `nnx.jit` and `jax.jit(lambda m, x: m(x))` work as before, and
    what a call writes to Variables (statistics, caches) is kept. It is pickled and copied as its class is. A call outside of
    any trace, `model(x)`, is compiled when arguments of such shapes are met first; later ones hand over the weights as they are
    by then, without a walk through the module.

    Args:
      model: what to change.
      chunk: images that a thread takes through a program at a time.

    Returns:
      `model`.
    """
    object.__setattr__(model, "__class__", _fused(type(model), chunk))
    return model


class _FusedType(type(nnx.Module)):
    """Of the classes made here, which no module has: so that `pickle` can say in a graphdef which one it was."""


@functools.lru_cache
def _fused(model_type: Any, chunk: int) -> type:
    if getattr(model_type, "_is_fused", False):
        return model_type

    class Fused(model_type, metaclass=_FusedType if issubclass(_FusedType, type(model_type)) else type(model_type)):
        _is_fused, _chunk = True, chunk

        def __call__(self, *args, **kwargs):
            return _call(self, model_type, chunk, args, kwargs)

        def __reduce_ex__(self, protocol):
            dense = object.__new__(model_type)  # its class says how it is pickled and copied
            vars(dense).update(vars(self))
            reduced: Any = dense.__reduce_ex__(protocol)
            return reduced if isinstance(reduced, str) else (_remake, (chunk, *reduced[:2]), *reduced[2:])

    Fused.__name__, Fused.__qualname__, Fused.__module__ = model_type.__name__, model_type.__qualname__, model_type.__module__
    return Fused


def _remake(chunk: int, make: Callable[..., Any], args: Sequence[Any]) -> Any:
    """A fused module, unpickled or copied."""
    return fuse_call(make(*args), chunk)


copyreg.pickle(_FusedType, lambda made: (_fused, (*made.__bases__, made._chunk)))  # type: ignore[arg-type]

def _call(model: Any, model_type: Any, chunk: int, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A fused call of `model`: in the trace that there is, or compiled."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        y, written = _run(model_type, chunk, *nnx.split(model), args, kwargs)
    else:
        calls = _calls.get(id(model))
        if calls is None or not calls.fit():
            calls = _calls[id(model)] = _Calls(model, model_type, chunk)
        y, written = calls(leaves, tree)
    if written:
        nnx.update(model, written)
    return y


_calls: dict[int, _Calls] = {}  # by the id of a living module, in which they would be part of its state


class _Calls:
    """Calls of one module, as long as it is made of the same parts: a walk through them costs more than a small network's call.

    Attributes:
      parts: of its modules and containers, each: a view of what it holds, and what it held.
      variables: whose values are the weights; arrays that are no Variable's are themselves.
    """

    def __init__(self, model: Any, model_type: Any, chunk: int):
        self.graphdef, state = nnx.split(model)
        self.module = model_type, chunk
        _, self.tree = jax.tree.flatten(state)
        self.variables: list[Any] = [variable for _, variable in nnx.to_flat_state(state)]
        views = [part if isinstance(part, list) else part.values() if isinstance(part, dict) else vars(part).values()
                 for _, part in nnx.iter_graph(model) if isinstance(part, (nnx.Pytree, list, dict))]
        self.parts = [(view, list(view)) for view in views]
        key = id(model)
        self.model = weakref.ref(model, lambda _, calls=_calls: calls.pop(key, None))
        # Not a method: the weights of a module that is gone should not wait for the garbage collector.
        compiled = functools.partial(_compile, self.module, self.graphdef, self.tree)
        self.compiled = functools.lru_cache(KEPT, typed=True)(compiled)

    def fit(self) -> bool:
        """Whether the module is still made of these."""
        return all(_same(now, held) for now, held in self.parts)

    def __call__(self, leaves: Sequence[Any], tree: Any) -> tuple[Any, Any]:
        """What a call of such arguments returns, and what it writes to Variables."""
        weights = jax.tree.leaves([each.get_raw_value() if isinstance(each, nnx.Variable) else each for each in self.variables])
        flags = [None if isinstance(leaf, ARRAYS) else leaf for leaf in leaves]
        concrete = all(issubclass(kind, ARRAYS) and not issubclass(kind, Tracer) for kind in set(map(type, weights)))
        if not (concrete and all(map(_has_hash, flags))):
            return _run(*self.module, self.graphdef, jax.tree.unflatten(self.tree, weights), *jax.tree.unflatten(tree, leaves))
        arrays = [leaf for leaf in leaves if isinstance(leaf, ARRAYS)]
        return self.compiled(tree, *flags)(weights, arrays)


def _compile(module: tuple[Any, int], graphdef: Any, parts: Any, tree: Any, *flags: Any) -> Callable[..., Any]:
    """A jitted call of (weights, arrays), with the arguments that are no arrays."""
    @jax.jit
    def run(weights, arrays):
        rest = iter(arrays)
        leaves = [next(rest) if flag is None else flag for flag in flags]
        return _run(*module, graphdef, jax.tree.unflatten(parts, weights), *jax.tree.unflatten(tree, leaves))

    return run


def _run(model_type: Any, chunk: int, graphdef: Any, state: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """The fused call: what it returns, and what it writes to Variables."""
    def call(state, args, kwargs):
        before = {path: jax.tree.leaves(leaf) for path, leaf in nnx.to_flat_state(state)}
        model: Any = nnx.merge(graphdef, state)
        y = model_type.__call__(model, *args, **kwargs)
        after = nnx.to_flat_state(nnx.state(model))
        return y, nnx.from_flat_state([(path, leaf) for path, leaf in after
                                       if path not in before or not _same(jax.tree.leaves(leaf), before[path])])

    return fuse(call, chunk)(state, args, kwargs)


def _has_hash(flag: Any) -> bool:
    try:
        hash(flag)
    except TypeError:
        return False
    return True


def _same(now: Any, before: Any) -> bool:
    """Whether both hold the very same."""
    return len(now) == len(before) and all(map(operator.is_, now, before))
