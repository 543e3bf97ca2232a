"""Prune a Flax CNN so that it becomes faster on the CPU it will run on, and run it that fast inside `jax.jit`."""

import importlib
from typing import TYPE_CHECKING, Any

# What runs a packed network needs jax alone; all the rest is imported when it is first asked for.
from sparseflax.conv.int8 import Quantization as Quantization
from sparseflax.conv.int8 import QuantizedArray as QuantizedArray
from sparseflax.conv.int8 import QuantizedKernel as QuantizedKernel
from sparseflax.conv.int8 import pack_int8 as pack_int8
from sparseflax.conv.memory import keep_memory as keep_memory
from sparseflax.conv.packing import PackedKernel as PackedKernel
from sparseflax.conv.packing import Pattern as Pattern
from sparseflax.conv.packing import pack as pack
from sparseflax.conv.primitive import sparse_conv as sparse_conv
from sparseflax.files.program import export as export
from sparseflax.files.program import load_program as load_program

if TYPE_CHECKING:
    from sparseflax import linen as linen
    from sparseflax import nnx as nnx
    from sparseflax import onnx as onnx
    from sparseflax import prune as prune
    from sparseflax.calibration.calibrate import calibrate as calibrate
    from sparseflax.cost.detect import detect_machine as detect_machine
    from sparseflax.cost.machine import Machine as Machine
    from sparseflax.cost.model import UsefulRange as UsefulRange
    from sparseflax.cost.model import conv_seconds as conv_seconds
    from sparseflax.cost.model import dense_seconds as dense_seconds
    from sparseflax.cost.model import speedup as speedup
    from sparseflax.cost.model import useful_range as useful_range
    from sparseflax.cost.profile import load_machine as load_machine
    from sparseflax.cost.profile import save_machine as save_machine
    from sparseflax.cost.shape import ConvShape as ConvShape
    from sparseflax.files.store import load as load
    from sparseflax.files.store import save as save
    from sparseflax.job.faster import faster as faster
    from sparseflax.network.fuse import fuse as fuse
    from sparseflax.network.pack import pack_model as pack_model
    from sparseflax.network.plan import plan as plan
    from sparseflax.network.planned import LayerPlan as LayerPlan
    from sparseflax.network.planned import Plan as Plan
    from sparseflax.network.predict import StepTime as StepTime
    from sparseflax.network.shapes import conv_shapes as conv_shapes
    from sparseflax.network.steps import Steps as Steps
    from sparseflax.network.steps import step_times as step_times

keep_memory()  # before JAX starts its threads

_MODULES = ("linen", "nnx", "onnx", "prune")
_NAMES = {  # the same names for Python, by module
    "calibration.calibrate": ("calibrate",),
    "cost.detect": ("detect_machine",),
    "cost.machine": ("Machine",),
    "cost.model": ("UsefulRange", "conv_seconds", "dense_seconds", "speedup", "useful_range"),
    "cost.profile": ("load_machine", "save_machine"),
    "cost.shape": ("ConvShape",),
    "files.store": ("load", "save"),
    "job.faster": ("faster",),
    "network.fuse": ("fuse",),
    "network.pack": ("pack_model",),
    "network.plan": ("plan",),
    "network.planned": ("LayerPlan", "Plan"),
    "network.predict": ("StepTime",),
    "network.shapes": ("conv_shapes",),
    "network.steps": ("Steps", "step_times"),
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
