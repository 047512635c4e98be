"""One image file off the disk, whatever lies under its name."""

import os
import stat

from levattn.data.errors import ImageError

MAX_FILE_BYTES = 2**29  # The largest image that is decoded takes half of that uncompressed, 16 bits a channel all.


def read_image_file(path: str | os.PathLike) -> bytes:
    """The bytes of a regular file.

    Raises:
      ImageError: naming the file, when it cannot be opened or read (a link to nowhere or in a circle, no permission, a
        failing disk), is a pipe or a device, which might never end, or is larger than `MAX_FILE_BYTES`.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"{path}: not a regular file; remove it")
            data = file.read(MAX_FILE_BYTES + 1) if status.st_size <= MAX_FILE_BYTES else None
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from error
    if data is None or len(data) > MAX_FILE_BYTES:
        raise ImageError(f"{path}: more than {MAX_FILE_BYTES:,} bytes")
    return data


def _open_without_waiting(path: str, flags: int) -> int:
    # A named pipe would otherwise make us wait for somebody to write into it.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
