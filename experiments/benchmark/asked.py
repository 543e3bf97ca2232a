"""Asked and measured: two networks of a user's own, pruned in one shot for a speedup, from a first start with nothing stored.

A process for each network and batch, since what a machine is taken for is found once per process; its cache is empty, JAX and
malloc are as they come. What is timed is what a user would time: the network before and after, each one jitted call.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from flax import nnx

from experiments.benchmark.results import ROOT, Line
from experiments.benchmark.table import markdown
from experiments.benchmark.timing import confine
from experiments.models.layers import conv, norm
from experiments.report import MET
from sparseflax.network.measure import program

SPEEDUPS = 1.5, 2.0, 3.0
HEAD = ("network", "n", "threads", "asked", "measured", "off by", "predicted", "dense ms", "packed ms")


class Block(nnx.Module):
    """Two 3x3 convolutions and a shortcut past them."""

    def __init__(self, channels: int, features: int, strides: int, *, rngs: nnx.Rngs):
        self.first, self.first_norm = conv(channels, features, 3, strides, use_bias=False, rngs=rngs), norm(features, rngs=rngs)
        self.second, self.second_norm = conv(features, features, 3, use_bias=False, rngs=rngs), norm(features, rngs=rngs)
        self.shortcut = nnx.data(None if channels == features else conv(channels, features, 1, strides, rngs=rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.second_norm(self.second(nnx.relu(self.first_norm(self.first(x)))))
        return nnx.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Residual(nnx.Module):
    """Six residual blocks of 32 to 128 channels on images of 32x32."""

    def __init__(self, rngs: nnx.Rngs):
        self.stem, self.stem_norm = conv(3, 32, 3, use_bias=False, rngs=rngs), norm(32, rngs=rngs)
        sizes = (32, 32, 1), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1)
        self.blocks = nnx.List([Block(*size, rngs=rngs) for size in sizes])
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.stem_norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class Plain(nnx.Module):
    """Nine 3x3 convolutions of 32 to 256 channels, each with bias and ReLU, on images of 96x96."""

    def __init__(self, rngs: nnx.Rngs):
        widths = 3, 32, 32, 64, 64, 128, 128, 128, 256, 256
        self.layers = nnx.List([conv(a, b, 3, rngs=rngs) for a, b in zip(widths, widths[1:], strict=False)])
        self.head = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for i, layer in enumerate(self.layers):
            x = nnx.relu(layer(x))
            if i in (1, 3, 6):
                x = nnx.max_pool(x, (2, 2), (2, 2))
        return self.head(x.mean((1, 2)))


CASES: dict[str, tuple[Callable[..., nnx.Module], int, int]] = {
    "residual, n=1": (Residual, 32, 1), "residual, n=8": (Residual, 32, 8), "plain, n=1": (Plain, 96, 1)}


def measure(threads: int) -> Iterator[Line]:
    """A line for each network of CASES and speedup, on so many threads of JAX."""
    for case in CASES:
        with tempfile.TemporaryDirectory() as empty:
            command = [sys.executable, "-m", "experiments.benchmark.asked", case, str(threads)]
            done = subprocess.run(command, cwd=ROOT, env=os.environ | {"XDG_CACHE_HOME": empty}, capture_output=True,
                                  text=True)
        if done.returncode:
            raise ValueError(f"{case} on {threads} threads ended with {done.returncode}: {done.stderr[-2000:]}")
        yield from map(json.loads, done.stdout.splitlines())


def row(line: Line) -> tuple[str, ...]:
    """Under HEAD."""
    head = line["layer"], str(line["n"]), str(line["threads"]), f"{line['asked']:g}x"
    if "refused" in line:
        return (*head, "refused", "", "", "", line["refused"])
    off = f"{line['measured'] / line['asked'] - 1:+.0%}{', unpruned' * unpruned(line)}"
    return (*head, f"{line['measured']:.2f}", off, f"{line['predicted']:.2f}",
            f"{1e3 * line['dense']:.3f}", f"{1e3 * line['packed']:.3f}")


def unpruned(line: Line) -> bool:
    """Whether packing alone was predicted to give more than was asked for, so that no layer was pruned."""
    return line["predicted"] > 1.01 * line["asked"]


def asked_table(lines: Sequence[Line]) -> str:
    """The results of a CPU as a Markdown table, and how many requests were met."""
    refused = [f"- {line['layer']}, {_threads(line['threads'])}, {line['asked']:g}x: {line['refused']}"
               for line in lines if "refused" in line]
    parts = [markdown(HEAD, [row(line)[: len(HEAD)] for line in lines]), "", *refused]  # what a row has more is why
    for threads in sorted({line["threads"] for line in lines}):
        own = [line for line in lines if line["threads"] == threads and "refused" not in line]
        off = [line["measured"] / line["asked"] - 1 for line in own if not unpruned(line)]
        more = f", {len(own) - len(off)} exceeded without pruning" if len(off) < len(own) else ""
        met = sum(abs(each) <= MET for each in off)
        parts.append(f"- {_threads(threads)}: {met} of {len(off)} speedups met within {MET:.0%}, "
                     f"none off by more than {max(map(abs, off), default=0):.0%}{more}")
    last = lines[-1]
    return "\n".join([*parts, "", f"{last['cpu']}. Measured {last['date'][:10]} at {last['commit']}."])


def _threads(count: int) -> str:
    return f"{count} thread{'s' * (count > 1)}"


def _case(name: str, threads: int) -> Iterator[Line]:
    """As the tutorial says it, of one network."""
    import sparseflax
    from sparseflax import prune
    from sparseflax.cost.timing import medians

    make, side, n = CASES[name]
    model, x = make(nnx.Rngs(0)), np.random.default_rng(0).standard_normal((n, side, side, 3), np.float32)
    model.eval()
    machine = sparseflax.detect_machine()
    shapes = sparseflax.conv_shapes(model, x)
    folded = sparseflax.pack_model(model, sparseflax.plan(model, x, machine).all_dense, fuse=False)
    for speedup in SPEEDUPS:
        line = {"layer": name, "n": n, "threads": threads, "asked": speedup}
        whole = prune.measure(model, x, machine, speedup=speedup)
        try:
            guide = prune.guided(shapes, machine, speedup=speedup, whole=whole)
        except ValueError as error:
            yield line | {"refused": str(error)}
            continue
        pruned = nnx.clone(model)
        nnx.update(pruned, prune.one_shot(nnx.state(pruned, nnx.Param), guide))
        packed = sparseflax.pack_model(pruned, sparseflax.plan(pruned, x, machine))
        *dense, seconds = medians([program(network, x) for network in (model, folded, packed)], 4.0, burst=0.01)
        yield line | {"dense": min(dense), "packed": seconds, "measured": min(dense) / seconds, "predicted": guide.speedup}


if __name__ == "__main__":
    confine(int(sys.argv[2]))
    for each in _case(sys.argv[1], int(sys.argv[2])):
        print(json.dumps(each), flush=True)
