"""Dense softmax attention: the method that keeps every key, and the fastest exact route to its output."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from levattn.attention.coreset import Coreset, zero_masked


def dense(query, key, value, *, spec=None, mask=None, rng=None, grid=None) -> Coreset:
    """Keeps all S keys in their order; cost of attending to them: 4 B H T S D operations."""
    del query, spec, rng, grid
    batch, num_keys, heads, _ = key.shape
    shape = (batch, heads, num_keys)
    indices = jnp.broadcast_to(jnp.arange(num_keys), shape)
    valid = jnp.broadcast_to(True if mask is None else mask[:, None], shape)
    key, value = zero_masked(mask, key, value)
    return Coreset(key, value, jnp.zeros(shape, jnp.float32), indices, valid)


def attend_dense(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H D"],
    mask: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B T H D"]:
    """Softmax attention over all keys, by cuDNN's flash attention where it applies, else by XLA.

    cuDNN takes half precision and head widths that 8 divides, and has no backward pass at odd lengths: sequences are
    padded to a multiple of 64 there and their lengths passed on.

    Args:
      query: Queries.
      key: Keys.
      value: Values.
      mask: True for the tokens that exist. With a mask the XLA route is taken. An element without one token gives 0.

    Returns:
      The outputs, in the dtype of `query`.
    """
    half = query.dtype in (jnp.bfloat16, jnp.float16)
    if mask is None and half and query.shape[-1] % 8 == 0 and jax.default_backend() == "gpu":
        return _attend_cudnn(query, key, value)
    if mask is None:
        return jax.nn.dot_product_attention(query, key, value, implementation="xla")
    key, value = zero_masked(mask, key, value)
    out = jax.nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :], implementation="xla")
    return jnp.where(jnp.any(mask, axis=1)[:, None, None, None], out, 0)


def _attend_cudnn(query, key, value, multiple: int = 64):
    out = jax.nn.dot_product_attention(
        *(jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0))) for x in (query, key, value)),
        query_seq_lengths=_lengths(query, multiple),
        key_value_seq_lengths=_lengths(key, multiple),
        implementation="cudnn",
    )
    return out[:, : query.shape[1]]


def _lengths(x, multiple):
    batch, length = x.shape[:2]
    return None if length % multiple == 0 else jnp.full((batch,), length, jnp.int32)
