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
from sparseflax.job.engines import engines
from sparseflax.network.measure import program
from sparseflax.network.pack import pack_model
from sparseflax.network.plan import plan

BURST = 0.01  # seconds for which a network runs before it is another one's turn
WRONG = 1e-3  # of the largest output: an engine that is off by more computes something else


class Times(NamedTuple):
    """Median seconds of a call.

    Attributes:
      dense, folded: of the dense network, as it is and with its batch norms folded.
      packed: of each packed network.
      engines: {name: of the dense network there}.
      failed: {name: why the engine has no time}.
    """

    dense: float
    folded: float
    packed: list[float]
    engines: dict[str, float]
    failed: dict[str, str]

    @property
    def faster_dense(self) -> float:
        """Of the dense network in the faster of its two forms."""
        return min(self.dense, self.folded)


def times(model: nnx.Module, x: np.ndarray, machine: Machine, packed: Sequence[nnx.Module], seconds: float,
          content: bytes | None = None) -> Times:
    """Times a network, what became of it, and where a file is given the engines that are installed beside it.

    Args:
      model: dense.
      x: its input (n, h, w, c).
      machine: that it is planned for.
      packed: other networks, of the same input.
      seconds: for all of them.
      content: of the dense network's ONNX file; None times no other engine.
    """
    folded = pack_model(model, plan(model, x, machine).all_dense, x, fuse=False)
    calls = [program(network, x) for network in (model, folded, *packed)]
    others, failed = {}, dict[str, str]()
    if content is not None:
        right = [np.asarray(array) for array in jax.tree.leaves(calls[0]())]
        others, failed = engines(content, np.ascontiguousarray(x.transpose(0, 3, 1, 2)), client_threads())
        for name, (run, output) in list(others.items()):
            run()
            wrong = max(_error(a, b) for a, b in zip(output(), right, strict=True))
            if not wrong < WRONG:
                failed[name] = f"its outputs are off by {wrong:.1e} of the largest"
                del others[name]
    dense, with_folded, *found = medians([*calls, *(run for run, _ in others.values())], seconds, BURST)
    return Times(dense, with_folded, found[:len(packed)], dict(zip(others, found[len(packed):], strict=True)), failed)


def _error(y: np.ndarray, right: np.ndarray) -> float:
    """Largest difference over the largest output; images of the one are NCHW, of the other NHWC."""
    right = right.transpose(0, 3, 1, 2) if right.ndim == 4 and y.shape != right.shape else right
    return float(np.abs(y - right).max() / max(np.abs(right).max(), 1e-30)) if y.shape == right.shape else math.inf
