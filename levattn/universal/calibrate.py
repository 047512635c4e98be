"""Choosing eps: from the number of keys that one can afford, or from the attention that they are to capture."""

import math
import numbers
from collections.abc import Iterator

import numpy as np
from jaxtyping import Array, Float

from levattn.core.basis import at_unit_scale, checked_matrix, row_blocks
from levattn.core.functions import AttentionFunction, Power, Softmax
from levattn.core.heavy import check_row_sums, checked_pair, largest_exponents
from levattn.core.sensitivity import SLACK, sensitivity_bounds

_BLOCK_BYTES = 1 << 26


def choose_eps(
    keys: Float[Array | np.ndarray, "S D"],
    f: AttentionFunction = Power(2),  # noqa: B008
    *,
    size: int | None = None,
    mass: float | int | None = None,
    queries: Float[Array | np.ndarray, "T D"] | None = None,
    coverage: float | int | None = None,
) -> float:
    """The eps whose universal set has a size, or captures a share of attention. Give exactly one of `size` and `mass`.

    - `size`: the smallest eps whose set has no more keys than this; keys of equal score are in or out together.
    - `mass` with `queries`: the largest eps whose set receives this share of these queries' attention, on average.
    - `mass`, `queries` and `coverage`: its set receives this share from a *new* query with at least the probability
      `coverage`, if the new query and these come in exchangeable order (split conformal calibration).

    Args:
      keys: Keys of one head.
      f: Function of attention. Under `Softmax` the attention is the softmax of <q, k> / sqrt(D), and the set the
        heuristic one of the leverage scores.
      size: Largest number of keys.
      mass: Share of attention, in (0, 1).
      queries: Queries to measure it on. A query with no attention at all counts as captured.
      coverage: Probability for a new query, in (0, 1).

    Returns:
      eps, in (0, 1], for `universal_set` with the same keys and f.

    Raises:
      ValueError: For arguments that do not go together or are out of range; for a size below the number of keys of
        score 1, a mass that keys of score 0 hold, or a coverage that so few queries cannot show; for row sums of f that
        leave float64 (under a power they cannot: rows are scaled).

    Cost: that of the scores, and 2 T S D operations for a mass.
    """
    if (size is None) == (mass is None):
        raise ValueError(f"{size=}, {mass=}: give exactly one of them")
    if size is not None and (queries is not None or coverage is not None):
        raise ValueError(f"queries and coverage go with a mass, not with {size=}: leave them out")
    if size is not None and (isinstance(size, bool) or not isinstance(size, numbers.Integral)):
        raise ValueError(f"{size=} must be an int: it is a number of keys")
    keys = checked_matrix("keys", keys)
    scores = sensitivity_bounds(keys, Power(2) if f.growth is None else f)
    order = np.argsort(-scores, kind="stable")
    if size is not None:
        return _eps_for_size(scores[order], size)
    if queries is None:
        raise ValueError(f"{mass=} needs queries to measure it on")
    if not 0 < mass < 1:
        raise ValueError(f"{mass=} must be in (0, 1)")
    queries, keys, _ = checked_pair(queries, keys, 1.0)
    if coverage is None:
        num_kept = _num_for_mean(queries, keys[order], f, mass)
    else:
        num_kept = _num_for_coverage(queries, keys[order], f, mass, coverage)
    if num_kept and scores[order[num_kept - 1]] == 0:
        raise ValueError(f"{mass=} cannot be reached: keys of score 0 receive attention; lower it")
    # The highest score keeps no key too many where none is needed.
    return float(scores[order[max(num_kept, 1) - 1]]) or 1.0


def _eps_for_size(falling, size: int) -> float:
    if size < 1:
        raise ValueError(f"{size=} must be at least 1")
    if size >= len(falling) or falling[size] == 0:
        positive = falling[:size][falling[:size] > 0]
        return float(positive[-1]) if len(positive) else 1.0
    eps = float(np.nextafter(falling[size] * (1 + 2 * SLACK), 2))  # just too much for the first key to leave out
    if eps > 1:
        raise ValueError(f"{size=} is too small: {int(np.sum(falling >= falling[size]))} keys have a score of 1")
    return eps


def _num_for_mean(queries, keys, f, mass) -> int:
    received, num_queries = np.zeros(len(keys)), 0
    for attention, is_empty in _attention(queries, keys, f):
        received += np.sum(attention, axis=0)
        num_queries += np.sum(~is_empty)
    return int(np.searchsorted(np.cumsum(received), mass * num_queries)) + 1 if num_queries else 0


def _num_for_coverage(queries, keys, f, mass, coverage) -> int:
    if not 0 < coverage < 1:
        raise ValueError(f"{coverage=} must be in (0, 1)")
    rank = math.ceil((len(queries) + 1) * coverage)
    if rank > len(queries):
        needed = math.ceil(coverage / (1 - coverage))
        raise ValueError(f"{coverage=} needs at least {needed} queries to calibrate on, not {len(queries)}")
    needed = [
        np.where(is_empty, 0, np.sum(np.cumsum(attention, axis=1) < mass, axis=1) + 1)
        for attention, is_empty in _attention(queries, keys, f)
    ]
    return int(np.sort(np.concatenate(needed))[rank - 1])


def _attention(queries, keys, f) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of rows of the attention matrix, and which of them have none."""
    keys = keys.astype(np.float64)
    is_power = isinstance(f, Power)
    if is_power:
        keys = at_unit_scale(keys)
    for start, block in row_blocks(queries, max(1, _BLOCK_BYTES // (24 * len(keys)))):
        if is_power:  # the attention of a query is that of its multiples
            block = np.ldexp(block, -np.frexp(np.max(np.abs(block), axis=1, keepdims=True))[1])
            block = np.ldexp(block, -largest_exponents(block, keys))
        products = block @ keys.T
        if isinstance(f, Softmax):
            products *= keys.shape[1] ** -0.5
            products -= np.max(products, axis=1, keepdims=True)
        values = f(products)
        sums = np.sum(values, axis=1)
        if f.growth is not None:
            check_row_sums(sums, block, keys, f, start)
        yield values / np.where(sums > 0, sums, 1)[:, None], sums == 0
