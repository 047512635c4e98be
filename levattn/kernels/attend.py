"""Attention of every query over a few keys of its head: gathered, attended to and differentiated in one kernel each."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

_LOG2_E = 1.4426950408889634


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend_selected(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H D"],
    indices: Int[Array, "B H K"],
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """Softmax attention of every query over the keys at `indices`, which differ from each other.

    Args:
      query: Queries, in bfloat16 as keys and values; D a power of two of at least 16.
      key: All keys.
      value: All values.
      indices: Which keys each head attends to. S stands for no key, and makes the outputs of its head NaN.
      interpret: Run on any device, slowly.

    Returns:
      The outputs, in the dtype of `query`. Cost: 4 B T K H D operations; queries and outputs move once, of keys and
      values the selected rows. The backward pass recomputes the weights and keeps nothing but its inputs.
    """
    return _forward(query, key, value, indices, interpret)


def _forward(query, key, value, indices, interpret, block: int = 128, rows: int = 512):
    batch, num_queries, heads, _ = query.shape
    block = min(block, max(16, pl.next_power_of_2(num_queries)))
    rows = min(rows, pl.cdiv(num_queries, block) * block)
    queries = _all_rows(query)
    return pl.pallas_call(
        partial(_forward_kernel, block=block, rows=rows, num_queries=num_queries),
        grid=(batch, heads, pl.cdiv(num_queries, rows)),
        in_specs=[queries, _all_rows(key), _all_rows(value), _per_head(indices)],
        out_specs=queries,
        out_shape=jax.ShapeDtypeStruct(query.shape, query.dtype),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attend_selected",
    )(query, key, value, indices)


def _forward_kernel(query_ref, key_ref, value_ref, index_ref, out_ref, *, block, rows, num_queries):
    first = pl.program_id(2) * rows
    key, value, is_slot = _gather(key_ref, value_ref, index_ref)

    def attend(i, _):
        start = first + i * block
        at = pl.ds(start, block)
        is_query = (start + jnp.arange(block) < num_queries)[:, None]
        probs = _softmax(plgpu.load(query_ref.at[at, :], mask=is_query, other=0), key, is_slot)
        out = plgpu.dot(probs.astype(value.dtype), value)
        plgpu.store(out_ref.at[at, :], out.astype(out_ref.dtype), mask=is_query)

    jax.lax.fori_loop(0, rows // block, attend, None)


def _gather(key_ref, value_ref, index_ref):
    num_kept = index_ref.shape[0]
    slots = jnp.arange(max(16, pl.next_power_of_2(num_kept)))
    is_slot = slots < num_kept
    at = plgpu.load(index_ref.at[slots], mask=is_slot, other=0)
    columns = jnp.arange(key_ref.shape[1])[None, :]
    is_key = (at < key_ref.shape[0])[:, None]
    key, value = (plgpu.load(ref.at[at[:, None], columns], mask=is_key, other=jnp.nan) for ref in (key_ref, value_ref))
    return key, value, is_slot


def _softmax(query, key, is_slot):
    logits = plgpu.dot(query, key, trans_b=True) * (query.shape[1] ** -0.5 * _LOG2_E)
    logits = jnp.where(is_slot[None, :], logits, -jnp.inf)
    weights = jnp.exp2(logits - jnp.max(logits, axis=1)[:, None])
    return weights / jnp.sum(weights, axis=1)[:, None]


def _forward_rule(query, key, value, indices, interpret):
    return _forward(query, key, value, indices, interpret), (query, key, value, indices)


def _backward_rule(interpret, kept, cotangent, block: int = 64, rows: int = 1024):
    query, key, value, indices = kept
    batch, num_queries, heads, head_dim = query.shape
    num_kept = indices.shape[2]
    block = min(block, max(16, pl.next_power_of_2(num_queries)))
    rows = min(rows, pl.cdiv(num_queries, block) * block)
    parts = pl.cdiv(num_queries, rows)
    queries = _all_rows(query)
    slots = max(16, pl.next_power_of_2(num_kept))
    part = pl.BlockSpec((None, None, None, slots, head_dim), lambda b, h, t: (b, h, t, 0, 0))
    part_shape = jax.ShapeDtypeStruct((batch, heads, parts, slots, head_dim), jnp.float32)
    query_grad, key_parts, value_parts = pl.pallas_call(
        partial(_backward_kernel, block=block, rows=rows, num_queries=num_queries),
        grid=(batch, heads, parts),
        in_specs=[queries, _all_rows(key), _all_rows(value), _per_head(indices), queries],
        out_specs=[queries, part, part],
        out_shape=[jax.ShapeDtypeStruct(query.shape, query.dtype), part_shape, part_shape],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="attend_selected_backward",
    )(query, key, value, indices, cotangent)
    key_grad, value_grad = _scatter(key_parts, value_parts, indices, key, value, interpret)
    return query_grad, key_grad, value_grad, None


def _backward_kernel(
    query_ref, key_ref, value_ref, index_ref, cotangent_ref, dq_ref, dk_ref, dv_ref, *, block, rows, num_queries
):
    first = pl.program_id(2) * rows
    key, value, is_slot = _gather(key_ref, value_ref, index_ref)
    scale = key.shape[1] ** -0.5

    def add(i, grads):
        key_grad, value_grad = grads
        start = first + i * block
        at = pl.ds(start, block)
        is_query = (start + jnp.arange(block) < num_queries)[:, None]
        query, cotangent = (plgpu.load(ref.at[at, :], mask=is_query, other=0) for ref in (query_ref, cotangent_ref))
        probs = _softmax(query, key, is_slot)
        of_probs = plgpu.dot(cotangent, value, trans_b=True)
        of_logits = probs * (of_probs - jnp.sum(probs * of_probs, axis=1)[:, None]) * scale
        of_logits = of_logits.astype(query.dtype)
        plgpu.store(dq_ref.at[at, :], plgpu.dot(of_logits, key).astype(dq_ref.dtype), mask=is_query)
        key_grad += plgpu.dot(of_logits, query, trans_a=True)
        value_grad += plgpu.dot(probs.astype(cotangent.dtype), cotangent, trans_a=True)
        return key_grad, value_grad

    zeros = jnp.zeros(dk_ref.shape, jnp.float32)
    dk_ref[...], dv_ref[...] = jax.lax.fori_loop(0, rows // block, add, (zeros, zeros))


def _scatter(key_parts, value_parts, indices, key, value, interpret):
    """Sums the parts of each head into the rows of its selected keys and values; all others are zero."""
    batch, heads, parts, slots, head_dim = key_parts.shape
    part = pl.BlockSpec((None, None, parts, slots, head_dim), lambda b, h: (b, h, 0, 0, 0))
    zeros = [jnp.zeros(x.shape, x.dtype) for x in (key, value)]
    rows = [pl.BlockSpec((None, x.shape[1], None, head_dim), lambda b, h: (b, 0, h, 0)) for x in (key, value)]
    return pl.pallas_call(
        _scatter_kernel,
        grid=(batch, heads),
        in_specs=[part, part, pl.BlockSpec((None, None, indices.shape[2]), lambda b, h: (b, h, 0)), *rows],
        out_specs=rows,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (key, value)],
        input_output_aliases={3: 0, 4: 1},
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="scatter_selected",
    )(key_parts, value_parts, indices, *zeros)


def _scatter_kernel(key_ref, value_ref, index_ref, _, __, dk_ref, dv_ref):
    parts, slots, head_dim = key_ref.shape
    # Slots past the last kept key repeat it: they write what it writes.
    slot = jnp.minimum(jnp.arange(slots), index_ref.shape[0] - 1)
    at = jnp.minimum(plgpu.load(index_ref.at[slot])[:, None], dk_ref.shape[0] - 1)
    slot, columns = slot[:, None], jnp.arange(head_dim)[None, :]

    def total(ref):
        zeros = jnp.zeros((slots, head_dim), jnp.float32)
        return jax.lax.fori_loop(0, parts, lambda p, total: total + plgpu.load(ref.at[p, slot, columns]), zeros)

    plgpu.store(dk_ref.at[at, columns], total(key_ref).astype(dk_ref.dtype))
    plgpu.store(dv_ref.at[at, columns], total(value_ref).astype(dv_ref.dtype))


def _all_rows(x):
    return pl.BlockSpec((None, x.shape[1], None, x.shape[3]), lambda b, h, t: (b, 0, h, 0))


def _per_head(indices):
    return pl.BlockSpec((None, None, indices.shape[2]), lambda b, h, t: (b, h, 0))


attend_selected.defvjp(_forward_rule, _backward_rule)
