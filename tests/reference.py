"""A convolution in float64 NumPy that shares no code with the library, and how far float32 may be from it."""

import math

import numpy as np


def pads(size: int, k: int, stride: int, dilation: int, padding) -> tuple[int, int]:
    """(low, high) for one dimension of `size` pixels; "SAME" gives ceil(size / stride) outputs, the odd pixel at the end."""
    if padding == "VALID":
        return 0, 0
    if padding == "SAME":
        total = max(0, (math.ceil(size / stride) - 1) * stride + (k - 1) * dilation + 1 - size)
        return total // 2, total - total // 2
    return padding


def conv(x, kernel, *, strides=(1, 1), padding="SAME", dilation=(1, 1), groups=1) -> np.ndarray:
    """NHWC x HWIO -> NHWC in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    kh, kw, icg, oc = kernel.shape
    sides = [padding, padding] if isinstance(padding, str) else padding
    low, high = zip(*(pads(*args) for args in zip(x.shape[1:3], (kh, kw), strides, dilation, sides, strict=True)), strict=True)
    oh, ow = (max(0, (size + a + b - (k - 1) * d - 1) // s + 1) for size, a, b, k, d, s in
              zip(x.shape[1:3], low, high, (kh, kw), dilation, strides, strict=True))
    x = np.pad(x, [(0, 0), (low[0], high[0]), (low[1], high[1]), (0, 0)])
    y = np.zeros((x.shape[0], oh, ow, oc))
    if not y.size:
        return y
    for r in range(kh):
        for s in range(kw):
            rows, columns = slice(r * dilation[0], None, strides[0]), slice(s * dilation[1], None, strides[1])
            shifted = x[:, rows, columns][:, :oh, :ow].reshape(x.shape[0], oh, ow, groups, icg)
            weights = kernel[r, s].reshape(icg, groups, oc // groups)
            y += np.einsum("nhwgc,cgk->nhwgk", shifted, weights).reshape(y.shape)
    return y


def bound(x, kernel, bias=None, residual=None, **window) -> np.ndarray:
    """How far a float32 result may be from the exact one, shaped like it.

    A sum of m products in any order is off by at most m u / (1 - m u) times the sum of their absolute values, with
    u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). Products with a zero weight are
    exact; bias and residual are two more terms; the activations stretch no distance.
    """
    magnitude = conv(np.abs(x), np.abs(kernel), **window)
    for term in (bias, residual):
        magnitude = magnitude if term is None else magnitude + np.abs(term)
    mu = (np.count_nonzero(kernel, axis=(0, 1, 2)) + 2) * 2.0**-24
    return mu / (1 - mu) * magnitude


def epilogue(y, bias=None, residual=None, activation=None) -> np.ndarray:
    """act(y + bias + residual)"""
    for term in (bias, residual):
        y = y if term is None else y + np.asarray(term, np.float64)
    if activation is not None:
        y = np.maximum(y, 0)
    return np.minimum(y, 6) if activation == "relu6" else y


def normal_kernel(random: np.random.Generator, shape, density: float) -> np.ndarray:
    """A float32 kernel with normal weights of which about `density` are kept."""
    return (random.standard_normal(shape) * (random.random(shape) < density)).astype(np.float32)


def integers(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Small whole numbers in float32: their sums and products are exact in any order, so tests can ask for equality."""
    return random.integers(-4, 5, shape).astype(np.float32)
