"""Leverage scores of keys: the x^2-sensitivities from which LevAttention's universal sets are made.

The leverage score of key j is s_j = k_j^T (K^T K)^+ k_j = sup_y <k_j, y>^2 / |K y|^2. Scores lie in [0, 1] and sum to
the rank of K. Source: LevAttention (ICLR 2025, arXiv 2410.05462), section 3.
"""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from levattn.core import linalg
from levattn.core.finite import check_finite

ScoreMethod = Literal["auto", "gram", "refined", "svd"]

# Smallest pivot of the scaled Gram matrix that `auto` accepts, of the first and of the second. The shift of
# `whitening` is a thousandth of it, that of `_refined_scores` less.
_SAFE_PIVOT = 5e-2
_SECOND_SHIFT = 32 * float(jnp.finfo(jnp.float32).eps)
# A column of whitened keys is of squared norm 1, or what its pivot has over the shift; of 1e-5 and less, if its keys
# have nothing there but rounding.
_SECOND_CUT = 1e-3


def leverage_scores(
    keys: Float[Array, "B S H D"] | Float[Array, "S D"],
    *,
    mask: Bool[Array, "B S"] | Bool[Array, " S"] | None = None,
    method: ScoreMethod = "auto",
    centre: bool = False,
    ridge: float = 0.0,
) -> Float[Array, "B H S"] | Float[Array, " S"]:
    """Leverage score of every key within its head.

    Methods:
      gram: Gram matrix, Cholesky factor, one triangular inverse: matmuls and D x D work only, S D^2 operations. It
        squares the condition number: a direction whose singular value is under about 8e-3 of the root mean square,
        columns scaled to equal norms, is damped; scores of well-conditioned keys are low by about 1e-4. Exact rank
        deficiency, zero keys and S < D are fine. What the attention layer uses unless told otherwise.
      refined: gram, and once more on the keys that the first has whitened, which takes back the damping (shifted
        Cholesky QR, Fukaya et al., 2020). Right to 1e-4 up to condition numbers of 1e4, to 1e-3 on rank-deficient keys;
        at twice the cost of gram.
      svd: the definition, with singular values under max(S, D) * eps of the largest cut, columns scaled to equal
        norms. Right at any conditioning that float32 can express; one to three orders slower on accelerators.
      auto: gram where S >= D and the smallest Cholesky pivot of every head says that it is safe (no score is then off
        by more than about 1e-3), else refined, by the same rule, else svd. One bad head sends the whole batch on; under
        `vmap` all three are computed.

    Args:
      keys: Keys, as one matrix or as batch, tokens, heads, width. Any float dtype; accumulation is in float32, so that
        entries must be 0 or of a magnitude between 1e-15 and 1e15: the squares of smaller ones (1e-22, say) underflow
        and score 0, those of larger ones (1e20) overflow and give NaN. Scores have no scale: multiply the keys.
      mask: True for the tokens that exist. The others count as zero keys: they score 0 and move no other score.
      method: See above.
      centre: Score the keys less their mean over the tokens. Softmax does not see a shift common to all keys.
      ridge: Ridge regularisation, relative to the mean squared singular value of K; 1.0 damps the mean direction by
        half.

    Returns:
      Float32 scores.

    Raises:
      ValueError: For another rank of `keys`, an unknown method, a negative ridge, or keys that are not finite (under
        `jax.jit` their head scores NaN; see `levattn.core.finite`).
    """
    if method not in get_args(ScoreMethod):
        raise ValueError(f"{method=} must be one of {', '.join(get_args(ScoreMethod))}")
    if ridge < 0:
        raise ValueError(f"{ridge=} must not be negative")
    if keys.ndim == 2:
        mask = None if mask is None else mask[None]
        return leverage_scores(keys[None, :, None], mask=mask, method=method, centre=centre, ridge=ridge)[0, 0]
    if keys.ndim != 4:
        raise ValueError(f"{keys.shape=} must be (tokens, width) or (batch, tokens, heads, width)")

    check_finite("keys", keys, mask)
    if mask is not None:
        keys = jnp.where(mask[:, :, None, None], keys, 0)
    if centre:
        keys = centre_keys(keys, mask)
    num_keys, head_dim = keys.shape[1], keys.shape[3]
    if ridge:
        # The ridge is D more keys, sqrt(ridge) times the axes: every method then treats it alike.
        keys = jnp.concatenate([keys.astype(jnp.float32), _ridge_keys(keys, ridge)], axis=1)
    if method == "svd" or (method == "auto" and num_keys < head_dim and not ridge):
        scores = _svd_scores(keys)
    elif method == "refined":
        scores, _ = _refined_scores(keys)
    else:
        scores, smallest_pivot = scores_from_gram(keys, gram_matrix(keys))
        if method == "auto":
            is_safe = jnp.all(smallest_pivot > _SAFE_PIVOT)  # False for NaN
            scores = jax.lax.cond(is_safe, lambda: scores, partial(_refined_or_svd_scores, keys))
    scores = scores[..., :num_keys]
    return scores if mask is None else jnp.where(mask[:, None], scores, 0)


def centre_keys(keys: Float[Array, "B S H D"], mask: Bool[Array, "B S"] | None = None) -> Float[Array, "B S H D"]:
    """The keys less their mean over the existing tokens, in float32; tokens that do not exist become zero.

    Columns in which all tokens are equal become exactly zero.
    """
    keys = keys.astype(jnp.float32)
    where = None if mask is None else mask[:, :, None, None]
    along = {"axis": 1, "keepdims": True, "where": where}
    # The mean of equal keys is off by rounding, which would be all that is left of them and count like any direction.
    least, largest = jnp.min(keys, initial=jnp.inf, **along), jnp.max(keys, initial=-jnp.inf, **along)
    centred = keys - jnp.clip(jnp.mean(keys, **along), least, largest)
    return centred if where is None else jnp.where(where, centred, 0)


def gram_matrix(keys: Float[Array, "B S H D"], chunk: int = 256) -> Float[Array, "B H D D"]:
    """K^T K of every head, in float32 (float64 of such keys), summed pairwise over chunks of tokens.

    One long sum of near-equal keys (blank patches, say) drifts, all its entries differently, by more than a Cholesky
    factorisation of the near-singular result can take; short sums added in pairs do not.
    """
    batch, num_keys, heads, head_dim = keys.shape
    num_chunks = -(-num_keys // chunk)
    if num_chunks > 1:
        keys = jnp.pad(keys, ((0, 0), (0, num_chunks * chunk - num_keys), (0, 0), (0, 0)))
    keys = keys.reshape(batch, num_chunks, -1, heads, head_dim)
    dtype = jnp.promote_types(keys.dtype, jnp.float32)
    grams = jnp.einsum("bcshd,bcshe->bchde", keys, keys, precision="highest", preferred_element_type=dtype)
    return sum_pairwise(jnp.moveaxis(grams, 1, 0))


def sum_pairwise(parts: Float[Array, "P *shape"]) -> Float[Array, "*shape"]:
    """The sum over the first axis, halves added to halves: rounding grows with the logarithm of their number."""
    while len(parts) > 1:
        half = len(parts) // 2
        parts = jnp.concatenate([parts[:half] + parts[half : 2 * half], parts[2 * half :]])
    return parts[0]


def _ridge_keys(keys: Float[Array, "B S H D"], ridge: float) -> Float[Array, "B D H D"]:
    head_dim = keys.shape[-1]
    mean_power = jnp.sum(jnp.square(keys.astype(jnp.float32)), axis=(1, 3)) / head_dim
    axes = jnp.eye(head_dim, dtype=jnp.float32)[None, :, None]
    return axes * jnp.sqrt(ridge * mean_power)[:, None, :, None]


def inverse_norms(squared_norms: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 / norm, and 0 for a zero column. Leverage scores do not change when columns are scaled."""
    is_zero = squared_norms == 0
    return jnp.where(is_zero, 0, jax.lax.rsqrt(jnp.where(is_zero, 1, squared_norms)))


def scores_from_gram(
    keys: Float[Array, "B S H D"], gram: Float[Array, "B H D D"]
) -> tuple[Float[Array, "B H S"], Float[Array, "B H"]]:
    """The method "gram" for keys that are some of those in the Gram matrix.

    Args:
      keys: Keys to score.
      gram: K^T K of all keys, these among them; see `gram_matrix`.

    Returns:
      Scores from the Cholesky factor of the Gram matrix, and the smallest pivot of the column-scaled matrix.
    """
    whiten, smallest_pivot = whitening(gram)
    whitened = jnp.einsum("bshd,bhed->bhse", keys.astype(jnp.float32), whiten, precision="highest")
    return jnp.sum(jnp.square(whitened), axis=-1), smallest_pivot


def whitening(gram: Float[Array, "B H D D"]) -> tuple[Float[Array, "B H D D"], Float[Array, "B H"]]:
    """Lower triangular W with W^T W = G^-1: the leverage score of a key k is ||W k||^2.

    Args:
      gram: K^T K of each head.

    Returns:
      W, and the smallest pivot of the column-scaled matrix. Cost: D^3 operations a head.
    """
    scale = inverse_norms(jnp.diagonal(gram, axis1=-2, axis2=-1))
    scaled = gram * scale[..., :, None] * scale[..., None, :]
    identity = jnp.eye(gram.shape[-1], dtype=jnp.float32)
    factor, inverse = linalg.inverse_cholesky(scaled + diagonal_shift(gram.shape[-1]) * identity)
    smallest_pivot = jnp.min(jnp.square(jnp.diagonal(factor, axis1=-2, axis2=-1)), axis=-1)
    return inverse * scale[..., None, :], smallest_pivot


def diagonal_shift(head_dim: int) -> float:
    """What is added to the unit diagonal of a scaled Gram matrix.

    It keeps the factor finite on singular matrices (a quarter of it was seen to fail on equal keys). Keys have no part
    in the null space, so it is not seen there; a direction of squared singular value v it damps by v / (v + shift).
    """
    return max(8 * head_dim, 512) * float(jnp.finfo(jnp.float32).eps)


def _refined_scores(keys: Float[Array, "B S H D"]) -> tuple[Float[Array, "B H S"], Float[Array, "B H"]]:
    """Scores by two rounds of whitening, and the smallest pivot of the second, 0 for a column that was left out."""
    first, _ = whitening(gram_matrix(keys))
    keys = jnp.einsum("bshd,bhed->bshe", keys.astype(jnp.float32), first, precision="highest")
    gram = gram_matrix(keys)
    # Columns that hold rounding alone are left out, else they would count like any other.
    squared_norms = jnp.diagonal(gram, axis1=-2, axis2=-1)
    counts = squared_norms > _SECOND_CUT
    scale = inverse_norms(jnp.where(counts, squared_norms, 0))
    scaled = gram * scale[..., :, None] * scale[..., None, :]
    shift = jnp.where(counts, _SECOND_SHIFT, 1)[..., None] * jnp.eye(gram.shape[-1], dtype=jnp.float32)
    factor, inverse = linalg.inverse_cholesky(scaled + shift)
    whitened = jnp.einsum("bshd,bhed->bhse", keys, inverse * scale[..., None, :], precision="highest")
    pivots = jnp.square(jnp.diagonal(factor, axis1=-2, axis2=-1))
    smallest_pivot = jnp.min(jnp.where(counts, pivots, 0), axis=-1)
    return jnp.sum(jnp.square(whitened), axis=-1), smallest_pivot


def _refined_or_svd_scores(keys: Float[Array, "B S H D"]) -> Float[Array, "B H S"]:
    scores, smallest_pivot = _refined_scores(keys)
    is_safe = jnp.all(smallest_pivot > _SAFE_PIVOT)
    return jax.lax.cond(is_safe, lambda: scores, partial(_svd_scores, keys))


def _svd_scores(keys: Float[Array, "B S H D"]) -> Float[Array, "B H S"]:
    """Scores as squared row norms of the left singular vectors that the rank cut keeps."""
    columns = jnp.swapaxes(keys, 1, 2).astype(jnp.float32)
    columns *= inverse_norms(jnp.sum(jnp.square(columns), axis=2, keepdims=True))
    left, singular, _ = linalg.svd(columns)
    cut = max(columns.shape[-2:]) * jnp.finfo(jnp.float32).eps * singular[..., :1]
    return jnp.sum(jnp.square(left), axis=-1, where=(singular > cut)[..., None, :])
