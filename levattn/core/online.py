"""Online leverage scores: the scores of causal attention, which see the past alone.

The online score of key j is its leverage score among the keys up to itself, t_j = k_j^T (K_j^T K_j)^+ k_j with K_j the
first j keys. Scores only fall as keys arrive, so for f(x) = x^2 and causal attention (row i sees keys 1 to i)
A_ij <= score of j among the keys up to i <= t_j: the keys with t_j >= eps hold every entry >= eps of every causal row,
and t_j does not depend on what comes after j. Source: LevAttention (ICLR 2025, arXiv 2410.05462) names this as future
work; online leverage scores: Cohen, Musco and Pachocki (arXiv 1604.05448).

How: G = R^T R is the Gram matrix of the keys so far. With W = K_c R^-1 for a chunk K_c, the Cholesky factor L of
I + W W^T holds all scores of the chunk at once, L_jj^2 = 1 + k_j^T G_<j^-1 k_j = 1 / (1 - t_j). The chunk then enters
as R <- U R with U^T U = I + W^T W. All of it is matrix products and two factorisations a chunk, no step a token.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from levattn.core import linalg

# Directions in which the keys so far reach less than this many roundings of the longest key count as not yet seen.
_RIDGE_ROUNDINGS = 64
# I + W W^T is factored as it stands while no key is longer, squared, in the coordinates W: rounding is then relative to
# what is small. Beyond that (the first keys, new directions) both factors come from QR, which does not square W.
_SAFE_SQUARED_NORM = 100
DEFAULT_CHUNK = 64


def online_leverage_scores(
    keys: Float[Array, "B S H D"] | Float[Array, "S D"],
    *,
    mask: Bool[Array, "B S"] | Bool[Array, " S"] | None = None,
    chunk: int = DEFAULT_CHUNK,
) -> Float[Array, "B H S"] | Float[Array, " S"]:
    """Leverage score of every key among itself and the keys before it in its head.

    A key in a direction that none before it has scores 1, a zero key 0. The scores of a head sum to at most
    D (1 + log of the growth of the smallest squared singular value), where leverage scores sum to the rank.

    Args:
      keys: Keys, as one matrix or as batch, tokens, heads, width. Float64 is computed in float64, else in float32.
      mask: True for the tokens that exist. The others count as zero keys.
      chunk: Tokens at a time. It is no part of the definition: results differ by rounding.

    Returns:
      Scores in [0, 1]. In float32 they were within 2e-3 of a float64 SVD for prefixes of condition 1e4; directions in
      which the prefix has less than about 1e-4 of its longest key are damped, so that scores come out too small. Where
      a heavy key must not be lost at any conditioning, compute in float64, as `levattn.universal.online` does. Cost:
      4 S D^2 + 2 S C D operations and two factorisations a chunk of C; memory: a copy of the keys, D^2 + C (C + D)
      numbers a head.

    Raises:
      ValueError: For another rank of `keys`, no keys, or a chunk below 1.
    """
    if keys.ndim == 2:
        mask = None if mask is None else mask[None]
        return online_leverage_scores(keys[None, :, None], mask=mask, chunk=chunk)[0, 0]
    if keys.ndim != 4 or 0 in keys.shape:
        raise ValueError(f"{keys.shape=} must be (tokens, width) or (batch, tokens, heads, width), none of them 0")
    batch, _, heads, _ = keys.shape
    if mask is not None:
        keys = jnp.where(mask[:, :, None, None], keys, 0)
    chunks = split_chunks(_by_head(keys), chunk)
    _, scores = jax.lax.scan(absorb, initial_factor(chunks), chunks)
    return jnp.moveaxis(scores, 0, 1).reshape(batch, heads, -1)[..., : keys.shape[1]]


def initial_factor(chunks: Float[Array, "num_chunks N C D"]) -> Float[Array, "N D D"]:
    """The factor R before any key: a ridge at the size of rounding errors of each head's first key that is not zero."""
    norms = jnp.moveaxis(_norms(chunks), 0, 1).reshape(chunks.shape[1], -1)
    first = jnp.take_along_axis(norms, jnp.argmax(norms > 0, axis=1)[:, None], axis=1)
    # Keys before the first that is not zero score 0 under any finite ridge: this looks into no future.
    return _ridge(jnp.where(first > 0, first, 1), chunks.shape[-1])


def absorb(
    factor: Float[Array, "N D D"], keys: Float[Array, "N C D"]
) -> tuple[Float[Array, "N D D"], Float[Array, "N C"]]:
    """Takes the next chunk of keys of each of N heads into the factor R of the Gram matrix so far.

    Args:
      factor: Upper triangular, from `initial_factor` or an earlier call.
      keys: The next keys, in order.

    Returns:
      The new factor, and the online leverage scores of these keys.
    """
    whitened = whiten(factor, keys)
    # By the longest key up to each: which route a score takes is not to depend on later keys, nor on other heads.
    longest = jax.lax.cummax(jnp.sum(jnp.square(whitened), axis=-1), axis=1)
    is_safe = longest < _SAFE_SQUARED_NORM  # False for NaN
    safe = jnp.where(is_safe[..., None], whitened, 0)
    ones, axes = jnp.eye(keys.shape[1], dtype=keys.dtype), jnp.eye(keys.shape[2], dtype=keys.dtype)
    lower = linalg.cholesky(ones + _product(safe, _transpose(safe)))
    update = linalg.cholesky(axes + _product(_transpose(safe), safe))
    diagonal, updated = _diagonal(lower), _product(_transpose(update), factor)

    def by_qr():
        columns = jnp.concatenate([_transpose(whitened), jnp.broadcast_to(ones, lower.shape)], axis=1)
        # The ridge grows with the longest key: below its rounding error nothing is told apart.
        ridge = _ridge(jnp.max(_norms(keys), axis=1, keepdims=True), keys.shape[2])
        rows = jnp.concatenate([factor, keys, ridge], axis=1)
        return (
            jnp.where(is_safe, diagonal, _diagonal(linalg.qr_factor(columns))),
            jnp.where(is_safe[:, -1:, None], updated, linalg.qr_factor(rows)),
        )

    # Under `vmap` both are computed.
    diagonal, factor = jax.lax.cond(jnp.all(is_safe), lambda: (diagonal, updated), by_qr)
    growth = jnp.maximum(jnp.square(diagonal) - 1, 0)
    return factor, growth / (1 + growth)


def whiten(factor: Float[Array, "N D D"], keys: Float[Array, "N K D"]) -> Float[Array, "N K D"]:
    """Keys in coordinates in which the Gram matrix so far is the identity: squared norms are leverage scores."""
    return _product(keys, _transpose(linalg.inverse_triangular(_transpose(factor))))


def split_chunks(keys: Float[Array, "N S D"], chunk: int) -> Float[Array, "num_chunks N C D"]:
    """Keys in chunks of at most `chunk` tokens, zeros after the last.

    Raises:
      ValueError: If chunk is below 1.
    """
    if chunk < 1:
        raise ValueError(f"{chunk=} must be at least 1 token")
    num_heads, num_keys, head_dim = keys.shape
    chunk = min(chunk, num_keys)
    padded = jnp.pad(keys, ((0, 0), (0, -num_keys % chunk), (0, 0)))
    return jnp.moveaxis(padded.reshape(num_heads, -1, chunk, head_dim), 1, 0)


def _by_head(keys: Float[Array, "B S H D"]) -> Float[Array, "N S D"]:
    batch, num_keys, heads, head_dim = keys.shape
    keys = keys if keys.dtype == jnp.float64 else keys.astype(jnp.float32)
    return jnp.swapaxes(keys, 1, 2).reshape(batch * heads, num_keys, head_dim)


def _norms(keys: Float[Array, "*batch D"]) -> Float[Array, "*batch"]:
    """Norms of finite keys, themselves finite: no square overflows, or underflows to a key that would count as zero."""
    largest = jnp.max(jnp.abs(keys), axis=-1)
    scale = jnp.where(largest > 0, largest, 1)
    norms = scale * jnp.linalg.norm(keys / scale[..., None], axis=-1)
    return jnp.minimum(norms, jnp.finfo(norms.dtype).max)


def _ridge(norms: Float[Array, "N 1"], head_dim: int) -> Float[Array, "N D D"]:
    tiny = _RIDGE_ROUNDINGS * jnp.finfo(norms.dtype).eps
    return tiny * norms[..., None] * jnp.eye(head_dim, dtype=norms.dtype)


def _product(a, b):
    return jnp.matmul(a, b, precision="highest")


def _transpose(x):
    return jnp.swapaxes(x, -1, -2)


def _diagonal(x):
    return jnp.diagonal(x, axis1=-2, axis2=-1)
