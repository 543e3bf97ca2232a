"""A network timed on this machine, dense and packed at a few speeds, so that what is asked of it is what it will take."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import nnx

from sparseflax.cost.detect import detect_machine
from sparseflax.cost.machine import Machine
from sparseflax.cost.progress import progress
from sparseflax.cost.timing import medians
from sparseflax.network.measure import program
from sparseflax.network.pack import pack_model
from sparseflax.network.plan import MARGIN, elsewhere, plan
from sparseflax.network.shapes import conv_shapes
from sparseflax.prune.allocate import guided
from sparseflax.prune.mask import apply_masks, kernels
from sparseflax.prune.whole import Packed, Whole, fit

# Speedups at which the network is measured, as far as it goes, after the fastest and one halfway there: those tell by how much
# the model is off, these what is left then, and between them that is interpolated. All are over what needs no pruning, packed
# or not: of a network of small layers XLA may take six times as long as the program does unpruned.
SPEEDUPS = 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0
HALFWAY = 0.5  # in the logarithm of time
FIRST = 0.3  # of the time for measuring, until it is known what to measure; then all of it is timed again, in turn
BURST = 0.01  # seconds for which a network runs before it is another one's turn


def measure(model: Any, x: Any, machine: Machine | None = None, *, seconds: float = 15.0, min_density: float = 0.01,
            **call: Any) -> Whole:
    """Times the network, dense and packed, with weights removed by magnitude; let nothing else run meanwhile.

        whole = prune.measure(model, x, machine)
        guide = prune.guided(sparseflax.conv_shapes(model, x), machine, speedup=2.5, whole=whole)

    Packed it is timed unpruned, and pruned as the guide would, as far as it goes and for some speedups less: the predicted
    times of its layers, summed, are put right where a guide will use them.

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
    forms = model, pack_model(model, all_dense, x, fuse=False, **call), pack_model(model, all_dense, x, **call)
    programs = [program(network, x, **call) for network in forms]
    layers, turn, networks = all_dense.seconds, FIRST * seconds / (2 + len(SPEEDUPS)), list[Packed]()
    with progress("timing the network", 4 + len(SPEEDUPS)) as advance:
        # What a process does first is slower: its memory is not mapped yet, and its threads sleep.
        medians(programs, turn, BURST)
        *dense_times, time = medians(programs, turn, BURST)
        dense, unpruned = min(dense_times), Packed(layers, 0.0, time)
        longest = min(dense, time)
        advance(1, f"dense {1e3 * dense:.3g} ms")

        def packed(whole: Whole, goal: float) -> Packed | None:
            guide = guided(shapes, machine, speedup=max(1.0, dense / goal) if goal else math.inf, min_density=min_density,
                           whole=whole, best_effort=True)
            if not guide.densities:
                return None
            network = pruned(model, guide.densities)
            chosen = plan(network, x, machine, **call)
            programs.append(program(pack_model(network, chosen, x, **call), x, **call))
            *dense_times, time = medians([*programs[:2], programs[-1]], turn, BURST)
            sparse = sum(layer.seconds for layer in chosen.layers if layer.choice == "sparse")
            # Over the dense time of the same moment: a machine that others use changes its speed.
            networks.append(Packed(chosen.seconds - sparse, sparse, dense * time / min(dense_times)))
            advance(1 + len(networks), f"packed {1e3 * networks[-1].seconds:.3g} ms")
            return networks[-1]

        whole = Whole(dense, 0.0, time / layers, time / layers)
        for _ in range(2):
            found = packed(whole, longest * (networks[0].seconds / longest)**HALFWAY if networks else 0.0)
            if found is None:
                return whole
            whole = fit(dense, [*networks, unpruned])
            if found.seconds >= longest:
                break
        else:
            # The scales stay from here on, so that a guide takes the very densities that are measured.
            fastest, whole = networks[0].seconds, whole.through([networks[0], unpruned])
            for speedup in reversed(SPEEDUPS):
                if longest / speedup > MARGIN * fastest and packed(whole, longest / speedup):
                    whole = whole.through([networks[0], *networks[2:], unpruned])
        times = medians(programs, (1 - FIRST) * seconds, BURST)
        advance(4 + len(SPEEDUPS), "done")
    again = [network._replace(seconds=time) for network, time in zip((unpruned, *networks), times[2:], strict=True)]
    return fit(min(times[:2]), again)


def pruned(model: Any, densities: Mapping[str, float]) -> Any:
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
