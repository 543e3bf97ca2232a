"""A packed Linen model as arrays by name, and back: what `sparseflax.save` and `sparseflax.load` do with a pair of Linen's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from sparseflax.conv.int8 import QuantizedKernel
from sparseflax.conv.packing import PackedKernel, Pattern
from sparseflax.cost.shape import ConvShape
from sparseflax.files.safetensors import mismatches
from sparseflax.layers.planes import plane_shape
from sparseflax.layers.stack import PackedStack, from_arrays
from sparseflax.network.linen.packed import PackedModel, Words
from sparseflax.network.linen.trace import COLLECTIONS
from sparseflax.network.planned import LayerPlan, Plan

PATTERN = ("gaps", "layout")  # what is stored of a sparse layer beside its values: arrays of PackedKernel.to_arrays
INT8 = ("words", "scale")  # what is stored in place of values in eight bits


def arrays_of(packed: PackedModel, variables: Any) -> dict[str, Any]:
    """{name: array}: the variables as "params/conv/bias", and each sparse layer's pattern beside its values."""
    arrays = _named(variables)
    for path, pattern in packed.patterns:
        if isinstance(pattern, Words):
            words, scale = (arrays[_name("params", path, part)] for part in INT8)
            # The sums follow from the words.
            kernel: Any = QuantizedKernel(words, scale, arrays.pop(_name("params", path, "sums")), *pattern)
        else:
            values = arrays[_name("params", path, "values")]
            kernel = PackedKernel(values, pattern) if isinstance(pattern, Pattern) else PackedStack(values, pattern)
        parts = kernel.to_arrays()
        arrays |= {_name("params", path, part): parts[part] for part in PATTERN}
    return arrays


def restore(module: nn.Module, variables: Any, plan: Plan, tensors: Mapping[str, np.ndarray]
            ) -> tuple[tuple[PackedModel, dict[str, Any]] | None, list[str]]:
    """The packed model and its variables from arrays; or None, and what does not fit, in words.

    Args:
      module: unbound.
      variables: of the dense model; arrays or what has their shapes and dtypes.
      plan: what it was packed by.
      tensors: from `arrays_of`.
    """
    wanted = {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in _named(variables).items()}
    tensors, wrong, patterns, biased, folded, sums = dict(tensors), [], [], set(), set(), dict[str, Any]()
    for row in plan.layers:
        kernel, bias = (_name("params", row.path, part) for part in ("kernel", "bias"))
        sparse = row.choice == "sparse"
        if not sparse and row.norm is None:
            continue
        if wanted.get(kernel, (None,))[0] != row.kernel_shape:
            wrong.append(f"{row.path!r} is {wanted.get(kernel, ('missing',))[0]}, planned as {row.kernel_shape}")
            continue
        if row.norm is not None:
            of_norm = {name for name in wanted for kind in COLLECTIONS if name.startswith(_name(kind, row.norm, ""))
                       and name not in (kernel, bias)}
            if not of_norm:
                wrong.append(f"batch norm {row.norm!r} is missing")
            bias_shape = next((wanted[name][0] for name in of_norm), ())
            for name in of_norm:
                del wanted[name]
            folded.add(row.norm)
            if bias not in wanted:
                wanted[bias] = (bias_shape, np.dtype(np.float32))
                biased |= set() if sparse else {row.path}
        if sparse:
            del wanted[kernel]
            stored = {part: _name("params", row.path, part) for part in (*PATTERN, *_parts(row))}
            parts = {part: tensors[name] for part, name in stored.items() if name in tensors}
            for part in PATTERN:
                tensors.pop(stored[part], None)
            try:
                packed = _kernel(row, parts)
            except ValueError as error:
                wrong.append(f"{row.path!r}: {error}")
                for name in stored.values():  # told already
                    tensors.pop(name, None)
                continue
            arrays: dict[str, Any] = {part: getattr(packed, part) for part in _parts(row)}
            wanted |= {stored[part]: (array.shape, np.dtype(array.dtype)) for part, array in arrays.items()}
            if isinstance(packed, QuantizedKernel):
                patterns.append((row.path, Words(*packed.tree_flatten()[1])))
                wanted[bias] = (row.kernel_shape[-1:], np.dtype(np.float32))
                sums[_name("params", row.path, "sums")] = packed.sums
            elif isinstance(packed, PackedStack):
                patterns.append((row.path, packed.patterns))
                wanted[_name("params", row.path, "step")] = (2 * row.kernel_shape[:1], np.dtype(np.float32))
            else:
                patterns.append((row.path, packed.pattern))
    wrong += mismatches(tensors, wanted)
    if wrong:  # and nothing may be predicted of layers of any size
        return None, wrong
    tree = unflatten_dict({tuple(name.split("/")): jax.device_put(array) for name, array in (tensors | sums).items()})
    return (PackedModel(module, tuple(patterns), frozenset(biased), frozenset(folded), chunk=plan.chunk), tree), []


def _parts(row: LayerPlan) -> tuple[str, ...]:
    """Names of the params in place of a sparse layer's kernel that are stored."""
    return ("values",) if row.inputs is None else INT8


def _kernel(row: LayerPlan, parts: Mapping[str, np.ndarray]) -> PackedKernel | PackedStack | QuantizedKernel:
    """A layer's packed kernel from what is stored of it.

    Raises:
      ValueError: it is none, or another layer's.
    """
    if row.inputs is not None:
        rounding = {name: np.asarray(() if of is None else (of.scale, of.zero), np.float64)
                    for name, of in (("inputs", row.inputs), ("outputs", row.outputs))}
        packed: Any = QuantizedKernel.from_arrays({**parts, **rounding})
    else:
        packed = from_arrays(parts)
    if row.shape is None:
        raise ValueError("it is planned sparse without the sizes of what it computes")
    stack = isinstance(packed, PackedStack)
    alike = packed.shape[:stack] == row.kernel_shape[:stack]
    if not alike or not _holds(packed.shape[stack:], row.kernel_shape[stack:], row.shape):
        raise ValueError(f"its kernel is {packed.shape}, the model's {row.kernel_shape}")
    if packed.groups != row.shape.groups:
        raise ValueError(f"its kernel has {packed.groups} groups, the layer {row.shape.groups}")
    return packed


def _holds(plane: tuple[int, ...], kernel: tuple[int, ...], shape: ConvShape) -> bool:
    """Whether the kernel (kh, kw, ic, oc) of a 2-D convolution can be a layer's own, see sparseflax/layers/planes.py."""
    blocks = plane == shape.kernel_shape and plane[2] == kernel[-2] and plane[3] % kernel[-1] == 0
    return plane == plane_shape(kernel) or (blocks and len(kernel) in (3, 4))


def _named(variables: Any) -> dict[str, Any]:
    """{"params/conv/kernel": leaf}

    Raises:
      TypeError: variables that are no dictionaries of arrays.
    """
    leaves = flatten_dict(unfreeze(nn.unbox(variables)))
    arrays = jax.Array | np.ndarray | jax.ShapeDtypeStruct
    odd = ["/".join(map(str, path)) for path, leaf in leaves.items() if not isinstance(leaf, arrays)]
    if odd:
        raise TypeError(f"the variables {odd} are no arrays: only arrays are stored")
    return {"/".join(map(str, path)): leaf for path, leaf in leaves.items()}


def _name(*parts: str) -> str:
    """Parts joined; the path of a layer that is the model itself is empty."""
    first, path, last = parts
    return "/".join([first, *([path] if path else []), last])
