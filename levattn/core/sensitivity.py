"""Upper bounds on the f-sensitivities of keys: how large a share of any row of attention a key can ever hold.

The f-sensitivity of key j is s_j = sup_y f(<k_j, y>) / sum_l f(<k_l, y>). What is computed here is never below it:

- |x|^p, p <= 2: s_j <= w_j, its Lewis weight. (Exact for p = 2, where w_j is the leverage score.)
- |x|^p, p >= 2: s_j <= r^(p/2-1) w_j, r the rank of the keys. Put u_l = |<k_l, y>| / w_l^(1/p). By the definition of w,
  u_j <= (sum_l w_l u_l^2)^(1/2), and by Hoelder that is <= r^(1/2-1/p) (sum_l w_l u_l^p)^(1/p), as w sums to r.
- even p: <k, y>^p is the square of an inner product of p/2-fold tensor powers, so the leverage score of that power
  of the key is a bound too. Their sum is at most the number of distinct monomials, which is below r^(p/2).
- f with growth (q, p, C), see `levattn.core.functions`: with t_l = |<k_l, y>| / |<k_j, y>|, the share of key l over
  that of key j is at least min(t_l^q, t_l^p) / C. If T >= 1 is the largest t, the sum of these minima is at least
  T^(q-p) sum_l t_l^p, where sum_l t_l^p is at least 1 / b_j and at least T^p / b_max, b bounding the sensitivities of
  |x|^p. The worst T gives s_j <= C b_max^(1-q/p) b_j^(q/p).

Leaving keys out only raises sensitivities, so that a bound among some of the keys holds among all. Keys that float64
cannot resolve beside far longer ones are bounded among themselves; and where f lies between two powers, the bulk of the
keys without the few of largest b.

Sources: LevAttention (arXiv 2410.05462), section 3; Cohen and Peng (arXiv 1412.0588) for Lewis weights.
"""

import functools
import itertools
import math
import numbers

import numpy as np
from jaxtyping import Array, Bool, Float

from levattn.core.basis import at_unit_scale, checked_matrix, orthonormal_basis, row_blocks
from levattn.core.functions import AttentionFunction
from levattn.core.lewis import solve_weights

# Even p takes the smaller of the Lewis and the tensor bound of each key where the tensor power has at most this many
# features; beyond, the Lewis bound alone.
MAX_TENSOR_FEATURES = 512
# Keys shorter than this beside the longest would leave float64 when squared: they are bounded among themselves.
_FAR = 1e-100
_MAX_PEELS = 8  # rounds in which keys of large sensitivity are set aside
_TOLERANCE = 1e-7  # of the Lewis weights; the bounds are raised by it

# Scores down to this fraction below eps pass: rounding must not lose a key whose true score is eps.
SLACK = 1e-5


def check_eps(eps: float | int) -> float:
    """`eps` as a float.

    Raises:
      ValueError: Unless it is a number and 0 < eps <= 1, the range of attention entries.
    """
    if not isinstance(eps, numbers.Real) or isinstance(eps, bool) or not 0 < eps <= 1:
        raise ValueError(f"{eps=} must be in (0, 1]: it is a share of one row of the attention matrix")
    return float(eps)


def passes(scores: Float[np.ndarray, "..."], eps: float | int) -> Bool[np.ndarray, "..."]:
    """Whether each score is at least eps, up to `SLACK`: a key is kept in doubt."""
    return scores >= eps * (1 - SLACK)


def sensitivity_bounds(keys: Float[Array | np.ndarray, "S D"], f: AttentionFunction) -> Float[np.ndarray, " S"]:
    """An upper bound on the f-sensitivity of every key of one head.

    For f = x^2 these are the leverage scores. Rounding is on the safe side: bounds are raised by an estimate of the
    rounding error of the factorisation (for width 64 relatively 1e-13 at best, 1e-7 at condition 1e6, 1e-3 at 1e10).

    Args:
      keys: Keys; ill-conditioned, rank-deficient, repeated and zero keys are fine.
      f: The function of attention, see `levattn.core.functions`.

    What no float64 computation can tell apart is: where the keys are deficient in rank (their singular values, columns
    scaled to equal norms, fall below 32 D roundings of the largest), a part of a key in the missing directions below
    16 D roundings, 4e-15 D of its length, counts as its rounding.

    Returns:
      Bounds in [0, 1], float64; exactly 0 for zero keys where f grows at all. For |x|^p their sum is at most about
      rank^max(1, p/2).

    Raises:
      ValueError: For keys that are not finite, an f without a growth bound (softmax): nothing can be promised then; or
        one that grows by a power p out of the range of `lewis_weights`, 0.1 to 100.
      RuntimeError: Lewis weights did not converge.

    Cost: 3 S D^2 operations for x^2 in D^2 numbers of memory; for other powers 4 S D^2 in each of some 20 iterations
    (see `lewis_weights`) and S D numbers; with the tensor power 3 S F^2 more, F <= 512 features; for f between two
    powers up to 9 times.
    """
    keys = checked_matrix("keys", keys)
    if f.growth is None:
        raise ValueError(f"{f} has no growth bound, so its sensitivities have none: use a power, Huber or Growth")
    lower, upper, constant = f.growth
    bounds = _power_bounds(keys, upper) if lower == upper else _between_powers(keys, lower, upper)
    return np.minimum(constant * bounds, 1)


def _between_powers(keys, lower, upper) -> np.ndarray:
    """Few keys of large b would spoil the bounds of all through b_max: the others are bounded again without them."""
    best, rest = np.ones(len(keys)), np.arange(len(keys))
    for _ in range(_MAX_PEELS + 1):
        bounds = _power_bounds(keys[rest], upper)
        largest = np.max(bounds)
        best[rest] = np.minimum(best[rest], largest ** (1 - lower / upper) * bounds ** (lower / upper))
        kept = bounds < largest / 2
        if 2 * np.sum(kept) < len(rest):
            break
        rest = rest[kept]
    return best


def _power_bounds(keys, p) -> np.ndarray:
    if keys.dtype == np.float64:  # float32 does not reach as far
        sizes = np.concatenate([np.max(np.abs(block), axis=1) for _, block in row_blocks(keys)])
        far = (sizes > 0) & (sizes < _FAR * np.max(sizes))
        if np.any(far):
            bounds = np.empty(len(keys))
            bounds[far], bounds[~far] = _power_bounds(keys[far], p), _power_bounds(keys[~far], p)
            return bounds
    keys = at_unit_scale(keys)
    basis = orthonormal_basis(keys)
    if not basis.rank:
        return np.zeros(len(keys))
    bounds, resolved = np.empty(len(keys)), np.empty(len(keys), bool)
    rows = None if p == 2 else np.empty((len(keys), basis.rank))
    for start, block in row_blocks(keys):
        at = slice(start, start + len(block))
        block_rows = basis.rows(block)
        bounds[at] = np.sum(block_rows**2, axis=1)
        resolved[at] = basis.is_resolved(block)
        if rows is not None:
            rows[at] = block_rows
    if rows is not None:
        bounds = _lewis_bounds(rows, p)
        if p % 2 == 0 and num_tensor_features(basis.rank, int(p) // 2) <= MAX_TENSOR_FEATURES:
            bounds = np.minimum(bounds, _tensor_bounds(rows, int(p) // 2))
    bounds = np.minimum(bounds * (1 + basis.relative_error) ** max(1, p / 2), 1)
    if not np.all(resolved):
        alone = keys[~resolved]
        bounds[~resolved] = 1 if len(alone) == len(keys) else np.maximum(bounds[~resolved], _power_bounds(alone, p))
    return bounds


def _tensor_bounds(rows, degree: int) -> np.ndarray:
    """Leverage scores of the tensor powers of the rows; 1 for those that float64 does not resolve."""
    features = functools.partial(tensor_power, degree=degree)
    basis = orthonormal_basis(rows, features)
    bounds = np.ones(len(rows))
    for start, block in row_blocks(rows, 4096):
        block = features(block)
        scores = np.sum(basis.rows(block) ** 2, axis=1) * (1 + basis.relative_error)
        bounds[start : start + len(block)] = np.where(basis.is_resolved(block), scores, 1)
    return bounds


def _lewis_bounds(rows, p) -> np.ndarray:
    weights = solve_weights(rows, p, _TOLERANCE)
    slack = math.exp(_TOLERANCE * max(1, p / 2))
    return slack * weights * max(1, np.sum(weights) ** (p / 2 - 1) if p > 2 else 1)


def num_tensor_features(width: int, degree: int) -> int:
    """Number of distinct monomials of a degree in so many variables."""
    return math.comb(width + degree - 1, degree)


def tensor_power(rows: Float[np.ndarray, "S D"], degree: int) -> Float[np.ndarray, "S F"]:
    """Features whose inner products are <x, y>^degree: all monomials, each times the root of its multiplicity."""
    columns = []
    for places in itertools.combinations_with_replacement(range(rows.shape[1]), degree):
        repeats = math.prod(math.factorial(places.count(place)) for place in set(places))
        columns.append(math.sqrt(math.factorial(degree) / repeats) * np.prod(rows[:, places], axis=1))
    return np.stack(columns, axis=1)
