"""Arrays as text that a browser turns back into typed arrays."""

import base64
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Shaped

# Of typed arrays that every browser has.
_DTYPES = ("uint8", "uint16", "float32")

Layout = list[tuple[str, str, tuple[int, ...]]]


def layout_of(arrays: Mapping[str, Shaped[np.ndarray, "..."]]) -> Layout:
    """Name, dtype and shape of each array, in order: what `unpack` needs beside the text.

    Raises:
      ValueError: A dtype other than uint8, uint16 and float32.
    """
    for name, x in arrays.items():
        if x.dtype.name not in _DTYPES:
            raise ValueError(f"{name} of {x.dtype} must be one of {', '.join(_DTYPES)}")
    return [(name, x.dtype.name, x.shape) for name, x in arrays.items()]


def pack(arrays: Mapping[str, Shaped[np.ndarray, "..."]], level: int = 9) -> str:
    """One text for some arrays: first bytes of all numbers of an array, then second bytes, ..., deflated, in base 64.

    Bytes of one place are alike, and so take less room together: those above small whole numbers take none.

    Args:
      arrays: See `layout_of`.
      level: Of zlib.
    """
    planes = (np.ascontiguousarray(x.astype(x.dtype.newbyteorder("<"))) for x in arrays.values())
    data = b"".join(np.ascontiguousarray(x.reshape(-1, 1).view(np.uint8).T).tobytes() for x in planes)
    return base64.b64encode(zlib.compress(data, level)).decode()


def unpack(text: str, layout: Sequence[Sequence]) -> dict[str, Shaped[np.ndarray, "..."]]:
    """Undoes `pack`, as attention.js does in the browser.

    Args:
      text: From `pack`.
      layout: From `layout_of`, or as it comes back from JSON.
    """
    data, arrays, start = np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8), {}, 0
    for name, dtype, shape in layout:
        size, count = np.dtype(dtype).itemsize, int(np.prod(shape))
        planes = data[start : start + size * count].reshape(size, count)
        arrays[name] = np.ascontiguousarray(planes.T).view(np.dtype(dtype).newbyteorder("<")).reshape(shape)
        start += size * count
    return arrays
