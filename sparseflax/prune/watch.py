"""Calls of layers, watched and changed while a model runs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flax import nnx


@contextmanager
def watched(layers: Mapping[str, nnx.Module], run: Callable[..., Any]) -> Iterator[None]:
    """While it is open, a call layer(x) is run(name, layer, call, x), where call(x) is the layer's own.

    Args:
      layers: {name: module}.
      run: gives what the call returns.
    """
    classes = {name: type(layer) for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            vars(layer)["_run"] = functools.partial(run, name)
            object.__setattr__(layer, "__class__", _watched(classes[name]))
        yield
    finally:
        for name, layer in layers.items():
            object.__setattr__(layer, "__class__", classes[name])
            vars(layer).pop("_run", None)


@functools.lru_cache
def _watched(layer_type: type) -> type:
    """A subclass that shows its calls: unlike a wrapper it keeps isinstance and attributes working."""

    class Watched(layer_type):
        def __call__(self, *args, **kwargs):
            return self._run(self, super().__call__, *args, **kwargs)

    return Watched
