"""Keys drawn by a randomly pivoted Cholesky factorisation, with Nystroem weights: a published rival.

WildCat (Schroeder and Mackey, arXiv 2602.10056) looks at no query: it compresses the exponential kernel of the keys,
exp(<x_i, x_j>) for scaled keys x. A key is drawn with probability proportional to what the keys drawn before leave of
its diagonal entry. With W the weights that express every kernel column by the drawn ones at the least error, the drawn
keys P stand for all:

    out(q) = exp(<q, k_P>) W V / exp(<q, k_P>) W 1

Whichever the scale of x, W combines the functions q -> exp(<q, k_P>) best in the norm that the scale defines. Small x
make a kernel that few keys capture, but their error grows faster with the length of a query. Everything here is
computed from the Gaussian kernel, the same but for a factor for each row and column, whose entries are at most 1.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from levattn.attention.coreset import Coreset
from levattn.attention.groups import existing, zero_padding
from levattn.attention.select import num_kept
from levattn.core import linalg
from levattn.core.leverage import centre_keys

_MEAN_SQUARE = 2.0  # Of the scaled keys. Of 1 to 4, the best for CLIP's keys at 16, 32 and 64 of 197.
_RIDGE = 1e-3  # Of the Gaussian kernel, whose diagonal is 1.
_MIN_WEIGHT = 1.0  # Of a drawn key: what it weighs by itself.
_MAX_LOG_RATIO = 30.0  # Of two keys' factors: a huge key that was not drawn overflows no weight.


def pivoted(query, key, value, *, spec, mask=None, rng=None, grid=None) -> Coreset:
    """Keys drawn by randomly pivoted Cholesky, whose weights and values stand for all keys.

    As published, but for this: keys are scaled to a fixed mean square, in place of the paper's rule; and since the
    attention of a coreset is an average with positive weights, weights below 1 are raised to that, and the value of
    each slot is held within the range of the values, and so is the output. Leading tokens are drawn first. A threshold
    eps only bounds the number of keys, by D / eps. No bound on the error is promised here.

    Gradients flow through the drawn keys and through the values, weights held fixed. Cost: 2 B H S K (3 D + 2 K)
    operations, drawing in K sequential steps, and a K x K solve a head.

    Raises:
      ValueError: For a local window: its tokens would count twice.
    """
    if spec.local_window is not None:
        raise ValueError(
            f"local_window={spec.local_window!r} must be None with method 'pivoted': its weights count every token"
        )
    query, key, value = zero_padding(query, key, value, mask)
    num_keys, head_dim = key.shape[1], key.shape[3]
    num_slots = num_kept(spec, num_keys, head_dim)
    exists = existing(key, mask)
    points = jnp.swapaxes(centre_keys(jax.lax.stop_gradient(key), mask), 1, 2)
    squares = jnp.sum(jnp.square(points), axis=-1)
    mean_square = jnp.sum(squares, -1) / jnp.maximum(jnp.sum(exists, axis=-1), 1)
    points *= jnp.sqrt(_MEAN_SQUARE / jnp.where(mean_square > 0, mean_square, 1))[..., None, None]
    rng = jax.random.key(spec.seed) if rng is None else rng
    indices, valid = draw_pivots(points, exists, num_slots, spec.keep_prefix, rng)
    weights = nystroem_weights(points, exists, indices, valid)

    total = jnp.sum(weights, axis=-1)
    floored = jnp.maximum(total, _MIN_WEIGHT)
    values = jnp.swapaxes(value, 1, 2).astype(jnp.float32)
    there = exists[..., None]
    lowest = jnp.min(values, axis=2, keepdims=True, where=there, initial=jnp.inf)
    highest = jnp.max(values, axis=2, keepdims=True, where=there, initial=-jnp.inf)
    slot_values = jnp.einsum("bhks,bhsd->bhkd", weights, values) / floored[..., None]
    slot_values = jnp.where(valid[..., None], jnp.clip(slot_values, lowest, highest), 0)
    along = jnp.swapaxes(indices, 1, 2)[..., None]
    return Coreset(
        keys=jnp.take_along_axis(key, along, axis=1),
        values=jnp.swapaxes(slot_values, 1, 2).astype(value.dtype),
        log_weights=jnp.log(floored),
        indices=indices,
        valid=valid,
    )


def draw_pivots(
    points: Float[Array, "B H S D"],
    exists: Bool[Array, "B H S"],
    num_pivots: int,
    num_prefix: int,
    rng: Key[Array, ""],
) -> tuple[Int[Array, "B H K"], Bool[Array, "B H K"]]:
    """Draws keys by the residual diagonal of the kernel exp(<x_i, x_j>), each at most once.

    Args:
      points: Scaled keys x.
      exists: Which may be drawn.
      num_pivots: K.
      num_prefix: Leading tokens, drawn first.
      rng: One uniform number a draw: padding at the end changes no draw.

    Returns:
      The keys, and whether there was one left to draw.
    """
    num_keys = points.shape[2]
    squares = jnp.sum(jnp.square(points), axis=-1)
    draws = jax.random.uniform(rng, (num_pivots, *exists.shape[:2]))

    def step(state, now):
        residual, columns, left = state
        draw, i = now
        # The kernel is the Gaussian one times exp(|x|^2) on the diagonal; a little is left of any key not drawn.
        logits = jnp.where(left, squares + jnp.log(jnp.maximum(residual, 1e-7)), -jnp.inf)
        probs = jax.nn.softmax(logits, where=left)
        cumulated = jnp.cumsum(probs, axis=-1)
        at_random = jnp.sum(cumulated <= draw[..., None] * cumulated[..., -1:], axis=-1)
        pivot = jnp.where(i < num_prefix, i, jnp.minimum(at_random, num_keys - 1))[..., None]
        drawn = jnp.take_along_axis(left, pivot, axis=-1)
        column = _gaussian(points, squares, pivot)[..., 0] - jnp.einsum(
            "bhsk,bhk->bhs", columns, jnp.take_along_axis(columns, pivot[..., None], axis=2)[:, :, 0]
        )
        at_pivot = jnp.take_along_axis(column, pivot, axis=-1)
        column = jnp.where(drawn, column / jnp.sqrt(jnp.maximum(at_pivot, 1e-6)), 0)
        columns = jax.lax.dynamic_update_index_in_dim(columns, column, i, axis=3)
        residual = jnp.maximum(residual - jnp.square(column), 0)
        left &= jnp.arange(num_keys) != pivot
        return (residual, columns, left), (pivot[..., 0], drawn[..., 0])

    start = (jnp.ones(exists.shape), jnp.zeros((*exists.shape, num_pivots)), exists)
    _, (pivots, drawn) = jax.lax.scan(step, start, (draws, jnp.arange(num_pivots)))
    return jnp.moveaxis(pivots, 0, -1), jnp.moveaxis(drawn, 0, -1)


def nystroem_weights(
    points: Float[Array, "B H S D"],
    exists: Bool[Array, "B H S"],
    indices: Int[Array, "B H K"],
    valid: Bool[Array, "B H K"],
) -> Float[Array, "B H K S"]:
    """How much of every key each drawn key stands for: the least-squares weights in the kernel exp(<x_i, x_j>).

    Args:
      points: Scaled keys x.
      exists: Which count.
      indices: The drawn keys.
      valid: Which of them count.

    Returns:
      Weights of either sign. A drawn key stands for itself alone, exactly.
    """
    squares = jnp.sum(jnp.square(points), axis=-1)
    num_slots, num_keys = indices.shape[-1], points.shape[2]
    both = valid[..., None] & exists[:, :, None]
    cross = jnp.where(both, jnp.swapaxes(_gaussian(points, squares, indices), 2, 3), 0)
    among = jnp.take_along_axis(cross, indices[:, :, None], axis=3)
    among = jnp.where(valid[:, :, None], among, 0) + _RIDGE * jnp.eye(num_slots)
    # A slot that holds nothing has a row and column of zeros, but for the ridge.
    weights = linalg.cholesky_solve(among, cross)
    half = squares / 2
    ratio = half[:, :, None] - jnp.take_along_axis(half, indices, axis=-1)[..., None]
    weights = jnp.where(both, weights * jnp.exp(jnp.minimum(ratio, _MAX_LOG_RATIO)), 0)
    is_at = (indices[..., None] == jnp.arange(num_keys)) & valid[..., None]
    return jnp.where(jnp.any(is_at, axis=2, keepdims=True), is_at, weights)


def _gaussian(points, squares, indices) -> Float[Array, "B H S K"]:
    """exp(-|x_i - x_j|^2 / 2) of all points and those at `indices`."""
    chosen = jnp.take_along_axis(points, indices[..., None], axis=2)
    chosen_squares = jnp.take_along_axis(squares, indices, axis=-1)
    cross = jnp.einsum("bhsd,bhkd->bhsk", points, chosen, precision="highest")
    return jnp.exp(jnp.minimum(cross - (squares[..., None] + chosen_squares[:, :, None]) / 2, 0))
