"""What the trace of a model shows whose layers name their values: which norm follows a layer, who else uses its weights.

Layers and norms call `checkpoint_name` on what they return, take and read; what becomes of these values stands in the jaxpr.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

# A layer's output, the input of a norm that can be folded, of another norm, a weight "conv1/kernel" read by its own layer, and
# the output of a numbered call.
OUTPUT, FOLDABLE, OTHER, WEIGHT, CALL = (
    f"sparseflax {mark}: " for mark in ("output", "norm input", "other norm input", "weight", "call"))


class Call(NamedTuple):
    """A call that stands in a jaxpr.

    Attributes:
      number: of its mark.
      size: of what it returns, with the dimensions that vmap adds.
      scans: lengths of the scans around it.
    """

    number: int
    size: int
    scans: tuple[int, ...]


def calls(jaxpr: Any, scans: tuple[int, ...] = ()) -> Iterator[Call]:
    """The calls that are marked in a jaxpr and those in it."""
    for equation in jaxpr.eqns:
        params = equation.params
        if equation.primitive.name == "name" and str(params["name"]).startswith(CALL):
            yield Call(int(params["name"].removeprefix(CALL)), equation.outvars[0].aval.size, scans)
        around = (*scans, params["length"]) if equation.primitive.name == "scan" else scans
        for param in params.values():
            for inner in param if isinstance(param, tuple) else (param,):
                opened = getattr(inner, "jaxpr", inner)
                if hasattr(opened, "eqns"):
                    yield from calls(opened, around)


class Shown(NamedTuple):
    """What a trace shows.

    Attributes:
      norms: {path of a layer: path of the batch norm that can be folded into it}: every input of the norm is that layer's
        output, and nothing but the norm ever uses this output.
      alone: {weight of a layer or norm, "conv1/kernel": whether it is an array of the model that nothing else reads or writes}
    """

    norms: dict[str, str]
    alone: dict[str, bool]


def shown(jaxpr: Any, outputs: int) -> Shown:
    """Follows the marked values.

    Args:
      jaxpr: (arrays of the model, further inputs) -> (`outputs` outputs, the arrays of the model as the call leaves them, or
        nothing).
    """
    walk = _Walk()
    origins = walk.through(jaxpr, range(len(jaxpr.invars)))
    for number, origin in enumerate(origins[outputs:]):
        walk.used |= {number, origin} if origin != number else set()
    walk.used |= set(origins[:outputs])
    found = ((layer, next(iter(norms))) for layer, norms in walk.users.items() if len(norms) == 1)
    return Shown({layer: norm for layer, norm in found if norm is not None and walk.inputs[norm] == {layer}},
                 {weight: not origins & (walk.used | {None}) for weight, origins in walk.weights.items()})


class _Walk:
    """A jaxpr and those in it, walked through.

    Attributes:
      users: of a layer's output: norms, None for anything else.
      inputs: of a norm: layers, None for anything else.
      weights: as their own layers read them, with the number of the outermost input that they are, None for computed ones.
      used: numbers of the inputs that something else uses.
    """

    def __init__(self):
        self.users: dict[str, set[str | None]] = defaultdict(set)
        self.inputs: dict[str, set[str | None]] = defaultdict(set)
        self.weights: dict[str, set[int | None]] = defaultdict(set)
        self.used: set[int | None] = set()

    def through(self, jaxpr: Any, origins: Sequence[int | None]) -> list[int | None]:
        """Which outermost inputs a jaxpr's outputs are, given those that its inputs are.

        A layer's output that crosses into an inner jaxpr has another user than a norm.
        """
        layers: dict[int, str] = {}  # id of a variable -> path of the layer that it is the output of
        origin = {id(variable): number for variable, number in zip(jaxpr.invars, origins, strict=True)}
        for equation in jaxpr.eqns:
            name = str(equation.params.get("name")) if equation.primitive.name == "name" else ""
            for variable in equation.invars:
                layer = layers.get(id(variable))
                if layer is not None:
                    self.users[layer].add(name.removeprefix(FOLDABLE) if name.startswith(FOLDABLE) else None)
                if name.startswith(FOLDABLE):
                    self.inputs[name.removeprefix(FOLDABLE)].add(layer)
                elif name.startswith(OTHER):
                    self.inputs[name.removeprefix(OTHER)].add(None)
            if name.startswith(OUTPUT):
                layers[id(equation.outvars[0])] = name.removeprefix(OUTPUT)
            operands = [origin.get(id(variable)) for variable in equation.invars]
            if name.startswith(WEIGHT):
                self.weights[name.removeprefix(WEIGHT)].add(operands[0])
                continue
            calls = _calls(equation, operands)
            results = [self.through(*call) for call in calls]
            if not calls:
                self.used.update(operands)
            elif len(calls) == 1 and len(results[0]) == len(equation.outvars):
                origin |= {id(variable): number for variable, number in zip(equation.outvars, results[0], strict=True)}
        for variable in jaxpr.outvars:
            if id(variable) in layers:
                self.users[layers[id(variable)]].add(None)
        return [origin.get(id(variable)) for variable in jaxpr.outvars]


def _calls(equation: Any, operands: list[int | None]) -> list[tuple[Any, list[int | None]]]:
    """The jaxprs that an equation runs, each with what its inputs are of the operands; [] where that is not known here."""
    params = equation.params
    if "branches" in params:
        calls = [(branch, operands[1:]) for branch in params["branches"]]
    elif "body_jaxpr" in params:
        condition, body = params["cond_nconsts"], params["body_nconsts"]
        carry = operands[condition + body:]
        calls = [(params["cond_jaxpr"], operands[:condition] + carry),
                 (params["body_jaxpr"], operands[condition:condition + body] + carry)]
    else:
        calls = [(params.get("jaxpr", params.get("call_jaxpr")), operands)]
    opened = [(getattr(jaxpr, "jaxpr", jaxpr), given) for jaxpr, given in calls]
    return opened if all(hasattr(jaxpr, "eqns") and len(jaxpr.invars) == len(given) for jaxpr, given in opened) else []
