"""Counts of up to 64 bits as two uint32 (high, low): JAX has no wider integer unless float64 is switched on."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt

Count = UInt[Array, "2"]


def to_count(number: int) -> Count:
    """A count of the host, below 2^64, as a pair."""
    return jnp.asarray(np.array(divmod(number, 1 << 32), np.uint32))


def to_int(count: UInt[Array | np.ndarray, "2"]) -> int:
    """A pair as an int of the host."""
    high, low = (int(part) for part in jax.device_get(count))
    return (high << 32) + low


def add(first: Count, second: Count) -> Count:
    """Their sum; as all unsigned integers, modulo 2^64."""
    low = first[1] + second[1]
    return jnp.stack([first[0] + second[0] + (low < first[1]).astype(jnp.uint32), low])


def subtract(first: Count, second: Count) -> Count:
    """Their difference, modulo 2^64: added to `second` it gives `first`, whichever is larger."""
    return jnp.stack([first[0] - second[0] - (first[1] < second[1]).astype(jnp.uint32), first[1] - second[1]])


def add_small(count: Count, offsets: Int[Array, "*C"] | int) -> UInt[Array, "*C 2"]:
    """The count plus each of some numbers that are not negative."""
    low = count[1] + jnp.asarray(offsets, jnp.uint32)
    return jnp.stack([count[0] + (low < count[1]).astype(jnp.uint32), low], axis=-1)


def at_least(first: Count, second: Count) -> Bool[Array, ""]:
    """Whether the first is no smaller."""
    return (first[0] > second[0]) | ((first[0] == second[0]) & (first[1] >= second[1]))
