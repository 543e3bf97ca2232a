"""A transposed convolution as ordinary ones: each makes the outputs at one position modulo the strides, of blocks of pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp

from sparseflax.network.region import PIXELS, Node, Region, size_of

VECTOR = 16  # output channels that a dense convolution does for the price of one


def transposed(region: Region, equation: Any, x: Node, kernel: Any) -> Node | None:
    """The step for one of a single group, whose blocks are joined from ordinary convolutions; or None.

        y[n, sh i + a, sw j + b, o] = sum_{t,u,c} x[n, i + first_a + t, j + first_b + u, c]
                                                    kernel[sh t + rest_a, sw u + rest_b, c, o]
    """
    params, (kh, kw, ic, oc), (_, h, w, _) = equation.params, kernel.shape, x.shape
    (sh, sw), (n, oh, ow, _) = params["lhs_dilation"], equation.outvars[0].aval.shape
    if params["window_strides"] != (1, 1) or params["rhs_dilation"] != (1, 1) or size_of(x.shape) is None or min(oh, ow) < 1:
        return None
    rows, columns = _phases(kh, sh, params["padding"][0]), _phases(kw, sw, params["padding"][1])
    if not all(taps for _, _, taps in (*rows, *columns)):  # outputs that are nothing's sum
        return None
    size = -(-oh // sh), -(-ow // sw)

    def step(op: str, args: Any, shared: Any, more: Any, channels: int) -> Any:
        node = region.node(equation, op, args, shared, more, size=(*size, channels))
        if node is None:
            return None
        region.is_read([node])
        return replace(node, shape=(n, *node.size))

    def convolved(rows: list[_Phase], columns: list[_Phase]) -> Any:
        """At these positions, by one convolution; its weights are zero where one does not meet a pixel that others do."""
        (top, taps), (left, across) = _together(rows), _together(columns)
        inside = (size[0] + taps - 1, size[1] + across - 1, ic)
        source = x if (top, left, inside) == (0, 0, (h, w, ic)) else region.border(x, (-top, -left), inside)
        parts = [jnp.pad(kernel[r.rest::sh, c.rest::sw], [
            (r.first - top, top + taps - r.first - r.taps), (c.first - left, left + across - c.first - c.taps), (0, 0), (0, 0)])
            for r in rows for c in columns]
        return step("dense", [source], [jnp.concatenate(parts, 3)], ((taps, across), PIXELS, 1), len(parts) * oc)

    alike = len({phase[1:] for phase in rows}) == len({phase[1:] for phase in columns}) == 1
    if alike or sh * sw * oc <= VECTOR:
        blocks = convolved(rows, columns)
    else:
        found = [convolved([r], [c]) for r in rows for c in columns]
        blocks = None if None in found else step("concat", found, (), (), sh * sw * oc)
    larger = (sh * size[0], sw * size[1], oc)
    y = blocks and region.node(equation, "upsample", [blocks], params=(sh, sw), size=larger)
    if y is None or larger[:2] == (oh, ow):
        return y
    region.is_read([y])
    return region.node(equation, "window", [replace(y, shape=(n, *larger))], params=(0, 0, 0), numbers=[0], size=(oh, ow, oc))


class _Phase(NamedTuple):
    """Outputs at one position modulo the stride: the first tap that meets a pixel, which pixel that is, and how many do."""

    rest: int
    first: int
    taps: int


def _phases(taps: int, stride: int, padding: tuple[int, int]) -> list[_Phase]:
    rests = [(padding[0] - phase) % stride for phase in range(stride)]
    return [_Phase(rest, (phase - padding[0] + rest) // stride, len(range(rest, taps, stride)))
            for phase, rest in enumerate(rests)]


def _together(phases: list[_Phase]) -> tuple[int, int]:
    """The first pixel that one of them meets, and how many from there on."""
    first = min(phase.first for phase in phases)
    return first, max(phase.first + phase.taps for phase in phases) - first
