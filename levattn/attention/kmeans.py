"""k-means pre-scoring: cluster the keys, keep the member of each cluster nearest to its mean.

Source of the idea: "Efficient Attention via Pre-Scoring" (arXiv 2505.11040), which ranks keys by clustering.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from levattn.attention.coreset import Coreset, gather
from levattn.attention.select import num_kept
from levattn.core.leverage import centre_keys

# Seeding by strips: about as many sequential steps as this, but no more strips than the second.
_STRIP_STEPS = 8
_MAX_STRIPS = 8


def kmeans(query, key, value, *, spec, mask=None, rng=None, grid=None) -> Coreset:
    """One key per cluster of keys, seeded by farthest points, then `spec.num_iters` Lloyd steps.

    The always-kept keys stay outside the clustering. A threshold eps drops clusters whose share of the keys is below
    eps / D. Deterministic. Cost: about 4 B H S K D (1 + num_iters) operations, the seeding in K sequential steps.
    """
    del query, rng
    batch, num_keys, heads, head_dim = key.shape
    points = jnp.swapaxes(centre_keys(jax.lax.stop_gradient(key), mask), 1, 2)
    exists = jnp.ones((batch, num_keys), bool) if mask is None else mask
    prefix = spec.keep_prefix
    clustered = jnp.broadcast_to((exists & (jnp.arange(num_keys) >= prefix))[:, None], (batch, heads, num_keys))
    num_slots = num_kept(spec, num_keys, head_dim)

    shape = (batch, heads, prefix)
    indices = jnp.broadcast_to(jnp.arange(prefix), shape)
    valid = jnp.broadcast_to(exists[:, None, :prefix], shape)
    if num_slots > prefix:
        medoids, sizes = _medoids(points, clustered, num_slots - prefix, spec.num_iters)
        kept = sizes > 0
        if spec.eps is not None:
            share = sizes / jnp.maximum(jnp.sum(clustered, axis=-1, keepdims=True), 1)
            kept &= head_dim * share >= spec.eps
        indices = jnp.concatenate([indices, medoids], axis=-1)
        valid = jnp.concatenate([valid, kept], axis=-1)
    return gather(key, value, indices, valid, sound=jnp.all(jnp.isfinite(points), axis=(2, 3)))


def _medoids(
    points: Float[Array, "B H S D"], exists: Bool[Array, "B H S"], num_clusters: int, num_iters: int
) -> tuple[Int[Array, "B H K"], Int[Array, "B H K"]]:
    """For each cluster, the index of the member nearest to its mean, and the number of its members."""
    centres = _take(points, farthest_points(points, exists, num_clusters))

    def lloyd(centres, _):
        members = _members(points, centres, exists)
        sums = jnp.einsum("bhsk,bhsd->bhkd", members.astype(jnp.float32), points)
        sizes = jnp.sum(members, axis=2)[..., None]
        return jnp.where(sizes > 0, sums / jnp.maximum(sizes, 1), centres), None

    centres, _ = jax.lax.scan(lloyd, centres, None, length=num_iters)
    members = _members(points, centres, exists)
    distances = jnp.where(members, squared_distances(points, centres), jnp.inf)
    return jnp.argmin(distances, axis=2), jnp.sum(members, axis=2)


def farthest_points(
    points: Float[Array, "B H S D"], exists: Bool[Array, "B H S"], num_points: int
) -> Int[Array, "B H K"]:
    """Gonzalez' traversal: the point farthest from the origin, then always the one farthest from those chosen."""

    def step(nearest, _):
        chosen = jnp.argmax(jnp.where(exists, nearest, -1.0), axis=-1)[..., None]
        distance = jnp.sum(jnp.square(points - _take(points, chosen)), axis=-1)
        return jnp.minimum(nearest, distance), chosen[..., 0]

    _, chosen = jax.lax.scan(step, jnp.sum(jnp.square(points), axis=-1), None, length=num_points)
    return jnp.moveaxis(chosen, 0, -1)


def farthest_points_of_strips(
    points: Float[Array, "B H S D"], exists: Bool[Array, "B H S"], num_points: int
) -> Int[Array, "B H K"]:
    """Gonzalez' traversal of many points at a time: each step takes the farthest one in every strip of the sequence.

    There are as many strips as make about eight steps, eight at most. Neighbours on a grid of patches are alike, so
    that the farthest points of two strips are seldom near each other. With few points to choose there is one strip:
    then it is `farthest_points`.

    Cost: about 4 B H S K D operations, in K / (number of strips) sequential steps.
    """
    num_keys = points.shape[2]
    length = -(-num_keys // min(max(1, num_points // _STRIP_STEPS), _MAX_STRIPS))
    num_strips = -(-num_keys // length)
    starts = np.arange(num_strips) * length
    padding = num_strips * length - num_keys

    def step(nearest, _):
        distances = jnp.pad(jnp.where(exists, nearest, -1.0), ((0, 0), (0, 0), (0, padding)), constant_values=-2.0)
        chosen = jnp.argmax(distances.reshape(*distances.shape[:2], num_strips, length), axis=-1) + starts
        new = _take(points, chosen)
        squares = jnp.sum(jnp.square(points), axis=-1)[..., None]
        distance = squares + jnp.min(squared_distances(points, new), axis=-1, keepdims=True)
        return jnp.minimum(nearest, jnp.maximum(distance[..., 0], 0)), chosen

    num_steps = -(-num_points // num_strips)
    _, chosen = jax.lax.scan(step, jnp.sum(jnp.square(points), axis=-1), None, length=num_steps)
    return jnp.moveaxis(chosen, 0, 2).reshape(*points.shape[:2], -1)[..., :num_points]


def _take(points, indices):
    return jnp.take_along_axis(points, indices[..., None], axis=2)


def squared_distances(points: Float[Array, "B H S P"], centres: Float[Array, "B H K P"]) -> Float[Array, "B H S K"]:
    """Up to the points' own squared norm, which no comparison between centres sees."""
    cross = jnp.einsum("bhsd,bhkd->bhsk", points, centres, precision="highest")
    return jnp.sum(jnp.square(centres), axis=-1)[:, :, None] - 2 * cross


def _members(points, centres, exists) -> Bool[Array, "B H S K"]:
    nearest = jnp.argmin(squared_distances(points, centres), axis=-1)
    return (nearest[..., None] == jnp.arange(centres.shape[2])) & exists[..., None]
