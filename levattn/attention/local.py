"""Local tokens: each query also sees the keys in a window around it, besides the coreset of its head."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from levattn.attention.coreset import Coreset, zero_masked
from levattn.attention.select import is_selected
from levattn.attention.spec import AttentionSpec


def window_neighbours(
    num_tokens: int, window: int | tuple[int, int], prefix: int, grid: tuple[int, int] | None
) -> Int[np.ndarray, "T W"]:
    """The tokens in each token's window; -1 where the window reaches over an edge.

    Args:
      num_tokens: Length of the sequence, leading tokens included.
      window: Tokens along the sequence (odd), or rows and columns of patches (odd).
      prefix: Leading tokens that are no patches. In a 2-D window they have no neighbours and are none.
      grid: Rows and columns of patches; needed for a 2-D window.

    Raises:
      ValueError: If the grid is missing or does not hold num_tokens - prefix patches.
    """
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
    free = exists[:, None] & ~is_selected(coreset.indices, coreset.valid, num_tokens)
    scale = query.shape[-1] ** -0.5

    @jax.checkpoint  # the backward pass gathers again rather than keep W copies of the keys
    def one_offset(_, places):
        logits = jnp.einsum("bthd,bthd->bht", query, key[:, places], preferred_element_type=jnp.float32)
        return None, (logits * scale, free[:, :, places] & (places >= 0))

    _, (local_logits, local_valid) = jax.lax.scan(one_offset, None, neighbours.T)
    logits = jnp.einsum("bthd,bkhd->kbht", query, coreset.keys, preferred_element_type=jnp.float32) * scale
    logits += jnp.moveaxis(coreset.log_weights, -1, 0)[..., None]
    valid = jnp.broadcast_to(jnp.moveaxis(coreset.valid, -1, 0)[..., None], logits.shape)
    probs = jax.nn.softmax(
        jnp.concatenate([logits, local_logits]), axis=0, where=jnp.concatenate([valid, local_valid])
    ).astype(query.dtype)

    num_heavy = coreset.indices.shape[-1]
    heavy = jnp.einsum("kbht,bkhd->bthd", probs[:num_heavy], coreset.values)

    @jax.checkpoint
    def add_offset(total, step):
        places, weight = step
        return total + jnp.swapaxes(weight, 1, 2)[..., None] * value[:, places], None

    total, _ = jax.lax.scan(add_offset, heavy, (neighbours.T, probs[num_heavy:]))
    return total
