"""Products of a value with a function of itself, as one step: HardSwish, SiLU, both forms of GELU, and their like.

Functions of two factors return what a map does instead: (what it reads, its name, its numbers); or None.
"""

from __future__ import annotations

import math
from typing import Any

from sparseflax.network.region import Node, Region, plain

UNBOUNDED = -math.inf, math.inf
Gate = tuple[Node, str, tuple[float, ...]]


def gate(region: Region, x: Any, factor: Any) -> Gate | None:
    """x times a factor that was made of it, or of what x is a multiple of, and that nothing else reads."""
    if not isinstance(x, Node) or not region.is_open(factor, "map"):
        return None
    if factor.params == ("logistic",):
        source, scale = _multiple(region, factor.args[0], x)
        return (x, "swish", (scale, 0.0, 1.0)) if source is x and _moderate(scale) else None
    if factor.params != ("clamp",):
        return None
    return _of_one_plus(region, x, factor) or _bounded(region, x, factor)


def lined(name: str, numbers: tuple[float, ...], scale: float, shift: float) -> tuple[float, ...] | None:
    """The numbers of scale f(x) + shift, f one of these functions; None for any other, and where a sum would meet a sum."""
    if name not in ("gate", "swish", "gelu"):
        return None
    *rest, s, t = numbers if name == "gate" else (*numbers, -0.0)
    if 0 not in (shift, t) or not is_normal(scale * s) or (name != "gate" and shift != 0):
        return None
    return (*rest, scale * s, scale * t + shift)[:len(numbers)]


def is_normal(number: float) -> bool:
    """Whether a number and its reciprocal are float32 of full precision."""
    return 2.0**-126 <= abs(number) <= 2.0**126


def _bounded(region: Region, x: Node, factor: Node) -> Gate | None:
    """x min(max(p x + q, low), high), and the line before it."""
    if plain(factor.args[0]) is not plain(x):
        return None
    source, line, unread = x, (1.0, -0.0), x.read == 2 and not region.is_done(x)
    if unread and x.op == "map" and x.params == ("clamp",) and x.numbers[2:] == UNBOUNDED:
        source, line = x.args[0], x.numbers[:2]
    return source, "gate", (*factor.numbers, *line, 1.0, -0.0)


def _of_one_plus(region: Region, x: Node, factor: Node) -> Gate | None:
    """x (a + b f(z)), |a| = |b| and f odd: s x (1 + erf(p x)), or s x (1 + tanh(z)) = 2 s x / (1 + e^-2z)."""
    slope, scale = factor.numbers[:2]
    inner = factor.args[0]
    if factor.numbers[2:] != UNBOUNDED or not region.is_open(inner, "map"):
        return None
    if inner.params not in (("erf",), ("tanh",)) or scale == 0 or abs(slope) != abs(scale):
        return None
    for source, times in _multiples(region, x):
        if inner.params == ("erf",):
            base, p = _multiple(region, inner.args[0], source)
            if base is source and is_normal(p) and is_normal(times * scale):
                return source, "gelu", (math.copysign(p, p * slope * scale), times * scale)
            continue
        argument = _cubic(region, inner.args[0], source)
        if argument is not None:
            p, q = (2 * math.copysign(1, slope * scale) * number for number in argument)
            if _moderate(p) and (q == 0 or _moderate(q) and p * q > 0) and is_normal(2 * times * scale):
                return source, "swish", (p, q, 2 * times * scale)
    return None


def _cubic(region: Region, z: Any, x: Node) -> tuple[float, float] | None:
    """(p, q) where z = p x + q x^3."""
    base, p = _multiple(region, z, x)
    if base is x:
        return p, 0.0
    if not isinstance(base, Node) or base.op != "combine" or base.params[:2] != ("add", "same"):
        return None
    for linear, cubed in (base.args, base.args[::-1]):
        cube, q = _multiple(region, cubed, x)
        if plain(linear) is plain(x) and isinstance(cube, Node) and cube.op == "combine" and cube.params[:2] == ("mul", "same"):
            for square, other in (cube.args, cube.args[::-1]):
                if plain(other) is plain(x) and square.op == "map" and square.params == ("square",) and (
                        plain(square.args[0]) is plain(x)):
                    return p, p * q
    return None


def _multiple(region: Region, value: Any, x: Node) -> tuple[Any, float]:
    """(source, scale) where value = scale * source; `x` itself as soon as that is the source."""
    scale = 1.0
    while plain(value) is not plain(x) and isinstance(value, Node) and value.op == "map" and value.params == ("clamp",) and (
            value.numbers[1:] == (0.0, *UNBOUNDED)):
        scale, value = scale * value.numbers[0], value.args[0]
    return (x if plain(value) is plain(x) else value), scale


def _multiples(region: Region, x: Node) -> list[tuple[Node, float]]:
    """x, and what it is a multiple of."""
    found = [(x, 1.0)]
    if region.is_open(x, "map") and x.params == ("clamp",) and x.numbers[1:] == (0.0, *UNBOUNDED):
        found.append((x.args[0], x.numbers[0]))
    return [(source, scale) for source, scale in found if isinstance(source, Node)]


def _moderate(number: float) -> bool:
    """Whether beyond 10^9, and before infinity, a logistic function of so many times x is 0 or 1."""
    return 2.0**-10 <= abs(number) <= 2.0**10
