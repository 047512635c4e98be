"""What every way of finding a universal set returns, and the one place where scores meet a threshold."""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from levattn.core.sensitivity import SLACK as SLACK
from levattn.core.sensitivity import check_eps as check_eps
from levattn.core.sensitivity import passes as passes


@dataclasses.dataclass(frozen=True, eq=False)
class UniversalSet:
    """The keys that can hold an entry >= eps of the attention matrix, whatever the queries.

    In the paper's symbols: U = {j : s_j >= eps} of K (n x d), and A_ij >= eps implies j in U.

    Attributes:
      indices: Which keys, ascending. `U` stands for their number.
      scores: Upper bounds on their sensitivities, rounded up to float32.
      eps: The threshold.
      size_bound: No more keys than this can pass: the sum of all scores over eps, or all keys.
      guarantee: In plain words, what holds and what does not.
      keys: The keys themselves, where they were kept.
    """

    indices: Int[np.ndarray, " U"]
    scores: Float[np.ndarray, " U"]
    eps: float
    size_bound: float
    guarantee: str
    keys: Float[np.ndarray, "U D"] | None = None

    def __len__(self) -> int:
        return len(self.indices)


def narrowed(keys: Float[np.ndarray, "U D"]) -> Float[np.ndarray, "U D"]:
    """The same keys, as float32 if that holds them exactly."""
    with np.errstate(over="ignore"):
        narrow = np.asarray(keys, np.float32)
    return narrow if np.array_equal(narrow, keys) else np.asarray(keys)


def threshold_set(
    scores: Float[np.ndarray, " S"],
    eps: float | int,
    guarantee: str,
    keys: Float[np.ndarray, "S D"] | None = None,
) -> UniversalSet:
    """The set of the keys whose score passes eps.

    Args:
      scores: Of all keys, upper bounds on their sensitivities.
      eps: The threshold, in (0, 1].
      guarantee: What these scores promise.
      keys: All keys, to keep those of the set with it.

    Returns:
      The set.

    Raises:
      ValueError: For eps out of range.
    """
    eps = check_eps(eps)
    scores = np.asarray(scores)
    indices = np.flatnonzero(passes(scores, eps)).astype(np.int64)
    kept = scores[indices].astype(np.float32)
    return UniversalSet(
        indices=indices,
        scores=np.where(kept < scores[indices], np.nextafter(kept, np.float32(np.inf)), kept),
        eps=eps,
        size_bound=min(float(np.sum(scores, dtype=np.float64)) / (eps * (1 - SLACK)), float(len(scores))),
        guarantee=guarantee,
        keys=None if keys is None else np.asarray(keys[indices]),
    )
