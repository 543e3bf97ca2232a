"""A network timed on this machine, dense and packed at a few speeds, so that what is asked of it is what it will take."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from sparseflax.cost.detect import detect_machine
from sparseflax.cost.machine import Machine
from sparseflax.cost.timing import medians
from sparseflax.network.pack import pack_model
from sparseflax.network.plan import MARGIN, elsewhere, plan
from sparseflax.network.shapes import conv_shapes
from sparseflax.prune.allocate import guided
from sparseflax.prune.mask import apply_masks, kernels
from sparseflax.prune.whole import Packed, Whole, fit

# Speedups at which the network is measured, as far as it goes, after the fastest and one halfway there: those tell by how much
# the model is off, these what is left then, and between them that is interpolated.
SPEEDUPS = 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0
HALFWAY = 0.5  # in the logarithm of time
BLOCKS = 3  # of every timing
BURST = 0.01  # seconds for which a network runs before it is another one's turn


def measure(model: Any, x: Any, machine: Machine | None = None, *, seconds: float = 5.0, min_density: float = 0.01,
            **call: Any) -> Whole:
    """Times the network, dense and packed, with weights removed by magnitude; let nothing else run meanwhile.

        whole = prune.measure(model, x, machine)
        guide = prune.guided(sparseflax.conv_shapes(model, x), machine, speedup=2.5, whole=whole)

    It is pruned as the guide would, as far as it goes and for some speedups less: the predicted times of its layers, summed,
    are put right where a guide will use them.

    Args:
      model: an nnx module, or a pair (Linen module, its variables), dense; only its shapes matter, so it need not be trained.
      x: the input, of the batch size it is to be fast at: an array (n, ...), or a pytree of them.
      machine: this one; None detects it.
      seconds: of measuring, compiling apart.
      min_density: of a layer, as the guide will be told.
      **call: further keyword arguments of the call, e.g. `train=False`.

    Raises:
      ValueError: for another machine than this one, a time that is not positive, or a model without convolution.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be positive and finite, got {seconds}")
    if machine is not None and elsewhere(machine):
        raise ValueError(f"a network is timed on this machine, but {elsewhere(machine)}: leave `whole` out of the guide for it")
    machine = machine or detect_machine()
    all_dense = plan(model, x, machine, **call).all_dense
    shapes = conv_shapes(model, x, **call)
    forms = [_program(network, x, call) for network in (model, pack_model(model, all_dense, x, fuse=False, **call))]
    layers, turn = all_dense.seconds, seconds / (3 + len(SPEEDUPS))
    dense = min(_times(forms, turn))

    def packed(whole: Whole, goal: float) -> Packed | None:
        guide = guided(shapes, machine, speedup=max(1.0, dense / goal) if goal else math.inf, min_density=min_density,
                       whole=whole, best_effort=True)
        if not guide.densities:
            return None
        pruned = _pruned(model, guide.densities)
        chosen = plan(pruned, x, machine, **call)
        *dense_times, time = _times([*forms, _program(pack_model(pruned, chosen, x, **call), x, call)], turn)
        sparse = sum(layer.seconds for layer in chosen.layers if layer.choice == "sparse")
        # Over the dense time of the same moment: a machine that others use changes its speed.
        return Packed(chosen.seconds - sparse, sparse, dense * time / min(dense_times))

    whole, ends = Whole(dense, 0.0, dense / layers, dense / layers), list[Packed]()
    for _ in range(2):
        found = packed(whole, dense * (ends[0].seconds / dense)**HALFWAY if ends else 0.0)
        if found is None:
            return whole
        ends.append(found)
        whole = fit(dense, layers, ends)
        if found.seconds >= dense:
            return whole
    # The scales stay from here on, so that a guide takes the very densities that are measured.
    measured = ends[:1]
    whole = whole.through(measured)
    for speedup in reversed(SPEEDUPS):
        if dense / speedup > MARGIN * ends[0].seconds and (found := packed(whole, dense / speedup)):
            measured.append(found)
            whole = whole.through(measured)
    return whole


def _times(programs: list[Callable[[], Any]], seconds: float) -> list[float]:
    # Other programs only ever add to a time, and may do so for seconds.
    blocks = [medians(programs, seconds / BLOCKS, burst=BURST) for _ in range(BLOCKS)]
    return np.min(blocks, axis=0).tolist()


def _pruned(model: Any, densities: Mapping[str, float]) -> Any:
    """A copy of the model, in evaluation mode, with the largest weights of every layer that has a density {layer: density}."""
    def largest(kernel: Any, density: float) -> Any:
        mask, lost = np.ones(kernel.size, bool), int((1 - density) * kernel.size)
        mask[np.abs(np.asarray(kernel, np.float32)).argpartition(lost, axis=None)[:lost]] = False
        return mask.reshape(kernel.shape)

    def smaller(params: Any) -> Any:
        found = kernels(params)
        return apply_masks(params, {name: largest(found[name], density) for name, density in densities.items()})

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
