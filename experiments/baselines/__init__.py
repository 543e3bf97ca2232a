"""Who we are measured against: one file per rival, each with

    needs                        the packages it is made of; it is absent where one is not installed
    rivals(problem, threads)     a list of `Rival`, empty where it has nothing for this layer

All get float32 weights with their zeros in place, whatever layouts they like best, and prepare as long as they like:
only `run` is timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Rival:
    """One way to compute relu(conv(x, kernel) + bias), ready to run.

    Attributes:
      name: e.g. "onednn nhwc".
      run: computes, and returns when the output is complete.
      output: turns what `run` returned into a NumPy array (n, oh, ow, oc).
      dense: False where it uses the zeros.
    """

    name: str
    run: Callable[[], Any]
    output: Callable[[Any], np.ndarray]
    dense: bool = True


def field() -> tuple[list[ModuleType], list[str]]:
    """(rivals whose packages are installed, names of the others)."""
    from experiments.baselines import onednn, xla

    modules = [xla, onednn]
    absent = [module for module in modules if not all(importlib.util.find_spec(need) for need in module.needs)]
    return [module for module in modules if module not in absent], [module.__name__.rpartition(".")[2] for module in absent]


def nhwc(nchw: np.ndarray) -> np.ndarray:
    return nchw.transpose(0, 2, 3, 1)


def nchw(nhwc: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(nhwc.transpose(0, 3, 1, 2))


def oihw(hwio: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(hwio.transpose(3, 2, 0, 1))
