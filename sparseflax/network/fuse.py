"""A traced function, rewritten for the CPU: what follows a convolution joins its program, the rest takes faster forms.

The function's jaxpr is evaluated with its equations replaced: by steps that wait (region.py) until something else needs their
results, and by what compiles better (rewrites.py).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray, Tracer, eval_jaxpr
from jax.extend.core import Jaxpr, Literal, primitives

from sparseflax.network.equations import step
from sparseflax.network.region import Region, is_number
from sparseflax.network.rewrites import REWRITES, joins
from sparseflax.network.unroll import constant_and_carried, inlined, step_rows

MAX_CONSTANT = 1 << 12  # values of an array that is computed while tracing
T = TypeVar("T")


def fuse(f: Callable[..., T], chunk: int = 1) -> Callable[..., T]:
    """The function `f`, faster on the CPU once it is compiled: `jax.jit(fuse(f))`.

    - Convolutions, sparse, dense and depthwise, and what follows them run as one native program, as far as it knows the steps:
      a bias, a residual of its output's shape, and relu, relu6, max(., 0) or clip(., 0, 6) join a convolution, if nothing else
      uses what lies between; products with a matrix, pooling, reductions over an image, its channels or groups of them (layer,
      group and instance norms), softmax, concatenation, padding, slices, shuffles of channels and what is done element by
      element (GELU and SiLU in one step) follow it. A batch runs some images at a time, each of them through
      the whole program.
    - `sparse_conv` in eight bits takes relu, relu6 and the rounding to uint8 by another one that reads it, through maxima and
      concatenations: what lies between the two is uint8 then, and so it is for whoever else reads it afterwards, a residual
      for one, which costs half a step of 255. Depthwise convolutions read and write uint8 there; for one that would read its
      float32, `sparse_conv` rounds by the `outputs` of its kernel.
    - Elsewhere pooling runs along one dimension after the other, and powers of 1/4, 1/2 and 3/4 are square roots; without the
      native kernel, or in layouts other than NHWC, grouped convolutions run group by group, depthwise ones as a sum of shifted
      images.

    Outputs are those of `f` up to rounding; nan and inf propagate alike. Left alone: what is not float32, and what stands
    inside of scan, while, cond, shard_map or a jit with shardings or compiler options. Other calls (jit, remat, custom_jvp,
    custom_vjp) are inlined, and a scan over a stack of sparse layers is unrolled. This is for inference: derivatives are right,
    but they are those of `f`, not fused.

    Args:
      f: any function that `jax.jit` can trace. Arguments that hold no arrays (flags, strings) are static.
      chunk: images that a thread takes through a program at a time.

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
        return jax.tree.unflatten(jax.tree.structure(shapes), _run(closed.jaxpr, closed.consts, arrays, chunk))

    return fused


def _run(jaxpr: Jaxpr, consts: Sequence[Any], arguments: Sequence[Any], chunk: int) -> Sequence[Any]:
    """The rewritten jaxpr's outputs, with the derivatives of the original."""

    known = {number: np.asarray(const) for number, const in enumerate(consts)
             if not isinstance(const, jax.Array) and np.size(const) <= MAX_CONSTANT}

    def rewritten(consts, arguments):
        trace = _Trace(chunk)
        values = _evaluate(jaxpr, [*(known.get(number, const) for number, const in enumerate(consts)), *arguments], trace)
        return [jnp.asarray(value) for value in trace.now(values)]

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
      region: the steps that wait.
      frames: values that will be read, of each jaxpr that is being evaluated.
      chained: by id, values of dense convolutions and of what was done to them element by element: XLA computes these as one.
    """

    def __init__(self, chunk: int):
        self.region, self.frames, self.chained = Region(chunk), list[dict[Any, Any]](), dict[int, Any]()

    def now(self, values: Sequence[Any]) -> list[Any]:
        """Values as arrays; what else waits is computed with them."""
        waiting = [*values, *(value for frame in self.frames for value in frame.values())]
        return [self.region.now(value, waiting) for value in values]

    def chain(self, equation: Any, operands: Sequence[Any], results: Sequence[Any]) -> None:
        if equation.primitive is primitives.conv_general_dilated_p or (
                equation.primitive in ELEMENTWISE and any(map(self.is_chained, operands))):
            self.chained |= {id(value): value for value in results}  # kept, so that no other gets its id

    def is_chained(self, value: Any) -> bool:
        return id(value) in self.chained


def _evaluate(jaxpr: Jaxpr, values: Sequence[Any], trace: _Trace) -> list[Any]:
    """The outputs of a jaxpr: arrays, or steps that wait.

    Args:
      jaxpr: an open one.
      values: of its constvars and invars; a step may wait here, too.
      trace: what is known so far.
    """
    atoms = (atom for atoms in (*(equation.invars for equation in jaxpr.eqns), jaxpr.outvars) for atom in atoms)
    unread = Counter(atom for atom in atoms if not isinstance(atom, Literal))
    known: dict[Any, Any] = {}
    trace.frames.append(known)

    def write(variable, value):
        if unread[variable]:
            known[variable] = value
            trace.region.will_be_read(value, unread[variable])

    def read(atom):
        if isinstance(atom, Literal):
            return atom.val
        unread[atom] -= 1
        return known[atom] if unread[atom] else known.pop(atom)

    for variable, value in zip([*jaxpr.constvars, *jaxpr.invars], values, strict=True):
        write(variable, value)
    for equation in jaxpr.eqns:
        operands = [read(atom) for atom in equation.invars]
        inner, first = inlined(equation), 0
        if inner is None and equation.primitive is primitives.cond_p and is_number(operands[0]):
            inner, first = equation.params["branches"][int(operands[0])], 1  # of a step's layers its own
        if inner is not None:
            results = _evaluate(inner.jaxpr, [*inner.consts, *operands[first:]], trace)
        elif equation.primitive is primitives.scan_p and (rows := step_rows(equation)):
            results = _unrolled(equation, operands, rows, [unread[variable] > 0 for variable in equation.outvars], trace)
        else:
            result = _constant(equation, operands)
            result = step(trace.region, equation, operands) if result is None else result
            if result is None:
                operands = trace.now(operands)
                if equation.primitive in REWRITES and not (trace.is_chained(operands[0]) and joins(equation)):
                    result = REWRITES[equation.primitive](equation, *operands)
            results = _bind(jaxpr, equation, operands) if result is None else [result]
            if equation.primitive in (primitives.slice_p, primitives.reshape_p):
                trace.region.lies_in(equation, operands[0], results[0])
            trace.chain(equation, operands, results)
        for variable, value in zip(equation.outvars, results, strict=True):
            write(variable, value)
    outputs = [read(atom) for atom in jaxpr.outvars]
    trace.frames.pop()
    return outputs


def _unrolled(equation: Any, operands: Sequence[Any], rows: set[int], wanted: Sequence[bool], trace: _Trace) -> list[Any]:
    """The results of a scan, its steps one after the other.

    Args:
      equation, operands: of the scan.
      rows: which operands say what step it is: known, here.
      wanted: which results will be read.
      trace: what is known so far.
    """
    params, body = equation.params, equation.params["jaxpr"]
    length, (constant, handed_on) = params["length"], constant_and_carried(equation)
    carried = constant + handed_on
    consts, carry = operands[:constant], operands[constant:carried]
    sliced = trace.now(operands[carried:])
    collected: dict[int, list[Any]] = {number: [] for number in range(len(carry), len(wanted)) if wanted[number]}
    held = dict[Any, Any](enumerate(consts))
    trace.frames.append(held)  # what all steps read, and what is collected of them
    for const in consts:
        trace.region.will_be_read(const, 2)
    for index in reversed(range(length)) if params["reverse"] else range(length):
        slices = [np.eye(length, dtype=np.float32)[index] if number in rows else x[index]
                  for number, x in enumerate(sliced, carried)]
        results = _evaluate(body.jaxpr, [*body.consts, *consts, *carry, *slices], trace)
        carry = results[:len(carry)]
        for number, values in collected.items():
            values.append(results[number])
            held[number, index] = results[number]
    arrays = {number: trace.now(values) for number, values in collected.items()}
    trace.frames.pop()
    return [*carry, *(jnp.stack(arrays[number][::-1] if params["reverse"] else arrays[number]) if number in arrays else None
                      for number in range(len(carry), len(wanted)))]


def _bind(jaxpr: Jaxpr, equation: Any, operands: Sequence[Any]) -> Sequence[Any]:
    """What one equation computes, in its own context."""
    inputs = list(dict.fromkeys(atom for atom in equation.invars if not isinstance(atom, Literal)))
    by_atom = {atom: _varying(value, atom.aval) for atom, value in zip(equation.invars, operands, strict=True)
               if not isinstance(atom, Literal)}
    alone = jaxpr.replace(constvars=[], invars=inputs, outvars=equation.outvars, eqns=[equation], effects=equation.effects)
    return eval_jaxpr(alone, [], *(by_atom[atom] for atom in inputs))


def _varying(value: Any, aval: Any) -> Any:
    """A value as it is read in a shard_map: a number that is known now varies over a mesh only once it is told to."""
    if isinstance(value, Tracer) or not isinstance(aval, ShapedArray) or not (axes := tuple(aval.manual_axis_type.varying)):
        return value
    return jax.lax.pcast(jnp.asarray(value, aval.dtype), axes, to="varying")


def _constant(equation: Any, operands: Sequence[Any]) -> Any:
    """What is made of numbers alone, known now: a bound of a clip, a factor, the number of a step, which rows to take."""
    known = all(is_number(operand) or isinstance(operand, np.ndarray) for operand in operands)
    if len(equation.outvars) != 1 or equation.effects or not known:
        return None
    aval = equation.outvars[0].aval
    if aval.dtype not in (jnp.float32, jnp.int32, jnp.bool_) or aval.size > MAX_CONSTANT:
        return None
    if aval.manual_axis_type.varying:  # in a shard_map numbers are cast so
        return operands[0] if equation.primitive.name == "pvary" else None
    with jax.ensure_compile_time_eval():
        value = equation.primitive.bind(*operands, **equation.params)
    if equation.primitive.multiple_results:  # of which this has one
        (value,) = value
    return value.item() if aval.weak_type and aval.shape == () else np.asarray(value, aval.dtype)[()]


# What XLA adds to a dense convolution.
ELEMENTWISE = {primitives.add_p, primitives.sub_p, primitives.mul_p, primitives.max_p, primitives.min_p, primitives.clamp_p}
