"""Keys that stand for others: every key belongs to a slot, and a slot holds the means of its members."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from levattn.attention.coreset import Coreset
from levattn.core.linalg import product


def merge(
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H D"],
    assignment: Int[Array, "B H S"],
    num_slots: int,
) -> Coreset:
    """Mean key, mean value and log count of the members of each slot. Gradients flow to keys and values.

    Args:
      key: All keys, finite.
      value: Their values, finite.
      assignment: The slot of each key; -1 for a key that belongs to none.
      num_slots: K.

    Returns:
      The coreset, with `assignment`. A slot of one member has its index, one of several -1, an empty one is invalid.
      Cost: 4 B H S K D operations.
    """
    members = membership(assignment, num_slots)
    sizes = jnp.sum(members, axis=2)
    only_member = jnp.argmax(members, axis=2)
    return Coreset(
        keys=member_means(members, key).astype(key.dtype),
        values=member_means(members, value).astype(value.dtype),
        log_weights=jnp.log(jnp.maximum(sizes, 1)),
        indices=jnp.where(sizes == 1, only_member, -1),
        valid=sizes > 0,
        assignment=assignment,
    )


def membership(assignment: Int[Array, "B H S"], num_slots: int) -> Float[Array, "B H S K"]:
    """1 where a key belongs to a slot, else 0."""
    return jax.nn.one_hot(assignment, num_slots, dtype=jnp.float32)


def slot_sizes(coreset: Coreset) -> Float[Array, "B H K"]:
    """Members of each slot of a merged coreset."""
    return jnp.sum(membership(coreset.assignment, coreset.valid.shape[-1]), axis=2)


def member_means(members: Float[Array, "B H S K"], x: Float[Array, "B S H D"]) -> Float[Array, "B K H D"]:
    """The mean of the members of each slot, in float32; zeros for an empty slot."""
    sums = product("bhsk,bshd->bkhd", members.astype(x.dtype), x)
    sizes = jnp.swapaxes(jnp.sum(members, axis=2), 1, 2)[..., None]
    return sums / jnp.maximum(sizes, 1)


def half_variance(
    squared_norms: Float[Array, "B H S"], mean_norms: Float[Array, "B H K"], members: Float[Array, "B H S K"]
) -> Float[Array, "B H K"]:
    """Half the variance of the members' logits, averaged over the queries: what log count leaves out.

    The members of a slot weigh sum_j exp(<q, k_j>), which is at least their number times exp(<q, mean key>); to second
    order in the spread of their logits the ratio is exp(variance / 2).

    Args:
      squared_norms: Of the keys, in coordinates in which the squared distance is the mean squared difference of logits.
      mean_norms: Of the mean key of each slot, in these coordinates.
      members: From `membership`.
    """
    mean_square = jnp.einsum("bhsk,bhs->bhk", members, squared_norms) / jnp.maximum(jnp.sum(members, axis=2), 1)
    return 0.5 * jnp.maximum(mean_square - mean_norms, 0)
