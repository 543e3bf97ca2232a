"""A network timed on this machine, dense and packed at a few speeds, so that what is asked of it is what it will take."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseflax.conv.int8 import LANES
from sparseflax.cost.detect import detect_machine
from sparseflax.cost.machine import Machine
from sparseflax.cost.progress import progress
from sparseflax.cost.timing import medians
from sparseflax.network.measure import program
from sparseflax.network.pack import pack_model
from sparseflax.network.plan import MARGIN, elsewhere, plan, rounded_as
from sparseflax.network.planned import Plan
from sparseflax.network.shapes import conv_shapes
from sparseflax.prune import blocks
from sparseflax.prune.aim import AIMS, aimed
from sparseflax.prune.allocate import guided
from sparseflax.prune.guide import Guidance
from sparseflax.prune.mask import apply_masks, kernels
from sparseflax.prune.whole import Packed, Whole, fit

# Speedups at which the network is measured, as far as it goes, after the fastest and one halfway there: those tell by how much
# the model is off, these what is left then, and between them that is interpolated. All are over what needs no pruning, packed
# or not: of a network of small layers XLA may take six times as long as the program does unpruned.
SPEEDUPS = 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0
HALFWAY = 0.5  # in the logarithm of time
FIRST = 0.3  # of the time for measuring, until it is known what to measure; then all of it is timed again, in turn
BURST = 0.01  # seconds for which a network runs before it is another one's turn


def measure(model: Any, x: Any, machine: Machine | None = None, *, speedup: float | None = None, seconds: float = 15.0,
            min_density: float = 0.01, rounded: Plan | None = None, **call: Any) -> Whole:
    """Times the network, dense and packed, with weights removed by magnitude; let nothing else run meanwhile.

        whole = prune.measure(model, x, machine, speedup=2.5)
        guide = prune.guided(sparseflax.conv_shapes(model, x), machine, speedup=2.5, whole=whole)

    Packed it is timed unpruned, and pruned as the guide would, as far as it goes and for some speedups less: the predicted
    times of its layers, summed, are put right where a guide will use them. With a `speedup` it is then pruned as the guide for
    that would, timed beside the dense one, and measured until what is predicted is reached within a twentieth.

    Args:
      model: an nnx module, or a pair (Linen module, its variables), dense; only its shapes matter, so it need not be trained.
      x: the input, of the batch size it is to be fast at: an array (n, ...), or a pytree of them.
      machine: this one; None detects it.
      speedup: that the guide will be asked for; None for a measurement that serves any, less closely.
      seconds: of measuring, compiling apart; with a `speedup` as many again at most.
      min_density: of a layer, as the guide will be told.
      rounded: a plan of the network in eight bits, `plan(..., precision="int8")`, for a guide of that precision: packed
        networks run the same layers so, where that is faster, and are pruned in blocks of four.
      **call: further keyword arguments of the call, e.g. `train=False`.

    Raises:
      ValueError: for another machine than this one, a time that is not positive, a speedup below 1, or a model without
        convolution.
    """
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds must be positive and finite, got {seconds}")
    if speedup is not None and not speedup >= 1:
        raise ValueError(f"speedup must be at least 1 (the dense network), or None, got {speedup}")
    if machine is not None and elsewhere(machine):
        raise ValueError(f"a network is timed on this machine, but {elsewhere(machine)}: leave `whole` out of the guide for it")
    network = _Network(model, x, machine or detect_machine(), min_density, rounded, call)
    whole = _explained(network, seconds)
    if speedup is None:
        return whole

    def measured(guide: Guidance) -> float:
        *dense, time = medians([*network.dense, network.packed(guide)[1]], seconds / AIMS, BURST)
        return min(dense) / time

    return aimed(whole, speedup, lambda whole: network.guide(whole, speedup), measured)


class _Network:
    """One that is measured, and its dense forms as programs: as it is, and with batch norms folded."""

    def __init__(self, model: Any, x: Any, machine: Machine, min_density: float, rounded: Plan | None,
                 call: Mapping[str, Any]):
        self.model, self.x, self.machine, self.call = model, x, machine, call
        self.min_density, self.rounded = min_density, rounded
        dense = plan(model, x, machine, **call).all_dense
        self.plan = dense if rounded is None else rounded_as(dense, rounded)
        self.shapes = conv_shapes(model, x, **call)
        self.dense = [program(form, x, **call) for form in (model, pack_model(model, dense, x, fuse=False, **call))]

    def guide(self, whole: Whole, speedup: float) -> Guidance:
        return guided(self.shapes, self.machine, speedup=speedup, min_density=self.min_density, whole=whole, best_effort=True,
                      precision="float32" if self.rounded is None else "int8")

    def packed(self, guide: Guidance) -> tuple[Plan, Callable[[], Any]]:
        """With the guide's densities: its plan, and the program."""
        network = pruned(self.model, guide.densities, 1 if self.rounded is None else LANES)
        chosen = plan(network, self.x, self.machine, **self.call)
        if self.rounded is not None:
            chosen = rounded_as(chosen, self.rounded)
        return chosen, self.program(network, chosen)

    def program(self, network: Any, chosen: Plan) -> Callable[[], Any]:
        return program(pack_model(network, chosen, self.x, **self.call), self.x, **self.call)


def _explained(network: _Network, seconds: float) -> Whole:
    """Timed at every speed of SPEEDUPS that it reaches."""
    layers, turn, networks = network.plan.seconds, FIRST * seconds / (2 + len(SPEEDUPS)), list[Packed]()
    programs = [*network.dense, network.program(network.model, network.plan)]
    with progress("timing the network", 4 + len(SPEEDUPS)) as advance:
        # What a process does first is slower: its memory is not mapped yet, and its threads sleep.
        medians(programs, turn, BURST)
        *dense_times, time = medians(programs, turn, BURST)
        dense, unpruned = min(dense_times), Packed(*_parts(network.plan), time)
        longest = min(dense, time)
        advance(1, f"dense {1e3 * dense:.3g} ms")

        def packed(whole: Whole, goal: float) -> Packed | None:
            guide = network.guide(whole, max(1.0, dense / goal) if goal else math.inf)
            if not guide.densities:
                return None
            chosen, one = network.packed(guide)
            programs.append(one)
            *dense_times, time = medians([*network.dense, one], turn, BURST)
            # Over the dense time of the same moment: a machine that others use changes its speed.
            networks.append(Packed(*_parts(chosen), dense * time / min(dense_times)))
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
    again = [packed._replace(seconds=time) for packed, time in zip((unpruned, *networks), times[2:], strict=True)]
    return fit(min(times[:2]), again)


def _parts(chosen: Plan) -> tuple[float, float]:
    """Predicted seconds of a plan's dense layers, and of its sparse ones."""
    sparse = sum(layer.seconds for layer in chosen.layers if layer.choice == "sparse")
    return chosen.seconds - sparse, sparse


def pruned(model: Any, densities: Mapping[str, float], block: int = 1) -> Any:
    """A copy of the model, in evaluation mode, with the largest weights of every layer that has a density {layer: density}.

    Or with the largest blocks of so many neighbouring input channels.
    """
    def largest(kernel: Any, density: float) -> Any:
        size = np.asarray(blocks.norms(kernel, block), np.float32)
        mask, lost = np.ones(size.size, bool), int((1 - density) * size.size)
        mask[size.argpartition(lost, axis=None)[:lost]] = False
        return blocks.spread(jnp.asarray(mask.reshape(size.shape)), kernel.shape, block)

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
