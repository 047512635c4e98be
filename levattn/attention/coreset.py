"""Weighted keys, and the attention over them: what every method returns and how it becomes an output.

Legend for shapes, here and in the whole package: `B` batch, `T` queries, `S` keys, `K` selected keys, `H` heads,
`D` head width, `C` model width.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


@flax.struct.dataclass
class Coreset:
    """K weighted keys per head that stand for all S of them.

    Attributes:
      keys: The kept (or merged) keys.
      values: Their values.
      log_weights: Added to the logits of each key; log(count) for a group of merged keys, 0 for a key itself.
      indices: Position of each key among the S; -1 for a merged key, which has none.
      valid: False for slots that hold no key (fewer keys above the threshold, or fewer unmasked, than K).
      assignment: Of methods that merge, the slot that each of the S keys belongs to, -1 for none.
    """

    keys: Float[Array, "B K H D"]
    values: Float[Array, "B K H D"]
    log_weights: Float[Array, "B H K"]
    indices: Int[Array, "B H K"]
    valid: Bool[Array, "B H K"]
    assignment: Int[Array, "B H S"] | None = None


def gather(
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H D"],
    indices: Int[Array, "B H K"],
    valid: Bool[Array, "B H K"],
    sound: Bool[Array, "B H"] | None = None,
) -> Coreset:
    """Takes the keys and values at `indices`; gradients flow to them, the indices carry none.

    Args:
      key: All keys.
      value: All values.
      indices: Which to keep, per batch element and head.
      valid: Which of the kept slots count.
      sound: False for a head in which the choice means nothing, because one key is not a number: its weights, and with
        them its outputs, are NaN. A choice made from NaN looks as good as any other. None: all are sound.

    Returns:
      A coreset of unweighted keys; slots that do not count hold zeros, whatever (NaN, say) stood there. Cost: B K H D
      numbers moved, twice.
    """
    log_weights = jnp.zeros(indices.shape, jnp.float32)
    if sound is not None:
        log_weights = jnp.where(sound[..., None], log_weights, jnp.nan)
    along, kept = (jnp.swapaxes(x, 1, 2)[..., None] for x in (indices, valid))
    return Coreset(
        keys=jnp.where(kept, jnp.take_along_axis(key, along, axis=1), 0),
        values=jnp.where(kept, jnp.take_along_axis(value, along, axis=1), 0),
        log_weights=log_weights,
        indices=indices,
        valid=valid,
    )


def zero_masked(mask: Bool[Array, "B S"] | None, *arrays: Float[Array, "B S H D"]) -> tuple[Array, ...]:
    """The arrays with zeros for the tokens that do not exist: a NaN there, times a weight of zero, would stay NaN."""
    return arrays if mask is None else tuple(jnp.where(mask[:, :, None, None], x, 0) for x in arrays)


def attend(query: Float[Array, "B T H D"], coreset: Coreset) -> Float[Array, "B T H D"]:
    """Softmax attention of every query over the weighted keys of its head.

    out(q) = sum_c softmax_c(<q, key_c> / sqrt(D) + log_weight_c) value_c

    Args:
      query: Queries.
      coreset: Keys with values and weights. A head without one valid key gives zeros, not NaN.

    Returns:
      The outputs in the dtype of `query`; the softmax itself is in float32. Cost: 4 B T K H D operations.
    """
    logits = jnp.einsum("bthd,bkhd->bhtk", query, coreset.keys, preferred_element_type=jnp.float32)
    logits = logits * query.shape[-1] ** -0.5 + coreset.log_weights[:, :, None]
    probs = jax.nn.softmax(logits, where=coreset.valid[:, :, None])
    return jnp.einsum("bhtk,bkhd->bthd", probs.astype(query.dtype), coreset.values)
