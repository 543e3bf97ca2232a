"""XLA's own dense convolution, in one jitted program with bias and ReLU. It has no fast path for groups on CPU."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.baselines import Rival
from experiments.layers import Problem

needs = ("jax",)


def rivals(problem: Problem, threads: int) -> list[Rival]:
    shape = problem.shape

    @jax.jit
    def conv(x, kernel, bias):
        y = jax.lax.conv_general_dilated(
            x, kernel, shape.strides, shape.padding, rhs_dilation=shape.kernel_dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=shape.groups)
        return jnp.maximum(y + bias, 0)

    operands = [jnp.asarray(a) for a in (problem.x, problem.kernel, problem.bias[None, None, None])]
    return [Rival("xla", lambda: conv(*operands).block_until_ready(), np.asarray)]
