"""Chunks of keys on the host: checked, cast, brought to one shape, and made ahead of their use."""

import contextlib
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from levattn.core.basis import real_array

Chunks = Iterable[np.ndarray]
Item = TypeVar("Item")


def check_chunk(
    keys: Shaped[Array | np.ndarray, "..."], head_dim: int, num_valid: Int[Array | np.ndarray, ""] | int | None
) -> None:
    """Refuses what is no chunk; of a `num_valid` that is traced nothing can be said.

    Raises:
      ValueError: For another width or rank, or a number of valid rows that there are not.
    """
    if keys.ndim != 2 or keys.shape[1] != head_dim:
        raise ValueError(f"keys have shape {tuple(keys.shape)}: it must be (keys, {head_dim})")
    if num_valid is not None and not isinstance(num_valid, jax.core.Tracer) and not 0 <= num_valid <= len(keys):
        raise ValueError(f"num_valid={int(num_valid)} must be in [0, {len(keys)}], the rows of its chunk")


def cast_keys(keys: Shaped[np.ndarray, "C D"], dtype: Any) -> Float[np.ndarray, "C D"]:
    """Keys in `dtype`, none of them lost: NumPy turns what a narrower dtype does not hold into 0 and infinity.

    Raises:
      ValueError: A finite key is too large or, as a whole, too small for `dtype`.
    """
    keys, dtype = real_array("keys", keys), np.dtype(dtype)
    if keys.dtype.itemsize <= dtype.itemsize:
        return keys.astype(dtype, copy=False)
    sizes, limits = np.max(np.abs(keys), axis=1, initial=0), jnp.finfo(dtype)
    is_lost = (sizes > limits.max) & (sizes < np.inf) | (sizes > 0) & (sizes < limits.tiny)
    if np.any(is_lost):
        raise ValueError(
            f"a key of size {sizes[np.argmax(is_lost)]:.3g} is beyond the range of {dtype}, {limits.tiny:.2g} to "
            f"{limits.max:.2g}: multiply all keys by a power of two, which changes no set, or compute in float64 "
            "(dtype=jnp.float64 with jax_enable_x64; --precision double)"
        )
    return keys.astype(dtype)


def fixed_chunks(
    chunks: Chunks, chunk_rows: int, head_dim: int, *, copy: bool = False
) -> Iterator[tuple[Float[np.ndarray, "C D"], int]]:
    """The same rows in arrays of one shape, each with the number of rows that count; the last is padded with zeros.

    With `copy` none of them is a view of a chunk, whose maker may write the next one in its place.

    Raises:
      ValueError: For a chunk that is not a floating-point matrix of width `head_dim`.
    """
    rest: list[np.ndarray] = []
    num_waiting = 0
    for number, chunk in enumerate(chunks):
        chunk = real_array(f"chunk {number}", chunk)
        if chunk.ndim != 2 or chunk.shape[1] != head_dim or not jnp.issubdtype(chunk.dtype, jnp.floating):
            raise ValueError(
                f"chunk {number} has shape {chunk.shape} and dtype {chunk.dtype}: it must be floats of shape "
                f"(keys, {head_dim})"
            )
        while num_waiting + len(chunk) >= chunk_rows:
            head, chunk = chunk[: chunk_rows - num_waiting], chunk[chunk_rows - num_waiting :]
            yield np.concatenate([*rest, head]) if rest or copy else head, chunk_rows
            rest, num_waiting = [], 0
        if len(chunk):
            rest.append(chunk.copy() if copy else chunk)
            num_waiting += len(chunk)
    if num_waiting:
        padding = np.zeros((chunk_rows - num_waiting, head_dim), rest[0].dtype)
        yield np.concatenate([*rest, padding]), num_waiting


def prefetched(items: Iterable[Item], depth: int = 2) -> Iterator[Item]:
    """The same items, made in a thread that is up to `depth` ahead; errors come out where the item would have."""
    ready: queue.Queue = queue.Queue(depth)
    is_over = threading.Event()
    end = object()

    def fill():
        try:
            for item in items:
                ready.put((item, None))
                if is_over.is_set():
                    return
            ready.put((end, None))
        except Exception as error:
            ready.put((end, error))

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        while (received := ready.get())[0] is not end:
            yield received[0]
        if received[1] is not None:
            raise received[1]
    finally:
        is_over.set()
        while thread.is_alive():  # it may be waiting for room
            with contextlib.suppress(queue.Empty):
                ready.get_nowait()
            thread.join(0.01)
