"""From keys to the indices of those of highest leverage score, in four launches."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from levattn.core.leverage import diagonal_shift, sum_pairwise, whitening
from levattn.kernels.gram import gram_parts
from levattn.kernels.select import scores, top
from levattn.kernels.whiten import MAX_HEAD_DIM, whitening_of_head


def top_leverage(
    keys: Float[Array, "B S H D"], k: int, *, keep_prefix: int = 0, interpret: bool = False
) -> Int[Array, "B H K"]:
    """Indices of the k keys of highest leverage score in each head, in falling order, ties by index.

    What `levattn.attention.scored.leverage` chooses with score_method="gram": accumulation is in float32 here as there,
    so that only keys whose scores agree to rounding may change places.

    Args:
      keys: Keys, in bfloat16; D a power of two of at least 16.
      k: How many, at most S.
      keep_prefix: Leading keys that come first whatever their score.
      interpret: Run on any device, slowly.

    Returns:
      The indices. Cost: the keys are read twice; 8 B H S D^2 operations on matrix units, k passes over the scores.
    """
    return _top_leverage(keys, k, keep_prefix, interpret)


# One unit to transformations: some versions of JAX keep kernels of which nothing is used, where Flax's scan relies
# on their going.
@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _top_leverage(keys, k, keep_prefix, interpret):
    gram = sum_pairwise(jnp.moveaxis(gram_parts(keys, interpret=interpret), 2, 0))
    if keys.shape[-1] > MAX_HEAD_DIM:
        whiten, _ = whitening(gram)
    else:
        whiten = whitening_of_head(gram, shift=diagonal_shift(keys.shape[-1]), interpret=interpret)
    return top(scores(keys, whiten, interpret=interpret), k, keep_prefix=keep_prefix, interpret=interpret)


def _forward_rule(keys, k, keep_prefix, interpret):
    return _top_leverage(keys, k, keep_prefix, interpret), keys


def _backward_rule(k, keep_prefix, interpret, keys, _):
    return (jnp.zeros_like(keys),)


_top_leverage.defvjp(_forward_rule, _backward_rule)
