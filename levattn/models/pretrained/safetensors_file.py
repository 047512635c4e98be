"""Files of safetensors: a JSON header that says where in the rest each tensor lies.

A reader of its own, as that of the library for NumPy knows no bfloat16, takes the last of two tensors of one name, and
names no tensor where header and file do not fit.
"""

import collections
import json
import math
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

_MAX_HEADER_BYTES = 100_000_000  # as in the library
_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
}


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The tensors of a file, and the texts under `__metadata__`.

    Raises:
      ValueError: Naming the tensor: header and file do not fit each other, or a name comes twice. No tensor is read
        then.
    """
    header, start, metadata = read_header(path)
    with path.open("rb") as file:
        file.seek(start)
        data = memoryview(file.read())
    arrays = {}
    for name, entry in header.items():
        begin, _ = entry["data_offsets"]
        arrays[name] = np.ndarray(entry["shape"], _DTYPES[entry["dtype"]], data, begin)
    return arrays, metadata


def read_header(path: Path) -> tuple[dict[str, dict[str, Any]], int, dict[str, str]]:
    """The entries of the header, checked against the file; where the data start; the metadata. Reads no tensor."""
    size = os.path.getsize(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(f"its header is to be {length:,} bytes long")
        header = json.loads(file.read(length), object_pairs_hook=_without_duplicates)
    if not isinstance(header, dict):
        raise ValueError("its header is no record of tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its __metadata__ is no record of texts")
    _check(header, size - 8 - length)
    return header, 8 + length, metadata


def _check(header: dict[str, Any], num_bytes: int) -> None:
    """Refuses what does not say of every byte, once, which tensor it is of."""
    for name, entry in header.items():
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise ValueError(f"tensor {name!r} has no dtype, shape or data_offsets")
        shape, offsets = entry["shape"], entry["data_offsets"]
        if not (_are_counts(shape) and _are_counts(offsets) and len(offsets) == 2):
            raise ValueError(f"tensor {name!r} has shape {shape!r} and data_offsets {offsets!r}")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in _DTYPES:
            raise ValueError(f"tensor {name!r} is of unknown dtype {entry['dtype']}")
        expected = math.prod(shape) * np.dtype(_DTYPES[entry["dtype"]]).itemsize
        if offsets[1] - offsets[0] != expected:
            raise ValueError(
                f"tensor {name!r} of shape {shape} is to have {expected:,} bytes, and has {offsets[1] - offsets[0]:,}"
            )
    at, before = 0, None
    for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
        begin, end = header[name]["data_offsets"]
        if begin != at:
            what = "overlap" if begin < at else "leave a hole between them"
            raise ValueError(f"tensors {before!r} and {name!r} {what}, at byte {begin:,}")
        if end > num_bytes:
            raise ValueError(f"tensor {name!r} ends at byte {end:,} of {num_bytes:,} that are there")
        at, before = end, name
    if at != num_bytes:
        raise ValueError(f"{num_bytes - at:,} bytes behind the last tensor, {before!r}, are of none")


def _are_counts(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        ((twice, count),) = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"its header has {twice!r} {count} times")
    return record
