"""A batch run some images at a time, from end to end, where no image meets another: what lies between stays in the caches.

Whether images meet is read off the call's jaxpr, traced for the whole batch and for a part of it: both have to do the same, and
every value has to be alike for all images, or each image's own along its first dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal, primitives

from sparseflax.conv.int8 import quantize_p
from sparseflax.conv.int8_primitive import RESIDUAL, int8_conv_p
from sparseflax.conv.primitive import conv_p
from sparseflax.network.rewrites import COMBINE


def _named(*names: str) -> set[Any]:
    return {getattr(primitives, f"{name}_p") for name in names if hasattr(primitives, f"{name}_p")}


POINTWISE = _named(
    "add", "sub", "mul", "div", "rem", "max", "min", "clamp", "neg", "exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic",
    "erf", "sqrt", "rsqrt", "cbrt", "square", "abs", "sign", "pow", "integer_pow", "floor", "ceil", "round", "is_finite", "not",
    "and", "or", "xor", "eq", "ne", "lt", "le", "gt", "ge", "select_n", "convert_element_type", "stop_gradient", "copy")
REDUCE = _named("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin")
CALLS = {primitives.jit_p: "jaxpr", primitives.custom_jvp_call_p: "call_jaxpr", primitives.custom_vjp_call_p: "call_jaxpr",
         primitives.remat_p: "jaxpr"}
SIZES = "new_sizes", "shape", "limit_indices"  # parameters that go with the batch; what they make of it is compared


def in_chunks(call: Callable[[Any, Any], Any], run: Callable[[Any, Any], Any], chunk: int, given: Any, batch: Any) -> Any:
    """`run(given, batch)` of a part of the batch at a time; None where that might not be the same, or there is but one part.

    Args:
      call: (given, batch) -> a pytree of arrays, to be looked into.
      run: what computes the same.
      chunk: images at most; taken is the largest divisor of the batch that is not above it.
      given: arrays that all images share.
      batch: a pytree of arrays with the images along their first dimension, and of what is no array.
    """
    leaves, tree = jax.tree.flatten(batch)
    at = [i for i, leaf in enumerate(leaves) if isinstance(leaf, (jax.Array, np.ndarray))]
    sizes = {leaves[i].shape[:1] for i in at}
    (n,) = sizes.pop() if len(sizes) == 1 and () not in sizes else (None,)
    if not isinstance(n, int) or n <= chunk:
        return None
    size = max(c for c in range(1, chunk + 1) if n % c == 0)

    def filled(arrays: Sequence[Any]) -> Any:
        merged = dict(enumerate(leaves)) | dict(zip(at, arrays, strict=True))
        return jax.tree.unflatten(tree, merged.values())

    def looked_into(given: Any, arrays: Sequence[Any]) -> Any:
        return call(given, filled(arrays))

    arrays = [jnp.asarray(leaves[i]) for i in at]
    parts = [array.reshape(n // size, size, *array.shape[1:]) for array in arrays]
    try:
        whole, shapes = jax.make_jaxpr(looked_into, return_shape=True)(given, arrays)
        some = jax.make_jaxpr(looked_into)(given, [jax.ShapeDtypeStruct(part.shape[1:], part.dtype) for part in parts])
    except (TypeError, ValueError):  # it wants a batch of that size
        return None
    inputs = [False] * len(jax.tree.leaves(given)) + [True] * len(arrays)
    if whole.jaxpr.effects or not all(_follow(whole, some, inputs, (n, size))):
        return None
    outputs = jax.lax.map(lambda part: run(given, filled(part)), parts)
    return jax.tree.map(lambda y, shape: y.reshape(shape.shape), outputs, shapes)


class _Meet(Exception):
    """Images meet, or it is not known that they do not."""


def _follow(whole: Any, some: Any, inputs: Sequence[bool], sizes: tuple[int, int]) -> list[bool]:
    """Which outputs are each image's own; [False] where it is not known of something that they need.

    Args:
      whole, some: closed jaxprs of the call, for the batch and a part of it.
      inputs: which are each image's own.
      sizes: images of the two.
    """
    try:
        return _walk(whole.jaxpr, some.jaxpr, [*_consts(whole, some), *inputs], sizes)
    except _Meet:
        return [False]


def _walk(whole: Jaxpr, some: Jaxpr, values: Sequence[bool], sizes: tuple[int, int]) -> list[bool]:
    own = dict(zip([*whole.constvars, *whole.invars], values, strict=True))
    if len(whole.eqns) != len(some.eqns):
        raise _Meet
    for equation, other in zip(whole.eqns, some.eqns, strict=True):
        operands = [not isinstance(atom, Literal) and own[atom] for atom in equation.invars]
        if equation.primitive is not other.primitive or not all(map(_same_literal, equation.invars, other.invars)):
            raise _Meet
        if equation.primitive in CALLS:
            inner, within = (each.params[CALLS[equation.primitive]] for each in (equation, other))
            found = _walk(getattr(inner, "jaxpr", inner), getattr(within, "jaxpr", within),
                          [*_consts(inner, within), *operands], sizes)
        elif not all(_same(equation.params[name], other.params[name]) for name in equation.params if name not in SIZES):
            raise _Meet
        elif any(operands):
            if not _apart(equation, operands, sizes[0]):
                raise _Meet
            found = [True] * len(equation.outvars)
        else:
            found = [_repeats(equation, sizes[0])] * len(equation.outvars)
        for variable, one, is_own in zip(equation.outvars, other.outvars, found, strict=True):
            shapes: list[tuple[int, ...]] = [each.aval.shape for each in (variable, one)]  # type: ignore[attr-defined]
            if shapes[0][is_own:] != shapes[1][is_own:] or is_own and [shape[:1] for shape in shapes] != [(n,) for n in sizes]:
                raise _Meet
            own[variable] = is_own
    return [not isinstance(atom, Literal) and own[atom] for atom in whole.outvars]


def _consts(whole: Any, some: Any) -> list[bool]:
    """All alike, and the same in both."""
    pairs = list(zip(getattr(whole, "consts", ()), getattr(some, "consts", ()), strict=True))
    if not all(one is other for one, other in pairs):
        raise _Meet
    return [False] * len(pairs)


def _same_literal(one: Any, other: Any) -> bool:
    if isinstance(one, Literal) and isinstance(other, Literal):
        return np.array_equal(one.val, other.val, equal_nan=np.asarray(one.val).dtype.kind == "f")
    return isinstance(one, Literal) == isinstance(other, Literal)


def _same(one: Any, other: Any) -> bool:
    return one is other or str(one) == str(other)


def _repeats(equation: Any, n: int) -> bool:
    """Whether a value that is alike for all images becomes the same row for each."""
    if equation.primitive is not primitives.broadcast_in_dim_p or equation.params["shape"][:1] != (n,):
        return False
    return 0 not in equation.params["broadcast_dimensions"] or equation.invars[0].aval.shape[:1] == (1,)


def _apart(equation: Any, own: Sequence[bool], n: int) -> bool:
    """Whether each image's output is made of its own part of the operands, and of what all share."""
    params, primitive, first = equation.params, equation.primitive, own[0] and not any(own[1:])
    shapes = [np.shape(atom.val) if isinstance(atom, Literal) else atom.aval.shape for atom in equation.invars]
    if primitive in POINTWISE:
        return all(is_own or shape[:1] in ((), (1,)) for is_own, shape in zip(own, shapes, strict=True))
    if primitive is conv_p:
        residual = params["has_residual"]
        return own[0] and own[-1] == residual and not any(own[1:-1])
    if primitive is int8_conv_p:
        return own[0] and all(is_own == (i == RESIDUAL) for i, is_own in enumerate(own) if i)
    if primitive is quantize_p:
        return first
    if primitive is primitives.conv_general_dilated_p:
        layout = params["dimension_numbers"]
        return first and params["batch_group_count"] == 1 and layout.lhs_spec[0] == layout.out_spec[0] == 0
    if primitive is primitives.dot_general_p:
        (contracted, _), (together, _) = params["dimension_numbers"]
        return first and 0 not in contracted and not together
    if primitive in COMBINE:
        sides = (params[name][0] for name in ("window_dimensions", "window_strides", "base_dilation", "window_dilation"))
        return set(sides) == {1} and tuple(params["padding"][0]) == (0, 0)
    if primitive in REDUCE:
        return 0 not in params["axes"]
    if primitive is primitives.reshape_p:
        return params["dimensions"] is None and params["new_sizes"][:1] == (n,)
    if primitive is primitives.broadcast_in_dim_p:
        return first and params["broadcast_dimensions"][:1] == (0,)
    if primitive is primitives.transpose_p:
        return params["permutation"][0] == 0
    if primitive is primitives.squeeze_p:
        return 0 not in params["dimensions"]
    if primitive is primitives.rev_p:
        return 0 not in params["dimensions"]
    if primitive is primitives.pad_p:
        return first and tuple(params["padding_config"][0]) == (0, 0, 0)
    if primitive is primitives.concatenate_p:
        return all(own) and params["dimension"] != 0
    if primitive is primitives.slice_p:
        return params["start_indices"][0] == 0 and params["limit_indices"][0] == n and (params["strides"] or (1,))[0] == 1
    return False
