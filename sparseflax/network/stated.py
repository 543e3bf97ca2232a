"""Ranges that a model states itself: it quantizes what its layers take and dequantizes it again, as networks in eight bits from
files do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Literal, primitives

from sparseflax.conv.int8 import Quantization, dequantize_p
from sparseflax.layers.int8 import integers
from sparseflax.network.equations import MOVES
from sparseflax.network.ranges import Rounded, replaced, worthwhile
from sparseflax.network.unroll import inlined

MARK = "sparseflax takes: "  # before the path of a layer, at its input


class _Named(nnx.Module):
    """A layer that names what it takes."""

    def __init__(self, path: str, layer: Any):
        self.path, self.layer = path, layer

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        return self.layer(checkpoint_name(inputs, MARK + self.path), **kwargs)


def stated_ranges(model: nnx.Module, norms: Mapping[str, str | None], x: Any, **call: Any) -> dict[str, Quantization]:
    """{path: what the inputs of a layer are rounded to} of those layers whose inputs are, and all of them alike.

    Args:
      model: an nnx module; it stays as it is, and is traced, not run.
      norms: {path of a layer: path of the batch norm that is folded into it, or None}.
      x: its input, or a `jax.ShapeDtypeStruct`.
      **call: further keyword arguments of the call.
    """
    graphdef, state = nnx.split(replaced(model, norms, _Named))

    def run(state: Any, x: Any) -> Any:
        merged: Any = nnx.merge(graphdef, state)
        return merged(x, **call)

    jaxpr = jax.make_jaxpr(run)(state, x).jaxpr
    found: dict[str, set[Quantization | None]] = {}
    _follow(jaxpr, [None] * len(jaxpr.invars), found)
    return {path: one for path, (one, *others) in found.items() if one is not None and not others}


def _follow(jaxpr: Any, given: Sequence[Quantization | None], found: dict[str, set[Quantization | None]]
            ) -> list[Quantization | None]:
    """What the outputs of a jaxpr are rounded to, given that of its inputs; notes that of what layers take."""
    known = dict(zip(jaxpr.invars, given, strict=True))
    for equation in jaxpr.eqns:
        operands = [None if isinstance(atom, Literal) else known.get(atom) for atom in equation.invars]
        results: Sequence[Quantization | None] = [None] * len(equation.outvars)
        inner = inlined(equation)
        if inner is not None:
            results = _follow(inner.jaxpr, operands, found)
        elif equation.primitive is dequantize_p:
            results = [equation.params["quantization"]]
        elif equation.primitive.name == "name":
            results, name = operands, equation.params["name"]
            if name.startswith(MARK):
                found.setdefault(name.removeprefix(MARK), set()).add(operands[0])
        elif equation.primitive in MOVES:
            moved = operands if equation.primitive is primitives.concatenate_p else operands[:1]
            zeros = equation.primitive is not primitives.pad_p or _is_zero(equation.invars[1])
            results = [moved[0] if zeros and len(set(moved)) == 1 else None]
        known.update(zip(equation.outvars, results, strict=True))
    return [None if isinstance(atom, Literal) else known.get(atom) for atom in jaxpr.outvars]


def _is_zero(atom: Any) -> bool:
    return isinstance(atom, Literal) and atom.val == 0


def round_stated(model: nnx.Module, norms: Mapping[str, str | None], ranges: Mapping[str, Quantization]) -> dict[str, Rounded]:
    """Eight bits for layers whose inputs and weights are of eight bits in the model already: nothing is rounded anew.

    Layers whose weights are not, as those that were changed since, are not in the result.

    Args:
      model: an nnx module.
      norms: as in `stated_ranges`.
      ranges: what that returns.
    """
    rounded: dict[str, Rounded] = {}

    def note(path: str, layer: Any) -> Any:
        whole = integers(layer) if path in ranges else None
        if whole is not None:
            rounded[path] = _rounded(layer, ranges[path], int(np.abs(whole).max(initial=0)))
        return layer

    replaced(model, norms, note)
    return rounded


def _rounded(layer: Any, inputs: Quantization, largest: int) -> Rounded:
    if largest > 127:
        return Rounded(None, None, (), f"float32: its weights are up to {largest} steps in the model, int8 has 127 at most")
    int8 = worthwhile(layer, inputs)
    if isinstance(int8, Rounded):
        return int8
    return Rounded(inputs, None, (), "int8, as the model rounds it", int8.density)
