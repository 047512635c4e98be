"""From scores to a coreset: the k best keys of each head, or all above a threshold, with static shapes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from levattn.attention.coreset import Coreset, gather
from levattn.attention.spec import AttentionSpec


def num_kept(spec: AttentionSpec, num_keys: int, head_dim: int) -> int:
    """The static number of slots K of a coreset chosen under `spec`.

    That is `spec.k`; with only a threshold it is the bound on the size of a universal set, head_dim / eps (the scores
    of every method sum to at most head_dim), and the always-kept keys on top.

    Args:
      spec: What is asked for.
      num_keys: Keys there are, S.
      head_dim: Head width, D.

    Raises:
      ValueError: If k, or the always-kept keys, exceed the number of keys.
    """
    if spec.keep_prefix > num_keys:
        raise ValueError(f"keep_prefix={spec.keep_prefix} must not exceed the {num_keys} tokens of the sequence")
    if spec.k is None:
        return min(num_keys, int(head_dim / spec.eps) + spec.keep_prefix)
    if spec.k > num_keys:
        raise ValueError(f"k={spec.k} must be in [1, {num_keys}]: the sequence has {num_keys} tokens")
    return spec.k


def select_by_score(
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H D"],
    scores: Float[Array, "B H S"],
    spec: AttentionSpec,
    mask: Bool[Array, "B S"] | None = None,
) -> Coreset:
    """Keeps the keys of highest score, ties by index; gathers them, and marks as invalid what should not count.

    Args:
      key: All keys.
      value: All values.
      scores: Score of each key, on the scale of leverage scores (summing to at most D). No gradient flows to them.
      spec: How many, by which threshold, and which are always kept.
      mask: True for the tokens that exist. The others are never kept, not even as prefix.

    Returns:
      The coreset; its slots are in order of falling score, the always-kept ones first. Of a head with a score that is
      NaN all weights are, too, and with them its outputs. Cost: a top-k of S per head.
    """
    scores = jax.lax.stop_gradient(scores)
    num_keys, head_dim = key.shape[1], key.shape[3]
    is_prefix = jnp.arange(num_keys) < spec.keep_prefix
    ranking = jnp.where(is_prefix, jnp.inf, scores)
    if mask is not None:
        ranking = jnp.where(mask[:, None], ranking, -jnp.inf)
    top, indices = jax.lax.top_k(ranking, num_kept(spec, num_keys, head_dim))
    least = -jnp.finfo(top.dtype).max if spec.eps is None else spec.eps
    return gather(key, value, indices, ~(top < least), sound=~jnp.any(jnp.isnan(scores), axis=-1))


def is_selected(indices: Int[Array, "B H K"], valid: Bool[Array, "B H K"], num_keys: int) -> Bool[Array, "B H S"]:
    """For each of the S keys, whether a valid slot of the coreset holds it."""
    batch, heads, _ = indices.shape
    # Slots that hold no key of their own write to a place past the end.
    places = jnp.where(valid & (indices >= 0), indices, num_keys)
    at = (jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None], places)
    return jnp.zeros((batch, heads, num_keys + 1), bool).at[at].set(True)[..., :num_keys]
