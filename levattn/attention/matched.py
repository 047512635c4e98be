"""Groups whose weights and values are fitted, so that a few landmark queries attend as they would densely.

Three ideas, each for what the others miss:

- Queries of self-attention often look at their own neighbourhood, and no coreset that all queries share holds every
  neighbourhood. So each query sees its own token and the four around it exactly, and a group counts for it less those
  of its members (`levattn.attention.local`).
- Keys that many queries attend to deserve finer groups: k-means is weighted by the attention that a key receives from
  the landmarks.
- A group's weight and value are first guessed from its members, then corrected so that the landmarks, whose dense
  attention is known, get the right mass from each group and the right output.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from levattn.attention.coreset import Coreset
from levattn.attention.groups import existing, is_leading, merge_groups, zero_padding
from levattn.attention.local import remaining_sizes, window_neighbours, window_size
from levattn.attention.merge import membership, slot_sizes
from levattn.attention.select import num_kept
from levattn.attention.spec import AttentionSpec
from levattn.core import linalg

_CROSS_MIN_K = 12  # With fewer keys, five for the neighbourhood leave too few for the rest.
_LANDMARKS_PER_KEY = 2  # Values are fitted by least squares: more equations than unknowns.
_MASS_FLOOR = 1e-3  # Rows of the attention matrix; a smaller mass is not told from none.
_MASS_CEILING = 1e6
_VALUE_RIDGE = 0.15  # Of the mean squared weight of a slot. Unit of the pull towards the values guessed from members.


def settle(spec: AttentionSpec, num_keys: int, grid: tuple[int, int] | None) -> AttentionSpec:
    """The spec with the defaults of `matched` in place, and the window's tokens taken off its k.

    Leading tokens that are not on the grid are kept. Where the grid is known and no window is asked for, it is that
    of a token and its four neighbours, or the token alone if k is below 12. Other methods: unchanged.

    Args:
      spec: As the user gives it; its k counts all keys that a query sees.
      num_keys: Tokens of the sequence.
      grid: Rows and columns of patches.

    Raises:
      ValueError: If the window leaves no key.
    """
    if spec.method != "matched" or spec.k is None or spec.k >= num_keys:
        return spec
    num_prefix, window = spec.keep_prefix, spec.local_window
    if grid is not None and grid[0] * grid[1] <= num_keys:
        num_prefix = max(num_prefix, num_keys - grid[0] * grid[1])
        window = ("cross" if spec.k >= _CROSS_MIN_K else (1, 1)) if window is None else window
    num_local = 0 if window is None else window_size(window)
    if spec.k - num_local < max(num_prefix, 1):
        raise ValueError(
            f"k={spec.k} must exceed {num_local} keys of local_window={window} and {num_prefix} leading tokens: "
            "method 'matched' counts them in"
        )
    return dataclasses.replace(
        spec,
        k=spec.k - num_local,
        keep_prefix=num_prefix,
        local_window=window,
        num_landmarks=num_landmarks(spec, spec.k),
    )


def num_landmarks(spec: AttentionSpec, k: int) -> int:
    """Queries to fit to, where a query sees k keys; a shorter sequence has fewer."""
    return _LANDMARKS_PER_KEY * k if spec.num_landmarks is None else spec.num_landmarks


def matched(query, key, value, *, spec, mask=None, rng=None, grid=None) -> Coreset:
    """Groups of keys, fitted to the dense attention of `spec.num_landmarks` queries at even distances.

    With S keys, T queries and m landmarks, m = 2 k by default, the cost is linear in S: dense attention of the
    landmarks, 4 B H m S D operations; grouping, about 8 B H S K D (2 + num_iters), the seeding in K sequential steps;
    the fit, about B H m K (K + 6 D) and a K x K solve a head. Deterministic. A threshold eps only bounds the number of
    groups, by D / eps.
    """
    del rng
    query, key, value = zero_padding(query, key, value, mask)
    num_keys, num_queries = key.shape[1], query.shape[1]
    wanted = num_landmarks(spec, num_kept(spec, num_keys, key.shape[3]))
    landmarks = np.unique(np.linspace(0, num_queries - 1, min(wanted, num_queries)).astype(int))
    neighbours = None
    if spec.local_window is not None:
        neighbours = window_neighbours(num_keys, spec.local_window, spec.keep_prefix, grid)[landmarks]
    logits = _logits(query[:, landmarks], key)
    probs = jax.nn.softmax(logits, where=existing(key, mask)[:, :, None])  # zeros, where there is no key at all
    if mask is not None and num_queries == num_keys:
        probs = jnp.where(mask[:, None, landmarks, None], probs, 0)

    # Not quite zero, so that a group of keys whose attention underflows still has a mean.
    received = jax.lax.stop_gradient(jnp.mean(probs, axis=2)) + 1e-6
    coreset = merge_groups(query, key, value, is_leading(key, spec), spec.keep_prefix, spec, mask, received)
    return _fit(query[:, landmarks], key, value, coreset, probs, logits, neighbours)


def _fit(
    query: Float[Array, "B M H D"],
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H D"],
    coreset: Coreset,
    probs: Float[Array, "B H M S"],
    logits: Float[Array, "B H M S"],
    neighbours: Int[np.ndarray, "M W"] | None,
) -> Coreset:
    """Corrects weights, then values, so that the landmarks' attention over the coreset is closer to dense."""
    remaining = slot_sizes(coreset)[:, :, None] if neighbours is None else remaining_sizes(coreset, neighbours)
    # What the members beyond the neighbourhood would weigh, each as much as its mean; `extra` comes on top.
    fixed_logits = _logits(query, coreset.keys) + jnp.log(remaining)
    outputs = linalg.product("bhms,bshd->bhmd", probs.astype(value.dtype), value)
    counts = jnp.sum(probs, axis=-1) > 0  # landmarks that exist
    received = jax.lax.stop_gradient(jnp.sum(probs, axis=2))
    local_logits, local_output = None, 0.0
    if neighbours is not None:
        places = (np.arange(len(neighbours))[:, None], neighbours)
        near = jnp.where(neighbours >= 0, probs[:, :, *places], 0)
        near_logits = jnp.where(near > 0, logits[:, :, *places], -1e30)
        local_logits = jax.nn.logsumexp(near_logits, axis=-1)
        received = jnp.maximum(received.at[:, :, neighbours].add(-jax.lax.stop_gradient(near)), 0)
        # Not probs by their sum, whose square, in the derivative, underflows where attention is far away.
        near = jnp.where(near > 0, jnp.exp(near_logits - local_logits[..., None]), 0)
        local_output = jnp.einsum("bhmw,bmwhd->bhmd", near, value[:, neighbours].astype(jnp.float32))
    members = membership(coreset.assignment, coreset.valid.shape[-1])
    target_mass = jnp.einsum("bhs,bhsk->bhk", received, members)

    log_sizes = jnp.log(jnp.maximum(slot_sizes(coreset), 1))
    extra = jax.lax.stop_gradient(coreset.log_weights - log_sizes)
    # Against the landmarks' own normalisers: the weight of a lone key, which is right, then stays as it is.
    excess = fixed_logits + extra[:, :, None] - jax.nn.logsumexp(logits, axis=-1, where=probs > 0)[..., None]
    mass = jnp.sum(jnp.where(counts[..., None], jnp.minimum(jnp.exp(excess), _MASS_CEILING), 0), axis=2)
    extra += jax.lax.stop_gradient(jnp.log(target_mass + _MASS_FLOOR) - jnp.log(mass + _MASS_FLOOR))

    # Shares of every slot, and of all local tokens together, in the attention of each landmark.
    both = fixed_logits + extra[:, :, None]
    if local_logits is not None:
        both = jnp.concatenate([both, local_logits[..., None]], axis=-1)
    both = jnp.where(counts[..., None], jax.nn.softmax(both, where=jnp.isfinite(both)), 0)
    num_slots = extra.shape[-1]
    slot_share, local_share = both[..., :num_slots], both[..., num_slots:]
    slot_values = jnp.swapaxes(coreset.values, 1, 2).astype(jnp.float32)
    missing = (
        outputs
        - jnp.sum(local_share, axis=-1, keepdims=True) * local_output
        - jnp.einsum("bhmk,bhkd->bhmd", slot_share, slot_values)
    )
    normal = jnp.einsum("bhmk,bhml->bhkl", slot_share, slot_share)
    ridge = _VALUE_RIDGE * jnp.trace(normal, axis1=-2, axis2=-1)[..., None, None] / num_slots + 1e-20
    seen = jnp.einsum("bhmk,bhmd->bhkd", slot_share, missing)
    slot_values += linalg.cholesky_solve(normal + ridge * jnp.eye(num_slots), seen)
    return coreset.replace(
        values=jnp.swapaxes(slot_values, 1, 2).astype(value.dtype),
        log_weights=extra + log_sizes,
    )


def _logits(query, key) -> Float[Array, "B H M S"]:
    return linalg.product("bmhd,bshd->bhms", query, key) * query.shape[-1] ** -0.5
