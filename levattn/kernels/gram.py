"""Gram matrices K^T K of every head: one pass over the keys, split over programs."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float


def gram_parts(
    keys: Float[Array, "B S H D"], *, rows: int = 1024, block: int = 128, interpret: bool = False
) -> Float[Array, "B H P D D"]:
    """Gram matrices of consecutive stretches of the keys of each head, in float32; their sum is K^T K.

    Args:
      keys: Keys, in half precision; D a power of two.
      rows: Keys in a stretch, which one program sums. Short enough that rounding does not drift, see
        `levattn.core.leverage.gram_matrix`.
      block: Keys multiplied at once.
      interpret: Run on any device, slowly.

    Returns:
      One matrix for each of the P = ceil(S / rows) stretches. Cost: 2 B H S D^2 operations; the keys are read once.
    """
    batch, num_keys, heads, head_dim = keys.shape
    block = min(block, max(16, pl.next_power_of_2(num_keys)))
    rows = min(rows, pl.cdiv(num_keys, block) * block)
    parts = pl.cdiv(num_keys, rows)
    return pl.pallas_call(
        partial(_gram_kernel, num_keys=num_keys, rows=rows, block=block),
        grid=(batch, heads, parts),
        in_specs=[pl.BlockSpec((None, num_keys, None, head_dim), lambda b, h, p: (b, 0, h, 0))],
        out_specs=pl.BlockSpec((None, None, None, head_dim, head_dim), lambda b, h, p: (b, h, p, 0, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, heads, parts, head_dim, head_dim), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="gram_parts",
    )(keys)


def _gram_kernel(keys_ref, gram_ref, *, num_keys, rows, block):
    first = pl.program_id(2) * rows

    def add(i, gram):
        start = first + i * block
        is_key = start + jnp.arange(block) < num_keys
        keys = plgpu.load(keys_ref.at[pl.ds(start, block), :], mask=is_key[:, None], other=0)
        return gram + plgpu.dot(keys, keys, trans_a=True)

    side = gram_ref.shape[-1]
    gram_ref[...] = jax.lax.fori_loop(0, rows // block, add, jnp.zeros((side, side), jnp.float32))
