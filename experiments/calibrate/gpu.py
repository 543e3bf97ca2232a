"""Can unstructured sparsity pay on a GPU? Dense convolutions of its library against sparse ones of our own, in Pallas.

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

from experiments.benchmark.results import Line, append, geometric_mean, provenance
from experiments.benchmark.table import markdown
from experiments.calibrate.gpu_conv import BLOCKS, dense_conv, gather_conv, rows_of
from experiments.layers import BENCHMARK, name_of
from sparseflax.cost.machine import Machine
from sparseflax.cost.model import conv_seconds, dense_seconds
from sparseflax.cost.progress import progress
from sparseflax.cost.shape import ConvShape

DENSITY, BATCH, CALLS = 0.1, 16, 20
MEASURED = "measured dense", "measured tensor cores", "measured sparse", "measured speedup", "over tensor cores"
COLUMNS = "dense", "sparse", "speedup", *MEASURED
TENSOR_PEAK = 7.4  # of tensor cores in TF32, over the peak without them
RATIOS = "speedup", "measured speedup", "over tensor cores"
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
    rows = [(layer, *("not measured" if line.get(key) is None else f"{line[key]:.3g}" for key in COLUMNS))
            for layer, line in newest.items()]
    return "\n".join([markdown(("layer", *(name + ", us" * (name not in RATIOS) for name in COLUMNS)), rows), "",
                      f"{lines[-1]['machine']}, density {DENSITY:g}, float32; with tensor cores in TF32."])


def says(lines: Sequence[Line]) -> str:
    """What the newest measured lines come to, in sentences.

    Raises:
      ValueError: nothing was measured.
    """
    found = list({line["layer"]: line for line in lines if line["measured dense"] is not None}.values())
    if not found:
        raise ValueError("no layer was measured: run python -m experiments.calibrate --gpu where there is a GPU")
    over, fast = (geometric_mean(line[key] for line in found) for key in ("measured speedup", "over tensor cores"))
    alpha = min(1 / (DENSITY * line["speedup"]) for line in found)  # of a layer that no memory holds back
    share, ours = 1 / DOCUMENTED.alpha, 1 / alpha
    started = min(line["measured tensor cores"] for line in found)
    return "\n".join([
        f"- The paper's loop is {over:.2f} times as fast as the library's dense convolutions without tensor cores at a density "
        f"of {DENSITY:g}, and {fast:.2f} times as fast as with them, which is how JAX runs float32 there by default (geometric "
        "means).",
        f"- The model says so too: with alpha {alpha:.1f}, from one layer, sparse loses above a density of {ours:.2f}.",
        f"- The shortest dense times with tensor cores, {started:.0f} us, are those of starting a kernel from Python, so that "
        "the truth is worse.",
        f"- Better sparse kernels reach {share:.0%} of the peak (Gale et al., SC 2020), {share / ours:.1f} times our share; "
        f"against {TENSOR_PEAK:g} times the peak with tensor cores (data sheets) that wins below one weight in "
        f"{TENSOR_PEAK / share:.0f}."])


def compare(shape: ConvShape, machine: Machine, device: Any, seconds: float) -> dict:
    """Predicted and measured microseconds of a layer at DENSITY; None where no device is given."""
    dense, sparse = float(dense_seconds(shape, machine)), float(conv_seconds(shape, DENSITY, machine))
    row = {"layer": f"n{shape.n} {name_of(shape)}", "dense": 1e6 * dense, "sparse": 1e6 * sparse, "speedup": dense / sparse,
           **dict.fromkeys(MEASURED)}
    if device is not None:
        dense, fast, sparse = time_layer(shape, device, seconds)
        row |= zip(MEASURED, (1e6 * dense, 1e6 * fast, 1e6 * sparse, dense / sparse, fast / sparse), strict=True)
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
    dense, _, sparse = time_layer(BENCHMARK[4].with_batch(1 if small else BATCH), device, 1.0)
    return Machine(
        name=device.device_kind, isa=device.platform, lanes=32, cores=1, threads=1, l1_bytes=1, l2_bytes=0, l3_bytes=0,
        peak=peak, bandwidth=bandwidth, alpha=sparse / (DENSITY * dense), beta=2.0, source="measured")


def time_layer(shape: ConvShape, device: Any, seconds: float) -> tuple[float, float, float]:
    """Seconds of a random layer: dense, dense with tensor cores, and sparse, in the blocks that suit it best.

    Raises:
      AssertionError: the outputs differ by more than rounding.
    """
    draw = np.random.default_rng(0)
    kernel = draw.standard_normal(shape.kernel_shape, np.float32) * (draw.random(shape.kernel_shape) < DENSITY)
    x = draw.standard_normal((shape.n, shape.ih, shape.iw, shape.ic), np.float32)
    with jax.default_device(device):
        images = jnp.asarray(x), jnp.asarray(kernel)
        dense, fast = (functools.partial(dense_conv, shape=shape, precision=p) for p in ("highest", "default"))
        operands = jnp.asarray(x.transpose(3, 0, 1, 2)), *map(jnp.asarray, rows_of(kernel, shape))
        expected, times = np.asarray(dense(*images)).transpose(3, 0, 1, 2), []
        for block in BLOCKS:
            sparse = jax.jit(functools.partial(gather_conv, shape=shape, block=block))
            error = float(np.abs(np.asarray(sparse(*operands)) - expected).max())
            assert error <= 1e-4 * np.abs(expected).max(), f"{shape}: outputs differ by {error}"
            times.append(_median(sparse, operands, seconds / 5))
        return _median(dense, images, seconds / 5), _median(fast, images, seconds / 5), min(times)


def _median(call: Callable[..., jax.Array], operands: tuple, seconds: float) -> float:
    """Seconds of a call; CALLS are under way at once, so that the host's share of them does not count."""
    call(*operands).block_until_ready()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        begin = time.perf_counter()
        jax.block_until_ready([call(*operands) for _ in range(CALLS)])
        times.append((time.perf_counter() - begin) / CALLS)
    return statistics.median(times)
