"""Sparse layers for Flax NNX."""

from sparseflax.layers.int8 import Int8Conv as Int8Conv
from sparseflax.layers.int8 import Int8ConvTranspose as Int8ConvTranspose
from sparseflax.layers.int8 import Int8Dense as Int8Dense
from sparseflax.layers.nnx import SparseConv as SparseConv
from sparseflax.layers.nnx import SparseConvTranspose as SparseConvTranspose
from sparseflax.layers.nnx import SparseDense as SparseDense
