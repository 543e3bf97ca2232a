"""ONNX's operators that hold graphs of their own: loops that are known while tracing, and branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparseflax.onnx.graph import Body
from sparseflax.onnx.value import Unsupported, Value, number, value

LONGEST = 1024  # steps of a loop: each is compiled

Run = Callable[..., Any]  # what another operator makes of its inputs and attributes


def if_(run: Run, condition: Value, *outer: Value, then_branch: Body, else_branch: Body, captured: Sequence[str]) -> Any:
    """One of two graphs; where the data choose, both are compiled, and have to return the same shapes."""
    values: dict[str, Any] = dict(zip(captured, outer, strict=True))
    if condition.known:
        return _body(run, then_branch if number(condition, "condition") else else_branch, (), values)

    def branch(body: Body) -> Callable[[], tuple[jax.Array, ...]]:
        return lambda: tuple(jnp.asarray(v.plain()) for v in _body(run, body, (), values))

    branches = branch(then_branch), branch(else_branch)
    returned = [[(a.dtype.name, a.shape) for a in jax.eval_shape(each)] for each in branches]
    if returned[0] != returned[1] or condition.shape not in ((), (1,)):
        raise Unsupported(f"its condition of shape {condition.shape} is computed from the data, and its branches return "
                          f"{returned[0]} and {returned[1]}: wanted one condition and the same shapes, or a constant")
    return tuple(map(value, jax.lax.cond(condition.array.reshape(()), *branches)))


def loop(run: Run, *given: Value | None, body: Body, captured: Sequence[str]) -> Any:
    """A graph again and again: (count, condition, *carried) -> the carried values at the end, then what each step adds."""
    count, condition, *carried = given[:len(given) - len(captured)]
    outer: dict[str, Any] = dict(zip(captured, given[len(given) - len(captured):], strict=True))
    steps = LONGEST + 1 if count is None else number(count, "trip count")
    going, collected = condition is None or bool(number(condition, "condition")), list[Sequence[Value]]()
    while going and len(collected) < steps:
        if len(collected) == LONGEST:
            raise Unsupported(f"it takes more than {LONGEST} steps, wanted fewer")
        condition, *results = _body(run, body, (value(np.int64(len(collected))), value(np.bool_(True)), *carried), outer)
        carried = results[:len(carried)]
        collected.append(results[len(carried):])
        going = bool(number(condition, "condition"))
    if not collected and len(body.outputs) > 1 + len(carried):
        raise Unsupported("it takes no step, and what each would add is not known")
    added = [value(jnp.stack([v.plain() for v in several])) for several in zip(*collected, strict=True)]
    return *carried, *added


def _body(run: Run, body: Body, inputs: Sequence[Value | None], outer: dict[str, Any]) -> tuple[Any, ...]:
    """The outputs of a graph."""
    values: dict[str, Any] = {name: value(array) for name, array in body.constants.items()}
    values |= outer | dict(zip(body.inputs, inputs, strict=True)) | {"": None}
    for node in body.nodes:
        results = run(node, [values[name] for name in node.inputs])
        values.update(zip(node.outputs, results if isinstance(results, tuple) else (results,), strict=False))
    return tuple(values[name] for name in body.outputs)


OPERATORS = {"If": if_, "Loop": loop}  # unlike others they take, first, how to run the nodes in them
