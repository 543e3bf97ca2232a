"""Prune a Flax CNN so that it becomes faster on the CPU it will run on, and run it that fast inside `jax.jit`."""

from sparseflax.conv import sparse_conv as sparse_conv
from sparseflax.packing import PackedKernel as PackedKernel
from sparseflax.packing import pack as pack
