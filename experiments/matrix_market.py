"""Sparse matrices as text: a reader and a writer of MatrixMarket's real coordinate format."""

from __future__ import annotations

from pathlib import Path

import numpy as np

HEADER = "%%MatrixMarket matrix coordinate real general"


def read_matrix(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """The dense float32 matrix (rows, columns) in a file.

    Raises:
      FileNotFoundError: no such file.
      ValueError: not this format, another shape than `shape`, or a bad entry; names the line.
    """
    lines = [(i, line) for i, line in enumerate(path.read_text().splitlines(), 1) if line.strip()]
    if not lines or lines[0][1].split() != HEADER.split():
        raise ValueError(f"{path} does not begin with {HEADER!r}: only this kind of MatrixMarket file is read")
    body = [(i, line.split()) for i, line in lines[1:] if not line.startswith("%")]
    try:
        at, fields = body[0]
        rows, columns, entries = map(int, fields)
    except (IndexError, ValueError):
        raise ValueError(f"{path} lacks its line of sizes, wanted `rows columns entries` after the comments") from None
    if (rows, columns) != shape:
        raise ValueError(f"{path}, line {at}: a {rows} x {columns} matrix, wanted {shape[0]} x {shape[1]}: another layer?")
    if len(body) - 1 != entries:
        raise ValueError(f"{path}, line {at}: {entries} entries promised, {len(body) - 1} found: the file is cut")
    matrix = np.zeros(shape, np.float32)
    for at, fields in body[1:]:
        try:
            i, j, value = int(fields[0]) - 1, int(fields[1]) - 1, np.float32(fields[2])
        except (IndexError, ValueError):
            raise ValueError(f"{path}, line {at}: {' '.join(fields)!r}, wanted `row column value`") from None
        if not (0 <= i < rows and 0 <= j < columns and np.isfinite(value)):
            raise ValueError(f"{path}, line {at}: row {i + 1}, column {j + 1}, value {value}; wanted a finite value inside "
                             f"{rows} x {columns}, counted from 1")
        matrix[i, j] = value
    return matrix


def write_matrix(path: Path, matrix: np.ndarray) -> None:
    """Writes the non-zeros of a float32 matrix (rows, columns); `read_matrix` returns it to the bit."""
    entries = [f"{i + 1} {j + 1} {matrix[i, j]!s}" for i, j in np.argwhere(matrix)]
    path.write_text("\n".join([HEADER, f"{matrix.shape[0]} {matrix.shape[1]} {len(entries)}", *entries, ""]))
