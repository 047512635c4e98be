"""A universal set without a pass of S D^2 operations: a superset of the exact one, with high probability."""

import numpy as np
from jaxtyping import Array, Float

from levattn.core.basis import checked_matrix
from levattn.core.sketch import sketched_leverage_bounds
from levattn.universal.sets import UniversalSet, check_eps, threshold_set


def sketched_universal_set(
    keys: Float[Array | np.ndarray, "S D"],
    eps: float | int,
    *,
    distortion: float | int = 3,
    failure: float = 1e-2,
    num_directions: int | None = 32,
    keep_keys: bool = False,
    seed: int = 0,
) -> UniversalSet:
    """`universal_set` for x^2, from a sparse embedding of the keys. For when there are millions of them.

    Args:
      keys: Keys of one head.
      eps: Share of a row of attention, in (0, 1].
      distortion: The threshold on the sketched scores is eps / (1 + distortion).
      failure: Probability that the set misses a key of the exact one.
      num_directions: Gaussian directions of a first screening; None for none. See `sketched_leverage_bounds`.
      keep_keys: Whether the set holds a copy of its keys.
      seed: Of all that is random.

    Returns:
      The set: typically that of the exact scores for eps / (1 + distortion), so up to 1 + distortion times as large.

    Raises:
      ValueError: For keys that are empty or not finite, or numbers out of range.
    """
    keys, eps = checked_matrix("keys", keys), check_eps(eps)
    scores = sketched_leverage_bounds(
        keys, distortion=distortion, failure=failure, num_directions=num_directions, refine_above=eps / 2, seed=seed
    )
    guarantee = (
        f"with probability at least {1 - failure:g} over the seed, every entry >= eps of x^2-attention lies on a key "
        f"of this set, whatever the queries, for keys that do not depend on the seed; scores may be "
        f"{1 + distortion:g} times too high and more"
    )
    return threshold_set(scores, eps, guarantee, keys if keep_keys else None)
