"""Compensated selection: what is not kept exactly is not dropped, it is merged into groups.

Two keys may share a group when no query tells them apart and their values are alike. So keys are grouped in the
coordinates of `grouping_points`: differences of logits as the queries at hand see them, and of values.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from levattn.attention.coreset import Coreset, zero_masked
from levattn.attention.kmeans import farthest_points, farthest_points_of_strips, squared_distances
from levattn.attention.merge import half_variance, member_means, membership, merge
from levattn.attention.scored import leverage
from levattn.attention.select import is_selected, num_kept
from levattn.attention.spec import AttentionSpec
from levattn.core import linalg

# A difference of values weighs half as much as one of logits, both relative to their mean square over the keys.
_VALUE_WEIGHT = 0.5
_RIDGE = 1e-4  # Of the mean of the queries' second moment: directions that no query has stay just visible.
# Of the 2 D coordinates as many count: keys of trained heads spread along few directions that queries can see.
_NUM_COORDINATES = 24


def leverage_merged(query, key, value, *, spec, mask=None, rng=None, grid=None) -> Coreset:
    """The keys of highest leverage score, each merged with the keys nearest to it.

    Cost: that of `leverage` and 12 B H S K D operations.
    """
    query, key, value = zero_padding(query, key, value, mask)
    kept = leverage(query, key, value, spec=spec, mask=mask, rng=rng)
    points = grouping_points(query, key, value, mask).points
    chosen = jnp.take_along_axis(points, jnp.maximum(kept.indices, 0)[..., None], axis=2)
    # A leading token stands for itself alone: what it does in its head no patch does.
    stands_alone = (kept.indices < spec.keep_prefix)[:, :, None]
    distances = squared_distances(points, chosen)
    nearest = jnp.argmin(jnp.where(kept.valid[:, :, None] & ~stands_alone, distances, jnp.inf), axis=-1)
    own_slot = jnp.argmax(_is_at(kept, key.shape[1]), axis=-1)
    assignment = jnp.where(is_selected(kept.indices, kept.valid, key.shape[1]), own_slot, nearest)
    return merge(key, value, _without_padding(assignment, mask), kept.valid.shape[-1])


def leverage_groups(query, key, value, *, spec, mask=None, rng=None, grid=None) -> Coreset:
    """Half of the slots for the keys of highest leverage score, exact; the rest of the keys in groups.

    Cost: those of `leverage` and `groups`.
    """
    query, key, value = zero_padding(query, key, value, mask)
    num_slots = num_kept(spec, key.shape[1], key.shape[3])
    heavy = leverage(query, key, value, spec=spec, mask=mask, rng=rng)
    num_heavy = min(num_slots, spec.keep_prefix + (num_slots - spec.keep_prefix) // 2)
    alone = is_selected(heavy.indices[..., :num_heavy], heavy.valid[..., :num_heavy], key.shape[1])
    return merge_groups(query, key, value, alone, num_heavy, spec, mask)


def groups(query, key, value, *, spec, mask=None, rng=None, grid=None) -> Coreset:
    """Groups of keys that the queries hardly tell apart and whose values are alike; leading tokens stay alone.

    k-means seeded by farthest points, mean key and mean value, log count and half the variance of the logits as the
    weight. A threshold eps only bounds the number of groups, by D / eps. Deterministic. Cost: about
    8 B H S K D (2 + num_iters) operations, the seeding in K sequential steps, with seeding="strips" in K / 8.
    """
    del rng
    query, key, value = zero_padding(query, key, value, mask)
    return merge_groups(query, key, value, is_leading(key, spec), spec.keep_prefix, spec, mask)


def merge_groups(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H D"],
    alone: Bool[Array, "B H S"],
    num_alone: int,
    spec: AttentionSpec,
    mask: Bool[Array, "B S"] | None = None,
    weights: Float[Array, "B H S"] | float = 1.0,
) -> Coreset:
    """Some keys by themselves, the others in groups, each with the log of its size and half its variance as weight.

    Args:
      query: Queries; those of padding are zero.
      key: Keys.
      value: Values.
      alone: Keys that no group takes.
      num_alone: Slots for these, at least as many as there are in any head.
      spec: The number of all slots, and the steps of k-means.
      mask: True for the tokens that exist.
      weights: Of the keys in k-means, positive.
    """
    points, squared_norms, coordinates = grouping_points(query, key, value, mask)
    num_slots = num_kept(spec, key.shape[1], key.shape[3])
    grouped = ~alone & existing(key, mask)
    slots = jnp.zeros(_head_shape(key), int)
    if num_slots > num_alone:
        seed_fn = farthest_points if spec.seeding == "farthest" else farthest_points_of_strips
        seeds = seed_fn(points, grouped, num_slots - num_alone)
        centres = jnp.take_along_axis(points, seeds[..., None], axis=2)
        slots = num_alone + nearest_after_lloyd(points, centres, jnp.where(grouped, weights, 0), spec.num_iters)
    slots = jnp.where(alone, jnp.cumsum(alone, axis=-1) - 1, slots)
    slots = _without_padding(slots, mask)
    members = membership(slots, num_slots)
    frozen = jax.lax.stop_gradient(key)
    mean_norms = jnp.swapaxes(_squared_norms(member_means(members, frozen), _mean(frozen, mask), coordinates), 1, 2)
    coreset = merge(key, value, slots, num_slots)
    log_weights = coreset.log_weights + half_variance(squared_norms, mean_norms, members)
    return coreset.replace(log_weights=log_weights)


def is_leading(key: Float[Array, "B S H D"], spec: AttentionSpec) -> Bool[Array, "B H S"]:
    """Whether a token is one of the leading ones that are always kept."""
    return jnp.broadcast_to(jnp.arange(key.shape[1]) < spec.keep_prefix, _head_shape(key))


def zero_padding(query, key, value, mask):
    """Zeros for tokens that do not exist, the queries' included where these are of the same tokens."""
    key, value = zero_masked(mask, key, value)
    (query,) = zero_masked(mask if query.shape[1] == key.shape[1] else None, query)
    return query, key, value


def existing(key: Float[Array, "B S H D"], mask: Bool[Array, "B S"] | None) -> Bool[Array, "B H S"]:
    """The mask of tokens for every head."""
    return jnp.broadcast_to(True if mask is None else mask[:, None], _head_shape(key))


class GroupingPoints(NamedTuple):
    """Where keys lie when only what merging them costs counts.

    Attributes:
      points: Squared distances are that cost.
      squared_norms: Of the centred keys in the coordinates of logits.
      coordinates: L, which maps keys to these.
    """

    points: Float[Array, "B H S P"]
    squared_norms: Float[Array, "B H S"]
    coordinates: Float[Array, "B H D D"]


def grouping_points(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H D"],
    mask: Bool[Array, "B S"] | None = None,
) -> GroupingPoints:
    """Keys in coordinates whose distances tell what merging two of them costs.

    With M = mean over queries of q q^T / D = L L^T, the squared distance of two rows of K L is the mean squared
    difference of their logits. Values are scaled to the spread of these and appended. Of the 2 D coordinates the
    points have the P of largest spread, as one step of subspace iteration finds them.

    Args:
      query: Queries; those of padding are zero.
      key: Keys; those of padding are zero.
      value: Values; those of padding are zero.
      mask: True for the tokens that exist.

    Returns:
      Points, centred. No gradient flows to them. Cost: 2 B H (T + S) D^2 + 12 B H S P D operations, a D x D and a P x P
      Cholesky factor a head.
    """
    query, key, value = (jax.lax.stop_gradient(x) for x in (query, key, value))
    head_dim = key.shape[-1]
    second_moment = jnp.einsum("bthd,bthe->bhde", query, query, precision="highest", preferred_element_type=jnp.float32)
    num_queries = query.shape[1]
    if mask is not None and num_queries == key.shape[1]:
        num_queries = jnp.maximum(jnp.sum(mask, axis=1), 1)[:, None, None, None]
    second_moment /= num_queries * head_dim
    ridge = _RIDGE * jnp.trace(second_moment, axis1=-2, axis2=-1)[..., None, None] / head_dim + 1e-30
    # Rounded once to the type of the keys, so that norms of keys and of their means are taken alike.
    coordinates = linalg.cholesky(second_moment + ridge * jnp.eye(head_dim)).astype(key.dtype)

    exists = existing(key, mask)
    mean_key, mean_value = _mean(key, mask), _mean(value, mask)
    squared_norms = jnp.where(exists, jnp.swapaxes(_squared_norms(key, mean_key, coordinates), 1, 2), 0)
    offsets = jnp.where(exists, jnp.swapaxes(jnp.sum(jnp.square(value - mean_value), axis=-1), 1, 2), 0)
    spreads = [jnp.sum(x, axis=-1)[..., None, None] for x in (squared_norms, offsets)]
    scale = _VALUE_WEIGHT * jnp.sqrt(spreads[0] / jnp.where(spreads[1] > 0, spreads[1], 1))

    def project(basis: Float[Array, "... P"]) -> Float[Array, "B H S P"]:
        """The centred points times a basis of P columns: the 2 D coordinates themselves are never written down."""
        of_keys, of_values = basis[..., :head_dim, :], basis[..., head_dim:, :]
        of_keys = jnp.matmul(coordinates.astype(jnp.float32), of_keys)
        found = 0.0
        for x, mean, columns in ((key, mean_key, of_keys), (value, mean_value, scale * of_values)):
            columns = columns.astype(x.dtype)
            found += linalg.product("bshd,bhdp->bhsp", x, columns)
            found -= linalg.product("bshd,bhdp->bhsp", mean, columns)
        return jnp.where(exists[..., None], found, 0)

    if 2 * head_dim <= _NUM_COORDINATES:
        return GroupingPoints(project(jnp.eye(2 * head_dim)), squared_norms, coordinates)
    drawn = np.random.default_rng(0).normal(size=(2 * head_dim, _NUM_COORDINATES)).astype(np.float32)
    shadow = project(jnp.asarray(drawn))
    seen = [linalg.product("bhsp,bshd->bhdp", shadow, x) for x in (key, value)]
    seen[0] = linalg.product("bhde,bhdp->bhep", coordinates, seen[0])
    return GroupingPoints(
        project(_orthonormal(jnp.concatenate([seen[0], scale * seen[1]], -2))), squared_norms, coordinates
    )


def _orthonormal(columns: Float[Array, "B H N P"]) -> Float[Array, "B H N P"]:
    """An orthonormal basis of the columns' span; what rounding hides of it is left out."""
    norms = jnp.linalg.norm(columns, axis=-2, keepdims=True)
    columns = columns / jnp.where(norms > 0, norms, 1)
    gram = jnp.einsum("bhnp,bhnq->bhpq", columns, columns, precision="highest")
    _, inverse = linalg.inverse_cholesky(gram + 1e-4 * jnp.eye(columns.shape[-1]))
    return jnp.einsum("bhnp,bhqp->bhnq", columns, inverse)


def _mean(x: Float[Array, "B S H D"], mask: Bool[Array, "B S"] | None) -> Float[Array, "B 1 H D"]:
    """The mean over the tokens that exist, in float32."""
    where = None if mask is None else mask[:, :, None, None]
    count = x.shape[1] if mask is None else jnp.maximum(jnp.sum(where, axis=1, keepdims=True), 1)
    return jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True, where=where) / count


def _squared_norms(key, mean, coordinates) -> Float[Array, "B S H"]:
    """Of the keys less the mean, in the given coordinates."""
    points = linalg.product("bshd,bhde->bshe", key, coordinates)
    centre = linalg.product("bshd,bhde->bshe", mean, coordinates)
    return jnp.sum(jnp.square(points - centre), axis=-1)


def nearest_after_lloyd(
    points: Float[Array, "B H S P"],
    centres: Float[Array, "B H K P"],
    weights: Float[Array, "B H S"],
    num_iters: int,
) -> Int[Array, "B H S"]:
    """The nearest centre of each point after some steps of weighted k-means; points of weight 0 move no centre."""

    def step(centres, _):
        members = membership(jnp.argmin(squared_distances(points, centres), axis=-1), centres.shape[2])
        members = members * weights[..., None]
        mass = jnp.sum(members, axis=2)[..., None]
        means = jnp.einsum("bhsk,bhsp->bhkp", members, points) / jnp.where(mass > 0, mass, 1)
        return jnp.where(mass > 0, means, centres), None

    centres, _ = jax.lax.scan(step, centres, None, length=num_iters)
    return jnp.argmin(squared_distances(points, centres), axis=-1)


def _is_at(coreset: Coreset, num_keys: int) -> Bool[Array, "B H S K"]:
    slots = jnp.where(coreset.valid, coreset.indices, -1)
    return slots[:, :, None] == jnp.arange(num_keys)[:, None]


def _without_padding(assignment, mask):
    return assignment if mask is None else jnp.where(mask[:, None], assignment, -1)


def _head_shape(key) -> tuple[int, int, int]:
    batch, num_keys, heads, _ = key.shape
    return batch, heads, num_keys
