"""A network as one artefact: exported with its weights, and run by a process that has neither flax nor the model's code."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from sparseflax.conv import ffi
from sparseflax.files.safetensors import seal, unseal

PROGRAM = "program"  # name of the serialized program beside its weights


def export(model: Callable[[Any], Any], x: Any, *, any_batch: bool = False) -> bytes:
    """A model for inference, traced, as bytes that `load_program` makes a function of, elsewhere and later.

    The bytes are a safetensors file with the serialized program (`jax.export`, for CPUs) and the weights. They stay
    loadable as long as JAX keeps its promise for serialized programs, six months, and our kernel's contract its name.

    Args:
      model: what `pack_model` returned, or any function of one argument, e.g. `lambda x: net.apply(variables, x)`; the
        arrays that it closes over are the weights.
      x: an example of the input (n, ...), an array, a `jax.ShapeDtypeStruct`, or a pytree of them; only shapes and dtypes
        count.
      any_batch: makes n, the first dimension of every array of the input, free.

    Raises:
      ImportError: flatbuffers is missing, which JAX needs for it.
      ValueError: `any_batch` with an input that has no batch dimension.
    """
    arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct(np.shape(a), a.dtype), x)
    if any_batch:
        if not all(a.ndim for a in jax.tree.leaves(arguments)):
            raise ValueError(f"any_batch=True, but an input has no batch dimension: {arguments}")
        (n,) = jax.export.symbolic_shape("n")
        arguments = jax.tree.map(lambda a: jax.ShapeDtypeStruct((n, *a.shape[1:]), a.dtype), arguments)
    jaxpr, output = jax.make_jaxpr(model, return_shape=True)(arguments)
    structure = jax.tree.structure(output)

    keys = [jax.random.key_impl(a) if jnp.issubdtype(a.dtype, jax.dtypes.prng_key) else None for a in jaxpr.consts]
    arrays = [np.asarray(a if key is None else jax.random.key_data(a)) for a, key in zip(jaxpr.consts, keys, strict=True)]

    def run(arrays, x):
        consts = [a if key is None else jax.random.wrap_key_data(a, impl=key) for a, key in zip(arrays, keys, strict=True)]
        return jax.tree.unflatten(structure, jaxpr_as_fun(jaxpr.replace(consts=consts))(*jax.tree.leaves(x)))

    allowed = [jax.export.DisabledSafetyCheck.custom_call(target) for target in ffi.TARGETS]
    exported = jax.export.export(jax.jit(run), platforms=["cpu"], disabled_checks=allowed)(arrays, arguments)
    weights = {f"weight {i}": array for i, array in enumerate(arrays)}
    text = exported.mlir_module()
    return seal("program", {PROGRAM: np.frombuffer(exported.serialize(), np.uint8), **weights},
                {"target": " ".join(target for target in ffi.TARGETS if target in text), "kernels": json.dumps(ffi.kernels()),
                 "jax": jax.__version__})


def load_program(data: bytes, *, other_kernels: bool = False) -> Callable[[Any], Any]:
    """The function x -> y of an exported model: compiled at its first call, and usable inside `jax.jit`.

    A program is compiled and run: unlike a file of `save`, take it only from those whom you trust. What XLA or the kernel
    cannot take of one that was edited ends in `jax.errors.JaxRuntimeError` when it is called.

    Args:
      data: what `export` returned.
      other_kernels: accepts a program whose layers were chosen for other kernels than this machine has: its results are the
        same, but a layer may run slower than dense.

    Raises:
      ImportError: flatbuffers is missing, which JAX needs for it.
      ValueError: `data` is cut, damaged, of another version or no program; or it was exported for other kernels.
      RuntimeError: the program needs the native module, which does not load here.
    """
    try:
        tensors, metadata = unseal("program", data)
        target, kernels, jax_version = (metadata.get(name, "") for name in ("target", "kernels", "jax"))
        program = tensors.pop(PROGRAM, np.zeros(0))
        if program.dtype != np.uint8 or set(tensors) != {f"weight {i}" for i in range(len(tensors))}:
            raise ValueError("it has no program, or weights of other names")
    except ValueError as error:
        raise ValueError(f"this is no program that sparseflax.export returned: {error}") from error
    if not set(target.split()) <= set(ffi.TARGETS):
        raise ValueError(f"the program was exported for the kernel {target!r}, this sparseflax has {' '.join(ffi.TARGETS)!r}: "
                         "export the model again with this version")
    if target and not ffi.available:
        raise RuntimeError(f"the program needs the sparse kernel: {ffi.reason}")
    here = json.dumps(ffi.kernels())
    if target and kernels != here and not other_kernels:
        raise ValueError(f"the program was exported where the kernels are {kernels}, here they are {here}: plan "
                         "and export the model here, or pass other_kernels=True to run it as it is")
    try:
        exported = jax.export.deserialize(bytearray(program.tobytes()))
    except ImportError:  # flatbuffers
        raise
    except Exception as error:  # JAX's reader raises what it happens upon
        raise ValueError(f"jax {jax.__version__} cannot read a program that jax {jax_version} exported "
                         f"({type(error).__name__}: {error}): export the model again") from error
    weights = [tensors[f"weight {i}"] for i in range(len(tensors))]
    expected = [(a.shape, a.dtype) for a in exported.in_avals[:len(weights)]]
    if [(weight.shape, weight.dtype) for weight in weights] != expected:
        raise ValueError("the weights are not those that the program takes: the file was edited, export the model again")
    return functools.partial(jax.jit(exported.call), jax.device_put(weights))
