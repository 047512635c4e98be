"""The set of keys that serves every row of causal attention."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from levattn.core.online import online_leverage_scores
from levattn.universal.sets import UniversalSet, check_eps, threshold_set

_CHUNK = 256

_scores = jax.jit(online_leverage_scores, static_argnames="chunk")


def causal_universal_set(
    keys: Float[np.ndarray, "S D"] | Float[Array, "S D"], eps: float, *, chunk: int = _CHUNK
) -> UniversalSet:
    """One set of keys that holds every entry >= eps of causal x^2 attention, in every row, whatever the queries.

    Key j is decided by the keys up to j alone: the set of a prefix is the part of this set that lies in the prefix.

    Args:
      keys: Keys of one head in the order of their tokens.
      eps: The threshold, in (0, 1].
      chunk: Tokens at a time.

    Returns:
      The set. Its `scores` are online leverage scores, computed in float64: what float32 keys can express is resolved.
      Cost: that of `online_leverage_scores`.

    Raises:
      ValueError: For eps or chunk out of range, no keys, another rank, or a NaN or infinity among the keys.
    """
    check_eps(eps)
    keys = np.asarray(keys)
    if not np.all(np.isfinite(keys)):
        bad = np.flatnonzero(~np.all(np.isfinite(keys), axis=tuple(range(1, keys.ndim))))
        raise ValueError(f"keys must be finite: token {bad[0]} is not (one of {len(bad)}); mask or drop such tokens")
    with jax.enable_x64(True):
        scores = np.asarray(_scores(jnp.asarray(keys, jnp.float64), chunk=chunk))
    guarantee = (
        f"causal attention with f(x) = x^2: every entry >= {eps} of row i lies on a key of this set, for any queries; "
        "each key was decided by the keys up to it"
    )
    return threshold_set(scores, eps, guarantee, keys)
