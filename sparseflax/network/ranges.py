"""What eight bits do to a model: ranges of its layers' inputs, measured on examples, and the error that each layer makes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.core import Tracer

from sparseflax.conv.int8 import Quantization
from sparseflax.layers.int8 import Int8Conv, in_int8
from sparseflax.layers.shifted import shifted
from sparseflax.network.fold import Folded, with_norm
from sparseflax.network.survey import join

CLIP = 1e-4  # the share of a batch's inputs that may lie beyond each end of the range
FEW = 16  # examples below which ranges are hardly known
BATCH = 32  # examples that run at a time
MOST = 1 << 20  # inputs of a batch that are looked at
ERROR = 0.1  # of a layer's outputs, relative: beyond it the layer stays float32
LAYERS = nnx.Conv, nnx.ConvTranspose, nnx.Linear  # that have a form in eight bits
PER_WORD = 2.0  # kept weights in a word of four, below which int8 gains nothing


class Rounded(NamedTuple):
    """A layer in eight bits.

    Attributes:
      inputs: what its uint8 inputs stand for; None where it stays float32.
      error: root mean square error of its outputs over that of its outputs, bias corrected; None where it was not measured.
      correction: mean error of each output channel, to be added to the bias.
      reason: in words.
      density: kept / all words of four.
      outputs: what its outputs could be rounded to.
    """

    inputs: Quantization | None
    error: float | None
    correction: tuple[float, ...]
    reason: str
    density: float = 0.0
    outputs: Quantization | None = None


class _Watched(nnx.Module):
    """A layer that shows what goes in and what comes out."""

    def __init__(self, layer: Any, see: Callable[[Any, Any], None]):
        self.layer, self.see = layer, see

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:
        outputs = self.layer(inputs, **kwargs)
        self.see(inputs, outputs)
        return outputs


def round_layers(model: nnx.Module, norms: Mapping[str, str | None], examples: Any, stated: Mapping[str, Quantization],
                 **call: Any) -> dict[str, Rounded]:
    """Tries eight bits on some layers of a model, each for itself, with float32 inputs from the layers before it.

    Args:
      model: an nnx module; it stays as it is and is run eagerly, as at inference.
      norms: {path of a layer: path of the batch norm that is folded into it, or None}.
      examples: inputs, unlabelled, with a leading axis of examples: an array or a pytree of them.
      stated: what the inputs of some of these layers are rounded to already; the others take the range of the examples.
      **call: further keyword arguments of the call.

    Raises:
      ValueError: no examples, or values in them or between layers that are not finite.
    """
    count = min((len(leaf) for leaf in jax.tree.leaves(examples)), default=0)
    if count == 0:
        raise ValueError("examples hold none, wanted some hundred inputs like those that the model will meet")
    if count < FEW:
        warnings.warn(f"ranges from {count} examples are hardly those of other inputs: give a few hundred", RuntimeWarning,
                      stacklevel=4)
    batches = [jax.tree.map(lambda leaf, i=i: leaf[i:i + BATCH], examples) for i in range(0, count, BATCH)]
    ranges: dict[str, list[tuple[float, float]]] = {path: [] for path in norms}
    outputs: dict[str, list[tuple[float, float]]] = {path: [] for path in norms}
    hidden = set[str]()  # what is called where functions are traced

    def see_range(path: str, layer: Any) -> Callable[[Any, Any], None]:
        def see(inputs, results):
            if isinstance(results, Tracer):
                hidden.add(path)
                return
            for values, found in ((inputs, ranges[path]), (results, outputs[path])):
                values = np.asarray(values)
                values = values.ravel()[::_stride(values.size, values.shape[-1])]
                if not np.isfinite(values).all():
                    which = "inputs" if found is ranges[path] else "outputs"
                    raise ValueError(f"{which} of layer {path!r} are not finite for these examples: check them, and the "
                                     "weights before it")
                low, high = np.quantile(values, (CLIP, 1 - CLIP))
                found.append((float(low), float(high)))
        return see

    _run(model, norms, see_range, batches, call)
    totals: dict[str, tuple[Any, float, list[np.ndarray]]] = {}
    rounded: dict[str, Rounded] = {}

    def see_error(path: str, layer: Any) -> Callable[[Any, Any], None]:
        inputs = stated.get(path) or _holding(ranges[path])
        if inputs is None or path in hidden:
            seen = "its inputs are 0 in all examples, or it does not run"
            why = "a jit or remat hides its inputs" if path in hidden else seen
            rounded[path] = Rounded(None, None, (), f"float32: {why}")
            return lambda *_: None
        int8 = worthwhile(layer, inputs)
        if isinstance(int8, Rounded):
            rounded[path] = int8
            return lambda *_: None
        run = nnx.jit(lambda layer, x: layer(x))

        def see(x, y):
            y, error = np.asarray(y, np.float64), np.asarray(y, np.float64) - np.asarray(run(int8, x), np.float64)
            axes = tuple(range(y.ndim - 1))
            sums = [np.asarray(y.size // y.shape[-1], np.float64), error.sum(axes), (error**2).sum(axes), (y**2).sum(axes)]
            before = totals[path][2] if path in totals else [np.zeros(())] * 4
            totals[path] = inputs, int8.density, [a + b for a, b in zip(before, sums, strict=True)]
        return see

    _run(model, norms, see_error, batches, call)
    for path, (inputs, density, (n, errors, squares, powers)) in totals.items():
        mean = errors / n
        error = float(np.sqrt(max(0.0, (squares / n - mean**2).sum()) / max((powers / n).sum(), 1e-30)))
        if error > ERROR:
            rounded[path] = Rounded(None, error, (), f"float32: int8 would be off by {error:.2g}")
        else:
            reason = f"int8, off by {error:.2g}"
            rounded[path] = Rounded(inputs, error, tuple(map(float, mean)), reason, density, _holding(outputs[path]))
    return rounded


def _stride(size: int, channels: int) -> int:
    """Between the values that are looked at: MOST at most, and of all channels, which lie side by side."""
    stride = -(-size // MOST)
    while math.gcd(stride, channels) > 1:
        stride += 1
    return stride


def worthwhile(layer: Any, inputs: Quantization) -> Int8Conv | Rounded:
    """A layer in eight bits; or why it gains nothing by them, where its words hold too few weights."""
    int8 = in_int8(layer, inputs)
    kept = int(np.count_nonzero(np.asarray(layer.kernel[...]))) / max(1, int8.pattern.nnz)
    if kept < PER_WORD:
        return Rounded(None, None, (), f"float32: {kept:.2g} kept weights in a block of four, prune with block=4")
    return int8


def _holding(ranges: list[tuple[float, float]]) -> Quantization | None:
    """What holds all these ranges; None where there are none, or all are 0."""
    if not any(map(any, ranges)):
        return None
    return Quantization.of_range(min(low for low, _ in ranges), max(high for _, high in ranges))


def _run(model: Any, norms: Mapping[str, str | None], watch: Callable[[str, Any], Callable], batches: Any, call: Any) -> None:
    """Runs the folded model on the batches with its layers watched; shared ones once for all their places."""
    watched = shifted(replaced(model, norms, lambda path, layer: _Watched(layer, watch(path, layer))))
    for batch in batches:
        watched(batch, **call)


def replaced(model: Any, norms: Mapping[str, str | None], make: Callable[[str, Any], Any]) -> Any:
    """A copy of a model, as at inference, with batch norms folded and its layers as `make` makes them of path and layer; those
    that have no form in eight bits stay."""
    copy = nnx.clone(model)
    copy.eval()
    modules: dict[str, Any] = {join(path): module for path, module in nnx.iter_modules(copy)}
    folded = {norms.get(join(path)) for path, node in nnx.iter_modules(copy) if isinstance(node, LAYERS)}

    def replace(path, node: Any) -> Any:
        name = join(path)
        if isinstance(node, nnx.BatchNorm) and name in folded:
            return Folded()
        if isinstance(node, LAYERS) and name in norms:
            norm = norms[name]
            layer = node if norm is None else with_norm(node, modules[norm])
            return make(name, layer)
        return node

    return nnx.recursive_map(replace, copy)
