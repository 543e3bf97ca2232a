"""Random damage and edits of bytes, arrays and JSON, as a function of a generator of random numbers."""

import functools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

Draw = np.random.Generator
EDGES = (0, 1, -1, 2, 255, 256, 65535, 2**31 - 1, 2**31, 2**40, 2**63 - 1, -(2**63), 2**64, 10**400)


@functools.cache
def folder() -> Path:
    made = tempfile.TemporaryDirectory()
    folder.made = made  # type: ignore[attr-defined]  # lives as long as the process
    return Path(made.name)


def pick(draw: Draw, items: Any) -> Any:
    return items[int(draw.integers(len(items)))]


def number(draw: Draw, old: Any) -> Any:
    """What a number might become."""
    kind = int(draw.integers(4))
    return (pick(draw, EDGES), old + int(draw.integers(-2, 3)), int(draw.integers(0, 300)), old * float(draw.normal()))[kind]


def damaged(draw: Draw, data: bytes) -> bytes:
    """Bytes flipped, cut off, put in or taken out."""
    content = bytearray(data)
    for _ in range(int(draw.integers(1, 4))):
        at = int(draw.integers(len(content) + 1))
        if draw.random() < 0.5:
            at = min(at, int(draw.integers(400)))  # headers lie in front
        kind = int(draw.integers(4))
        if kind == 0 and at < len(content):
            content[at] ^= int(draw.integers(1, 256))
        elif kind == 1:
            del content[at:]
        elif kind == 2:
            content[at:at] = draw.bytes(int(draw.integers(1, 9)))
        else:
            del content[at:at + int(draw.integers(1, 9))]
    return bytes(content)


def edited_array(draw: Draw, array: np.ndarray) -> np.ndarray:
    """Other numbers, another length, shape or type."""
    kind = int(draw.integers(5))
    if kind == 0 and array.size:
        array = array.copy()
        old = array.reshape(-1)[at := int(draw.integers(array.size))]
        try:
            array.reshape(-1)[at] = number(draw, old.item())
        except (OverflowError, ValueError):
            array.reshape(-1)[at] = 255
    elif kind == 1 and array.ndim:
        array = array[:int(draw.integers(len(array) + 1))]
    elif kind == 2:
        array = np.concatenate([array.reshape(-1)] * 2)
    elif kind == 3:
        array = array.astype(pick(draw, (np.uint8, np.int64, np.float32, np.float64, np.bool_)))
    else:
        array = array.reshape(pick(draw, ((-1,), (1, -1), (-1, 1))))
    return array


def edited_json(draw: Draw, tree: Any) -> Any:
    """A JSON tree, changed in place at one to three places."""
    for _ in range(int(draw.integers(1, 4))):
        places = [(parent, key) for parent in _parents(tree)
                  for key in (parent if isinstance(parent, dict) else range(len(parent)))]
        if not places:
            return tree
        parent, key = pick(draw, places)
        old = parent[key]
        kind = int(draw.integers(6))
        if kind == 0:
            del parent[key]
        elif kind == 1:
            parent[key] = pick(draw, (None, True, "", "conv", [], {}, [old], {"a": old}, 1.5, float("inf"), "head"))
        elif kind == 2 and isinstance(parent, list):
            parent.append(old)
        elif kind == 3:
            other, there = pick(draw, places)
            parent[key] = other[there] if there in (other if isinstance(other, dict) else range(len(other))) else None
        elif isinstance(old, (int, float)) and not isinstance(old, bool):
            parent[key] = number(draw, old)
    return tree


def _parents(tree: Any, depth: int = 0):
    if isinstance(tree, (dict, list)) and depth < 20:
        yield tree
        for inner in tree.values() if isinstance(tree, dict) else tree:
            yield from _parents(inner, depth + 1)


def first_words(error: Exception, path: Path | None = None) -> str:
    text = str(error).replace(str(path), "FILE")
    return f"{type(error).__name__}: {''.join('#' if c.isdigit() else c for c in text)[:40]}"
