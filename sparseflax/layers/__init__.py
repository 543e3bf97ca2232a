"""Sparse layers for Flax: NNX and Linen."""
