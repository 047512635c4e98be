"""One image file off the disk, whatever lies under its name."""

import os
import stat
from typing import BinaryIO

from levattn.data.errors import ImageError

MAX_FILE_BYTES = 2**29  # The largest image that is decoded takes half of that uncompressed, 16 bits a channel all.


def read_image_file(path: str | os.PathLike) -> bytes:
    """The bytes of a regular file.

    Raises:
      ImageError: naming the file, when it cannot be opened or read (a link to nowhere or in a circle, no permission, a
        failing disk), is a pipe or a device, which might never end, or is larger than `MAX_FILE_BYTES`.
    """
    try:
        with open_regular(path) as file:
            is_small = os.fstat(file.fileno()).st_size <= MAX_FILE_BYTES
            data = file.read(MAX_FILE_BYTES + 1) if is_small else None
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror or error}") from error
    if data is None or len(data) > MAX_FILE_BYTES:
        raise ImageError(f"{path}: more than {MAX_FILE_BYTES:,} bytes")
    return data


def open_regular(path: str | os.PathLike, buffering: int = -1) -> BinaryIO:
    """Opens a file to read its bytes, and nothing that could make the reader wait, or never end.

    Raises:
      OSError: It cannot be opened, or is a pipe, a device or a folder.
    """
    file = open(path, "rb", buffering=buffering, opener=_open_without_waiting)  # noqa: SIM115  The caller closes it.
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("not a regular file; remove it")
    return file


def _open_without_waiting(path: str, flags: int) -> int:
    # A named pipe would otherwise make us wait for somebody to write into it.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
