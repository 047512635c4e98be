"""Attention logits of many heads in little room: factors of whole numbers, from which softmax is taken again.

A head has T x S logits, but of rank D at most, and softmax sees no shift of a row: so keys are centred, and the
singular value decomposition cut where nothing is left. Both factors of a component, each as long as its singular value,
are rounded to multiples of one step: every component then adds about as much to the error, which is the cheapest way to
a given error, and the weak components need few bits or none.

An error of a logit counts as much as attention falls on its key. So keys are scaled by the root of what they receive
before all this, and back afterwards.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, UInt8, UInt16

_LARGEST = 32767  # Of a signed number in 16 bits.
_LEAST_RECEIVED = 0.25  # Of the mean over the keys: a method may keep keys that are rarely looked at.
_NO_SCALE = 64  # The precision of a key that is not scaled, in quarter octaves.


class Factors(NamedTuple):
    """Singular vectors of the scaled logits of each head, each as long as its singular value, which falls.

    Attributes:
      left: Of the queries.
      right: Of the keys.
      values: The singular values.
      precision: Of each key, see `scale_of`.
    """

    left: Float32[np.ndarray, "R H T"]
    right: Float32[np.ndarray, "R H S"]
    values: Float32[np.ndarray, "R H"]
    precision: UInt8[np.ndarray, "H S"]


class Rounded(NamedTuple):
    """Logits of each head but for a shift of each row: sum_r scale_r left_rt right_rs / scale_of(precision_s).

    Attributes:
      left: Whole numbers, see `signed`.
      right: Whole numbers.
      scale: Of the products.
      precision: Of each key.
    """

    left: UInt16[np.ndarray, "R H T"]
    right: UInt16[np.ndarray, "R H S"]
    scale: Float32[np.ndarray, "R H"]
    precision: UInt8[np.ndarray, "H S"]


def factorise(query: Float[np.ndarray, "T H D"], key: Float[np.ndarray, "S H D"]) -> Factors:
    """The singular value decomposition of <q, k - mean k> / sqrt(D), keys scaled, in float64.

    Cost: 4 H T S D operations, a QR decomposition of queries and keys and an SVD of D x D, a head.
    """
    query, key = (np.moveaxis(np.asarray(x, np.float64), 1, 0) for x in (query, key))
    key = key * key.shape[-1] ** -0.5
    received = _softmax(query @ np.swapaxes(key, 1, 2)).mean(axis=1) * key.shape[1]
    precision = np.rint(2 * np.log2(np.maximum(received, _LEAST_RECEIVED)) + _NO_SCALE).clip(0, 255).astype(np.uint8)
    scale = scale_of(precision)[..., None]
    mean = np.average(key, axis=1, weights=np.broadcast_to(scale**2, key.shape), keepdims=True)
    (query, of_query), (key, of_key) = np.linalg.qr(query), np.linalg.qr((key - mean) * scale)
    left, values, right = np.linalg.svd(of_query @ np.swapaxes(of_key, 1, 2), full_matrices=False)
    left, right = query @ left * values[:, None], key @ np.swapaxes(right, 1, 2) * values[:, None]
    left, right = (np.moveaxis(x, -1, 0).astype(np.float32) for x in (left, right))
    return Factors(left, right, values.T.astype(np.float32), precision)


def scale_of(precision: UInt8[np.ndarray, "H S"]) -> Float[np.ndarray, "H S"]:
    """What a key was multiplied by: the root of the attention it receives, relative to the mean, in quarter octaves."""
    return 2.0 ** ((precision.astype(np.float64) - _NO_SCALE) / 4)


def round_factors(factors: Factors, step: float) -> Rounded:
    """Rounds both factors of every component to multiples of `step`; of a head whose numbers overflow, to coarser ones.

    Args:
      factors: Of the heads.
      step: Error of a scaled logit, about: sqrt(R / (6 S)) steps, where R components are left.

    Returns:
      As many components as the head that needs most of them has.
    """
    largest = np.maximum(abs(factors.left).max((0, 2)), abs(factors.right).max((0, 2)))
    steps = np.maximum(step, largest / _LARGEST)
    left, right = (np.rint(x / steps[:, None]).astype(np.int32) for x in (factors.left, factors.right))
    there = np.any(left, axis=2) & np.any(right, axis=2)
    rank = max(1, 1 + int(np.flatnonzero(there.any(axis=1)).max(initial=0)))
    values = np.where(there, factors.values, 1)[:rank]
    scale = np.where(there[:rank], steps**2 / values, 0)
    return Rounded(zigzag(left[:rank]), zigzag(right[:rank]), scale.astype(np.float32), factors.precision)


def restore(rounded: Rounded) -> Float32[np.ndarray, "H T S"]:
    """The logits, but for a shift of each row."""
    left, right = (signed(x).astype(np.float32) for x in (rounded.left, rounded.right))
    left = np.moveaxis(left * rounded.scale[..., None], 0, -1)
    right = right / scale_of(rounded.precision).astype(np.float32)
    return left @ np.moveaxis(right, 0, 1)


def attention_error(
    query: Float[np.ndarray, "T H D"], key: Float[np.ndarray, "S H D"], rounded: Rounded
) -> Float[np.ndarray, "H T"]:
    """How far softmax of the rounded logits is off: the total variation distance, half the sum of all differences.

    It is in [0, 1], and bounds the error of the share of attention on any set of keys.
    """
    query, key = (np.moveaxis(np.asarray(x, np.float32), 1, 0) for x in (query, key))
    exact = _softmax(query @ np.swapaxes(key, 1, 2) * key.shape[-1] ** -0.5)
    return abs(exact - _softmax(restore(rounded))).sum(axis=-1) / 2


def zigzag(x: np.ndarray) -> UInt16[np.ndarray, "..."]:
    """Whole numbers in 16 bits so that small ones have no second byte: 0, -1, 1, -2, ... become 0, 1, 2, 3, ..."""
    return np.where(x < 0, -2 * x - 1, 2 * x).astype(np.uint16)


def signed(x: UInt16[np.ndarray, "..."]) -> np.ndarray:
    """Undoes `zigzag`."""
    x = x.astype(np.int32)
    return (x >> 1) ^ -(x & 1)


def _softmax(logits):
    probs = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return probs / probs.sum(axis=-1, keepdims=True)
