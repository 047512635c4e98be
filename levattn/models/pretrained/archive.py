"""Zip archives of strangers, as NumPy's and PyTorch's files are: checked by their directory before they are read."""

import collections
import contextlib
import math
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np

# Weights hardly compress: what unpacks to much more than the file is made to fill memory. Zeros, though, are nothing.
_MAX_RATIO, _SMALL = 20, 2**26
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # Others can ask for gigabytes to unpack with.
_ENCRYPTED = 1


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
    """A zip archive of which reading every member is safe.

    Raises:
      ValueError: Members of the same name, in each other's place, with names that lead out of the archive, encrypted,
        packed by another method than deflate, or that unpack to more than 64 MiB and 20 times the size of the file.
    """
    with zipfile.ZipFile(path) as archive:
        _check(archive.infolist(), path.stat().st_size)
        yield archive


def is_bomb(unpacked: int, packed: int) -> bool:
    """Whether so many bytes in a file of `packed` bytes are made to fill memory: more than 64 MiB and 20 times it."""
    return unpacked > _SMALL + _MAX_RATIO * packed


def _check(members: list[zipfile.ZipInfo], size: int) -> None:
    counts = collections.Counter(member.filename for member in members)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"it holds {twice[0]!r} more than once, and which one is meant nobody can tell")
    total = sum(member.file_size for member in members)
    if is_bomb(total, size):
        raise ValueError(f"its {len(members)} members unpack to {total:,} bytes: that is a zip bomb, and no weights")
    end = 0
    for member in sorted(members, key=lambda member: member.header_offset):
        name = member.filename
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name or ":" in name[:2]:
            raise ValueError(f"its member {name!r} leads out of the archive")
        if member.compress_type not in _METHODS or member.flag_bits & _ENCRYPTED:
            raise ValueError(f"its member {name!r} is encrypted or packed by another method than deflate")
        if member.header_offset < end:
            raise ValueError(f"its member {name!r} lies in the place of another")
        end = member.header_offset + member.compress_size


def read_npz(path: Path, only: str | None = None) -> dict[str, np.ndarray]:
    """The arrays of a NumPy archive. A header is believed only as far as its member has the bytes it speaks of.

    Args:
      path: The file.
      only: The one array that is wanted, if it is there.

    Raises:
      ValueError, zipfile.BadZipFile: As `open_archive`; a member that is no array, or one of Python objects.
    """
    arrays = {}
    with open_archive(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name == member.filename:
                raise ValueError(f"its member {name!r} is no array of NumPy")
            if only in (None, name):
                arrays[name] = _read_npy(archive, member)
    return arrays


def _read_npy(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in readers:
            raise ValueError(f"the header of {member.filename!r} is of a version that is not known here: {version}")
        shape, fortran_order, dtype = readers[version](file)
        if dtype.hasobject:
            raise ValueError(
                f"{member.filename!r} holds Python objects, as a pickle that could run any code and was not run: NumPy "
                "reads it by allow_pickle=True, and so do not"
            )
        if dtype.names:
            raise ValueError(f"{member.filename!r} holds records, and no numbers or text")
        expected, held = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
        if min(shape, default=0) < 0 or expected != held:
            raise ValueError(f"{member.filename!r} is to be of shape {shape}: {expected:,} bytes, and it has {held:,}")
        data = file.read(expected)
    if dtype.kind == "U" and np.any(np.frombuffer(data, dtype.str[0] + "u4") > sys.maxunicode):
        raise ValueError(f"{member.filename!r} is no text")  # of which Python would make strings that it cannot use
    return np.ndarray(shape, dtype, data, order="F" if fortran_order else "C")
