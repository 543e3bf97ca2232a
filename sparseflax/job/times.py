"""What the networks of a job take, in turn: dense, packed, and in other engines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx

from sparseflax.cost.cpu import client_threads
from sparseflax.cost.machine import Machine
from sparseflax.cost.timing import medians
from sparseflax.job.engines import Engine, engines
from sparseflax.network.measure import program
from sparseflax.network.pack import pack_model
from sparseflax.network.plan import plan

BURST = 0.01  # seconds for which a network runs before it is another one's turn
WRONG = 1e-3  # of the largest output: an engine that is off by more computes something else, unless in fewer bits


class Times(NamedTuple):
    """Median seconds of a call.

    Attributes:
      dense, folded: of the dense network, as it is and with its batch norms folded.
      packed: of each packed network.
      engines: {name: of the dense network there, in float32}.
      coarser: {name: of the dense network there in fewer bits, and its largest error over the largest output}.
      failed: {name: why the engine has no time}.
    """

    dense: float
    folded: float
    packed: list[float]
    engines: dict[str, float]
    coarser: dict[str, tuple[float, float]]
    failed: dict[str, str]

    @property
    def faster_dense(self) -> float:
        """Of the dense network in the faster of its two forms."""
        return min(self.dense, self.folded)


def times(model: nnx.Module, x: np.ndarray, machine: Machine, packed: Sequence[nnx.Module], seconds: float,
          content: bytes | None = None, examples: np.ndarray | None = None) -> Times:
    """Times a network, what became of it, and where a file is given the engines that are installed beside it.

    Args:
      model: dense.
      x: its input (n, h, w, c).
      machine: that it is planned for.
      packed: other networks, of the same input.
      seconds: for all of them.
      content: of the dense network's ONNX file; None times no other engine.
      examples: inputs by which other engines find their ranges of eight bits; None times none in eight bits.
    """
    folded = pack_model(model, plan(model, x, machine).all_dense, x, fuse=False)
    calls = [program(network, x) for network in (model, folded, *packed)]
    others, errors, failed = dict[str, Engine](), dict[str, float](), dict[str, str]()
    if content is not None:
        right = [np.asarray(array) for array in jax.tree.leaves(calls[0]())]
        others, failed = engines(content, _nchw(x), client_threads(), None if examples is None else _nchw(examples))
        for name, engine in list(others.items()):
            engine.run()
            errors[name] = max(_error(a, b) for a, b in zip(engine.outputs(), right, strict=True))
            if engine.exact and not errors[name] < WRONG:
                failed[name] = f"its outputs are off by {errors[name]:.1e} of the largest"
                del others[name]
    dense, with_folded, *found = medians([*calls, *(engine.run for engine in others.values())], seconds, BURST)
    taken = dict(zip(others, found[len(packed):], strict=True))
    return Times(dense, with_folded, found[:len(packed)], {name: taken[name] for name in others if others[name].exact},
                 {name: (taken[name], errors[name]) for name in others if not others[name].exact}, failed)


def _nchw(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def _error(y: np.ndarray, right: np.ndarray) -> float:
    """Largest difference over the largest output; images of the one are NCHW, of the other NHWC."""
    right = right.transpose(0, 3, 1, 2) if right.ndim == 4 and y.shape != right.shape else right
    return float(np.abs(y - right).max() / max(np.abs(right).max(), 1e-30)) if y.shape == right.shape else math.inf
