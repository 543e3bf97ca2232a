"""What a whole network takes on this machine, so that a guide's speedup is that of the network and not of its layers alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from sparseflax.machine import Machine, detect_machine, medians
from sparseflax.model import pack_model
from sparseflax.plan import elsewhere, plan
from sparseflax.prune.mask import apply_masks, kernels

DENSITIES = 0.3, 0.03  # at which the network is measured, packed
BLOCKS = 3  # of the measurement
BURST = 0.01  # seconds for which a network runs before it is another one's turn


class Whole(NamedTuple):
    """Of a network, measured: packed it takes scale * (predicted seconds of its layers) + other_seconds.

    Attributes:
      dense_seconds: of the dense network, in the faster of its two forms, as it is and with batch norms folded.
      other_seconds: of everything in the packed network that is no layer.
      scale: measured over predicted seconds of its layers.
    """

    dense_seconds: float
    other_seconds: float = 0.0
    scale: float = 1.0

    def checked(self) -> Whole:
        """Itself. Raises ValueError for a time or a scale that cannot be one."""
        for name, wanted, good in (("dense_seconds", "positive", self.dense_seconds > 0), ("scale", "positive", self.scale > 0),
                                   ("other_seconds", "at least 0", self.other_seconds >= 0)):
            if not (good and math.isfinite(getattr(self, name))):
                raise ValueError(f"{name} of the whole network must be {wanted} and finite, got {getattr(self, name)}")
        return self


def measure(model: Any, x: Any, machine: Machine | None = None, *, seconds: float = 3.0, **call: Any) -> Whole:
    """Times the network, dense and packed, with weights removed by magnitude at two densities; let nothing else run meanwhile.

        whole = prune.measure(model, x, machine)
        guide = prune.guided(sparseflax.conv_shapes(model, x), machine, speedup=2.5, whole=whole)

    The packed times over those predicted of the layers lie on a line: its slope is by how much the model is off in this
    network, and what is left for no layers at all is everything else.

    Args:
      model: an nnx module, or a pair (Linen module, its variables), dense; only its shapes matter, so it need not be trained.
      x: the input, of the batch size it is to be fast at: an array (n, ...), or a pytree of them.
      machine: this one; None detects it.
      seconds: of measuring, compiling apart.
      **call: further keyword arguments of the call, e.g. `train=False`.

    Raises:
      ValueError: for another machine than this one, a time that is not positive, or a model without convolution.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be positive and finite, got {seconds}")
    if machine is not None and elsewhere(machine):
        raise ValueError(f"a network is timed on this machine, but {elsewhere(machine)}: leave `whole` out of the guide for it")
    machine = machine or detect_machine()
    layers, packed = [], []
    for density in DENSITIES:
        pruned = _pruned(model, density)
        chosen = plan(pruned, x, machine, **call)
        layers.append(chosen.seconds)
        packed.append(pack_model(pruned, chosen, x, **call))
    folded = pack_model(pruned, chosen.all_dense, x, fuse=False, **call)
    programs = [_program(network, x, call) for network in (model, folded, *packed)]
    # Other programs only ever add to a time, and may do so for seconds.
    blocks = [medians(programs, seconds / BLOCKS, burst=BURST) for _ in range(BLOCKS)]
    as_it_is, without_norms, *times = np.min(blocks, axis=0).tolist()
    return line(min(as_it_is, without_norms), layers, times)


def line(dense: float, layers: Sequence[float], packed: Sequence[float]) -> Whole:
    """What the seconds of the dense network, those predicted of packed layers, and of all packed say, the slower ones first.

    A line through two noisy points cannot tell that the model is off by more than a factor of two, or that everything else
    takes less than no time.
    """
    saved = layers[0] - layers[1]
    slope = (packed[0] - packed[1]) / saved if saved > 0 else 1.0
    scale = min(max(slope, 0.5), 2.0, *(time / own for time, own in zip(packed, layers, strict=True)))
    other = statistics.mean(time - scale * own for time, own in zip(packed, layers, strict=True))
    return Whole(dense, other, scale)


def _pruned(model: Any, density: float) -> Any:
    """A copy of the model, in evaluation mode, with the largest weights of every layer."""
    def largest(kernel: Any) -> Any:
        mask, lost = np.ones(kernel.size, bool), int((1 - density) * kernel.size)
        mask[np.abs(np.asarray(kernel, np.float32)).argpartition(lost, axis=None)[:lost]] = False
        return mask.reshape(kernel.shape)

    def smaller(params: Any) -> Any:
        return apply_masks(params, {name: largest(kernel) for name, kernel in kernels(params).items()})

    if isinstance(model, tuple):
        module, variables = model
        return module, {**variables, "params": smaller(variables["params"])}
    copy = nnx.clone(model)
    nnx.update(copy, smaller(nnx.state(copy, nnx.Param)))
    copy.eval()
    return copy


def _program(model: Any, x: Any, call: dict[str, Any]) -> Callable[[], Any]:
    """The model's call in evaluation mode, as one jitted program with its weights as operands."""
    if isinstance(model, tuple):
        module, weights = model
        run = jax.jit(lambda variables, x: module.apply(variables, x, **call))
    else:
        copy = nnx.clone(model)
        copy.eval()
        graph, weights = nnx.split(copy)
        run = jax.jit(lambda state, x: nnx.merge(graph, state)(x, **call))
    operands = jax.device_put((weights, x), jax.devices("cpu")[0])
    return lambda: run(*operands)
