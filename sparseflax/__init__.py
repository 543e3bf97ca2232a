"""Prune a Flax CNN so that it becomes faster on the CPU it will run on, and run it that fast inside `jax.jit`."""

# `sparseflax.plan` is the function, not its module; `from sparseflax.plan import ...` finds the module all the same.
from sparseflax import linen as linen
from sparseflax import nnx as nnx
from sparseflax import prune as prune
from sparseflax.conv import sparse_conv as sparse_conv
from sparseflax.cost import UsefulRange as UsefulRange
from sparseflax.cost import conv_seconds as conv_seconds
from sparseflax.cost import dense_seconds as dense_seconds
from sparseflax.cost import speedup as speedup
from sparseflax.cost import useful_range as useful_range
from sparseflax.machine import Machine as Machine
from sparseflax.machine import detect_machine as detect_machine
from sparseflax.packing import PackedKernel as PackedKernel
from sparseflax.packing import Pattern as Pattern
from sparseflax.packing import pack as pack
from sparseflax.plan import LayerPlan as LayerPlan
from sparseflax.plan import Plan as Plan
from sparseflax.plan import pack_model as pack_model
from sparseflax.plan import plan as plan
from sparseflax.shapes import ConvShape as ConvShape
from sparseflax.shapes import conv_shapes as conv_shapes
