"""Methods that rank keys by one score each and keep the best: leverage, row norm, random, oracle.

Scores share the scale of leverage scores: they are not negative and sum to at most the head width D over the keys of
a head. A threshold eps therefore never keeps more than D / eps keys, whichever the method.
"""

import jax
import jax.numpy as jnp

from levattn.attention.coreset import Coreset
from levattn.attention.select import select_by_score
from levattn.core.leverage import centre_keys, leverage_scores


def leverage(query, key, value, *, spec, mask=None, rng=None, grid=None) -> Coreset:
    """LevAttention: the keys of highest leverage score k_j^T (K^T K)^+ k_j.

    For squared-dot-product attention the keys with score >= eps contain every entry >= eps of the attention matrix,
    for any queries; under softmax it is a heuristic. Cost: 4 B H S D^2 operations and a D x D factorisation a head.
    Source: LevAttention, ICLR 2025 (arXiv 2410.05462).
    """
    del query, rng
    frozen = jax.lax.stop_gradient(key)
    scores = leverage_scores(frozen, mask=mask, method=spec.score_method, centre=spec.centre, ridge=spec.ridge)
    return select_by_score(key, value, scores, spec, mask)


def row_norm(query, key, value, *, spec, mask=None, rng=None, grid=None) -> Coreset:
    """The longest keys. Cost: 2 B H S D operations. The paper's baseline; a leverage score that ignores correlation."""
    del query, rng
    frozen = jax.lax.stop_gradient(key)
    frozen = centre_keys(frozen, mask) if spec.centre else frozen.astype(jnp.float32)
    scores = jnp.swapaxes(jnp.sum(jnp.square(frozen), axis=-1), 1, 2)
    return select_by_score(key, value, _normalise(scores, key, mask), spec, mask)


def random(query, key, value, *, spec, mask=None, rng=None, grid=None) -> Coreset:
    """Keys at random, drawn for each batch element and head: the floor that a score has to beat.

    Under `vmap` with one `rng` for all, every example draws the same.
    """
    del query
    batch, num_keys, heads, _ = key.shape
    rng = jax.random.key(spec.seed) if rng is None else rng
    scores = jax.random.uniform(rng, (batch, heads, num_keys))
    return select_by_score(key, value, _normalise(scores, key, mask), spec, mask)


def oracle(query, key, value, *, spec, mask=None, rng=None, grid=None) -> Coreset:
    """The keys that receive the most dense softmax attention, summed over the queries.

    It computes the dense attention it would replace (2 B H T S D operations): a ceiling for scores that see one key
    at a time, not a method to deploy. Where there is one query per key, a mask leaves out the queries of padding, too.
    """
    del rng
    probs = dense_probabilities(jax.lax.stop_gradient(query), jax.lax.stop_gradient(key), mask)
    is_query = None if mask is None or query.shape[1] != key.shape[1] else mask[:, None, :, None]
    received = jnp.sum(probs, axis=2, where=is_query)
    return select_by_score(key, value, _normalise(received, key, mask), spec, mask)


def dense_probabilities(query, key, mask=None) -> jax.Array:
    """The dense softmax attention matrix, `B H T S`, in float32."""
    logits = jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32) * query.shape[-1] ** -0.5
    return jax.nn.softmax(logits, where=None if mask is None else mask[:, None, None])


def _normalise(scores, key, mask):
    """Scales the scores of each head to sum to its width."""
    scores = scores if mask is None else jnp.where(mask[:, None], scores, 0)
    total = jnp.sum(scores, axis=-1, keepdims=True)
    return key.shape[-1] * scores / jnp.where(total > 0, total, 1)
