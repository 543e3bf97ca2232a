"""JAX's own sparse matrices, `jax.experimental.sparse.BCSR`, where a convolution is a matrix product: 1x1, stride 1."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from experiments.baselines import Rival
from experiments.layers import Problem

needs = ("jax",)


def rivals(problem: Problem, threads: int) -> list[Rival]:
    from jax.experimental.sparse import BCSR

    shape = problem.shape
    product = (shape.kh, shape.kw, shape.groups, *shape.strides) == (1, 1, 1, 1, 1) and not np.any(shape.padding)
    if not product or not problem.kernel.any():
        return []
    weights = BCSR.fromdense(jnp.asarray(problem.kernel[0, 0].T))  # (oc, ic)
    x = jnp.asarray(problem.x.reshape(-1, shape.ic).T)  # (ic, pixels), the layout it computes in

    @jax.jit
    def conv(weights, x, bias):
        return jnp.maximum(weights @ x + bias, 0)

    operands = weights, x, jnp.asarray(problem.bias[:, None])
    size = shape.n, shape.oh, shape.ow, shape.oc
    return [Rival("bcsr", lambda: conv(*operands).block_until_ready(), lambda y: np.asarray(y).T.reshape(size), dense=False)]
