"""Prune a Flax CNN so that it becomes faster on the CPU it will run on, and run it that fast inside `jax.jit`."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

# What runs a packed network needs jax alone; all the rest is imported when it is first asked for.
from sparseflax.conv import sparse_conv as sparse_conv
from sparseflax.memory import keep_memory as keep_memory
from sparseflax.packing import PackedKernel as PackedKernel
from sparseflax.packing import Pattern as Pattern
from sparseflax.packing import pack as pack
from sparseflax.program import export as export
from sparseflax.program import load_program as load_program

if TYPE_CHECKING:
    from sparseflax import linen as linen
    from sparseflax import nnx as nnx
    from sparseflax import prune as prune
    from sparseflax.cost import UsefulRange as UsefulRange
    from sparseflax.cost import conv_seconds as conv_seconds
    from sparseflax.cost import dense_seconds as dense_seconds
    from sparseflax.cost import speedup as speedup
    from sparseflax.cost import useful_range as useful_range
    from sparseflax.fuse import fuse as fuse
    from sparseflax.machine import Machine as Machine
    from sparseflax.machine import detect_machine as detect_machine
    from sparseflax.model import pack_model as pack_model
    from sparseflax.plan import LayerPlan as LayerPlan
    from sparseflax.plan import Plan as Plan
    from sparseflax.plan import plan as plan
    from sparseflax.shapes import ConvShape as ConvShape
    from sparseflax.shapes import conv_shapes as conv_shapes
    from sparseflax.store import load as load
    from sparseflax.store import save as save

keep_memory()  # before JAX starts its threads

_MODULES = ("linen", "nnx", "prune")
_NAMES = {  # the same names for Python, by module
    "cost": ("UsefulRange", "conv_seconds", "dense_seconds", "speedup", "useful_range"),
    "fuse": ("fuse",),
    "machine": ("Machine", "detect_machine"),
    "model": ("pack_model",),
    "plan": ("LayerPlan", "Plan", "plan"),
    "shapes": ("ConvShape", "conv_shapes"),
    "store": ("load", "save"),
}
_HOME = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"sparseflax.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(f"sparseflax.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_HOME})


class _Package(ModuleType):
    """Keeps `sparseflax.plan` the function: importing the module of that name would put the module there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
