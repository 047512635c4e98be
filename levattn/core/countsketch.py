"""Heavy entries of x^2-attention by CountSketch: each row of Q K_U^T is seen only through a few signed sums.

The U columns of keys are added, with random signs, into b buckets, t times over; a query times the t b sums gives t
estimates of each of its inner products, of variance at most (row normaliser) / b. Their median misses by twice that
standard deviation with a probability that falls geometrically with t. What it calls large is evaluated exactly.
"""

import math

import numpy as np
import scipy.special
from jaxtyping import Array, Float, Int

from levattn.core.basis import at_unit_scale, row_blocks
from levattn.core.functions import Power
from levattn.core.heavy import HeavyEntries, checked_indices, checked_pair, with_row_sums
from levattn.core.rowsums import EXACT, exact_row_sums
from levattn.core.sensitivity import passes, sensitivity_bounds


def countsketch_heavy_entries(
    queries: Float[Array | np.ndarray, "T D"],
    keys: Float[Array | np.ndarray, "S D"],
    eps: float | int,
    *,
    failure: float = 1e-3,
    key_indices: Int[np.ndarray, " U"] | None = None,
    seed: int = 0,
    block_bytes: int = 1 << 26,
) -> HeavyEntries:
    """The entries >= eps of x^2-attention, each of them with high probability, none that is not one.

    Args:
      queries: Queries of one head. They must not depend on the seed.
      keys: Keys of that head.
      eps: Threshold, in (0, 1].
      failure: Probability that any entry at all is missed: at most 1 / eps a query are at stake, so that
        t = O(log(T / (eps failure))).
      key_indices: The keys to look at: the universal set for eps unless given.
      seed: Of buckets and signs.
      block_bytes: Memory for the estimates of one block of queries.

    Returns:
      The entries, values exact.

    Raises:
      ValueError: For arrays that are empty, not finite or of different widths, or numbers out of range.

    Cost: beside universal set and normalisers, T t (2 b D + U) operations with b = 16 / eps buckets, where evaluating
    all of U takes 2 T U D: it pays for keys wider than t only, and U larger than t b.
    Source: LevAttention (arXiv 2410.05462), section 3; Charikar, Chen, Farach-Colton, ICALP 2002.
    """
    queries, keys, eps = checked_pair(queries, keys, eps)
    if not 0 < failure < 1:
        raise ValueError(f"{failure=} must be in (0, 1)")
    if key_indices is None:
        key_indices = np.flatnonzero(passes(sensitivity_bounds(keys, Power(2)), eps))
    key_indices = checked_indices(key_indices, len(keys))
    keys = at_unit_scale(keys)
    chosen = keys[key_indices].astype(np.float64)
    num_buckets, num_tables = math.ceil(16 / eps), num_tables_for(failure * eps / len(queries))
    rng = np.random.default_rng(seed)
    buckets = rng.integers(num_buckets, size=(num_tables, len(chosen)))
    signs = rng.choice([-1.0, 1.0], (num_tables, len(chosen)))
    sums = np.zeros((num_tables, num_buckets, keys.shape[1]))
    for table in range(num_tables):
        np.add.at(sums[table], buckets[table], signs[table][:, None] * chosen)
    row_sums = exact_row_sums(keys, Power(2), num_queries=len(queries))

    found = []
    size = max(1, block_bytes // (24 * num_tables * max(1, len(chosen))))
    for start, block in row_blocks(queries, size):
        block, normalisers = with_row_sums(block, keys, row_sums)
        estimates = np.empty((num_tables, len(block), len(chosen)))
        for table in range(num_tables):
            estimates[table] = (block @ sums[table].T)[:, buckets[table]] * signs[table]
        # Two standard deviations are half of what an entry of eps measures. Of an all-zero row nothing passes.
        least = np.where(normalisers > 0, np.sqrt(eps * normalisers) * (1 - EXACT) / 2, math.inf)
        rows, columns = np.nonzero(np.abs(np.median(estimates, axis=0)) >= least[:, None])
        values = np.einsum("ed,ed->e", block[rows], chosen[columns]) ** 2 / normalisers[rows]
        heavy = values >= eps * (1 - EXACT) / (1 + row_sums.relative_error)
        found.append((start + rows[heavy], key_indices[columns[heavy]], values[heavy]))
    return HeavyEntries(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def num_tables_for(failure: float | int) -> int:
    """The odd number of tables whose median is off by two standard deviations with at most this probability.

    By Chebyshev each is, with probability 1/4 at most; half of them must be for the median.
    """
    num_tables = 1
    while scipy.special.bdtrc(num_tables // 2, num_tables, 0.25) > failure:
        num_tables += 2
    return num_tables
