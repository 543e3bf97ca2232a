"""A stack of equal layers that `nnx.scan` or `nn.scan` runs one after the other: a packed kernel for each, one for each step.

A scan runs the same program at each step, and patterns are static: so every step has a branch for each layer, and takes its
own. `sparseflax.fuse` unrolls the scan, and no branch is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from sparseflax.conv.packing import SKIP, PackedKernel, Pattern

STEP = "sparseflax step"  # the name of which step of its scan a layer is


class PackedStack(NamedTuple):
    """The kernels of a stack.

    Attributes:
      values: (layers, most), each one's kept weights in packed order, then zeros.
      patterns: one for each layer.
    """

    values: Any
    patterns: tuple[Pattern, ...]

    @classmethod
    def of(cls, kernels: Sequence[PackedKernel]) -> PackedStack:
        """Of the layers in the order in which they run."""
        most = max(kernel.nnz for kernel in kernels)
        values = [np.pad(np.asarray(kernel.values), (0, most - kernel.nnz)) for kernel in kernels]
        return cls(jnp.asarray(np.stack(values), jnp.float32), tuple(kernel.pattern for kernel in kernels))

    @property
    def shape(self) -> tuple[int, ...]:
        """(layers, kh, kw, ic / groups, oc) of the dense kernels."""
        return len(self.patterns), *self.patterns[0].shape

    @property
    def groups(self) -> int:
        return self.patterns[0].groups

    @property
    def nnz(self) -> int:
        """Number of kept weights."""
        return sum(pattern.nnz for pattern in self.patterns)

    @property
    def density(self) -> float:
        """Kept weights / all weights."""
        return self.nnz / max(1, int(np.prod(self.shape)))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays, as `PackedKernel.to_arrays`: a row of the layout for each layer, with the number of its gaps behind."""
        kernels = [PackedKernel(self.values[i, :pattern.nnz], pattern).to_arrays() for i, pattern in enumerate(self.patterns)]
        return {"values": np.asarray(self.values), "gaps": np.concatenate([kernel["gaps"] for kernel in kernels]),
                "layout": np.stack([np.append(kernel["layout"], len(kernel["gaps"])) for kernel in kernels])}


def from_arrays(arrays: Mapping[str, np.ndarray]) -> PackedKernel | PackedStack:
    """What `to_arrays` of a kernel or of a stack was called on, checked.

    Raises:
      ValueError: as `PackedKernel.from_arrays`, or for layers that differ in shape.
    """
    layout = np.asarray(arrays.get("layout", 0))
    if layout.ndim != 2 or not {"values", "gaps"} <= arrays.keys():
        return PackedKernel.from_arrays(arrays)
    values, gaps = arrays["values"], arrays["gaps"]
    if layout.dtype.kind not in "iu" or layout.shape[1:] != (7,) or not len(layout) or (layout[:, 6] < 0).any() or (
            layout[:, 6].sum(), len(layout)) != (gaps.size, len(values)) or values.ndim != 2:
        raise ValueError(f"a packed stack with a layout {layout.shape}, {gaps.size} gaps and values {values.shape}, wanted 7 "
                         "integers for each layer: the file is damaged or was edited; pack the dense model again")
    kernels, ends = [], np.cumsum(layout[:, 6])
    for row, own, gap in zip(layout, values, np.split(gaps, ends[:-1]), strict=True):
        kept = np.count_nonzero(gap != SKIP)
        kernels.append(PackedKernel.from_arrays({"values": own[:kept], "gaps": gap, "layout": row[:6]}))
    stack = PackedStack.of(kernels)
    if any((kernel.shape, kernel.groups) != (kernels[0].shape, kernels[0].groups) for kernel in kernels) or (
            stack.values.shape != values.shape):
        raise ValueError(f"a packed stack of kernels {[kernel.shape for kernel in kernels]} with values {values.shape}, wanted "
                         "equal ones: the file is damaged or was edited; pack the dense model again")
    return stack


def steps(layers: int) -> jax.Array:
    """What says of a layer which one it is: (layers, layers), a row for each, that no decay of weights changes."""
    return jnp.eye(layers)


def of_step(step: Any, values: Any, patterns: Sequence[Pattern], run: Callable[[PackedKernel], jax.Array]) -> jax.Array:
    """`run` with the kernel of this step.

    Args:
      step: (layers,), a row of `steps`.
      values: (most,) of this step.
      patterns: of all steps.
      run: what is done with the kernel.

    Raises:
      ValueError: outside of the scan, where there is no step.
    """
    if jnp.ndim(step) != 1:
        raise ValueError(f"a stack of {len(patterns)} sparse layers is called at once, wanted one of them in each step of "
                         "nnx.scan or nn.scan over the stack, as its dense layers ran")
    index = checkpoint_name(jax.lax.argmax(step, 0, np.int32), STEP)

    def branch(pattern: Pattern) -> Callable[[Any], jax.Array]:
        return lambda values: run(PackedKernel(values[:pattern.nnz], pattern))

    return jax.lax.switch(index, [branch(pattern) for pattern in patterns], values)
