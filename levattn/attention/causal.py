"""Causal attention over few keys: each query sees the heavy keys of its own past, and its nearest tokens.

Selection walks the sequence in chunks and holds K keys. At the end of a chunk all held keys and the chunk's own are
scored again under the Gram matrix of the keys so far, and the K best stay. Leverage scores only fall as keys arrive: a
key that falls below eps is below it for good. Rescoring is what makes a running top-k of use, as the first D keys of
any sequence have score 1 when they arrive. Within a chunk, keys count with their score on arrival.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from levattn.attention.coreset import zero_masked
from levattn.attention.select import num_kept
from levattn.attention.spec import AttentionSpec
from levattn.core.online import DEFAULT_CHUNK, absorb, initial_factor, split_chunks, whiten

# Float32 scores this much below eps, relatively, still pass: rounding must not lose a heavy key.
_SLACK = 1e-3
# A key that is alone in its direction scores 1 up to rounding; such keys are to tie, and ties go to the earlier.
_ALONE = 1 - 1e-4


class CausalSelection(NamedTuple):
    """What each chunk of N = ceil(T / C) remembers of the tokens before it, and how its own tokens score.

    Attributes:
      indices: Keys held at the start of the chunk, best first, the always-kept ones before all.
      scores: Their leverage scores among the keys before the chunk; inf for a token that is always kept, -inf for a
        slot that holds none.
      own_scores: Scores of the chunk's own keys on arrival, among the keys up to each; inf as above, -inf for a token
        that does not exist or is below the threshold.
    """

    indices: Int[Array, "B H N K"]
    scores: Float[Array, "B H N K"]
    own_scores: Float[Array, "B H N C"]


def attend_causal(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H D"],
    spec: AttentionSpec,
    *,
    mask: Bool[Array, "B S"] | None = None,
    chunk: int = DEFAULT_CHUNK,
) -> Float[Array, "B T H D"]:
    """Causal attention: row i depends on tokens 1 to i alone, its choice of keys included.

    A query sees, of the tokens up to itself: itself, the half of `spec.local_window` that lies behind it, and

    - without `spec.eps`: the `spec.k` keys of highest score;
    - with `spec.eps`: every key of score at least eps. Of those before its own chunk `spec.k` are held at most; with
      `k=None` that is D / eps, which is always enough. These keys then hold every entry >= eps of row i of causal
      attention with f(x) = x^2, for any queries, as far as float32 resolves scores: directions in which the keys so far
      reach less than about 1e-4 of the longest of them are damped, and a key that is heavy there alone may be missed.
      (`levattn.universal.causal_universal_set` computes in float64.) Under softmax the choice is a heuristic.

    Method "dense" is causal softmax attention over all keys.

    Args:
      query: Queries.
      key: Keys, of the same tokens.
      value: Values.
      spec: Of method "leverage" or "dense", with `causal=True`.
      mask: True for the tokens that exist.
      chunk: Tokens between two rescorings.

    Returns:
      The outputs, in the dtype of `query`; NaN for a head from its first key or value that is not finite on. Gradients
      flow through the keys and values that are seen, the choice carries
      none. Cost: 4 B H T (K + 2 C + W) D operations for C tokens a chunk and a window of W, 4 B H T (1 + K / C) D^2 to
      choose; memory B H T (K + 2 C + W), linear in T.

    Raises:
      ValueError: If there is not one key per query, or more keys are asked for than there are tokens.
    """
    if query.shape[1] != key.shape[1]:
        raise ValueError(f"causal attention needs one key per query: {query.shape=}, {key.shape=}")
    key, value = zero_masked(mask, key, value)
    key, value, unknown = _zero_not_finite(key, value)
    if spec.method == "dense":
        exists = None if mask is None else mask[:, None, None]
        out = jax.nn.dot_product_attention(query, key, value, mask=exists, is_causal=True, implementation="xla")
        # A row without one existing token before it has nothing to attend to.
        out = out if mask is None else jnp.where(jnp.cumsum(mask, axis=1)[:, :, None, None] > 0, out, 0)
    else:
        selection = select_causal(key, spec, mask=mask, chunk=chunk)
        out = _attend_selection(query, key, value, selection, spec, mask)
    return out + unknown.astype(out.dtype)


def _zero_not_finite(
    key: Float[Array, "B S H D"], value: Float[Array, "B S H D"]
) -> tuple[Float[Array, "B S H D"], Float[Array, "B S H D"], Float[Array, "B S H 1"]]:
    """Zeros for the tokens of a head with NaN or infinity, and what to add to its rows: NaN from the first of them on.

    Rows before it do not see it, but a weight of zero times infinity is NaN.
    """
    finite = jnp.all(jnp.isfinite(key) & jnp.isfinite(value), axis=-1, keepdims=True)
    unknown = jnp.where(jax.lax.cummin(finite.astype(jnp.int8), axis=1) > 0, 0.0, jnp.nan)
    return jnp.where(finite, key, 0), jnp.where(finite, value, 0), unknown


def select_causal(
    key: Float[Array, "B T H D"],
    spec: AttentionSpec,
    *,
    mask: Bool[Array, "B T"] | None = None,
    chunk: int = DEFAULT_CHUNK,
) -> CausalSelection:
    """The keys that each chunk remembers, and the scores of its own. No gradient flows through either.

    Args:
      key: Keys.
      spec: How many, by which threshold, and which are always kept.
      mask: True for the tokens that exist; the others are never held.
      chunk: Tokens between two rescorings.
    """
    (key,) = zero_masked(mask, jax.lax.stop_gradient(key).astype(jnp.float32))
    batch, num_tokens, heads, head_dim = key.shape
    num_slots = num_kept(spec, num_tokens, head_dim)
    chunks = split_chunks(jnp.swapaxes(key, 1, 2).reshape(batch * heads, num_tokens, head_dim), chunk)
    num_chunks, num_heads, chunk, _ = chunks.shape
    exists = _in_chunks(jnp.ones((batch, num_tokens), bool) if mask is None else mask, chunk)
    exists = jnp.moveaxis(jnp.repeat(exists, heads, axis=0), 1, 0)
    places = jnp.broadcast_to(jnp.arange(num_chunks * chunk).reshape(num_chunks, 1, chunk), exists.shape)

    def rank(scores, places, exists):
        scores = jnp.where(scores > _ALONE, 1, scores)
        passes = exists if spec.eps is None else exists & (scores >= spec.eps * (1 - _SLACK))
        return jnp.where(exists & (places < spec.keep_prefix), jnp.inf, jnp.where(passes, scores, -jnp.inf))

    def step(state, now):
        factor, held_keys, held, scores = state
        own_keys, own, own_exist = now
        factor, own_scores = absorb(factor, own_keys)
        keys = jnp.concatenate([held_keys, own_keys], axis=1)
        indices = jnp.concatenate([held, own], axis=1)
        rescored = jnp.sum(jnp.square(whiten(factor, keys)), axis=-1)
        ranked = rank(rescored, indices, jnp.concatenate([scores > -jnp.inf, own_exist], axis=1))
        best, at = jax.lax.top_k(ranked, num_slots)
        state = (
            factor,
            jnp.take_along_axis(keys, at[..., None], axis=1),
            jnp.take_along_axis(indices, at, axis=1),
            best,
        )
        return state, (held, scores, rank(own_scores, own, own_exist))

    nothing = (
        jnp.zeros((num_heads, num_slots, head_dim)),
        jnp.zeros((num_heads, num_slots), places.dtype),
        jnp.full((num_heads, num_slots), -jnp.inf),
    )
    _, by_chunk = jax.lax.scan(step, (initial_factor(chunks), *nothing), (chunks, places, exists))
    return CausalSelection(*(jnp.moveaxis(x, 0, 1).reshape(batch, heads, num_chunks, -1) for x in by_chunk))


def seen_keys(
    selection: CausalSelection, spec: AttentionSpec, num_tokens: int, mask: Bool[Array, "B T"] | None = None
) -> Bool[Array, "B H T T"]:
    """Whether the query of a row sees the key of a column: for analysis, at the memory of dense attention."""
    sees_held, sees_near = _sight(selection, spec, num_tokens, mask)
    batch, heads, num_chunks, chunk, num_near = sees_near.shape
    total = num_chunks * chunk
    rows = jnp.arange(total).reshape(num_chunks, chunk, 1)
    near = rows - rows % chunk + chunk - num_near + jnp.arange(num_near)
    columns = jnp.concatenate(
        [
            jnp.broadcast_to(selection.indices[:, :, :, None], sees_held.shape),
            jnp.broadcast_to(near, sees_near.shape),
        ],
        axis=-1,
    ).reshape(batch, heads, total, -1)
    sees = jnp.concatenate([sees_held, sees_near], axis=-1).reshape(columns.shape)
    at = (jnp.arange(batch)[:, None, None, None], jnp.arange(heads)[:, None, None], jnp.arange(total)[:, None])
    seen = jnp.zeros((batch, heads, total, total + 1), bool)
    return seen.at[(*at, jnp.where(sees, columns, total))].set(True)[:, :, :num_tokens, :num_tokens]


def _attend_selection(query, key, value, selection: CausalSelection, spec: AttentionSpec, mask) -> jax.Array:
    batch, num_tokens, heads, head_dim = query.shape
    num_chunks, chunk = selection.own_scores.shape[2:]
    sees_held, sees_near = _sight(selection, spec, num_tokens, mask)
    num_before = sees_near.shape[-1] // chunk - 1

    def held(x):
        along = selection.indices.reshape(batch, heads, -1, 1)
        return jnp.take_along_axis(jnp.swapaxes(x, 1, 2), along, axis=2).reshape(batch, heads, num_chunks, -1, head_dim)

    def near(x):
        chunks = jnp.moveaxis(_in_chunks(x, chunk), 3, 1)
        chunks = jnp.pad(chunks, ((0, 0), (0, 0), (num_before, 0), (0, 0), (0, 0)))
        return jnp.concatenate([chunks[:, :, n : n + num_chunks] for n in range(num_before + 1)], axis=3)

    queries = jnp.moveaxis(_in_chunks(query, chunk), 3, 1)
    keys, values = (jnp.concatenate([held(x), near(x)], axis=3) for x in (key, value))
    logits = jnp.einsum("bhnqd,bhnkd->bhnqk", queries, keys, preferred_element_type=jnp.float32) * head_dim**-0.5
    probs = jax.nn.softmax(logits, where=jnp.concatenate([sees_held, sees_near], axis=-1)).astype(query.dtype)
    out = jnp.einsum("bhnqk,bhnkd->bhnqd", probs, values)
    return jnp.swapaxes(out.reshape(batch, heads, -1, head_dim), 1, 2)[:, :num_tokens]


def _sight(
    selection: CausalSelection, spec: AttentionSpec, num_tokens: int, mask: Bool[Array, "B T"] | None
) -> tuple[Bool[Array, "B H N C K"], Bool[Array, "B H N C L"]]:
    """Which of the keys held at the start of its chunk a query sees, and which of the L nearest: its chunk's and those
    of as many chunks before as the window reaches into. A key that is in both counts among the nearest."""
    held, scores, own_scores = selection
    num_chunks, chunk = own_scores.shape[2:]
    reach = 0 if spec.local_window is None else spec.local_window // 2
    num_before = -(-reach // chunk)
    places = jnp.arange(num_chunks * chunk).reshape(num_chunks, chunk, 1)
    is_far = places - held[:, :, :, None] > reach
    within = np.arange(chunk)
    has_come = within <= within[:, None]
    sees_held = scores[:, :, :, None] > -jnp.inf
    sees_own = own_scores[:, :, :, None] > -jnp.inf
    if spec.eps is None:
        # The rank of each key among those that have come by the time of a query; ties go to the earlier.
        num_slots = held.shape[-1]
        other, own = own_scores[..., :, None], own_scores[..., None, :]
        beats_own = (other > own) | ((other == own) & (within[:, None] < within))
        held_ahead = jnp.sum(scores[..., :, None] >= own, axis=-2)
        sees_own &= held_ahead[:, :, :, None] + jnp.cumsum(beats_own, axis=-2) < num_slots
        own_ahead = jnp.cumsum(other > scores[..., None, :], axis=-2)
        sees_held &= jnp.arange(num_slots) + own_ahead < num_slots

    distances = within[:, None] + num_before * chunk - np.arange((num_before + 1) * chunk)
    exists = _in_chunks(jnp.ones((1, num_tokens), bool) if mask is None else mask, chunk)
    exists = jnp.pad(exists, ((0, 0), (num_before, 0), (0, 0)))
    exists = jnp.concatenate([exists[:, n : n + num_chunks] for n in range(num_before + 1)], axis=2)
    sees_own = jnp.pad(sees_own & has_come, (*[(0, 0)] * 4, (num_before * chunk, 0)))
    sees_near = (sees_own | ((distances >= 0) & (distances <= reach))) & exists[:, None, :, None]
    return sees_held & is_far, sees_near


def _in_chunks(x: jax.Array, chunk: int) -> jax.Array:
    """Splits axis 1 into chunks, with zeros after the last token."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % chunk), *[(0, 0)] * (x.ndim - 2)))
    return x.reshape(x.shape[0], -1, chunk, *x.shape[2:])
