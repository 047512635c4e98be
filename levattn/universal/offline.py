"""The universal set of keys that are all at hand."""

import numpy as np
from jaxtyping import Array, Float

from levattn.core.basis import checked_matrix
from levattn.core.functions import AttentionFunction, Growth, Power
from levattn.core.sensitivity import sensitivity_bounds
from levattn.universal.sets import UniversalSet, check_eps, threshold_set


def universal_set(
    keys: Float[Array | np.ndarray, "S D"],
    eps: float | int,
    f: AttentionFunction = Power(2),  # noqa: B008
    *,
    keep_keys: bool = False,
) -> UniversalSet:
    """The keys that contain every entry >= eps of attention f(<q, k>) / sum f, for any queries, seen or not.

    Args:
      keys: Keys of one head, K (n x d) in the paper.
      eps: Share of a row of attention, in (0, 1].
      f: Function of attention: `Power(p)`, `Huber`, `Growth` of your own; `Softmax` for a heuristic without a promise.
      keep_keys: Whether the set holds a copy of its keys.

    Returns:
      The set. For |x|^p it has at most rank^max(1, p/2) / eps keys.

    Raises:
      ValueError: For keys that are empty or not finite, or eps or the power of f out of range, see
        `sensitivity_bounds`.
      RuntimeError: Lewis weights did not converge.

    Cost: that of `sensitivity_bounds`; for x^2 3 S D^2 operations, on the host in float64.
    Source: LevAttention (ICLR 2025, arXiv 2410.05462), section 3.
    """
    keys, eps = checked_matrix("keys", keys), check_eps(eps)
    scores = sensitivity_bounds(keys, Power(2) if f.growth is None else f)
    return threshold_set(scores, eps, describe_guarantee(f), keys if keep_keys else None)


def describe_guarantee(f: AttentionFunction) -> str:
    """What thresholding the scores of `universal_set` promises under f, in plain words."""
    if f.growth is None:
        return (
            f"no guarantee: {f} has no small universal set in the worst case; these are the keys whose leverage score "
            "is at least eps, a heuristic whose captured mass must be measured"
        )
    promise = (
        f"every entry >= eps of attention under {f} lies on a key of this set, whatever the queries, for keys taken as "
        "exact to 16 D roundings of float64"
    )
    if isinstance(f, Growth):
        promise = f"if the stated growth holds, which was tried and not proved: {promise}"
    if isinstance(f, Power) and f.p == 2:
        return f"{promise}; and for each key of the set some query gives it an entry of eps (up to rounding)"
    return f"{promise}; keys may be in it that no query gives an entry of eps, as scores are upper bounds"
