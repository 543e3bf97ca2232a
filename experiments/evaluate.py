"""What became of a network: its bytes, its times beside the dense one's, and each layer's, predicted beside measured."""

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.benchmark.timing import alternate
from experiments.data import Data
from experiments.methods import Precision
from sparseflax import prune
from sparseflax.cost.atomic import write_atomically
from sparseflax.cost.cpu import client_threads
from sparseflax.cost.int8 import work_in
from sparseflax.cost.machine import Machine
from sparseflax.cost.model import conv_seconds, dense_seconds, useful_range
from sparseflax.cost.shape import ConvShape
from sparseflax.layers.int8 import Int8Conv, Int8Dense
from sparseflax.layers.nnx import SparseConv, SparseDense
from sparseflax.network.call import fuse_call
from sparseflax.network.measure import program
from sparseflax.network.pack import pack_model
from sparseflax.network.plan import plan as plan_for
from sparseflax.network.planned import Plan

DENSE, FOLDED, PACKED = "dense", "dense, batch norm folded", "packed"
# Two right programs differ in the order of their sums and in one rounding of each folded weight: their errors are of one
# size. A wrong weight or pixel is thousands of times larger.
ERROR_FACTOR = 16
# In eight bits a layer may be off by a tenth of its outputs before it stays float32, and a network by what its layers add up
# to, which its accuracy judges; one that computes something else is off by about its largest output.
ROUNDED = 0.5
LAYER = 0.05  # of the time for the networks is for each layer
EXAMPLES = 256  # pictures that ranges in eight bits are taken from


def fold_only(model: nnx.Module, plan: Plan) -> nnx.Module:
    """The model with its batch norms folded and every layer dense: what XLA reaches without us."""
    return pack_model(model, plan.all_dense, fuse=False)


def forms(model: nnx.Module, plan: Plan) -> dict[str, nnx.Module]:
    """The networks that are timed beside each other, by name: as trained, with batch norms folded, and packed."""
    return {DENSE: model, FOLDED: fold_only(model, plan), PACKED: pack_model(model, plan)}


def speedup(times: Mapping[str, Mapping[str, float]]) -> float:
    """Seconds of the faster dense form over those of the packed one, of what `time_networks` returns."""
    return min(times[DENSE]["seconds"], times[FOLDED]["seconds"]) / times[PACKED]["seconds"]


def planned(model: nnx.Module, data: Data, machine: Machine, precision: Precision) -> Plan:
    """The plan of a pruned network for one image; in eight bits by the ranges of pictures of its training."""
    examples = data.train_images[:EXAMPLES] if precision == "int8" else None
    return plan_for(model, data.test_images[:1], machine, precision=precision, examples=examples)


def measured(networks: Mapping[str, nnx.Module], plan: Plan, images: np.ndarray, batches: Sequence[int],
             seconds: float) -> dict[str, dict[str, Any]]:
    """{"times": {str(n): `time_networks`}, "layers": {str(n): `time_layers`}} of the first n images, for n of the batches.

    Args:
      networks: `forms`.
      plan: of the packed one.
      images: (n, ih, iw, ic).
      batches: numbers of images.
      seconds: for the networks, and a share LAYER of it for each layer.
    """
    return {"times": time_batches(networks, images, batches, seconds),
            "layers": {str(n): time_layers(networks[FOLDED], plan, n, LAYER * seconds) for n in batches}}


def time_batches(networks: Mapping[str, nnx.Module], images: np.ndarray, batches: Sequence[int],
                 seconds: float) -> dict[str, dict[str, dict[str, float]]]:
    """{str(n): `time_networks` of the first n images}, for n of the batches."""
    return {str(n): time_networks(networks, images[:n], seconds) for n in batches}


def time_networks(networks: Mapping[str, nnx.Module], x: np.ndarray, seconds: float) -> dict[str, dict[str, float]]:
    """Times networks, or layers, that compute the same in turn, each one jitted program with its weights as operands.

    Args:
      networks: {name: model in evaluation mode}; the first, of Flax's own layers, is the reference.
      x: their input (n, ...).
      seconds: for all of them.

    Returns:
      {name: {"seconds": median of one call, "spread": distance of its quartiles / median, "calls", "error": largest
      error of an output / largest output, against the first network in float64}}

    Raises:
      AssertionError: a network's error is not that of rounding: to float32, or to eight bits in a network with such layers.
    """
    calls = {name: program(model, x) for name, model in networks.items()}
    first = next(iter(networks))
    exact = in_float64(networks[first], x)
    errors = {name: float(np.abs(np.asarray(call()) - exact).max() / np.abs(exact).max()) for name, call in calls.items()}
    wanted = {name: ROUNDED if _in_eight_bits(model) else ERROR_FACTOR * errors[first] for name, model in networks.items()}
    if wrong := {name: error for name, error in errors.items() if not error <= wanted[name]}:
        most = ", ".join(f"{wanted[name]:.1e}" for name in wrong)
        raise AssertionError(f"the outputs of {wrong} are off by these shares of the largest, wanted at most {most}, where "
                             f"{first!r} is off by {errors[first]:.1e}: they compute something else, and no time counts")
    timings, _ = alternate(calls, seconds, client_threads())
    return {name: dataclasses.asdict(timing) | {"error": errors[name]} for name, timing in timings.items()}


def time_layers(folded: nnx.Module, plan: Plan, batch: int, seconds: float) -> list[dict[str, Any]]:
    """Every layer of a plan alone, dense and sparse in turn, both as packed and with bias, beside what was predicted.

    A layer in eight bits rounds its inputs here, and a network does that once.

    Args:
      folded: the network with pruned weights, `fold_only` of the model that the plan was made for.
      plan: what is predicted.
      batch: images.
      seconds: for each layer.

    Returns:
      One dict per layer, JSON-able: path, shape, density, choice, reason, useful (lower, upper), and seconds of "dense" and
      "sparse" as (predicted, measured).
    """
    modules: dict[str, Any] = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(folded)}
    draw = np.random.default_rng(0)
    rows = []
    for layer in plan.layers:
        if layer.shape is None:
            continue
        shape, dense = layer.shape.with_batch(batch), modules[layer.path]
        image = () if isinstance(dense, nnx.Linear) else (shape.ih, shape.iw)
        x = draw.standard_normal((batch, *image, shape.ic), np.float32)
        linear = isinstance(dense, nnx.Linear)
        if layer.inputs is None:
            sparse = SparseDense.from_dense(dense) if linear else SparseConv.from_dense(dense)
            predicted = float(conv_seconds(shape, max(layer.density, 1 / shape.weights), plan.machine))
        else:
            sparse = (Int8Dense if linear else Int8Conv)(dense, layer.inputs, layer.correction)
            predicted = layer.seconds
            # All that its inputs can be: numbers beyond would be other numbers.
            x = (layer.inputs.scale * (draw.integers(0, 256, x.shape) - layer.inputs.zero)).astype(np.float32)
        times = time_networks({"dense": fuse_call(nnx.clone(dense)), "sparse": sparse}, x, seconds)
        rows.append({
            "path": layer.path, "shape": str(shape), "density": layer.density, "choice": layer.choice, "reason": layer.reason,
            "useful": useful(shape, plan.machine, "float32" if layer.inputs is None else "int8"),
            "dense": [float(dense_seconds(shape, plan.machine)), times["dense"]["seconds"]],
            "sparse": [predicted, times["sparse"]["seconds"]],
        })
    return rows


def useful(shape: ConvShape, machine: Machine, precision: Precision) -> list[float]:
    """Densities between which pruning pays, [lower, upper], see `useful_range`; in eight bits over dense in float32."""
    return [float(bound[0]) for bound in useful_range(*work_in(precision, [shape], machine))]


def _in_eight_bits(model: nnx.Module) -> bool:
    return any(isinstance(module, Int8Conv) for _, module in nnx.iter_modules(model))


def save_weights(model: nnx.Module, path: Path) -> dict[str, int]:
    """Write all arrays of a model to an uncompressed .npz file and count bytes.

    Returns:
      {"disk": of the file, "memory": of the arrays, and of the 16-bit offset that a compiled program adds per kept weight}
    """
    arrays, offsets = {}, 0
    for parts, module in nnx.iter_modules(model):
        prefix = "/".join(map(str, parts))
        own = {name: np.asarray(variable[...]) for name, variable in vars(module).items() if isinstance(variable, nnx.Variable)}
        if isinstance(module, SparseConv | SparseDense | Int8Conv):
            kernel = module.kernel.to_arrays()
            own = {name: array for name, array in own.items() if name == "bias"} | {
                f"kernel/{name}": array for name, array in kernel.items()}
            offsets += 2 * module.pattern.nnz
        arrays |= {f"{prefix}/{name}": array for name, array in own.items()}
    content = io.BytesIO()
    np.savez(content, **dict(sorted(arrays.items())))  # in which order a model has them depends on what restored it
    write_atomically(path, content.getvalue())
    return {"disk": path.stat().st_size, "memory": offsets + sum(array.nbytes for array in arrays.values())}


def count_weights(model: nnx.Module) -> tuple[int, int]:
    """(kept, all) weights of the kernels of a dense model."""
    kernels = prune.kernels(nnx.state(model, nnx.Param)).values()
    return sum(int(jnp.count_nonzero(kernel)) for kernel in kernels), sum(kernel.size for kernel in kernels)


def in_float64(model: nnx.Module, x: np.ndarray) -> np.ndarray:
    """What a model of Flax's own layers computes in float64."""
    graphdef, state = nnx.split(model)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.float64), nnx.to_pure_dict(state))
        return np.asarray(jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(wide, jnp.asarray(x, jnp.float64)))
