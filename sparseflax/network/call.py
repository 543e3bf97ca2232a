"""A packed nnx module that is called: in a trace its call is fused there; outside of any it is compiled once, and kept."""

from __future__ import annotations

import copyreg
import functools
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.core import Tracer

from sparseflax.network.fuse import fuse
from sparseflax.network.joined import join
from sparseflax.network.program import Part

Model = TypeVar("Model", bound=nnx.Module)
ARRAYS = jax.Array, np.ndarray, np.generic
RAW = operator.methodcaller("get_raw_value")
KEPT = 32  # compiled calls of a module: of other flags each; jax.jit itself keeps those of other shapes


def fuse_call(model: Model, chunk: int = 1) -> Model:
    """Makes calls of an nnx module fused: the same object, now of a subclass of its class with a `__call__` of its own.

    It stays an ordinary module: submodules, state, `nnx.split`, `nnx.jit` and `jax.jit(lambda m, x: m(x))` work as before, and
    what a call writes to Variables (statistics, caches) is kept. It is pickled and copied as its class is. A call outside of
    any trace, `model(x)`, is compiled when arguments of such shapes are met first; later ones hand over the weights as they are
    by then, without a walk through the module, and small ones together.

    Args:
      model: what to change.
      chunk: images that a thread takes through a program at a time.

    Returns:
      `model`.
    """
    object.__setattr__(model, "__class__", _fused(type(model), chunk))
    return model


def is_fused(model: Any) -> bool:
    """Whether it is an nnx module whose calls are fused."""
    return hasattr(model, "_fused_from")


class _FusedType(type(nnx.Module)):
    """Of the classes made here, which no module has: so that `pickle` can say in a graphdef which one it was."""


@functools.lru_cache
def _fused(model_type: Any, chunk: int) -> type:
    if is_fused(model_type):
        return model_type

    class Fused(model_type, metaclass=_FusedType if issubclass(_FusedType, type(model_type)) else type(model_type)):
        _fused_from = model_type, chunk

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


copyreg.pickle(_FusedType, lambda made: (_fused, made._fused_from))  # type: ignore[arg-type]

def _call(model: Any, model_type: Any, chunk: int, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """A fused call of `model`: in the trace that there is, or compiled."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        graphdef, state = nnx.split(model)
        arrays, structure = jax.tree.flatten(state)
        weights, state_of = state, _itself
        if _concrete(arrays):  # constants of the trace, then
            parts, weights = join(arrays)
            state_of = _apart(parts, structure)
        y, written = _run(model_type, chunk, graphdef, weights, state_of, args, kwargs)
    else:
        calls = _calls.get(id(model))
        if calls is None or not calls.fit():
            calls = _calls[id(model)] = _Calls(model, model_type, chunk)
        y, written = calls(leaves, tree)
    if written:
        nnx.update(model, written)
    return y


def call_with_weights(model: Any, *args: Any, **kwargs: Any) -> Callable[[], Any]:
    """A call of a fused module with these arguments, and with the weights that it has now: no later call asks for them again,
    and what it would write to Variables is lost."""
    leaves, tree = jax.tree.flatten((args, kwargs))
    calls = _Calls(model, *type(model)._fused_from)
    held = calls.hold(list(map(RAW, calls.variables)))
    assert held is not None
    arrays, run = [leaf for leaf in leaves if isinstance(leaf, ARRAYS)], held.compiled(tree, *map(_flag, leaves))
    return lambda: run(held.weights, arrays)[0]


_calls: dict[int, _Calls] = {}  # by the id of a living module, in which they would be part of its state


class _Calls:
    """Calls of one module, as long as it is made of the same parts: a walk through them costs more than a small network's call.

    Attributes:
      parts, copies: what its modules and containers hold, and held.
      leaves: Variables, whose values are the weights, and arrays that are no Variable's.
      variables: the former.
      held: what the last call handed over.
    """

    def __init__(self, model: Any, model_type: Any, chunk: int):
        self.graphdef, state = nnx.split(model)
        self.module = model_type, chunk
        _, self.tree = jax.tree.flatten(state)
        self.leaves: list[Any] = [leaf for _, leaf in nnx.to_flat_state(state)]
        self.variables = [leaf for leaf in self.leaves if isinstance(leaf, nnx.Variable)]
        self.parts: list[Any] = [part if isinstance(part, (list, dict)) else vars(part) for _, part in nnx.iter_graph(model)
                                 if isinstance(part, (nnx.Pytree, list, dict))]
        self.copies = [part.copy() for part in self.parts]
        key = id(model)
        self.model = weakref.ref(model, lambda _, calls=_calls: calls.pop(key, None))
        self.held: _Held | None = None

    def fit(self) -> bool:
        """Whether the module is still made of these, or of numbers and texts that equal them: one comparison, which looks no
        further where something is the very same."""
        try:
            return self.parts == self.copies
        except Exception:  # of what was exchanged, as arrays have it
            return False

    def __call__(self, leaves: Sequence[Any], tree: Any) -> tuple[Any, Any]:
        """What a call of such arguments returns, and what it writes to Variables."""
        values = list(map(RAW, self.variables))
        flags, held = list(map(_flag, leaves)), self.held
        if held is None or not _same(values, held.values):
            held = self.hold(values)
        if held is None or not all(map(_has_hash, flags)):
            weights = jax.tree.unflatten(self.tree, self._arrays(values))
            return _run(*self.module, self.graphdef, weights, _itself, *jax.tree.unflatten(tree, leaves))
        arrays = [leaf for leaf in leaves if isinstance(leaf, ARRAYS)]
        return held.compiled(tree, *flags)(held.weights, arrays)

    def _arrays(self, values: list[Any]) -> list[Any]:
        """Of all leaves, with these values of the Variables."""
        rest = iter(values)
        return jax.tree.leaves([next(rest) if isinstance(leaf, nnx.Variable) else leaf for leaf in self.leaves])

    def hold(self, values: list[Any]) -> _Held | None:
        """What is handed over of these; None if some are no arrays, or traced."""
        arrays = self._arrays(values)
        if not _concrete(arrays):
            return None
        parts, weights = join(arrays)
        if any(isinstance(array, np.ndarray) for array in arrays):  # which may be written to
            values = [None]
        if self.held is not None and self.held.parts == parts:
            self.held = self.held._replace(values=values, weights=weights)
        else:
            # Not a method: the weights of a module that is gone should not wait for the garbage collector.
            compiled = functools.partial(_compile, self.module, self.graphdef, self.tree, parts)
            self.held = _Held(values, parts, weights, functools.lru_cache(KEPT, typed=True)(compiled))
        return self.held


class _Held(NamedTuple):
    """What a call hands over, all at once: other threads may call, too.

    Attributes:
      values: of the module's Variables; none where they have to be looked at each time.
      parts, weights: their arrays, joined.
      compiled: from the structure of the arguments, and those that are no arrays, to a jitted call of (weights, arrays).
    """

    values: list[Any]
    parts: tuple[Part, ...]
    weights: list[Any]
    compiled: Callable[..., Callable[..., Any]]


def _compile(module: tuple[Any, int], graphdef: Any, state: Any, parts: Sequence[Part], tree: Any, *flags: Any
             ) -> Callable[..., Any]:
    """A jitted call of (weights, arrays), with the arguments that are no arrays."""
    @jax.jit
    def run(weights, arrays):
        rest = iter(arrays)
        leaves = [next(rest) if flag is None else flag for flag in flags]
        return _run(*module, graphdef, weights, _apart(parts, state), *jax.tree.unflatten(tree, leaves))

    return run


def _apart(parts: Sequence[Part], state: Any) -> Callable[[Any], Any]:
    """What makes a state of this structure of its joined arrays again."""
    return lambda weights: jax.tree.unflatten(state, [part.of(weights) for part in parts])


def _itself(state: Any) -> Any:
    return state


def _run(model_type: Any, chunk: int, graphdef: Any, weights: Any, state_of: Callable[[Any], Any], args: Sequence[Any],
         kwargs: dict[str, Any]) -> Any:
    """The fused call: what it returns, and what it writes to Variables. Within it, where it is seen which array lies in which,
    the module's state is made of its weights."""
    def call(weights, args, kwargs):
        state = state_of(weights)
        before = {path: jax.tree.leaves(leaf) for path, leaf in nnx.to_flat_state(state)}
        model: Any = nnx.merge(graphdef, state)
        y = model_type.__call__(model, *args, **kwargs)
        after = nnx.to_flat_state(nnx.state(model))
        return y, nnx.from_flat_state([(path, leaf) for path, leaf in after
                                       if path not in before or not _same(jax.tree.leaves(leaf), before[path])])

    return fuse(call, chunk)(weights, args, kwargs)


def _flag(leaf: Any) -> Any:
    """An argument that is no array; None for an array."""
    return None if isinstance(leaf, ARRAYS) else leaf


def _concrete(arrays: Sequence[Any]) -> bool:
    """Whether all are arrays, and none is traced."""
    return all(issubclass(kind, ARRAYS) and not issubclass(kind, Tracer) for kind in set(map(type, arrays)))


def _has_hash(flag: Any) -> bool:
    try:
        hash(flag)
    except TypeError:
        return False
    return True


def _same(now: Any, before: Any) -> bool:
    """Whether both hold the very same."""
    return len(now) == len(before) and all(map(operator.is_, now, before))
