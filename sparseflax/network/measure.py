"""How long a layer takes here, dense as a packed network runs it and in the sparse kernel, and a whole network as a program."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from sparseflax.conv.primitive import dense_conv, sparse_conv
from sparseflax.conv.window import Window
from sparseflax.cost.shape import ConvShape
from sparseflax.cost.timing import medians
from sparseflax.layers.planes import blocks, image_kernel, is_transposed, plane
from sparseflax.network.call import call_with_weights, is_fused
from sparseflax.network.fuse import fuse

QUIET = 2.0  # seconds before progress is shown


class Measured(NamedTuple):
    """Median seconds of one layer."""

    dense: float
    sparse: float


def time_layers(layers: Mapping[str, tuple[ConvShape, np.ndarray, Any]], seconds: float) -> dict[str, Measured]:
    """Times each layer dense and sparse, without bias; where it takes long, a terminal is shown how far it has come.

    Args:
      layers: {path: (shape, kernel, module)}, float32 kernels of Flax's shape, those of a stack with a leading axis of its
        layers, pruned weights zero; the module's attributes say how they are used.
      seconds: for each layer, compiling apart; three rounds at least.
    """
    times, start = {}, time.monotonic()
    shown = False
    for done, (path, layer) in enumerate(layers.items()):
        elapsed = time.monotonic() - start
        if elapsed > QUIET and sys.stderr.isatty():
            left, shown = elapsed / done * (len(layers) - done), True
            line = f"measuring layer {done + 1} of {len(layers)}, about {left:.0f} s left: {path}"
            print(f"\r{line}\033[K", end="", file=sys.stderr, flush=True)
        times[path] = time_layer(*layer, seconds)
    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    return times


def time_layer(shape: ConvShape, kernel: np.ndarray, module: Any, seconds: float) -> Measured:
    """Times one layer as `time_layers` does; a stack by its first layer."""
    if shape.layers > 1:
        first = time_layer(shape.one, kernel[0], module, seconds)
        return Measured(shape.layers * first.dense, shape.layers * first.sparse)
    window = Window(shape.strides, shape.padding, shape.kernel_dilation)
    ordinary = plane(module, kernel).reshape(shape.kernel_shape)
    packed = shape.pack(ordinary)

    @jax.jit
    @fuse  # as in a packed network
    def dense(x, kernel):
        return blocks(module).dense(x, kernel) if is_transposed(module) else dense_conv(x, kernel, window, shape.groups)

    @jax.jit
    def sparse(x, packed):
        return sparse_conv(x, packed, strides=window.strides, padding=window.padding, kernel_dilation=window.dilation,
                           feature_group_count=shape.groups)

    with jax.default_device(jax.devices("cpu")[0]):
        x = jnp.ones((shape.n, shape.ih, shape.iw, shape.ic), jnp.float32)
        weights = jnp.asarray(image_kernel(kernel) if is_transposed(module) else ordinary, jnp.float32)
        return Measured(*medians([lambda: dense(x, weights), lambda: sparse(x, packed)], seconds))


def called(model: Any, **call: Any) -> tuple[Callable[[Any, Any], Any], Any]:
    """The model's call in evaluation mode as a function of (weights, x), and its weights."""
    if isinstance(model, tuple):
        module, variables = model
        return lambda variables, x: module.apply(variables, x, **call), variables
    copy = nnx.clone(model)
    copy.eval()
    graph, state = nnx.split(copy)
    return lambda state, x: nnx.merge(graph, state)(x, **call), state


def program(model: Any, x: Any, **call: Any) -> Callable[[], Any]:
    """The model's call in evaluation mode, as one jitted program with its weights as operands; complete when it returns.

    The weights are a plain list: a walk through Flax's state would add up to half a millisecond to each call.
    """
    if is_fused(model):
        packed = nnx.clone(model)
        packed.eval()
        here, x = jax.device_put((nnx.state(packed), x), jax.devices("cpu")[0])
        nnx.update(packed, here)
        run_packed = call_with_weights(packed, x, **call)
        return lambda: jax.block_until_ready(run_packed())
    function, weights = called(model, **call)
    leaves, tree = jax.tree.flatten(weights)
    run = jax.jit(lambda leaves, x: function(jax.tree.unflatten(tree, leaves), x))
    operands = jax.device_put((leaves, x), jax.devices("cpu")[0])
    return lambda: jax.block_until_ready(run(*operands))
