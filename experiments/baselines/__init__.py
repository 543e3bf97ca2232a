"""Who we are measured against: one file per rival, each with

    needs                        the packages it is made of; it is absent where one is not installed
    rivals(problem, threads)     a list of `Rival`, empty where it has nothing for this layer
    network(model, x, threads)   the same for a whole network: its ONNX file's bytes, and images (n, h, w, c); not in all files

and `yardstick`, which runs in a process of its own. All get float32 weights with their zeros in place, in whatever
layout they like best, and prepare as long as they like: only `run` is timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Rival:
    """One way to compute relu(conv(x, kernel) + bias), or a network, ready to run.

    Attributes:
      name: e.g. "onednn nhwc".
      run: computes, and returns when the output is complete.
      output: turns what `run` returned into a NumPy array (n, oh, ow, oc), of a network (n, classes).
      dense: False where it uses the zeros.
      exact: False where it computes in fewer bits than float32.
    """

    name: str
    run: Callable[[], Any]
    output: Callable[[Any], np.ndarray]
    dense: bool = True
    exact: bool = True


def field(names: Sequence[str] = ()) -> tuple[list[ModuleType], list[str]]:
    """Rivals for single layers: (those whose packages are installed, names of the others), among `names` or all.

    Raises:
      ValueError: a name that is none of theirs.
    """
    from experiments.baselines import bcsr, onednn, onnxruntime, openvino, xla

    return _present((xla, onednn, onnxruntime, openvino, bcsr), names)


def network_field(names: Sequence[str] = ()) -> tuple[list[ModuleType], list[str]]:
    """The same for whole networks; inductor only if it is named."""
    from experiments.baselines import inductor, onednn, onnxruntime, openvino

    return _present((onednn, onnxruntime, openvino, inductor), names or ("onednn", "onnxruntime", "openvino"))


def _present(modules: Sequence[ModuleType], names: Sequence[str]) -> tuple[list[ModuleType], list[str]]:
    rivals = {module.__name__.rpartition(".")[2]: module for module in modules}
    if unknown := set(names) - set(rivals):
        raise ValueError(f"no rival is called {sorted(unknown)}, wanted some of {list(rivals)}")
    names = [name for name in rivals if not names or name in names]
    absent = [name for name in names if not all(map(importlib.util.find_spec, rivals[name].needs))]
    return [rivals[name] for name in names if name not in absent], absent


def nhwc(nchw: np.ndarray) -> np.ndarray:
    return nchw.transpose(0, 2, 3, 1)


def nchw(nhwc: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(nhwc.transpose(0, 3, 1, 2))


def oihw(hwio: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(hwio.transpose(3, 2, 0, 1))
