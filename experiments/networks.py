"""The networks that are timed whole: published ones with random weights, pruned as they would be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.models import VGG16, AlexNet, GoogLeNet, MobileNetV1, SqueezeNet, UNet, resnet18, resnet50
from sparseflax import conv_shapes


@dataclass(frozen=True)
class Spec:
    """A network to be timed.

    Attributes:
      name: "resnet50".
      make: builds the model, given `rngs`.
      image: rows and columns of its input.
      density: of a layer, from its path and the shape of its kernel; the first convolution stays dense in any case.
    """

    name: str
    make: Callable[..., nnx.Module]
    image: int
    density: Callable[[str, tuple[int, ...]], float]


# Zeros in percent that Park et al. reached with guided sparsity learning (their repository's README); 1x1 stayed dense.
GOOGLENET = {
    "conv3": 81.65, "fc": 90.65,
    "3a/branch2": 90.09, "3b/branch2": 90.47, "4a/branch2": 87.97, "4b/branch2": 96.11, "4c/branch2": 94.90,
    "4d/branch2": 92.41, "4e/branch2": 98.70, "5a/branch2": 96.24, "5b/branch2": 94.95,
    "3a/branch3": 84.56, "3b/branch3": 88.55, "4a/branch3": 83.76, "4b/branch3": 87.40, "4c/branch3": 88.01,
    "4d/branch3": 90.39, "4e/branch3": 94.42, "5a/branch3": 93.40, "5b/branch3": 94.87,
}


def _tenth(path: str, kernel: tuple[int, ...]) -> float:
    return 0.1


def _googlenet(path: str, kernel: tuple[int, ...]) -> float:
    """The paper's; 1x1 convolutions and the first stay dense."""
    name = path.removeprefix("inception").removesuffix("/conv").removesuffix("/1")
    return 1 - GOOGLENET.get(name, 0.0) / 100


def _pointwise(path: str, kernel: tuple[int, ...]) -> float:
    return 0.1 if kernel[:-2] == (1, 1) else 1.0


NETWORKS = {spec.name: spec for spec in (
    Spec("alexnet", AlexNet, 227, _tenth),
    Spec("vgg16", VGG16, 224, _tenth),
    Spec("googlenet", GoogLeNet, 224, _googlenet),
    Spec("resnet18", resnet18, 224, _tenth),
    Spec("resnet50", resnet50, 224, _tenth),
    Spec("mobilenet", MobileNetV1, 224, _pointwise),
    Spec("squeezenet", SqueezeNet, 224, _tenth),
    Spec("unet", partial(UNet, width=0.5), 128, _tenth),
)}


def pruned(spec: Spec, kernels: Mapping[str, np.ndarray] | None = None, seed: int = 0, block: int = 1) -> nnx.Module:
    """The network in evaluation mode, with zeros in its weights.

    Kept weights are normal with variance 2 / kept inputs (He et al. 2015), so that activations neither vanish nor grow;
    batch norms have statistics and scales around those of such activations, biases are small.

    Args:
      spec: the network.
      kernels: trained kernels, by path of their layer, in place of random ones; scaled to the same variance.
      seed: of the weights.
      block: neighbouring input channels that are kept or pruned together.

    Raises:
      ValueError: a kernel of a path or shape that the network does not have.
    """
    kernels, draw = dict(kernels or {}), np.random.default_rng(seed)
    model: Any = nnx.eval_shape(lambda: spec.make(rngs=nnx.Rngs(0)))
    model.eval()
    first = next(iter(conv_shapes(model, jax.ShapeDtypeStruct((1, spec.image, spec.image, 3), jnp.float32))))
    graphdef, state = nnx.split(model)

    def fill(path: tuple, shape: tuple[int, ...]) -> np.ndarray:
        layer, name = "/".join(map(str, path[:-1])), path[-1]
        if name == "kernel" and layer in kernels:
            kernel = kernels.pop(layer)
            if kernel.shape != shape:
                raise ValueError(f"the kernel of {layer} has shape {kernel.shape}, wanted {shape}")
        elif name == "kernel":
            density = 1.0 if layer == first else spec.density(layer, shape)
            blocks = draw.random((*shape[:-2], -(-shape[-2] // block), shape[-1]), np.float32) < density
            kernel = draw.standard_normal(shape, np.float32) * np.repeat(blocks, block, axis=-2)[..., :shape[-2], :]
        elif name in ("scale", "var"):
            return draw.uniform(0.5, 1.5, shape).astype(np.float32)
        else:
            return 0.1 * draw.standard_normal(shape, np.float32)
        inputs = math.prod(shape[:-1]) * max(np.count_nonzero(kernel), 1) / kernel.size
        return kernel * np.float32((2 / inputs) ** 0.5 / max(kernel[kernel != 0].std(), 1e-30))

    leaves = [(path, variable.replace(jnp.asarray(fill(path, variable.shape), jnp.float32)))
              for path, variable in nnx.to_flat_state(state)]
    if kernels:
        raise ValueError(f"{spec.name} has no layers {sorted(kernels)}")
    return nnx.merge(graphdef, nnx.from_flat_state(leaves))
