"""Local tokens: each query also sees the keys in a window around it, besides the coreset of its head."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from levattn.attention.coreset import Coreset, zero_masked
from levattn.attention.merge import slot_sizes
from levattn.attention.select import is_selected
from levattn.attention.spec import AttentionSpec

Window = int | tuple[int, int] | Literal["cross"]

_CROSS = (1, 3, 4, 5, 7)  # Of the nine places of a 3 x 3 window.
_MAX_UNROLLED = 9


def window_size(window: Window) -> int:
    """Tokens in a window that reaches over no edge."""
    if window == "cross":
        return len(_CROSS)
    return window if isinstance(window, int) else window[0] * window[1]


def window_neighbours(
    num_tokens: int, window: Window, prefix: int, grid: tuple[int, int] | None
) -> Int[np.ndarray, "T W"]:
    """The tokens in each token's window; -1 where the window reaches over an edge.

    Args:
      num_tokens: Length of the sequence, leading tokens included.
      window: Tokens along the sequence (odd), rows and columns of patches (odd), or "cross".
      prefix: Leading tokens that are no patches. In a 2-D window they have no neighbours and are none.
      grid: Rows and columns of patches; needed for a 2-D window.

    Raises:
      ValueError: If the grid is missing or does not hold num_tokens - prefix patches.
    """
    if window == "cross":
        return window_neighbours(num_tokens, (3, 3), prefix, grid)[:, _CROSS]
    if isinstance(window, int):
        offsets = np.arange(window) - window // 2
        places = np.arange(num_tokens)[:, None] + offsets
        return np.where((places >= 0) & (places < num_tokens), places, -1)
    if grid is None or grid[0] * grid[1] != num_tokens - prefix:
        raise ValueError(
            f"local_window={window} needs the patches on a grid: {num_tokens} tokens less {prefix} leading ones do not "
            f"fill {grid=}; set keep_prefix to the number of class tokens, or use a 1-D window"
        )
    rows, columns = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    row_offsets, column_offsets = (o.ravel() for o in np.mgrid[: window[0], : window[1]])
    rows = rows[:, None] + row_offsets - window[0] // 2
    columns = columns[:, None] + column_offsets - window[1] // 2
    inside = (rows >= 0) & (rows < grid[0]) & (columns >= 0) & (columns < grid[1])
    places = np.where(inside, prefix + rows * grid[1] + columns, -1)
    return np.concatenate([np.full((prefix, places.shape[1]), -1), places])


def attend_with_window(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H D"],
    coreset: Coreset,
    spec: AttentionSpec,
    mask: Bool[Array, "B S"] | None = None,
    grid: tuple[int, int] | None = None,
) -> Float[Array, "B T H D"]:
    """One softmax over the coreset of the head and the window of the query; a key in both counts once.

    Where the coreset holds merged keys, a slot counts for a query less those of its members that are in the window.

    Args:
      query: Queries, of the same tokens as the keys.
      key: All keys.
      value: All values.
      coreset: The heavy part, from any method.
      spec: Gives the window and the number of leading tokens.
      mask: True for the tokens that exist.
      grid: Rows and columns of patches, for a 2-D window.

    Returns:
      The outputs, in the dtype of `query`. Cost: that of the coreset and 4 B T H W D operations for a window of W.
      The windows are walked one offset at a time: memory is that of the W logits a query, never W copies of the keys.
    """
    num_tokens = key.shape[1]
    if query.shape[1] != num_tokens:
        raise ValueError(f"local_window={spec.local_window} needs one key per query: {query.shape=}, {key.shape=}")
    neighbours = window_neighbours(num_tokens, spec.local_window, spec.keep_prefix, grid)
    exists = jnp.ones(key.shape[:2], bool) if mask is None else mask
    key, value = zero_masked(mask, key, value)
    # A window key that the coreset holds already would be counted twice.
    free = exists[:, None]
    if coreset.assignment is None:
        free &= ~is_selected(coreset.indices, coreset.valid, num_tokens)
    scale = query.shape[-1] ** -0.5

    @jax.checkpoint  # the backward pass gathers again rather than keep W copies of the keys
    def one_offset(_, places):
        logits = jnp.einsum("bthd,bthd->bht", query, key[:, places], preferred_element_type=jnp.float32)
        valid = jnp.broadcast_to(free, (*free.shape[:2], num_tokens))[:, :, places] & (places >= 0)
        return None, (logits * scale, jnp.broadcast_to(valid, logits.shape))

    _, (local_logits, local_valid) = jax.lax.scan(one_offset, None, neighbours.T, unroll=_unroll(neighbours))
    # Slots first only afterwards: XLA:CPU multiplies bfloat16 in the other order alone.
    logits = jnp.einsum("bthd,bkhd->bhtk", query, coreset.keys, preferred_element_type=jnp.float32) * scale
    logits = jnp.moveaxis(logits, -1, 0)
    logits += jnp.moveaxis(coreset.log_weights, -1, 0)[..., None]
    valid = jnp.broadcast_to(jnp.moveaxis(coreset.valid, -1, 0)[..., None], logits.shape)
    if coreset.assignment is not None:
        remaining = jnp.moveaxis(remaining_sizes(coreset, neighbours), -1, 0)
        valid &= remaining > 0
        share = jnp.maximum(remaining, 1) / jnp.maximum(jnp.moveaxis(slot_sizes(coreset), -1, 0), 1)[..., None]
        logits += jnp.log(share)
    probs = jax.nn.softmax(
        jnp.concatenate([logits, local_logits]), axis=0, where=jnp.concatenate([valid, local_valid])
    ).astype(query.dtype)

    num_heavy = coreset.indices.shape[-1]
    heavy = jnp.einsum("kbht,bkhd->bthd", probs[:num_heavy], coreset.values)

    @jax.checkpoint
    def add_offset(total, step):
        places, weight = step
        return total + jnp.swapaxes(weight, 1, 2)[..., None] * value[:, places], None

    total, _ = jax.lax.scan(add_offset, heavy, (neighbours.T, probs[num_heavy:]), unroll=_unroll(neighbours))
    return total


def remaining_sizes(coreset: Coreset, neighbours: Int[np.ndarray, "T W"]) -> Float[Array, "B H T K"]:
    """Members of each slot of a merged coreset that are not among the neighbours of a token."""
    slots = jnp.arange(coreset.valid.shape[-1])
    assignment = coreset.assignment

    def without(sizes, places):
        member = jnp.where(places >= 0, assignment[:, :, places], -1)
        return sizes - (member[..., None] == slots), None

    sizes = slot_sizes(coreset)[:, :, None]
    sizes = jnp.broadcast_to(sizes, (*sizes.shape[:2], len(neighbours), len(slots)))
    return jax.lax.scan(without, sizes, neighbours.T, unroll=_unroll(neighbours))[0]


def _unroll(neighbours: Int[np.ndarray, "T W"]) -> int:
    """Small windows are walked in one go, which the compiler then fuses."""
    return max(1, min(neighbours.shape[1], _MAX_UNROLLED))
