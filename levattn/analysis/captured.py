"""How much of dense attention falls on a set of keys, on the window around each query, and on both together."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from levattn.attention.local import Window, window_neighbours
from levattn.attention.polynomial import polynomial_probabilities
from levattn.attention.scored import dense_probabilities


class KeyAttention(NamedTuple):
    """What each key receives of dense attention, a mean over the queries: all that any set of keys needs.

    Attributes:
      mass: Attention.
      local_mass: The part of it from queries in whose window the key lies.
      heavy: For each of `E` thresholds the share of queries that give the key at least as much. Its sum over the keys
        is the number of heavy entries a query.
      local_heavy: The part of it from queries in whose window the key lies.
      effective_keys: Kish's effective sample size of a query's attention, 1 / sum_j A_ij^2: from 1, one key has all,
        to S, all have the same.
    """

    mass: Float[Array, "B H S"]
    local_mass: Float[Array, "B H S"]
    heavy: Float[Array, "E B H S"]
    local_heavy: Float[Array, "E B H S"]
    effective_keys: Float[Array, "B H"]


class Captured(NamedTuple):
    """What a set of keys captures of dense attention, a mean over the queries.

    Attributes:
      mass: Attention on the set.
      mass_with_local: Attention on the set and the window of each query; what is in both counts once.
      heavy: Heavy entries a query that lie on the set.
      heavy_with_local: On the set or in the window.
    """

    mass: Float[Array, "*N B H"]
    mass_with_local: Float[Array, "*N B H"]
    heavy: Float[Array, "*N E B H"]
    heavy_with_local: Float[Array, "*N E B H"]


def near_keys(
    num_tokens: int, window: Window | None, num_prefix: int, grid: tuple[int, int] | None
) -> Bool[np.ndarray, "T S"]:
    """Which keys lie in the window of each query.

    Args:
      num_tokens: Queries and keys.
      window: As `AttentionSpec.local_window`; None: no key does.
      num_prefix: Tokens before the patches, which have no neighbours on the grid.
      grid: Rows and columns of patches, for a 2-D window.

    Raises:
      ValueError: The patches do not fill the grid.
    """
    near = np.zeros((num_tokens, num_tokens + 1), bool)  # the last column takes what lies over an edge
    if window is not None:
        np.put_along_axis(near, window_neighbours(num_tokens, window, num_prefix, grid), True, axis=1)
    return near[:, :-1]


def attention_by_key(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S H D"],
    near: Bool[Array, "T S"] | Bool[np.ndarray, "T S"],
    *,
    eps: tuple[float, ...] = (),
    power: float | int | None = None,
    block_bytes: int = 1 << 26,
) -> KeyAttention:
    """Sums the columns of the dense attention matrix, a block of queries at a time.

    Args:
      query: Queries.
      key: Keys.
      near: From `near_keys`.
      eps: Thresholds of heavy entries. Entries are compared in float32.
      power: As `AttentionSpec.power`; None: softmax.
      block_bytes: Memory of one block of attention; a few of them are alive at a time.

    Returns:
      Sums from which `captured` takes any set of keys. Cost: 2 B H T S D operations, in the precision of float32.
    """
    batch, num_queries, heads, _ = query.shape
    num_keys = key.shape[1]
    num_blocks = min(num_queries, -(-4 * batch * heads * num_queries * num_keys // block_bytes))
    size = -(-num_queries // num_blocks)
    padding = num_blocks * size - num_queries
    blocks = jnp.pad(query, ((0, 0), (0, padding), (0, 0), (0, 0))).reshape(batch, num_blocks, size, heads, -1)
    near = jnp.pad(jnp.asarray(near), ((0, padding), (0, 0))).reshape(num_blocks, size, num_keys)
    counts = (jnp.arange(num_blocks * size) < num_queries).reshape(num_blocks, size, 1)
    thresholds = jnp.asarray(eps, jnp.float32).reshape(-1)

    def add(total, block):
        queries, near, counts = block
        with jax.default_matmul_precision("highest"):
            if power is None:
                probs = dense_probabilities(queries, key)
            else:
                probs = polynomial_probabilities(queries, key, power)
        probs = jnp.where(counts, probs, 0)  # of the queries that fill up the last block
        squared = jnp.sum(jnp.square(probs), axis=-1)
        effective = jnp.where(squared == 0, 0, 1 / squared)  # NaN stays NaN

        def by_key(share):
            return jnp.sum(share, axis=2), jnp.sum(share, axis=2, where=near)

        # One threshold after the other: no copy of the block for each.
        heavy = jax.lax.map(lambda eps: by_key((probs >= eps).astype(jnp.float32)), thresholds)
        found = KeyAttention(*by_key(probs), *heavy, jnp.sum(effective, axis=-1))
        return jax.tree.map(jnp.add, total, found), None

    by_key, by_head = (batch, heads, num_keys), (batch, heads)
    shapes = (by_key, by_key, (len(eps), *by_key), (len(eps), *by_key), by_head)
    start = KeyAttention(*(jnp.zeros(shape, jnp.float32) for shape in shapes))
    total, _ = jax.lax.scan(add, start, (jnp.moveaxis(blocks, 1, 0), near, counts))
    return jax.tree.map(lambda x: x / num_queries, total)


def captured(found: KeyAttention, kept: Bool[Array, "*N B H S"]) -> Captured:
    """What sets of keys capture, the window of each query apart and with it.

    Args:
      found: From `attention_by_key`.
      kept: The keys of each set; any number of sets.

    Returns:
      Means over the queries. Cost: 4 B H S operations a set and threshold.
    """

    def on_set(each, local):
        return tuple(jnp.sum(jnp.where(kept, each, rest), axis=-1) for rest in (0, local))

    mass, mass_with_local = on_set(found.mass, found.local_mass)
    kept = kept[..., None, :, :, :]
    heavy, heavy_with_local = on_set(found.heavy, found.local_heavy)
    return Captured(mass, mass_with_local, heavy, heavy_with_local)
