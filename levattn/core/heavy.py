"""The heavy entries of an attention matrix, found without forming it.

A_ij = f(<q_i, k_j>) / sum_l f(<q_i, k_l>) >= eps needs a key of sensitivity >= eps, and there are few such keys: only
their columns are evaluated, and the normalisers have a short form of their own (`levattn.core.rowsums`).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from levattn.core.basis import at_unit_scale, checked_matrix, row_blocks
from levattn.core.functions import AttentionFunction, Power
from levattn.core.rowsums import EXACT, RowSums, exact_row_sums
from levattn.core.sensitivity import check_eps, passes, sensitivity_bounds

# Row sums below the one may have lost terms to underflow, those above the other may be the sum of terms that overflow
# when they are taken in another order.
_SMALL_SUM, _LARGE_SUM = 1e-200, 1e300
_SMALLEST = np.nextafter(0.0, 1.0)
_HEADROOM = 32  # binary places that a sum over the features of a query may add to the largest of its terms


class HeavyEntries(NamedTuple):
    """Entries of the attention matrix as a sparse matrix, `E` of them, by query and then by key.

    Attributes:
      query_indices: Row of each entry.
      key_indices: Column of each entry.
      values: Its attention, in (0, 1].
    """

    query_indices: Int[np.ndarray, " E"]
    key_indices: Int[np.ndarray, " E"]
    values: Float[np.ndarray, " E"]


def heavy_entries(
    queries: Float[Array | np.ndarray, "T D"],
    keys: Float[Array | np.ndarray, "S D"],
    eps: float | int,
    f: AttentionFunction = Power(2),  # noqa: B008
    *,
    key_indices: Int[np.ndarray, " U"] | None = None,
    row_sums: RowSums | None = None,
    block_bytes: int = 1 << 26,
) -> HeavyEntries:
    """All entries >= eps of the attention matrix f(<q_i, k_j>) / sum_l f(<q_i, k_l>).

    Nothing is missed: every entry >= eps is returned. Values are accurate to a relative 1e-7, in float64, and none
    below eps by more than that is returned. A query orthogonal to all keys (normaliser 0) has no entries.

    With `row_sums` of a relative error delta, entries >= eps are still all returned (unless with the probability of
    failure stated there), together with some down to eps (1 - delta) / (1 + delta), and values are off by up to
    1 / (1 - delta).

    Args:
      queries: Queries of one head, Q in the paper.
      keys: Keys of that head, K.
      eps: Threshold, in (0, 1].
      f: Function of attention, with a growth bound.
      key_indices: The keys to look at, if a universal set for eps is at hand; any others are not searched.
      row_sums: Normalisers, exact unless given.
      block_bytes: Memory for one block of queries times the universal set; the blocks of queries follow from it.

    Returns:
      The entries; at most 1 / eps a query. For outputs larger than memory use `heavy_entries_blocks`.

    Raises:
      ValueError: For arrays that are empty, not finite or of different widths, eps out of range, f without growth,
        indices that are not those of keys, or row sums that leave float64 (under a power each query is scaled first so
        that they do not).

    Cost: that of the universal set, of the normalisers, and 2 T U D operations: for x^2 together 2 S D^2 + T D^2 +
    2 T U D, with U <= D / eps. Memory: O(D^2) and a block beside the arguments and the result.
    Source: LevAttention (ICLR 2025, arXiv 2410.05462), section 3.
    """
    blocks = heavy_entries_blocks(
        queries, keys, eps, f, key_indices=key_indices, row_sums=row_sums, block_bytes=block_bytes
    )
    found = list(blocks)
    return HeavyEntries(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def heavy_entries_blocks(
    queries: Float[Array | np.ndarray, "T D"],
    keys: Float[Array | np.ndarray, "S D"],
    eps: float | int,
    f: AttentionFunction = Power(2),  # noqa: B008
    *,
    key_indices: Int[np.ndarray, " U"] | None = None,
    row_sums: RowSums | None = None,
    block_bytes: int = 1 << 26,
) -> Iterator[HeavyEntries]:
    """As `heavy_entries`, one block of queries at a time. Arguments are checked at once, before the first block."""
    queries, keys, eps = checked_pair(queries, keys, eps)
    if key_indices is None:
        key_indices = np.flatnonzero(passes(sensitivity_bounds(keys, f), eps))
    key_indices = checked_indices(key_indices, len(keys))
    if row_sums is None:
        if isinstance(f, Power):
            keys = at_unit_scale(keys)
        row_sums = exact_row_sums(keys, f, num_queries=len(queries))
    chosen = keys[key_indices].astype(np.float64)
    # Products, their f, and the comparison: two and a half blocks at a time.
    size = max(1, min(block_bytes // (20 * max(1, len(chosen))), 1 << 16))
    return _blocks(queries, keys, chosen, key_indices, eps, f, row_sums, size)


def checked_indices(key_indices: Shaped[np.ndarray, " U"], num_keys: int) -> Int[np.ndarray, " V"]:
    """Indices of keys, each once and in order.

    Raises:
      ValueError: They are no whole numbers (a mask, say), or no indices of so many keys.
    """
    key_indices = np.asarray(key_indices)
    if key_indices.size and not np.issubdtype(key_indices.dtype, np.integer):
        raise ValueError(f"{key_indices.dtype=} must be an integer: give np.flatnonzero of a mask")
    if key_indices.size and not 0 <= key_indices.min() <= key_indices.max() < num_keys:
        raise ValueError(f"key_indices must be in [0, {num_keys}): they are those of another set of keys")
    return np.unique(key_indices).astype(np.int64)


def checked_pair(queries, keys, eps: float | int) -> tuple[np.ndarray, np.ndarray, float]:
    """Queries, keys and eps, if they can be computed with together.

    Raises:
      ValueError: As `heavy_entries`.
    """
    queries, keys = checked_matrix("queries", queries), checked_matrix("keys", keys)
    if queries.shape[1] != keys.shape[1]:
        raise ValueError(f"{queries.shape=} and {keys.shape=} must have the same width: give one head of both")
    return queries, keys, check_eps(eps)


def with_row_sums(
    block: Float[np.ndarray, "b D"], keys: Float[np.ndarray, "S D"], row_sums: RowSums
) -> tuple[Float[np.ndarray, "b D"], Float[np.ndarray, " b"]]:
    """Queries and their normalisers under |x|^p, each query times a power of two that keeps both in float64.

    The attention of a query is that of its multiples.
    """
    block = np.ldexp(block, -np.frexp(np.max(np.abs(block), axis=1, keepdims=True))[1])
    with np.errstate(over="ignore", invalid="ignore"):
        sums = row_sums(block)
        is_out = ~((sums >= _SMALL_SUM) & (sums <= _LARGE_SUM))
        if np.any(is_out):
            block[is_out] = np.ldexp(block[is_out], -largest_exponents(block[is_out], keys))
            sums[is_out] = row_sums(block[is_out])
    return block, sums


def largest_exponents(queries: Float[np.ndarray, "b D"], keys: Float[np.ndarray, "S D"]) -> Int[np.ndarray, "b 1"]:
    """The power of two just above the largest |<q, k>| of each query of entries up to 1; 0 where there is none.

    Whatever the keys: products that overflow are taken of a part of the query.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        largest = _largest_products(queries, keys)
    exponents = np.frexp(largest)[1]
    is_over = ~np.isfinite(largest)
    if np.any(is_over):
        parts = np.ldexp(queries[is_over], -_HEADROOM)
        exponents[is_over] = np.frexp(_largest_products(parts, keys))[1] + _HEADROOM
    return exponents[:, None]


def check_row_sums(
    sums: Float[np.ndarray, " b"],
    queries: Float[np.ndarray, "b D"],
    keys: Float[np.ndarray, "S D"],
    f: AttentionFunction,
    first: int = 0,
) -> None:
    """Refuses normalisers that float64 does not hold.

    Args:
      sums: The normalisers of the queries under f.
      queries: Those that they are of.
      keys: All keys.
      f: Function of attention.
      first: Number of the first query, for the message.

    Raises:
      ValueError: One is not finite; or so small that terms may have been lost, though the query meets a key.
    """
    small = np.flatnonzero(sums < _SMALL_SUM)
    is_lost = ~np.isfinite(sums)
    if len(small) and not isinstance(f, Power):  # under a power with_row_sums has seen to it
        is_lost[small] |= _largest_products(queries[small], keys) > 0
    if np.any(is_lost):
        way = "under" if sums[is_lost][0] < 1 else "over"
        raise ValueError(
            f"sum of f {way}flows float64 for query {first + int(np.argmax(is_lost))}: bring queries and keys to a "
            "scale at which f is near 1"
        )


def _largest_products(queries, keys):
    largest = np.zeros(len(queries))
    for _, block in row_blocks(keys, max(1, (1 << 21) // len(queries))):
        np.maximum(largest, np.max(np.abs(queries @ block.T), axis=1), out=largest)
    return largest


def _blocks(queries, keys, chosen, key_indices, eps, f, row_sums, size):
    threshold = eps * (1 - EXACT) / (1 + row_sums.relative_error)
    for start, block in row_blocks(queries, size):
        if isinstance(f, Power):
            block, sums = with_row_sums(block, keys, row_sums)
        else:
            sums = row_sums(block)
        check_row_sums(sums, block, keys, f, start)
        values = f(block @ chosen.T)
        # Of a row that is all zero every entry would pass a threshold of 0; so would zeros where that underflows.
        least = np.where(sums > 0, np.maximum(threshold * sums, _SMALLEST), math.inf)
        rows, columns = np.nonzero(values >= least[:, None])
        yield HeavyEntries(start + rows, key_indices[columns], values[rows, columns] / sums[rows])
