"""How alike sets of keys are: the Jaccard index, and what it would be of sets drawn at random."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from scipy.stats import hypergeom


def jaccard(a: Bool[Array, "*N S"], b: Bool[Array, "*N S"]) -> Float[Array, "*N"]:
    """|a and b| / |a or b| of sets that are given by membership; 1 where both are empty."""
    union = jnp.sum(a | b, axis=-1)
    return jnp.where(union > 0, jnp.sum(a & b, axis=-1) / jnp.maximum(union, 1), 1.0)


def pairwise_jaccard(a: Bool[Array, "*B N S"], b: Bool[Array, "*B M S"]) -> Float[Array, "*B N M"]:
    """The Jaccard index of every set of one list with every set of another. Cost: 2 N M S operations."""
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)  # counts up to 2^24 are exact
    both = jnp.einsum("...ns,...ms->...nm", a, b, precision="highest")
    union = jnp.sum(a, axis=-1)[..., :, None] + jnp.sum(b, axis=-1)[..., None, :] - both
    return jnp.where(union > 0, both / jnp.maximum(union, 1), 1.0)


def chance_jaccard(size_a: int, size_b: int, num_keys: int) -> float:
    """The expected Jaccard index of two sets of these sizes drawn uniformly and independently from so many keys.

    Raises:
      ValueError: A set larger than there are keys.
    """
    if not 0 <= size_a <= num_keys or not 0 <= size_b <= num_keys:
        raise ValueError(f"{size_a=} and {size_b=} must be in [0, {num_keys}], the number of keys")
    if size_a == size_b == 0:
        return 1.0
    both = np.arange(min(size_a, size_b) + 1)
    return float(np.sum(hypergeom.pmf(both, num_keys, size_a, size_b) * both / (size_a + size_b - both)))
