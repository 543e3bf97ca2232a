"""Sparse layers for Flax Linen."""

from sparseflax.layers.linen import SparseConv as SparseConv
from sparseflax.layers.linen import SparseDense as SparseDense
