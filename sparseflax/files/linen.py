"""A packed Linen model as arrays by name, and back: what `sparseflax.save` and `sparseflax.load` do with a pair of Linen's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from sparseflax.conv.packing import PackedKernel, Pattern
from sparseflax.files.safetensors import mismatches
from sparseflax.layers.stack import PackedStack, from_arrays
from sparseflax.network.linen.packed import PackedModel
from sparseflax.network.linen.trace import COLLECTIONS
from sparseflax.network.plan import Plan

PATTERN = ("gaps", "layout")  # what is stored of a sparse layer beside its values: arrays of PackedKernel.to_arrays


def arrays_of(packed: PackedModel, variables: Any) -> dict[str, Any]:
    """{name: array}: the variables as "params/conv/bias", and each sparse layer's pattern beside its values."""
    arrays = _named(variables)
    for path, pattern in packed.patterns:
        values = arrays[_name("params", path, "values")]
        kernel = PackedKernel(values, pattern) if isinstance(pattern, Pattern) else PackedStack(values, pattern)
        parts = kernel.to_arrays()
        arrays |= {_name("params", path, part): parts[part] for part in PATTERN}
    return arrays


def restore(module: nn.Module, variables: Any, plan: Plan, tensors: Mapping[str, np.ndarray]
            ) -> tuple[tuple[PackedModel, dict[str, Any]], list[str]]:
    """The packed model and its variables from arrays; and what does not fit, in words.

    Args:
      module: unbound.
      variables: of the dense model; arrays or what has their shapes and dtypes.
      plan: what it was packed by.
      tensors: from `arrays_of`.
    """
    wanted = {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in _named(variables).items()}
    tensors, wrong, patterns, biased, folded = dict(tensors), [], [], set(), set()
    for row in plan.layers:
        kernel, bias, values = (_name("params", row.path, part) for part in ("kernel", "bias", "values"))
        sparse = row.choice == "sparse"
        if not sparse and row.norm is None:
            continue
        if wanted.get(kernel, (None,))[0] != row.kernel_shape:
            wrong.append(f"{row.path!r} is {wanted.get(kernel, ('missing',))[0]}, planned as {row.kernel_shape}")
            continue
        if row.norm is not None:
            of_norm = {name for name in wanted for kind in COLLECTIONS if name.startswith(_name(kind, row.norm, ""))}
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
            parts = {part: tensors.pop(_name("params", row.path, part)) for part in PATTERN
                     if _name("params", row.path, part) in tensors}
            try:
                packed = from_arrays(parts | ({"values": tensors[values]} if values in tensors else {}))
                stack = isinstance(packed, PackedStack)
                layers, kernel_shape = row.kernel_shape[:stack], row.kernel_shape[stack:]
                if packed.shape != (*layers, *(1, 1, *kernel_shape)[-4:]):
                    raise ValueError(f"its kernel is {packed.shape}, the model's {row.kernel_shape}")
            except ValueError as error:
                wrong.append(f"{row.path!r}: {error}")
                tensors.pop(values, None)  # told already
            else:
                patterns.append((row.path, packed.patterns if isinstance(packed, PackedStack) else packed.pattern))
                wanted[values] = (packed.values.shape, np.dtype(np.float32))
                if stack:
                    wanted[_name("params", row.path, "step")] = (2 * layers, np.dtype(np.float32))
    wrong += mismatches(tensors, wanted)
    tree = unflatten_dict({tuple(name.split("/")): jnp.asarray(array) for name, array in tensors.items()}) if not wrong else {}
    return (PackedModel(module, tuple(patterns), frozenset(biased), frozenset(folded), chunk=plan.chunk), tree), wrong


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
