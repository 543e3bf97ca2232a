"""A transposed convolution as ordinary ones: each makes the outputs at one position modulo the strides, of blocks of pixels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sparseflax.layers.transposed import Blocks, together
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
    whole = Blocks.of((kh, kw), (sh, sw), params["padding"])
    if not all(phase.taps for phase in (*whole.rows, *whole.columns)):  # outputs that are nothing's sum
        return None
    size = whole.grid(oh, ow)

    def step(op: str, args: Any, shared: Any, more: Any, channels: int) -> Any:
        node = region.node(equation, op, args, shared, more, size=(*size, channels))
        if node is None:
            return None
        region.is_read([node])
        return replace(node, shape=(n, *node.size))

    def convolved(blocks: Blocks) -> Any:
        """At these positions, by one convolution."""
        (top, taps), (left, across) = together(blocks.rows), together(blocks.columns)
        inside = (size[0] + taps - 1, size[1] + across - 1, ic)
        source = x if (top, left, inside) == (0, 0, (h, w, ic)) else region.border(x, (-top, -left), inside)
        merged = blocks.merged(kernel)
        return step("dense", [source], [merged], ((taps, across), PIXELS, 1), merged.shape[3])

    alike = len({phase[1:] for phase in whole.rows}) == len({phase[1:] for phase in whole.columns}) == 1
    if alike or sh * sw * oc <= VECTOR:
        blocks = convolved(whole)
    else:
        found = [convolved(whole._replace(rows=[r], columns=[c])) for r in whole.rows for c in whole.columns]
        blocks = None if None in found else step("concat", found, (), (), sh * sw * oc)
    larger = (sh * size[0], sw * size[1], oc)
    y = blocks and region.node(equation, "upsample", [blocks], params=(sh, sw), size=larger)
    if y is None or larger[:2] == (oh, ow):
        return y
    region.is_read([y])
    return region.node(equation, "window", [replace(y, shape=(n, *larger))], params=(0, 0, 0), numbers=[0], size=(oh, ow, oc))
