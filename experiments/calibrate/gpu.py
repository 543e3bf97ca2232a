"""Can unstructured sparsity pay on a GPU? Dense convolutions of its library against sparse ones that gather, in plain JAX.

The machine is the paper's kind: peak, bandwidth and alpha, nothing else. alpha is measured on one layer. Without a GPU the
predictions are those for a documented one, and nothing is measured.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmark.results import Line, append, provenance
from experiments.benchmark.table import markdown
from experiments.layers import BENCHMARK, name_of
from experiments.progress import progress
from sparseflax.cost import conv_seconds, dense_seconds
from sparseflax.machine import Machine
from sparseflax.shapes import ConvShape

DENSITY, BATCH = 0.1, 16
COLUMNS = "dense", "sparse", "speedup", "measured dense", "measured sparse", "measured speedup"
# Without tensor cores. alpha: unstructured sparse products reach 27 % of the peak (Gale et al., "Sparse GPU Kernels for Deep
# Learning", SC 2020); beta: a 32-bit index beside each weight.
DOCUMENTED = Machine(
    name="NVIDIA H200", isa="cuda", lanes=32, cores=132, threads=1, l1_bytes=256 << 10, l2_bytes=50 << 20, l3_bytes=0,
    peak=67e12, bandwidth=4.8e12, alpha=1 / 0.27, beta=2.0, source="data sheet, alpha from Gale et al. 2020")


def run(seconds: float, out: Path) -> None:
    """Prints, for the benchmark's layers, what the model predicts and what was measured, if there is a GPU."""
    device = next((d for d in jax.devices() if d.platform in ("gpu", "cuda", "rocm")), None)
    machine = DOCUMENTED if device is None else measure_machine(device)
    print(machine)
    origin, lines = provenance({"jax", "jaxlib"}), []
    with progress("layers", len(BENCHMARK)) as advance:
        for i, shape in enumerate(BENCHMARK, 1):
            row = compare(shape.with_batch(BATCH), machine, device, seconds / len(BENCHMARK))
            lines.append({"machine": machine.name} | row | origin)
            append(out / "gpu.jsonl", lines[-1])
            advance(i, row["layer"])
    print(table(lines))


def table(lines: Sequence[Line]) -> str:
    """The newest line of each layer as Markdown, on the machine that came last."""
    newest = {line["layer"]: line for line in lines if line["machine"] == lines[-1]["machine"]}
    rows = [(layer, *("not measured" if line[key] is None else f"{line[key]:.3g}" for key in COLUMNS))
            for layer, line in newest.items()]
    return "\n".join([markdown(("layer", *(name + ", us" * ("speedup" not in name) for name in COLUMNS)), rows), "",
                      f"{lines[-1]['machine']}, density {DENSITY:g}."])


def compare(shape: ConvShape, machine: Machine, device: Any, seconds: float) -> dict:
    """Predicted and measured microseconds of a layer at DENSITY; None where no device is given."""
    dense, sparse = float(dense_seconds(shape, machine)), float(conv_seconds(shape, DENSITY, machine))
    row = {"layer": f"n{shape.n} {name_of(shape)}", "dense": 1e6 * dense, "sparse": 1e6 * sparse, "speedup": dense / sparse,
           "measured dense": None, "measured sparse": None, "measured speedup": None}
    if device is not None:
        dense, sparse = time_layer(shape, device, seconds)
        row |= {"measured dense": 1e6 * dense, "measured sparse": 1e6 * sparse, "measured speedup": dense / sparse}
    return row


def measure_machine(device: Any) -> Machine:
    """Peak from a matrix product, bandwidth from a pass over 1 GB (64 MB on a CPU), alpha from the first 3x3 layer."""
    small = device.platform == "cpu"
    with jax.default_device(device):
        side = 512 if small else 8192
        a = jnp.ones((side, side), jnp.float32)
        peak = 2 * side**3 / _median(jax.jit(functools.partial(jnp.dot, precision="highest")), (a, a), 0.5)
        x = jnp.ones((16 if small else 256) << 20, jnp.float32)
        bandwidth = 2 * x.nbytes / _median(jax.jit(lambda x: x * 0.5 + 0.5), (x,), 0.5)
    dense, sparse = time_layer(BENCHMARK[4].with_batch(1 if small else BATCH), device, 1.0)
    return Machine(
        name=device.device_kind, isa=device.platform, lanes=32, cores=1, threads=1, l1_bytes=1, l2_bytes=0, l3_bytes=0,
        peak=peak, bandwidth=bandwidth, alpha=sparse / (DENSITY * dense), beta=2.0, source="measured")


def time_layer(shape: ConvShape, device: Any, seconds: float) -> tuple[float, float]:
    """Seconds of the dense and of the gathered sparse convolution of a random layer; their outputs are compared.

    Raises:
      AssertionError: the outputs differ by more than rounding.
    """
    draw = np.random.default_rng(0)
    kernel = draw.standard_normal(shape.kernel_shape, np.float32) * (draw.random(shape.kernel_shape) < DENSITY)
    x = draw.standard_normal((shape.n, shape.ih, shape.iw, shape.ic), np.float32)
    columns, values = rows_of(kernel, shape.groups)
    with jax.default_device(device):
        dense = jax.jit(functools.partial(_dense, shape=shape))
        sparse = jax.jit(functools.partial(gather_conv, shape=shape))
        ours, theirs = (jnp.asarray(x), jnp.asarray(columns), jnp.asarray(values)), (jnp.asarray(x), jnp.asarray(kernel))
        expected, found = np.asarray(dense(*theirs)), np.asarray(sparse(*ours))
        error = float(np.abs(found - expected).max())
        assert error <= 1e-4 * np.abs(expected).max(), f"{shape}: outputs differ by {error}"
        return _median(dense, theirs, seconds / 2), _median(sparse, ours, seconds / 2)


def rows_of(kernel: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Kept weights of each output channel, padded with zeros: which patch entries they meet, and their values.

    Returns:
      columns: int32 (oc, most), indices into a patch (ic, kh, kw).
      values: float32 (oc, most).
    """
    kh, kw, icg, oc = kernel.shape
    matrix = kernel.transpose(3, 2, 0, 1).reshape(oc, -1)
    most = max(1, int(np.count_nonzero(matrix, axis=1).max()))
    columns, values = np.zeros((oc, most), np.int32), np.zeros((oc, most), np.float32)
    for k, row in enumerate(matrix):
        kept = np.flatnonzero(row)
        columns[k, :len(kept)] = kept + k // (oc // groups) * icg * kh * kw
        values[k, :len(kept)] = row[kept]
    return columns, values


def gather_conv(x: jax.Array, columns: jax.Array, values: jax.Array, shape: ConvShape) -> jax.Array:
    """The sparse convolution as gathers from patches and sums: x (n, ih, iw, ic) -> (n, oh, ow, oc)."""
    patches = jax.lax.conv_general_dilated_patches(
        x, (shape.kh, shape.kw), shape.strides, shape.padding, rhs_dilation=shape.kernel_dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"))
    flat = patches.reshape(-1, shape.ic * shape.kh * shape.kw).T  # a column of a kept weight is contiguous
    y = jax.lax.map(lambda row: jnp.einsum("kp,k->p", flat[row[0]], row[1], precision="highest"), (columns, values),
                    batch_size=8)
    return y.T.reshape(shape.n, shape.oh, shape.ow, shape.oc)


def _dense(x: jax.Array, kernel: jax.Array, shape: ConvShape) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, shape.strides, shape.padding, rhs_dilation=shape.kernel_dilation, dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=shape.groups, precision="highest")


def _median(call: Callable[..., jax.Array], operands: tuple, seconds: float) -> float:
    call(*operands).block_until_ready()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        call(*operands).block_until_ready()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
