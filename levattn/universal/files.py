"""Files of keys that may be larger than memory, read front to back in chunks; and files of universal sets."""

import contextlib
import dataclasses
import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp  # with it NumPy knows bfloat16
import numpy as np
from jaxtyping import Float

from levattn.universal.sets import UniversalSet

_RECORD_SUFFIXES = (".array_record", ".arrayrecord")
_SET_FIELDS = tuple(field.name for field in dataclasses.fields(UniversalSet))


@dataclasses.dataclass(frozen=True)
class KeyFile:
    """Keys in a file, one row each.

    Attributes:
      path: The file.
      num_keys: Rows, S.
      head_dim: Width of a key, D.
      dtype: Of its numbers.
      offset: Bytes before the first row of a `.npy` file; None for an ArrayRecord file.
    """

    path: Path
    num_keys: int
    head_dim: int
    dtype: np.dtype
    offset: int | None

    @property
    def num_bytes(self) -> int:
        """Of all keys."""
        return self.num_keys * self.head_dim * self.dtype.itemsize

    def chunks(
        self, chunk_rows: int, start: int = 0, stop: int | None = None, wanted: Sequence[bool] | None = None
    ) -> Iterator[Float[np.ndarray, "C D"]]:
        """The keys from `start` to `stop`, in chunks of `chunk_rows`; the last may be shorter.

        Args:
          chunk_rows: Keys in a chunk.
          start: Where to begin.
          stop: Where to end; None: at the end of the file.
          wanted: Which chunks to read; None: all. Zeros that take no memory stand in for the others.

        Plain reads, not a memory map: pages of a map count as memory of the process, and a disk error is an exception
        here and the end of the process there.

        Raises:
          ValueError: The file ends early, or a record has another length than the first.
        """
        stop = self.num_keys if stop is None else stop
        reader = _record_reader if self.offset is None else _row_reader
        with reader(self) as read:
            for number, first in enumerate(range(start, stop, chunk_rows)):
                last = min(first + chunk_rows, stop)
                if wanted is None or wanted[number]:
                    yield read(first, last)
                else:
                    yield np.broadcast_to(np.zeros((), self.dtype), (last - first, self.head_dim))


def open_keys(path: str | Path, *, head_dim: int | None = None, record_dtype: Any = None) -> KeyFile:
    """Opens a file of keys and reads its header only.

    Args:
      path: A `.npy` file of a matrix of rows (float16, float32 or float64 of either byte order, C order), or an
        `.array_record` file in which every record is the bytes of one row.
      head_dim: The width that is expected. None: whatever the file has.
      record_dtype: Of the numbers in an ArrayRecord file, which does not say; None: float32 or float64, whichever makes
        rows of the width `head_dim`.

    Raises:
      FileNotFoundError: There is no such file.
      ValueError: It is of another kind, holds something else, is empty, cut short or of another width; or nothing says
        what the bytes of its records are.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} is not a file: give a .npy or .array_record file of keys")
    if path.suffix in _RECORD_SUFFIXES:
        file = _open_records(path, head_dim, record_dtype)
    elif path.suffix == ".npy":
        file = _open_npy(path)
    else:
        raise ValueError(f"{str(path)!r} must end in .npy or {' or '.join(_RECORD_SUFFIXES)}")
    if not file.num_keys or not file.head_dim:
        raise ValueError(f"{str(path)!r} holds no keys: its shape is ({file.num_keys}, {file.head_dim})")
    if head_dim is not None and file.head_dim != head_dim:
        raise ValueError(f"{str(path)!r} has keys of width {file.head_dim}, not {head_dim}")
    return file


def save_set(path: str | Path, universal: UniversalSet, provenance: dict[str, Any] | None = None) -> None:
    """Writes a set as an `.npz` file that `numpy.load` reads without pickles; `provenance` goes in as JSON.

    Not atomic by itself: write to a temporary name, see `levattn.training.workdir.atomic_path`.
    """
    fields = {name: getattr(universal, name) for name in _SET_FIELDS}
    arrays = {name: np.asarray(value) for name, value in fields.items() if value is not None}
    with open(path, "wb") as file:  # by its handle: NumPy would add a suffix to a name
        np.savez(file, **arrays, provenance=np.asarray(json.dumps(provenance or {})))


def load_set(path: str | Path) -> UniversalSet:
    """Reads what `save_set` wrote.

    Raises:
      ValueError: It is no such file; the message says what is missing.
    """
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{str(path)!r} is not a file of a universal set: it is no .npz file")
    with np.load(path, allow_pickle=False) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    if missing := set(_SET_FIELDS) - {"keys"} - set(found):
        raise ValueError(f"{str(path)!r} is not a file of a universal set: it lacks {sorted(missing)}")
    return UniversalSet(
        indices=found["indices"],
        scores=found["scores"],
        eps=float(found["eps"]),
        size_bound=float(found["size_bound"]),
        guarantee=str(found["guarantee"]),
        keys=found.get("keys"),
    )


def _open_npy(path):
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (EOFError, ValueError, OSError) as error:
        if path.stat().st_size == 0:
            raise ValueError(f"{str(path)!r} is an empty file") from error
        raise ValueError(f"{str(path)!r} cannot be read as a .npy file, or is cut short ({error})") from error
    if array.ndim != 2:
        raise ValueError(f"{str(path)!r} has shape {array.shape}: it must be (keys, width), the keys of one head")
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise ValueError(f"{str(path)!r} holds {array.dtype}: it must hold float16, float32 or float64")
    if array.size and not array.flags.c_contiguous:
        raise ValueError(f"{str(path)!r} is in column order: save numpy.ascontiguousarray(keys)")
    offset = getattr(array, "offset", 0)
    return KeyFile(path, *array.shape, array.dtype, offset)


def _open_records(path, head_dim, record_dtype):
    records = _records(path)
    num_keys = len(records)
    num_bytes = len(records[0]) if num_keys else 0
    if record_dtype is None:
        sizes = {} if head_dim is None else {4 * head_dim: np.float32, 8 * head_dim: np.float64}
        if num_keys and num_bytes not in sizes:
            width = (
                "no width (--width) was given" if head_dim is None else f"width {head_dim} makes no float32 or float64"
            )
            raise ValueError(
                f"{str(path)!r}: records of {num_bytes} bytes do not say of which dtype they are, and {width}: give "
                f"record_dtype (--record_dtype), float32 for width {num_bytes / 4:g}, say"
            )
        record_dtype = sizes.get(num_bytes, np.float32)
    try:
        dtype = np.dtype(record_dtype)
    except TypeError as error:
        raise ValueError(f"{record_dtype=} (--record_dtype) is no dtype: give float32, say") from error
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize > 8:
        raise ValueError(f"{record_dtype=} (--record_dtype) must be of floating point, of 64 bits at most")
    if num_bytes % dtype.itemsize:
        raise ValueError(f"{str(path)!r}: a record of {num_bytes} bytes is no row of {dtype}")
    return KeyFile(path, num_keys, num_bytes // dtype.itemsize, dtype, None)


def _records(path):
    from array_record.python.array_record_data_source import ArrayRecordDataSource  # only where it is needed

    try:
        return ArrayRecordDataSource([str(path)])
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as an ArrayRecord file ({error})") from error


@contextlib.contextmanager
def _row_reader(file):
    row_bytes = file.head_dim * file.dtype.itemsize
    with open(file.path, "rb", buffering=0) as stream:

        def read(first, last):
            stream.seek(file.offset + first * row_bytes)
            chunk = np.empty((last - first, file.head_dim), file.dtype)
            unread = memoryview(chunk).cast("B")
            while unread:
                num_read = stream.readinto(unread)
                if not num_read:
                    raise ValueError(f"{str(file.path)!r} ends before key {last}: it was cut short while being read")
                unread = unread[num_read:]
            return chunk.astype(file.dtype.newbyteorder("="), copy=False)

        yield read


@contextlib.contextmanager
def _record_reader(file):
    records = _records(file.path)
    row_bytes = file.head_dim * file.dtype.itemsize

    def read(first, last):
        rows = records.__getitems__(range(first, last))
        for place, row in enumerate(rows, first):
            if len(row) != row_bytes:
                raise ValueError(f"{str(file.path)!r}: record {place} has {len(row)} bytes, the first {row_bytes}")
        return np.frombuffer(b"".join(rows), file.dtype).reshape(-1, file.head_dim)

    yield read
