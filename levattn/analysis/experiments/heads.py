"""Heads to measure on, drawn or of a model, the queries that are hardest on them, and their attention in float64."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Heads(NamedTuple):
    """Keys of some heads and the queries that meet them."""

    keys: Float[np.ndarray, "H S D"]
    queries: Float[np.ndarray, "H T D"]


def gather_heads(
    num_keys: int,
    width: int,
    seed: int,
    real_keys: Float[np.ndarray, "H S D"] | None = None,
    real_queries: Float[np.ndarray, "H T D"] | None = None,
) -> dict[str, Heads]:
    """One head of Gaussian and one of heavy-tailed (Student's t of two degrees) keys and queries, and "real" ones.

    Args:
      num_keys: Of the drawn keys, which 500 queries meet.
      width: Of the drawn keys.
      seed: Of the drawn keys.
      real_keys: Keys of a model.
      real_queries: Their queries; None: the keys themselves.

    Raises:
      ValueError: Queries without keys, or of other heads or widths.
    """
    rng = np.random.default_rng(seed)
    shape = (1, num_keys, width)
    heads = {
        "Gaussian": Heads(rng.normal(size=shape), rng.normal(size=(1, 500, width))),
        "heavy-tailed": Heads(rng.standard_t(2, size=shape), rng.standard_t(2, size=(1, 500, width))),
    }
    if real_keys is None and real_queries is not None:
        raise ValueError("real_queries need real_keys")
    if real_keys is not None:
        real_queries = real_keys if real_queries is None else real_queries
        if real_queries.shape[::2] != real_keys.shape[::2]:
            raise ValueError(f"{real_queries.shape=} must be (heads, queries, width) of {real_keys.shape=}")
        heads["real"] = Heads(real_keys, real_queries)
    return heads


def singling_queries(keys: Float[np.ndarray, "S D"]) -> Float[np.ndarray, "T D"]:
    """For each of some 500 keys the query (K^T K)^+ k that looks at it alone as far as one can, in float64."""
    keys = np.asarray(keys, np.float64)
    return keys[:: max(1, len(keys) // 500)] @ np.linalg.pinv(keys.T @ keys, rcond=1e-12, hermitian=True)


def attention_matrix(
    queries: Float[np.ndarray, "T D"], keys: Float[np.ndarray, "S D"], power: float | int
) -> Float[np.ndarray, "T S"]:
    """|<q, k>|^p over its sum over the keys, in float64; zeros for a query that no key meets."""
    weights = np.abs(np.asarray(queries, np.float64) @ np.asarray(keys, np.float64).T) ** power
    totals = weights.sum(axis=1, keepdims=True)
    return weights / np.where(totals > 0, totals, 1)
