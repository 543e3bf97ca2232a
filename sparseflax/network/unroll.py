"""What of a jaxpr is looked into: calls, and scans over stacks of sparse layers, whose steps each run a layer of their own."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, primitives

from sparseflax.layers.stack import STEP


def inlined(equation: Any) -> Any:
    """The closed jaxpr of a call to be looked into, or of a split as slices; None for everything else."""
    params = equation.params
    if equation.primitive.name == "split":
        return jax.make_jaxpr(functools.partial(_slices, sizes=params["sizes"], axis=params["axis"]))(equation.invars[0].aval)
    if equation.primitive is primitives.jit_p:
        shardings = (*params["in_shardings"], *params["out_shardings"])
        constrained = any(isinstance(sharding, jax.sharding.Sharding) for sharding in shardings)
        return None if constrained or params["compiler_options_kvs"] else params["jaxpr"]
    if equation.primitive in (primitives.custom_jvp_call_p, primitives.custom_vjp_call_p):
        return params["call_jaxpr"]
    if equation.primitive is primitives.remat_p:
        return ClosedJaxpr(params["jaxpr"], [])
    return None


def _slices(x: jax.Array, sizes: tuple[int, ...], axis: int) -> list[jax.Array]:
    ends = itertools.accumulate(sizes)
    return [jax.lax.slice_in_dim(x, end - size, end, axis=axis) for size, end in zip(sizes, ends, strict=True)]


def step_rows(scan: Any) -> set[int]:
    """Which operands of a scan say to a stack of sparse layers what step it is; empty for a scan over no stack."""
    return {number for number in _rows(scan.params["jaxpr"].jaxpr) if number >= sum(constant_and_carried(scan))}


def constant_and_carried(scan: Any) -> tuple[int, int]:
    """How many operands of a scan all steps read, and how many each hands on to the next."""
    if "ft_in" in scan.params:  # since JAX 0.12
        constant, carried, _ = map(len, scan.params["ft_in"].unpack())
        return constant, carried
    return scan.params["num_consts"], scan.params["num_carry"]


def _rows(jaxpr: Jaxpr) -> set[int]:
    """Numbers of the inputs of a jaxpr whose largest entry is marked as a step."""
    numbers: dict[Any, int] = {variable: number for number, variable in enumerate(jaxpr.invars)}
    largest, found = dict[Any, int](), set[int]()
    for equation in jaxpr.eqns:
        read = [None if isinstance(atom, Literal) else atom for atom in equation.invars]
        inner = inlined(equation)
        if equation.primitive is primitives.argmax_p and read[0] in numbers:
            largest[equation.outvars[0]] = numbers[read[0]]
        elif equation.primitive.name == "name" and equation.params["name"] == STEP and read[0] in largest:
            found.add(largest[read[0]])
        elif inner is not None:
            found |= {numbers[read[number]] for number in _rows(inner.jaxpr) if read[number] in numbers}
    return found
