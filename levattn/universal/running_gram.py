"""The Gram matrix of keys that arrive in chunks, kept in coordinates in which it is close to the identity.

Adding up K^T K as it stands squares the condition number, and millions of rows add their rounding to it. Here every
chunk is first multiplied by a *whitening* matrix, made from the keys seen earlier. What is added up is then a
well-conditioned matrix, in a two-float sum, and the same product gives the leverage scores of the chunk: one matmul
for the scores, one for the Gram matrix.

The whitening is made anew when the number of keys has doubled, and when a chunk brings something that the old one
does not resolve; the chunk then goes by way of a QR factorisation below the old triangle. Between two such *refreshes*
scores are taken as of the last one: too large, never too small, since scores only fall as keys arrive. While the
keys are well-conditioned, their Gram matrix is whitened in place of them, and a weighted norm shows that most chunks
hold no key worth scoring: one matmul.

What rounding can do, with machine epsilon u of the dtype and kappa the condition number of the keys (columns scaled
to equal norms): a direction is known to about u * kappa. Scores are inflated by that much, so that they stay upper
bounds; directions with kappa over 1 / (D u) are *unresolved*, and a key that has a part in one, beyond its own
rounding, gets the score infinity. Use float64 where that matters.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from levattn.core.leverage import gram_matrix
from levattn.universal import counts

# A chunk that adds more than this to a whitened Gram matrix, which is at least the identity, calls for a refresh: its
# rounding would be seen beside what was there before.
LARGEST_GROWTH = 16.0
# Up to this condition number the square of it, times that growth and the rounding of products, is within `slack`.
_MILD_CONDITION = 16.0


class RunningGram(NamedTuple):
    """Keys so far, as D x D numbers. A pytree of arrays: any checkpointer can save it.

    Attributes:
      whiten: Turns keys into coordinates in which those up to the last refresh have the identity as Gram matrix.
      factor: Of the keys up to the last refresh, factor^T factor = K^T K; its rows of unresolved directions are 0.
      gram: Identity plus the Gram matrix of the whitened keys since then; high part of a two-float sum.
      gram_low: Its low part.
      inflation: What each whitened coordinate, squared, is multiplied by to be an upper bound.
      rounding: Rounding may take from the length of a whitened key the length of the key times these, at most.
      norm_weights: Its score is at most the squared length of the key times these. Infinite where the keys are too
        ill-conditioned for that to be of use, or for their Gram matrix to be summed as they stand.
      unresolved: True for the coordinates of directions in which no key had a part beyond rounding.
      num_keys: Keys so far, as two uint32 (high, low): streams are longer than an int32 can count.
      refreshed_at: `num_keys` at the last refresh.
      num_refreshes: So far. Scores from before a refresh and after it differ.
      num_bad: Keys with a NaN or infinity. They are left out, and whoever finishes has to refuse.
      first_bad: Where the first of them was, as `num_keys`.
      num_tiny: Keys below the smallest normal number, which accelerators and XLA:CPU take for 0. As `num_bad`.
    """

    whiten: Float[Array, "D D"]
    factor: Float[Array, "D D"]
    gram: Float[Array, "D D"]
    gram_low: Float[Array, "D D"]
    inflation: Float[Array, " D"]
    rounding: Float[Array, " D"]
    norm_weights: Float[Array, " D"]
    unresolved: Bool[Array, " D"]
    num_keys: UInt[Array, "2"]
    refreshed_at: UInt[Array, "2"]
    num_refreshes: Int[Array, ""]
    num_bad: Int[Array, ""]
    first_bad: UInt[Array, "2"]
    num_tiny: Int[Array, ""]


def slack(dtype) -> float:
    """How far below a threshold a computed score still passes, relative to it. Covers the rounding of sums and products
    of whitened keys; what the condition number adds is in `RunningGram.inflation`."""
    return 2.0**13 * float(jnp.finfo(dtype).eps)


def rounding_tolerance(head_dim: int) -> int:
    """A part of a key in a direction that no key so far has counts as rounding up to so many roundings of the products
    that it is the sum of."""
    return max(2 * head_dim, 32)


def init_gram(head_dim: int, dtype=jnp.float32) -> RunningGram:
    """No keys yet.

    Args:
      head_dim: Width of the keys, D.
      dtype: Of the computation. float64 needs `jax_enable_x64`.

    Raises:
      ValueError: For a width below 1, or float64 while JAX has it switched off.
    """
    if head_dim < 1:
        raise ValueError(f"{head_dim=} must be at least 1")
    dtype = jnp.dtype(dtype)
    if dtype == jnp.float64 and not jax.config.jax_enable_x64:
        raise ValueError("dtype=float64 needs jax.config.update('jax_enable_x64', True) at the start of the program")
    square = (head_dim, head_dim)
    # No array twice: callers may donate the state.
    return RunningGram(
        whiten=jnp.eye(head_dim, dtype=dtype),
        factor=jnp.zeros(square, dtype),
        gram=jnp.eye(head_dim, dtype=dtype),
        gram_low=jnp.zeros(square, dtype),
        inflation=jnp.ones(head_dim, dtype),
        rounding=jnp.zeros(head_dim, dtype),
        norm_weights=jnp.full(head_dim, jnp.inf, dtype),
        unresolved=jnp.ones(head_dim, bool),
        num_keys=jnp.zeros(2, jnp.uint32),
        refreshed_at=jnp.zeros(2, jnp.uint32),
        num_refreshes=jnp.zeros((), jnp.int32),
        num_bad=jnp.zeros((), jnp.int32),
        first_bad=jnp.zeros(2, jnp.uint32),
        num_tiny=jnp.zeros((), jnp.int32),
    )


def add_keys(
    gram: RunningGram,
    keys: Float[Array | np.ndarray, "C D"],
    num_valid: Int[Array, ""] | int,
    *,
    floor: float = 0.0,
    refresh_if: Callable[[Float[Array, " C"]], Bool[Array, ""]] | None = None,
) -> tuple[RunningGram, Float[Array, " C"]]:
    """Adds a chunk, and scores it.

    Args:
      gram: Keys so far.
      keys: The chunk. Keep its shape the same from call to call: each shape is compiled.
      num_valid: How many of its leading rows count; the rest is padding.
      floor: For a caller who asks only which scores reach it: those that do not may be returned as any larger number
        below it. Saves half of the work on well-conditioned keys.
      refresh_if: Given the scores as of the last refresh, whether they are not sharp enough for the caller.

    Returns:
      The sum, and the scores of the chunk's rows under it: upper bounds on their leverage scores among all keys so
      far, hence among all keys that will ever have been; infinity where unresolved, 0 for padding and zero keys. Sharp
      after a refresh, else up to twice too large for keys alike in distribution. Cost: 4 C D^2 operations, half of it
      while keys are well-conditioned and below `floor`; a QR factorisation of the chunk when it brings something new.
    """
    is_row = jnp.arange(len(keys)) < num_valid
    is_tiny = is_row & _are_tiny(jnp.asarray(keys), gram.gram.dtype)
    keys = jnp.asarray(keys, gram.gram.dtype)
    # One pass finds them all: NaN and infinity survive a sum of magnitudes.
    is_bad = is_row & ~jnp.isfinite(jnp.sum(jnp.abs(keys), axis=1))
    keys = jnp.where((is_row & ~is_bad)[:, None], keys, 0)
    added, scores = jax.lax.cond(
        jnp.all(jnp.isfinite(gram.norm_weights)),
        partial(_measure_mild, gram, keys, floor),
        partial(_measure, gram, keys),
    )
    num_keys = counts.add_small(gram.num_keys, num_valid)

    doubled = counts.at_least(num_keys, counts.add(gram.refreshed_at, gram.refreshed_at))
    news = jnp.any(jnp.isinf(scores)) | ~(jnp.max(jnp.diagonal(added)) <= LARGEST_GROWTH)
    stale = doubled if refresh_if is None else doubled | refresh_if(scores)

    def summed():
        high, low = _two_sum(gram.gram, added)
        return gram._replace(gram=high, gram_low=gram.gram_low + low)

    def refreshed(stacked):
        new = from_factors(stacked, gram)._replace(refreshed_at=num_keys)
        return new, _scores(new, _whitened(new, keys), keys)

    new, scores = jax.lax.switch(
        jnp.where(news, 2, jnp.where(stale, 1, 0)),
        [
            lambda: (summed(), scores),
            lambda: refreshed(triangular_factor(summed())),
            lambda: refreshed(jnp.concatenate([triangular_factor(gram), keys])),
        ],
    )
    bad_at = counts.add_small(gram.num_keys, jnp.argmax(is_bad))
    return new._replace(
        num_keys=num_keys,
        num_bad=gram.num_bad + jnp.sum(is_bad, dtype=jnp.int32),
        first_bad=jnp.where((gram.num_bad == 0) & jnp.any(is_bad), bad_at, gram.first_bad),
        num_tiny=gram.num_tiny + jnp.sum(is_tiny, dtype=jnp.int32),
    ), jnp.where(is_row, scores, 0)


@jax.jit
def add_summed(gram: RunningGram, added: Float[Array | np.ndarray, "D D"], num_keys: UInt[Array, "2"]) -> RunningGram:
    """Adds keys of which only the Gram matrix is known: `levattn.universal.backlog` says when that is enough.

    Args:
      gram: Keys so far.
      added: The Gram matrix of the keys to add, whitened by `gram.whiten`.
      num_keys: Their number.
    """
    high, low = _two_sum(gram.gram, added)
    num_keys = counts.add(gram.num_keys, num_keys)
    return gram._replace(gram=high, gram_low=gram.gram_low + low, num_keys=num_keys)


def merge_grams(first: RunningGram, second: RunningGram) -> RunningGram:
    """The Gram matrix of both sets of keys, which may have been seen on different machines; freshly whitened.

    Positions of bad keys are kept as each of the two counted them.
    """
    merged = from_factors(jnp.concatenate([triangular_factor(first), triangular_factor(second)]), first)
    num_keys = counts.add(first.num_keys, second.num_keys)
    return merged._replace(
        num_keys=num_keys,
        refreshed_at=num_keys,
        num_refreshes=first.num_refreshes + second.num_refreshes + 1,
        num_bad=first.num_bad + second.num_bad,
        first_bad=jnp.where(first.num_bad > 0, first.first_bad, second.first_bad),
        num_tiny=first.num_tiny + second.num_tiny,
    )


def triangular_factor(gram: RunningGram) -> Float[Array, "D D"]:
    """R with R^T R the Gram matrix of all keys so far: what a shard has to send for others to know it."""
    lower = jnp.linalg.cholesky(gram.gram + gram.gram_low)
    return jnp.where(gram.unresolved[:, None], 0, lower.T @ gram.factor)


def from_factors(factors: Float[Array, "M D"], like: RunningGram) -> RunningGram:
    """The Gram matrix of the keys behind several factors, one below the other; counts are those of `like`."""
    return _refresh(factors, like)


def sharpen(gram: RunningGram) -> RunningGram:
    """The same keys with the whitening made anew, so that `score` is as sharp as it can be."""
    return from_factors(triangular_factor(gram), gram)._replace(refreshed_at=gram.num_keys)


def score(gram: RunningGram, keys: Float[Array | np.ndarray, "C D"]) -> Float[Array, " C"]:
    """Upper bounds on the leverage scores of keys that are among those in `gram`, as of its last refresh.

    Rows that are not finite score 0. Cost: 2 C D^2 operations.
    """
    keys = jnp.asarray(keys, gram.gram.dtype)
    keys = jnp.where(jnp.isfinite(jnp.sum(jnp.abs(keys), axis=1))[:, None], keys, 0)
    return _scores(gram, _whitened(gram, keys), keys)


def rank(gram: RunningGram) -> Int[Array, ""]:
    """Directions that the keys up to the last refresh resolve: their scores sum to it."""
    return jnp.sum(~gram.unresolved)


def _are_tiny(keys, dtype):
    """Which keys are not 0, but will be taken for it. By their bits: to compare them is to take them for 0."""
    if not jnp.issubdtype(keys.dtype, jnp.floating) or jnp.finfo(keys.dtype).minexp > jnp.finfo(dtype).minexp:
        return jnp.zeros(len(keys), bool)
    info = jnp.finfo(keys.dtype)
    if info.minexp < jnp.finfo(dtype).minexp:
        sizes = jnp.max(jnp.abs(keys), axis=1)
        return (sizes > 0) & (sizes < jnp.finfo(dtype).tiny)
    bits = jax.lax.bitcast_convert_type(keys, f"uint{info.bits}") << 1  # without the sign
    largest = jnp.max(bits, axis=1)
    return (largest > 0) & (largest < 1 << (info.nmant + 1))


def _measure(gram, keys):
    """What a chunk adds to the whitened Gram matrix, and its scores."""
    rows = _whitened(gram, keys)
    return _block_gram(jnp.where(gram.unresolved, 0, rows)), _scores(gram, rows, keys)


def _measure_mild(gram, keys, floor):
    """The same for well-conditioned keys: whitens their Gram matrix in place of them, and scores them if need be."""
    added = jnp.matmul(gram.whiten.T, _block_gram(keys), precision="highest")
    added = jnp.matmul(added, gram.whiten, precision="highest")
    bounds = jnp.sum(jnp.square(keys * gram.norm_weights), axis=1)
    return added, jax.lax.cond(
        jnp.any(bounds >= floor), lambda: _scores(gram, _whitened(gram, keys), keys), lambda: bounds
    )


def _whitened(gram, keys):
    return jnp.matmul(keys, gram.whiten, precision="highest")


def _scores(gram, rows, keys):
    weights = jnp.where(gram.unresolved, 0, gram.inflation)
    lengths = jnp.sqrt(jnp.sum(rows * rows * weights, axis=1))
    scores = jnp.square(lengths + jnp.sqrt(jnp.sum(jnp.square(keys * gram.rounding), axis=1)))
    scores = jnp.where(jnp.isnan(scores), jnp.inf, scores)  # in doubt a key is kept

    def with_unresolved():
        # A part beyond the rounding of the product it was computed by. Term by term, so that a tiny column counts.
        size = jnp.matmul(jnp.abs(keys), jnp.abs(gram.whiten), precision="highest")
        tolerance = rounding_tolerance(keys.shape[1]) * jnp.finfo(keys.dtype).eps
        beyond = jnp.any((jnp.abs(rows) > tolerance * size) & gram.unresolved, axis=1)
        return jnp.where(beyond, jnp.inf, scores)

    return jax.lax.cond(jnp.any(gram.unresolved), with_unresolved, lambda: scores)


def _block_gram(rows):
    """rows^T rows, summed pairwise over blocks."""
    return gram_matrix(rows[None, :, None])[0, 0]


def _refresh(stacked, gram):
    """Whitening of the keys whose Gram matrix is stacked^T stacked."""
    dtype, head_dim = stacked.dtype, stacked.shape[1]
    epsilon = jnp.finfo(dtype).eps
    largest = jnp.max(jnp.abs(stacked), axis=0)
    largest = jnp.where(largest > 0, largest, 1)
    stacked = stacked / largest  # first, so that no square overflows
    norms = jnp.sqrt(jnp.sum(stacked * stacked, axis=0))
    norms = jnp.where(norms > 0, norms, 1)
    triangle = jnp.linalg.qr(stacked / norms, mode="r")
    scale = largest * norms
    triangle = jnp.pad(triangle, ((0, head_dim - len(triangle)), (0, 0)))
    _, singular, right = jnp.linalg.svd(triangle)
    # Entries that are rounding alone would mix a column that no key has touched with those that keys have.
    right = jnp.where(jnp.abs(right) > 8 * epsilon, right, 0)
    cut = head_dim * epsilon * singular[0]
    unresolved = ~(singular > cut)
    safe = jnp.where(unresolved, 1, singular)
    inflation = 1 / jnp.square(1 - jnp.where(unresolved, 0, 0.5 * cut / safe))
    # Squares of keys as they stand must neither vanish nor overflow.
    square_safe = (largest > jnp.sqrt(jnp.finfo(dtype).tiny) * 2**16) & (
        largest < jnp.sqrt(jnp.finfo(dtype).max) / 2**16
    )
    is_mild = (singular[-1] * _MILD_CONDITION > singular[0]) & jnp.all(square_safe)
    return gram._replace(
        whiten=right.T / scale[:, None] / safe,
        factor=jnp.where(unresolved, 0, singular)[:, None] * right * scale,
        gram=jnp.eye(head_dim, dtype=dtype),
        gram_low=jnp.zeros((head_dim, head_dim), dtype),
        inflation=inflation,
        rounding=2 * epsilon * jnp.sqrt(head_dim * jnp.sum(inflation / safe**2, where=~unresolved)) / scale,
        norm_weights=jnp.where(is_mild, jnp.sqrt(jnp.max(inflation)) / safe[-1] / scale, jnp.inf),
        unresolved=unresolved,
        num_refreshes=gram.num_refreshes + 1,
    )


def _two_sum(a, b):
    """a + b as a sum and its rounding error (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)
