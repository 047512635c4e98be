"""Row normalisers of polynomial attention: sum_l f(<q, k_l>) for each query, without a row of attention in memory.

Exactly, for even p, as a quadratic form: sum_l <q, k_l>^2 = q^T (K^T K) q, and for p = 4, 6, ... the same of tensor
powers. For any f, by summing over all keys, block by block. Approximately, from a sample of keys.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np
from jaxtyping import Array, Float

from levattn.core.basis import Basis, checked_matrix, orthonormal_basis, row_blocks
from levattn.core.functions import AttentionFunction, Power
from levattn.core.sensitivity import MAX_TENSOR_FEATURES, num_tensor_features, sensitivity_bounds, tensor_power

# Quadratic forms whose rounding error may exceed this share of their value are summed key by key instead.
EXACT = 1e-7
_QUERIES_AT_ONCE, _KEYS_AT_ONCE = 1024, 2048  # 16 MB of products


@dataclasses.dataclass(frozen=True)
class RowSums:
    """Row normalisers of queries to come.

    Attributes:
      fn: From a block of queries (`b D`, float64) to their normalisers (`b`).
      relative_error: Every normaliser lies within a factor 1 +- this of the true one; below 1.
      failure: With at most this probability one of them does not; 0 for those that are not random.
    """

    fn: Callable[[np.ndarray], np.ndarray]
    relative_error: float
    failure: float = 0.0

    def __call__(self, queries: Float[np.ndarray, "b D"]) -> Float[np.ndarray, " b"]:
        return self.fn(queries)


def exact_row_sums(
    keys: Float[Array | np.ndarray, "S D"], f: AttentionFunction, *, num_queries: int | None = None
) -> RowSums:
    """Normalisers to a relative error of 1e-7.

    Even powers go through the quadratic form where that is the cheaper way for `num_queries` queries; queries nearly
    orthogonal to all the keys, for which the form would cancel, are summed key by key.

    Args:
      keys: Keys of one head.
      f: Function of attention.
      num_queries: How many queries will come; None for many.

    Returns:
      The normalisers. Cost of making them, and of each query: D^2 times S, and D^2, for x^2; F^2 times S, and F^2, for
      p = 4, 6, ... with F = (D + p/2 - 1 choose p/2) <= 512 monomials; nothing, and S D, else.

    Raises:
      ValueError: For keys that are empty or not finite.
    """
    keys = checked_matrix("keys", keys)
    by_key = functools.partial(_sums_by_key, keys, f)
    if not (isinstance(f, Power) and f.is_even):
        return RowSums(by_key, EXACT)
    basis = orthonormal_basis(keys)
    degree = int(f.p) // 2
    num_features = num_tensor_features(basis.rank, degree) if basis.rank else 0
    num_queries = math.inf if num_queries is None else num_queries
    form_cost = (len(keys) + num_queries) * num_features**2
    if degree > 1 and (num_features > MAX_TENSOR_FEATURES or form_cost > num_queries * keys.size):
        return RowSums(by_key, EXACT)
    if not all(np.all(basis.is_resolved(block)) for _, block in row_blocks(keys)):
        return RowSums(by_key, EXACT)  # a form that has lost keys to rounding is no normaliser
    features_fn = functools.partial(tensor_power, degree=degree)
    inner = None if degree == 1 or not basis.rank else _feature_basis(keys, basis, features_fn)

    def sums(queries):
        coordinates = basis.coordinates(queries)
        error = basis.coordinate_error(queries, coordinates)
        if inner is not None:
            features = features_fn(coordinates)
            # The coordinates' own error, raised to the power, and that of the form of the features.
            error = degree * error
            coordinates = inner.coordinates(features)
            error = error + inner.coordinate_error(features, coordinates)
        out = np.sum(coordinates**2, axis=1)
        doubtful = ~(error <= EXACT)
        if np.any(doubtful):
            out[doubtful] = by_key(queries[doubtful])
        return out

    return RowSums(sums, EXACT)


def sampled_row_sums(
    keys: Float[Array | np.ndarray, "S D"],
    f: AttentionFunction,
    relative_error: float | int,
    num_queries: int,
    *,
    failure: float = 1e-6,
    seed: int = 0,
) -> RowSums:
    """Normalisers from a sample of keys, for any f with sensitivities.

    Keys are drawn with replacement in proportion to their sensitivity bounds b, and count the inverse of it. One draw
    is at most B = sum b times the true sum, so that by Bernstein's inequality m >= B (2 + 2/3 delta) / delta^2
    ln(2 T / failure) draws put all T normalisers within 1 +- delta, unless with probability `failure`.

    Args:
      keys: Keys of one head.
      f: Function of attention, with a growth bound.
      relative_error: delta, in (0, 1).
      num_queries: T. The queries must not depend on the seed.
      failure: Probability that one of the T errs by more.
      seed: Of the draw.

    Returns:
      The normalisers; m D operations a query. Where m would not be less than the number of keys they are exact.

    Raises:
      ValueError: For a relative error or a failure outside (0, 1), and as `sensitivity_bounds`.
    """
    _check_open_unit(relative_error=relative_error, failure=failure)
    keys = checked_matrix("keys", keys)
    bounds = sensitivity_bounds(keys, f)
    total = float(np.sum(bounds))
    num_draws = total * (2 + 2 / 3 * relative_error) / relative_error**2 * math.log(2 * num_queries / failure)
    num_draws = math.ceil(num_draws)
    if not 0 < num_draws < len(keys):
        return exact_row_sums(keys, f, num_queries=num_queries)
    drawn, counts = np.unique(
        np.random.default_rng(seed).choice(len(keys), num_draws, p=bounds / total), return_counts=True
    )
    weights = counts * total / (num_draws * bounds[drawn])
    return RowSums(functools.partial(_sums_by_key, keys[drawn], f, weights=weights), relative_error, failure)


def jl_row_sums(
    keys: Float[Array | np.ndarray, "S D"],
    relative_error: float | int,
    num_queries: int,
    *,
    failure: float = 1e-6,
    seed: int = 0,
) -> RowSums:
    """Normalisers of x^2 by random projection: sum_l <q, k_l>^2 = |R q|^2, measured along g Gaussian directions.

    By Johnson and Lindenstrauss g >= ln(2 T / failure) / (delta^2 / 4 - delta^3 / 6) directions put all T norms within
    1 +- delta, unless with probability `failure`. It pays only for keys wider than that.

    Args:
      keys: Keys of one head.
      relative_error: delta, in (0, 1).
      num_queries: T. The queries must not depend on the seed.
      failure: Probability that one of the T errs by more.
      seed: Of the directions.

    Returns:
      The normalisers; D g operations a query. Where g would not be less than the rank of the keys they are exact.

    Raises:
      ValueError: For a relative error or a failure outside (0, 1), or keys that are empty or not finite.
    """
    _check_open_unit(relative_error=relative_error, failure=failure)
    keys = checked_matrix("keys", keys)
    basis = orthonormal_basis(keys)
    num_directions = math.ceil(math.log(2 * num_queries / failure) / (relative_error**2 / 4 - relative_error**3 / 6))
    if num_directions >= basis.rank or basis.rank < keys.shape[1]:
        return exact_row_sums(keys, Power(2), num_queries=num_queries)
    directions = np.random.default_rng(seed).normal(size=(basis.rank, num_directions)) / math.sqrt(num_directions)
    projection = basis.unwhiten.T @ directions
    return RowSums(lambda queries: np.sum((queries @ projection) ** 2, axis=1), relative_error, failure)


def _check_open_unit(**numbers):
    for name, number in numbers.items():
        if not 0 < number < 1:
            raise ValueError(f"{name}={number} must be in (0, 1)")


def _feature_basis(keys, basis: Basis, features_fn) -> Basis:
    return orthonormal_basis(keys, lambda block: features_fn(basis.rows(block)))


def _sums_by_key(keys, f, queries, weights=None):
    total = np.zeros(len(queries))
    for start, block in row_blocks(keys, _KEYS_AT_ONCE):
        weight = 1 if weights is None else weights[start : start + len(block)]
        for first, some in row_blocks(queries, _QUERIES_AT_ONCE):
            total[first : first + len(some)] += np.sum(f(some @ block.T) * weight, axis=1)
    return total
