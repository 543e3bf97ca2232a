"""One layer in eight bits beside the same layer in float32: as many weights kept, in blocks of four input channels."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.baselines import Rival
from experiments.benchmark.layers import ours
from experiments.benchmark.results import Line, geometric_mean, versions
from experiments.benchmark.table import OURS, markdown
from experiments.benchmark.timing import alternate
from experiments.layers import name_of, random_problem
from sparseflax import Quantization, QuantizedArray, QuantizedKernel, pack_int8, sparse_conv
from sparseflax.conv import ffi
from sparseflax.cost.shape import ConvShape

INT8 = "sparseflax int8"
INPUTS, OUTPUT = Quantization(1 / 32, 128), Quantization(1 / 16, 0)
HEAD = "layer", "n", "float32 us", "int8 us", "speedup"


def measure(shape: ConvShape, density: float, threads: int, seconds: float) -> dict[str, Any]:
    """Times relu(conv + bias) in float32, weights kept at random, and in eight bits with uint8 inputs and outputs.

    Returns:
      The layer's line of the results, without provenance.

    Raises:
      RuntimeError: an output is not what it has to be.
    """
    problem = random_problem(shape, density)
    x, packed, contender = _int8(shape, density, problem.bias)
    _check(shape, x, packed, problem.bias, contender.run())
    one = ours(problem, None)
    timings, _ = alternate({OURS: one.run, INT8: contender.run}, seconds, threads)
    return {"layer": name_of(shape), "n": shape.n, "threads": threads, "isa": ffi.isa(), "int8": ffi.kernels("int8")[0],
            "density": density, "bytes": {OURS: shape.pack(problem.kernel).nbytes, INT8: packed.nbytes},
            "times": {name: vars(timing) for name, timing in timings.items()}}


def _int8(shape: ConvShape, density: float, bias: np.ndarray) -> tuple[QuantizedArray, QuantizedKernel, Rival]:
    draw = np.random.default_rng(0)
    kh, kw, icg, oc = shape.kernel_shape
    kernel = draw.standard_normal(shape.kernel_shape, np.float32) * np.float32(0.05)
    kernel *= np.repeat(draw.random((kh, kw, -(-icg // 4), oc)) < density, 4, axis=2)[:, :, :icg]
    packed = pack_int8(kernel, INPUTS, shape.groups)
    x = QuantizedArray(jnp.asarray(draw.integers(0, 256, (shape.n, shape.ih, shape.iw, shape.ic)).astype(np.uint8)), INPUTS)

    @jax.jit
    def conv(x, packed, bias):
        return sparse_conv(x, packed, bias, strides=shape.strides, padding=shape.padding, kernel_dilation=shape.kernel_dilation,
                           feature_group_count=shape.groups, activation="relu", output=OUTPUT).values

    operands = x, packed, jnp.asarray(bias)
    return x, packed, Rival(INT8, lambda: conv(*operands).block_until_ready(), np.asarray, dense=False)


def _check(shape: ConvShape, x: QuantizedArray, packed: QuantizedKernel, bias: np.ndarray, y: jax.Array) -> None:
    """Half a step is rounding; the sums of the float32 convolution that it is compared with are a little off."""
    exact = jax.lax.conv_general_dilated(x.dequantize(), packed.unpack(), shape.strides, shape.padding,
                                         rhs_dilation=shape.kernel_dilation, dimension_numbers=("NHWC", "HWIO", "NHWC"),
                                         feature_group_count=shape.groups) + bias.reshape(1, 1, 1, -1)
    steps = np.clip(np.asarray(exact) / OUTPUT.scale, 0, 255)
    error = float(np.abs(np.asarray(y) - steps).max())
    if not error <= 0.51:
        raise RuntimeError(f"int8 is off by {error:.3g} steps, wanted at most a half: its time means nothing")


def row(line: Line) -> tuple[str, ...]:
    """The cells under HEAD."""
    one, int8 = (line["times"][name]["seconds"] for name in (OURS, INT8))
    return line["layer"], str(line["n"]), f"{1e6 * one:.0f}", f"{1e6 * int8:.0f}", f"{one / int8:.2f}"


def table(lines: list[Line]) -> str:
    """The results of a CPU as a Markdown table."""
    last = max(lines, key=lambda line: line["date"])
    rows = [list(row(line)) for line in sorted(lines, key=lambda line: line["n"])]
    commits = ", ".join(dict.fromkeys(line["commit"] for line in lines))
    threads = f"{last['threads']} thread{'s' * (last['threads'] > 1)}"
    caption = (f"{last['cpu']}, {last['int8']}, {threads}, {last['density']:.0%} of the weights kept ({versions(last)}). "
               f"Measured {last['date'][:10]} at {commits}. Geometric means: "
               + ", ".join(f"{mean:.2f}x at n={n}" for n, mean in means(lines).items()) + ".")
    return "\n".join([markdown(list(HEAD), rows), "", caption])


def means(lines: list[Line]) -> dict[int, float]:
    """{n: geometric mean of the speedups}."""
    return {n: geometric_mean(line["times"][OURS]["seconds"] / line["times"][INT8]["seconds"]
                              for line in lines if line["n"] == n)
            for n in sorted({line["n"] for line in lines})}
