"""Rank and condition of the keys of heads, in float64."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped


class KeySpectra(NamedTuple):
    """What the singular values of the keys of each head say.

    Attributes:
      rank: Singular values above max(S, D) * eps of float32 * the largest: smaller ones are the rounding of keys that
        were computed in float32.
      condition: The largest singular value over the smallest of those. NaN where all keys are zero.
      scaled_condition: The same of keys whose columns are scaled to equal norms, which changes no leverage score: what
        the accuracy of scores depends on.
      effective_rank: exp of the entropy of the squared singular values, as shares of their sum: how many directions the
        keys really use (Roy and Vetterli, 2007). 0 where all keys are zero.
    """

    rank: Int[np.ndarray, "*N"]
    condition: Float[np.ndarray, "*N"]
    scaled_condition: Float[np.ndarray, "*N"]
    effective_rank: Float[np.ndarray, "*N"]


def key_spectra(keys: Shaped[np.ndarray, "*N S D"]) -> KeySpectra:
    """Rank and condition of each head.

    Args:
      keys: Of any float dtype; leading axes count as heads.

    Returns:
      Float64. Cost: an SVD a head on the host, about 6 S D^2 operations.

    Raises:
      ValueError: Keys that are not finite.
    """
    keys = np.asarray(keys, np.float64)
    if not np.all(np.isfinite(keys)):
        raise ValueError("keys must be finite: the model, or an image, is damaged")
    rank, condition, shares = _spectra(keys)
    norms = np.linalg.norm(keys, axis=-2, keepdims=True)
    _, scaled_condition, _ = _spectra(keys / np.where(norms > 0, norms, 1))
    entropy = -np.sum(shares * np.log(np.where(shares > 0, shares, 1)), axis=-1)
    return KeySpectra(rank, condition, scaled_condition, np.where(rank > 0, np.exp(entropy), 0.0))


def _spectra(keys):
    values = np.linalg.svd(keys, compute_uv=False)
    cut = max(keys.shape[-2:]) * np.finfo(np.float32).eps * values[..., :1]
    rank = np.sum((values > cut) & (values > 0), axis=-1)
    smallest = np.take_along_axis(values, np.maximum(rank - 1, 0)[..., None], axis=-1)[..., 0]
    condition = np.where(rank > 0, values[..., 0] / np.where(rank > 0, smallest, 1), np.nan)
    power = np.square(values)
    total = np.sum(power, axis=-1, keepdims=True)
    return rank, condition, power / np.where(total > 0, total, 1)
