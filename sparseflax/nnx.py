"""Sparse layers for Flax NNX."""

from sparseflax.layers.nnx import SparseConv as SparseConv
from sparseflax.layers.nnx import SparseDense as SparseDense
