"""A traced function, rewritten for the CPU: epilogues move into the sparse convolutions, the rest into faster forms.

The function's jaxpr is evaluated with a few equations replaced. A sparse convolution is not computed where it stands but
waits, as a `_Waiting`, for what is done with its result: a bias, a residual or an activation joins it, anything else makes
it run. So a residual is always there before its convolution, whatever the order in which the function computes them.
"""

from __future__ import annotations

import copyreg
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer, eval_jaxpr
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, primitives

from sparseflax.conv.int8 import quantize_p
from sparseflax.conv.int8_primitive import bind_int8, int8_conv_p
from sparseflax.conv.packing import PackedKernel
from sparseflax.conv.primitive import Activation, conv_p, sparse_conv
from sparseflax.conv.window import Window
from sparseflax.network.chunks import in_chunks
from sparseflax.network.rewrites import REWRITES, joins

T = TypeVar("T")
Model = TypeVar("Model", bound=nnx.Module)


def fuse(f: Callable[..., T]) -> Callable[..., T]:
    """The function `f`, faster on the CPU once it is compiled: `jax.jit(fuse(f))`.

    - `sparse_conv` followed by a bias, by a residual of its output's shape, or by relu, relu6, max(., 0) or clip(., 0, 6)
      takes them into its epilogue, if nothing else uses what lies between, also through a reshape.
    - `sparse_conv` in eight bits takes relu and relu6, and the rounding to uint8 by another one that alone reads it: what lies
      between the two is uint8 then.
    - Pooling runs along one dimension after the other, grouped convolutions group by group, depthwise ones as a sum of
      shifted images, and powers of 1/4, 1/2 and 3/4 are square roots.

    Outputs are those of `f` up to rounding; nan and inf propagate alike. Left alone: what is not float32, and what stands
    inside of scan, while, cond, shard_map or a jit with shardings or compiler options. Other calls (jit, remat, custom_jvp,
    custom_vjp) are inlined. This is for inference: derivatives are right, but they are those of `f`, not fused.

    Args:
      f: any function that `jax.jit` can trace. Arguments that hold no arrays (flags, strings) are static.

    Returns:
      A function of the same arguments. It traces `f` on every call: call it under `jax.jit`.
    """

    @functools.wraps(f, updated=())
    def fused(*args: Any, **kwargs: Any) -> T:
        leaves, tree = jax.tree.flatten((args, kwargs))
        # A key of a random stream is closed over: where nothing draws from it, as in inference, it is not in the program.
        traced = [i for i, leaf in enumerate(leaves) if isinstance(leaf, (jax.Array, np.ndarray, np.generic))
                  and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]

        def call(arrays: Sequence[Any]) -> Any:
            merged = list(leaves)
            for i, array in zip(traced, arrays, strict=True):
                merged[i] = array
            args, kwargs = jax.tree.unflatten(tree, merged)
            return f(*args, **kwargs)

        arrays = [leaves[i] for i in traced]
        closed, shapes = jax.make_jaxpr(call, return_shape=True)(arrays)
        return jax.tree.unflatten(jax.tree.structure(shapes), _run(closed.jaxpr, closed.consts, arrays))

    return fused


def fuse_call(model: Model, chunk: int | None = None) -> Model:
    """Makes calls of an nnx module fused: the same object, now of a subclass of its class with a `__call__` of its own.

    It stays an ordinary module: submodules, state, `nnx.split`, `nnx.jit` and `jax.jit(lambda m, x: m(x))` work as before, and
    what a call writes to Variables (statistics, caches) is kept. It is pickled and copied as its class is.

    Args:
      model: what to change.
      chunk: images that a call runs at a time, where they do not meet; None runs all at once.

    Returns:
      `model`.
    """
    object.__setattr__(model, "__class__", _fused(type(model), chunk))
    return model


class _FusedType(type(nnx.Module)):
    """Of the classes made here, which no module has: so that `pickle` can say in a graphdef which one it was."""


@functools.lru_cache
def _fused(model_type: Any, chunk: int | None) -> type:
    if getattr(model_type, "_is_fused", False):
        return model_type

    class Fused(model_type, metaclass=_FusedType if issubclass(_FusedType, type(model_type)) else type(model_type)):
        _is_fused, _chunk = True, chunk

        def __call__(self, *args, **kwargs):
            graphdef, state = nnx.split(self)

            def call(state, args, kwargs):
                before = {path: jax.tree.leaves(leaf) for path, leaf in nnx.to_flat_state(state)}
                model: Any = nnx.merge(graphdef, state)
                y = model_type.__call__(model, *args, **kwargs)
                after = nnx.to_flat_state(nnx.state(model))
                return y, nnx.from_flat_state([(path, leaf) for path, leaf in after if not _same(before.get(path), leaf)])

            def run(state, batch):
                return fuse(call)(state, *batch)

            batch = args, kwargs
            done = in_chunks(lambda state, batch: call(state, *batch), run, chunk, state, batch) if chunk else None
            y, written = run(state, batch) if done is None else done
            if written:
                nnx.update(self, written)
            return y

        def __reduce_ex__(self, protocol):
            dense = object.__new__(model_type)  # its class says how it is pickled and copied
            vars(dense).update(vars(self))
            reduced: Any = dense.__reduce_ex__(protocol)
            return reduced if isinstance(reduced, str) else (_remake, (chunk, *reduced[:2]), *reduced[2:])

    Fused.__name__, Fused.__qualname__, Fused.__module__ = model_type.__name__, model_type.__qualname__, model_type.__module__
    return Fused


def _remake(chunk: int | None, make: Callable[..., Any], args: Sequence[Any]) -> Any:
    """A fused module, unpickled or copied."""
    return fuse_call(make(*args), chunk)


copyreg.pickle(_FusedType, lambda made: (_fused, (*made.__bases__, made._chunk)))  # type: ignore[arg-type]


def _same(before: list[Any] | None, leaf: Any) -> bool:
    """Whether a leaf of a model's state holds the very arrays that it held before."""
    return before is not None and list(map(id, before)) == list(map(id, jax.tree.leaves(leaf)))


@dataclass(frozen=True)
class _Waiting:
    """A sparse convolution that is not computed yet: act(conv(x) + bias + residual), reshaped."""

    number: int  # counts up along the trace
    x: Any
    packed: PackedKernel
    bias: Any
    residual: Any
    window: Window
    activation: Activation
    kernel: str | None
    output: tuple[int, ...]  # (n, oh, ow, oc)
    shape: tuple[int, ...]  # the same values, row-major

    def compute(self) -> jax.Array:
        strides, padding, dilation = self.window
        y = sparse_conv(self.x, self.packed, self.bias, strides=strides, padding=padding, kernel_dilation=dilation,
                        feature_group_count=self.packed.groups, activation=self.activation, residual=self.residual,
                        kernel=self.kernel)
        return y.reshape(self.shape)


@dataclass(frozen=True)
class _WaitingInt8:
    """A convolution in eight bits that is not computed yet, with float32 outputs."""

    operands: Sequence[Any]
    params: dict[str, Any]

    def compute(self) -> jax.Array:
        return bind_int8(*self.operands, **self.params)

    def clamped(self, low: float, high: float) -> _WaitingInt8:
        rescale = self.params["rescale"]
        bounds = rescale._replace(low=max(rescale.low, low), high=min(rescale.high, high))
        return replace(self, params=self.params | {"rescale": bounds})

    def quantized(self, output: Any) -> jax.Array:
        x, words, sums, scale, *rest = self.operands
        scale = scale * np.float32(1 / output.scale)
        return bind_int8(x, words, sums, scale, *rest, **self.params | {"rescale": self.params["rescale"].quantized(output)})


def _run(jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any]) -> Sequence[Any]:
    """The rewritten jaxpr's outputs, with the derivatives of the original."""

    def rewritten(consts, arguments):
        return [jnp.asarray(_now(value)) for value in _evaluate(jaxpr, [*consts, *arguments], _Trace())]

    def original(consts, arguments):
        return eval_jaxpr(jaxpr, consts, *arguments)

    if jaxpr.effects:  # a custom_jvp takes none
        return rewritten(consts, arguments)
    function = jax.custom_jvp(rewritten)
    function.defjvp(lambda primals, tangents: jax.jvp(original, primals, tangents))
    return function(list(consts), list(arguments))


class _Trace:
    """What is known across the jaxprs of one function.

    Attributes:
      numbers: counts the convolutions that wait.
      chained: by id, values of dense convolutions and of what was done to them element by element: XLA computes these as one.
    """

    def __init__(self):
        self.numbers, self.chained = itertools.count(), dict[int, Any]()

    def chain(self, equation: Any, operands: Sequence[Any], results: Sequence[Any]) -> None:
        if equation.primitive is primitives.conv_general_dilated_p or (
                equation.primitive in ELEMENTWISE and any(map(self.is_chained, operands))):
            self.chained |= {id(value): value for value in results}  # kept, so that no other gets its id

    def is_chained(self, value: Any) -> bool:
        return id(value) in self.chained


def _evaluate(jaxpr: Jaxpr, values: Sequence[Any], trace: _Trace) -> list[Any]:
    """The outputs of a jaxpr, arrays or convolutions that wait.

    Args:
      jaxpr: an open one.
      values: of its constvars and invars; a convolution may wait here, too.
      trace: what is known so far.
    """
    atoms = (atom for atoms in (*(equation.invars for equation in jaxpr.eqns), jaxpr.outvars) for atom in atoms)
    unread = Counter(atom for atom in atoms if not isinstance(atom, Literal))
    known: dict[Any, Any] = {}

    def write(variable, value):
        if unread[variable] == 1:
            known[variable] = value
        elif unread[variable]:  # several consumers: the value is needed as it is
            known[variable] = _now(value)

    def read(atom):
        if isinstance(atom, Literal):
            return atom.val
        unread[atom] -= 1
        return known[atom] if unread[atom] else known.pop(atom)

    for variable, value in zip([*jaxpr.constvars, *jaxpr.invars], values, strict=True):
        write(variable, value)
    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        inner = _inlined(equation)
        if inner is not None:
            results = _evaluate(inner.jaxpr, [*inner.consts, *operands], trace)
        elif equation.primitive is conv_p:
            results = [_wait(next(trace.numbers), equation, [_now(operand) for operand in operands])]
        elif equation.primitive is int8_conv_p and equation.params["rescale"].to_float:
            results = [_WaitingInt8([_now(operand) for operand in operands], equation.params)]
        else:
            result = EPILOGUES[equation.primitive](equation, *operands) if equation.primitive in EPILOGUES else None
            if result is None:
                operands = [_now(operand) for operand in operands]
                if equation.primitive in REWRITES and not (trace.is_chained(operands[0]) and joins(equation)):
                    result = REWRITES[equation.primitive](equation, *operands)
            results = _bind(jaxpr, equation, operands) if result is None else [result]
            trace.chain(equation, operands, results)
        for variable, value in zip(equation.outvars, results, strict=True):
            write(variable, value)
    return [read(atom) for atom in jaxpr.outvars]


def _bind(jaxpr: Jaxpr, equation: Any, operands: Sequence[Any]) -> Sequence[Any]:
    """What one equation computes, in its own context."""
    inputs = list(dict.fromkeys(atom for atom in equation.invars if not isinstance(atom, Literal)))
    by_atom = {atom: value for atom, value in zip(equation.invars, operands, strict=True) if not isinstance(atom, Literal)}
    alone = jaxpr.replace(constvars=[], invars=inputs, outvars=equation.outvars, eqns=[equation], effects=equation.effects)
    return eval_jaxpr(alone, [], *(by_atom[atom] for atom in inputs))


def _inlined(equation: Any) -> Any:
    """The closed jaxpr of a call to be looked into; None for everything else."""
    params = equation.params
    if equation.primitive is primitives.jit_p:
        shardings = (*params["in_shardings"], *params["out_shardings"])
        constrained = any(isinstance(sharding, jax.sharding.Sharding) for sharding in shardings)
        return None if constrained or params["compiler_options_kvs"] else params["jaxpr"]
    if equation.primitive in (primitives.custom_jvp_call_p, primitives.custom_vjp_call_p):
        return params["call_jaxpr"]
    if equation.primitive is primitives.remat_p:
        return ClosedJaxpr(params["jaxpr"], [])
    return None


def _wait(number: int, equation: Any, operands: Sequence[Any]) -> _Waiting:
    params, (x, values, *rest) = equation.params, operands
    bias = rest.pop(0) if params["has_bias"] else None
    residual = rest.pop() if params["has_residual"] else None
    shape = equation.outvars[0].aval.shape
    return _Waiting(number, x, PackedKernel(values, params["pattern"]), bias, residual, params["window"],
                    params["activation"], params["kernel"], shape, shape)


def _now(value: Any) -> Any:
    return value.compute() if isinstance(value, _Waiting | _WaitingInt8) else value


def _add(_, a: Any, b: Any) -> _Waiting | None:
    """Of two convolutions that wait the later takes the sum of the earlier."""
    waiting = [(conv, other) for conv, other in ((a, b), (b, a)) if isinstance(conv, _Waiting) and conv.activation is None]
    for conv, other in sorted(waiting, key=lambda pair: -pair[0].number):
        channels = conv.output[-1]
        if conv.residual is None and np.shape(other) == conv.shape:
            return replace(conv, residual=_now(other).reshape(conv.output))
        per_channel = np.shape(other) == (*(1 for _ in conv.shape[1:]), channels) and conv.shape[-1] == channels
        if conv.bias is None and per_channel:
            return replace(conv, bias=_now(other).reshape(channels))
    return None


def _max(_, a: Any, b: Any) -> _Waiting | _WaitingInt8 | None:
    for conv, bound in ((a, b), (b, a)):
        if isinstance(conv, _WaitingInt8) and _is_number(bound) and bound == 0:
            return conv.clamped(0.0, np.inf)
        if isinstance(conv, _Waiting) and conv.activation is None and _is_number(bound) and bound == 0:
            return replace(conv, activation="relu")
    return None


def _min(_, a: Any, b: Any) -> _Waiting | _WaitingInt8 | None:
    for conv, bound in ((a, b), (b, a)):
        if isinstance(conv, _WaitingInt8) and conv.params["rescale"].low == 0 and _is_number(bound) and bound == 6:
            return conv.clamped(0.0, 6.0)
        if isinstance(conv, _Waiting) and conv.activation == "relu" and _is_number(bound) and bound == 6:
            return replace(conv, activation="relu6")
    return None


def _clamp(_, low: Any, x: Any, high: Any) -> _Waiting | _WaitingInt8 | None:
    if isinstance(x, _WaitingInt8) and _is_number(low) and low == 0 and _is_number(high) and high == 6:
        return x.clamped(0.0, 6.0)
    if isinstance(x, _Waiting) and x.activation is None and _is_number(low) and low == 0 and _is_number(high) and high == 6:
        return replace(x, activation="relu6")
    return None


def _quantize(equation: Any, x: Any) -> jax.Array | None:
    return x.quantized(equation.params["quantization"]) if isinstance(x, _WaitingInt8) else None


def _reshape(equation: Any, x: Any, *sizes: Any) -> _Waiting | None:
    params = equation.params
    if not isinstance(x, _Waiting) or sizes or params["dimensions"] is not None or params["sharding"] is not None:
        return None
    return replace(x, shape=params["new_sizes"])


def _convert(equation: Any, x: Any) -> Any:
    """Numbers stay numbers, so that the bounds of a clip are known."""
    strong_float32 = equation.params["new_dtype"] == jnp.float32 and not equation.params["weak_type"]
    return np.float32(x) if _is_number(x) and strong_float32 else None


def _is_number(value: Any) -> bool:
    return not isinstance(value, _Waiting | _WaitingInt8 | Tracer) and np.ndim(value) == 0


# What XLA adds to a dense convolution.
ELEMENTWISE = {primitives.add_p, primitives.sub_p, primitives.mul_p, primitives.max_p, primitives.min_p, primitives.clamp_p}
# What can join a convolution that waits.
EPILOGUES: dict[Any, Callable[..., Any]] = {
    primitives.add_p: _add, primitives.max_p: _max, primitives.min_p: _min, primitives.clamp_p: _clamp,
    primitives.reshape_p: _reshape, primitives.convert_element_type_p: _convert, quantize_p: _quantize}
