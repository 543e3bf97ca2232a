"""Named arrays and text in one file: the safetensors format, read with every bound checked, and sealed with a digest.

    8 bytes: the header's length, little endian | header, JSON | the arrays' bytes, little endian, without gaps

The header is {"__metadata__": {text: text}, name: {"dtype": "F32", "shape": [...], "data_offsets": [begin, end]}, ...}.
Nothing in such a file is code. The digest tells damage and careless edits; who edits on purpose can renew it, so whatever
reads a file checks what it says all the same. The package safetensors (0.8) reads bytes without their text, and no bfloat16
into NumPy, and what runs an exported program is to need jax alone.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": jnp.bfloat16, "I64": np.int64, "I32": np.int32,
          "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
          "BOOL": np.bool_}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
VERSION = "1"  # of what the sealed files of this project hold
MAX_SIZE = 1 << 48  # of one dimension: far beyond any array, far below where sizes overflow


def dump(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """The arrays and the text as the bytes of a safetensors file; equal content gives equal bytes.

    Raises:
      TypeError: an array of a dtype that the format does not have.
    """
    arrays = {name: np.asarray(tensors[name]) for name in sorted(tensors)}
    wrong = {name: str(array.dtype) for name, array in arrays.items() if array.dtype not in NAMES}
    if wrong:
        raise TypeError(f"safetensors cannot hold {wrong}, only {list(DTYPES)}")
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end, parts = 0, []
    for name, array in sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize):  # so that each is aligned
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
        parts.append(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *parts])


def parse(data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The inverse of `dump`: read-only arrays that share `data`'s memory, and the text.

    Raises:
      ValueError: `data` is cut, or no safetensors file: every size, offset and name is checked before it is used.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise ValueError(f"no safetensors file, or a cut one: {len(data)} bytes, of which the header claims {size}")
    header, body = _header(data[8:8 + size]), memoryview(data)[8 + size:]
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("damaged safetensors header: __metadata__ should hold texts only")
    entries = sorted((*_entry(name, entry), name) for name, entry in header.items())
    tensors, end = {}, 0
    for begin, stop, dtype, shape, name in entries:
        wanted = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        if begin != end or stop - begin != wanted or stop > len(body):
            raise ValueError(f"tensor {name!r} ({dtype} {list(shape)}) claims the bytes {begin} to {stop} of {len(body)}, "
                             f"wanted {wanted} from {end} on: the file is cut or was edited")
        raw = np.frombuffer(body[begin:stop], np.uint8)
        if dtype == "BOOL" and raw.size and raw.max() > 1:
            raise ValueError(f"tensor {name!r} should hold only 0 and 1: the file is damaged")
        tensors[name], end = raw.view(np.dtype(DTYPES[dtype]).newbyteorder("<")).reshape(shape), stop
    if end != len(body):
        raise ValueError(f"{len(body) - end} bytes follow the last tensor: the file is damaged")
    return tensors, metadata


def seal(kind: str, tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> bytes:
    """`dump` of a file of ours: with its kind, its version and a digest of all that it holds."""
    metadata = {**metadata, "format": f"sparseflax {kind}", "version": VERSION}
    return dump(tensors, {**metadata, "digest": _digest(tensors, metadata)})


def unseal(kind: str, data: bytes) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The inverse of `seal`.

    Raises:
      ValueError: what `parse` refuses, another kind or version, or a content that is not what the digest was taken of.
    """
    tensors, metadata = parse(data)
    form, version, digest = (metadata.pop(name, "") for name in ("format", "version", "digest"))
    if form != f"sparseflax {kind}":
        raise ValueError(f"its format is {form!r}, wanted 'sparseflax {kind}'")
    if version != VERSION:
        raise ValueError(f"it is of format version {version}, this sparseflax reads {VERSION}: install the sparseflax that "
                         "wrote it, or write it again with this one")
    if digest != _digest(tensors, {**metadata, "format": form, "version": version}):
        raise ValueError("its content is not what its digest was taken of: the file is damaged or was edited")
    return tensors, metadata


def mismatches(tensors: Mapping[str, np.ndarray], wanted: Mapping[str, tuple[tuple[int, ...], Any]]) -> list[str]:
    """Where arrays differ from the (shape, dtype) wanted by name, in words."""
    return [*(f"{name!r} is not in the model" for name in tensors if name not in wanted),
            *(f"{name!r} is missing" for name in wanted if name not in tensors),
            *(f"{name!r} is {tensors[name].dtype}{list(tensors[name].shape)}, the model has {dtype}{list(shape)}"
              for name, (shape, dtype) in wanted.items()
              if name in tensors and (tensors[name].shape, tensors[name].dtype) != (shape, dtype))]


def _digest(tensors: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    return hashlib.blake2b(dump(tensors, metadata), digest_size=16).hexdigest()


def _header(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"damaged safetensors header: {error}") from None
    if not isinstance(header, dict):
        raise ValueError("damaged safetensors header: no JSON object")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name occurs twice")
    return dict(pairs)


def _entry(name: str, entry: Any) -> tuple[int, int, str, tuple[int, ...]]:
    """(begin, end, dtype, shape) of a tensor's entry in the header."""
    try:
        (begin, end), dtype, shape = entry["data_offsets"], entry["dtype"], tuple(entry["shape"])
        good = dtype in DTYPES and len(entry) == 3 and len(shape) <= 32
        if not good or not all(type(number) is int and 0 <= number < MAX_SIZE for number in (begin, end, *shape)):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"damaged safetensors header: tensor {name!r} is {str(entry)[:200]}") from None
    return begin, end, dtype, shape
