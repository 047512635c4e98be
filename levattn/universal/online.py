"""The set of keys that serves every row of causal attention."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from levattn.core.basis import real_array
from levattn.core.online import online_leverage_scores
from levattn.universal.sets import UniversalSet, check_eps, threshold_set

_CHUNK = 256
_FARTHEST = 400  # binary orders of magnitude between keys whose squares float64 holds

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
      The set. Its `scores` are online leverage scores, computed in float64. A direction in which the keys so far reach
      less than about 1e-10 of the longest of them is damped by the ridge that keeps rounding out: a key that is heavy
      there alone may be missed. (Float32 keys of one scale are resolved; `universal_set`, which is not causal, resolves
      any.) Cost: that of `online_leverage_scores`.

    Raises:
      ValueError: For eps or chunk out of range, no keys, another rank, a NaN or infinity among the keys, or keys whose
        sizes are 1e120 times apart.
    """
    check_eps(eps)
    keys = real_array("keys", keys)
    if not np.all(np.isfinite(keys)):
        bad = np.flatnonzero(~np.all(np.isfinite(keys), axis=tuple(range(1, keys.ndim))))
        raise ValueError(f"keys must be finite: token {bad[0]} is not (one of {len(bad)}); mask or drop such tokens")
    with jax.enable_x64(True):
        scores = np.asarray(_scores(jnp.asarray(_at_scale_of_first(keys)), chunk=chunk))
    guarantee = (
        f"causal attention with f(x) = x^2: every entry >= {eps} of row i lies on a key of this set, for any queries, "
        "but for directions in which the keys so far reach less than about 1e-10 of the longest of them; each key was "
        "decided by the keys up to it"
    )
    return threshold_set(scores, eps, guarantee, keys)


def _at_scale_of_first(keys):
    """Keys times the power of two that brings the first of them that is not 0 to size 1: it looks into no future."""
    wide = keys.astype(np.float64)
    sizes = np.max(np.abs(wide), axis=tuple(range(1, keys.ndim)), initial=0)
    is_key = sizes > 0
    if not np.any(is_key):
        return wide
    exponents = np.frexp(sizes)[1] - np.frexp(sizes[np.argmax(is_key)])[1]
    too_far = is_key & (np.abs(exponents) > _FARTHEST)
    first = sizes[np.argmax(is_key)]
    if np.any(too_far):
        token = np.argmax(too_far)
        raise ValueError(
            f"token {token} has size {sizes[token]:.3g}, the first {first:.3g}: such keys leave float64 side by side"
        )
    return np.ldexp(wide, -np.frexp(first)[1])
