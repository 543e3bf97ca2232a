"""A pruned network trained to give its original's outputs, with its zeros where they are."""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from sparseflax.cost.progress import progress
from sparseflax.job.fidelity import Outputs
from sparseflax.job.pictures import Pictures
from sparseflax.layers.shifted import shifted
from sparseflax.prune.fixed import fixed

BATCH = 32
RATE = 3e-4  # of Adam, falling to nothing along a cosine
TIMED = 3  # updates by which it is found how many there will be


def finetune(model: nnx.Module, pictures: Pictures, original: Outputs, minutes: float, title: str) -> Any:
    """A copy of the network, trained for some minutes against the outputs of another on the same pictures.

    The loss is the squared error over the squared size of the outputs; of probabilities it is the cross entropy.

    Args:
      model: pruned; its zeros stay. Batch norms keep their statistics.
      pictures: to learn from.
      original: what the other network says of them.
      minutes: of training, compiling apart.
      title: of its progress.
    """
    copy: Any = nnx.clone(model)
    copy.eval()
    graph, params, rest = nnx.split(shifted(copy), nnx.Param, ...)
    scales = [float(np.square(array).mean()) or 1.0 for array in original.arrays]
    first = original.arrays[0]
    chances = len(scales) == 1 and first.ndim > 1 and bool((first >= 0).all() and np.allclose(first.sum(-1), 1, atol=1e-3))

    def loss(params: Any, x: Any, wanted: Any) -> jax.Array:
        ys = jax.tree.leaves(nnx.merge(graph, params, rest)(x))
        if chances:
            return -jnp.sum(wanted[0] * jnp.log(ys[0] + 1e-7), -1).mean()
        return sum(jnp.mean(jnp.square(y - w)) / scale for y, w, scale in zip(ys, wanted, scales, strict=True))  # type: ignore

    def update(params: Any, state: Any, x: Any, wanted: Any, rate: Any) -> tuple[Any, Any, jax.Array]:
        state[0].hyperparams["learning_rate"] = rate
        value, gradients = jax.value_and_grad(loss)(params, x, wanted)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    optimizer = optax.chain(optax.inject_hyperparams(optax.adam)(RATE), fixed())
    state, step, draw = optimizer.init(params), jax.jit(update), np.random.default_rng(0)
    size = min(BATCH, len(pictures))

    def run(params: Any, state: Any, rate: float) -> tuple[Any, Any, float]:
        rows = draw.permutation(len(pictures))[:size]
        wanted = [array[rows] for array in original.arrays]
        params, state, value = step(params, state, pictures.inputs(rows), wanted, jnp.float32(rate))
        return params, state, float(value)

    run(params, state, 0.0)  # compiles
    start = time.perf_counter()
    for _ in range(TIMED):
        run(params, state, 0.0)
    steps = max(1, round(60 * minutes * TIMED / (time.perf_counter() - start)))
    with progress(title, steps) as advance:
        for done in range(steps):
            params, state, value = run(params, state, RATE * (1 + np.cos(np.pi * done / steps)) / 2)
            advance(done + 1, f"loss {value:.3g}")
    nnx.update(copy, params)
    return copy
