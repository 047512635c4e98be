"""Universal sets of x^2 of keys that are spread over devices, or over machines that share only files.

K^T K is the sum of the shards' Gram matrices, so that D x D numbers a shard give every shard the exact global scores.
What travels is a triangular factor R_i with R_i^T R_i = K_i^T K_i rather than K_i^T K_i itself: as many numbers, and
the condition number is not squared. Two ways to the same set:

* exact: factors first, then each shard scores its keys globally, and only the keys of the set travel.
* one round: factors travel together with the keys whose score within their shard is at least eps. A global score
  is at most the local one, so these cover the set; scored again, they give it. Fewer messages, more keys in them.

Across machines, `OnePassStream` on each part of a stream and `merge_shards` do the same without collectives.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from levattn.universal import counts
from levattn.universal.chunks import cast_keys
from levattn.universal.running_gram import (
    RunningGram,
    add_keys,
    from_factors,
    init_gram,
    score,
    slack,
    triangular_factor,
)
from levattn.universal.sets import UniversalSet, check_eps
from levattn.universal.streaming import OnePassState, OnePassStream, finish_gram, score_bounds, select

_CHUNK_ROWS = 8192


class ShardedCandidates(NamedTuple):
    """What all shards hold in common after the exchange: keys that contain the set.

    Attributes:
      gram: Of the keys of all shards.
      keys: Candidates, shard by shard.
      positions: Their rows in the global array.
      valid: False for slots that hold no key.
      num_lost: Candidates that found no slot.
    """

    gram: RunningGram
    keys: Float[Array, "N D"]
    positions: Int[Array, " N"]
    valid: Bool[Array, " N"]
    num_lost: Int[Array, ""]


def sharded_universal_set(
    keys: Float[Array | np.ndarray, "S D"],
    eps: float,
    *,
    mesh: Mesh,
    axis: str = "data",
    one_round: bool = False,
    dtype: Any = jnp.float32,
) -> UniversalSet:
    """The universal set of x^2 of keys whose rows are split over the devices of a mesh, of one process or many.

    Args:
      keys: A global array. Rows must divide among the devices along `axis`: pad with zero rows, which are in no set.
        A NumPy array, the same on every process, is cast shard by shard, with a look at what that loses;
        `jnp.asarray` casts float64 to float32 without one.
      eps: The threshold, in (0, 1].
      mesh: The devices.
      axis: The axis of the mesh that rows are split over.
      one_round: One exchange of more keys instead of two of fewer, see the head of this file.
      dtype: Of the computation; float64 needs `jax_enable_x64`.

    Returns:
      The set, the same on every process.

    Raises:
      ValueError: An argument is out of range, rows do not divide, a key on any shard is not finite, or a shard had more
        candidates than slots; or a key of a NumPy array is beyond the range of `dtype`.

    Cost: 4 S D^2 operations over all devices. See `communicated_bytes` for what travels.
    """
    check_eps(eps)
    if axis not in mesh.shape:
        raise ValueError(f"the mesh has no {axis=}, only {tuple(mesh.shape)}")
    if keys.shape[0] % mesh.shape[axis]:
        raise ValueError(f"{keys.shape[0]} keys do not divide among {mesh.shape[axis]} devices: append rows of zeros")
    if keys.shape[0] >= 1 << 31:
        raise ValueError(f"{keys.shape[0]} keys are more than int32 counts: give each part to a OnePassStream")
    if isinstance(keys, np.ndarray):
        host_keys, by_rows = keys, NamedSharding(mesh, PartitionSpec(axis))
        keys = jax.make_array_from_callback(keys.shape, by_rows, lambda at: cast_keys(host_keys[at], dtype))
    # By way of the host: every process then goes on alone, on its own devices.
    found = jax.tree.map(
        jnp.asarray, jax.device_get(_find(keys, eps=eps, mesh=mesh, axis=axis, one_round=one_round, dtype=dtype))
    )
    gram = finish_gram(found.gram)
    if num_lost := int(found.num_lost):
        raise ValueError(
            f"{num_lost} candidates found no slot, so that the set is not known: use dtype=float64 for "
            "ill-conditioned keys"
        )
    bounds = np.where(found.valid, np.asarray(score_bounds(gram, found.keys)), 0)
    return select(gram, np.asarray(found.positions, np.int64), bounds, np.asarray(found.keys), eps)


def sharded_candidates(
    keys: Float[Array, "S D"], *, eps: float, mesh: Mesh, axis: str, one_round: bool = False, dtype: Any = jnp.float32
) -> ShardedCandidates:
    """The exchange of `sharded_universal_set`, to be used under jit. Arguments are as there.

    Nobody has looked at `gram.num_bad` and `num_lost` yet: both must be 0.
    """

    def of_one_shard(keys):
        num_local, head_dim = keys.shape
        slots = num_slots(num_local, head_dim, eps)
        local = _local_gram(keys, dtype)
        threshold = eps * (1 - slack(dtype))

        if one_round:
            mine = score(local, keys) >= threshold
            sent = _take(keys, mine, slots)
            received, factors, bad = _gather((sent, triangular_factor(local), _bad_keys(local)), axis)
            gram = _global_gram(factors, bad, local, num_local)
        else:
            factors, bad = _gather((triangular_factor(local), _bad_keys(local)), axis)
            gram = _global_gram(factors, bad, local, num_local)
            mine = score(gram, keys) >= threshold
            received = _gather(_take(keys, mine, slots), axis)
        kept, rows, valid, lost = received
        positions = rows + num_local * jnp.arange(len(rows))[:, None]
        return ShardedCandidates(
            gram=gram,
            keys=kept.reshape(-1, head_dim),
            positions=jnp.where(valid, positions, -1).reshape(-1),
            valid=valid.reshape(-1),
            num_lost=jnp.sum(lost),
        )

    everywhere = PartitionSpec()
    # Nothing here is differentiated, and what comes out is made of gathered arrays by the same steps on every device.
    return jax.shard_map(of_one_shard, mesh=mesh, in_specs=PartitionSpec(axis), out_specs=everywhere, check_vma=False)(
        keys
    )


_find = jax.jit(sharded_candidates, static_argnames=("eps", "mesh", "axis", "one_round", "dtype"))


def num_slots(num_local: int, head_dim: int, eps: float) -> int:
    """Keys that a shard of `num_local` may send: scores sum to at most D, locally and globally, and a little for
    their inflation by rounding."""
    return int(min(num_local, 1.25 * head_dim / eps + 1))


def communicated_bytes(
    num_keys: int, head_dim: int, eps: float, num_devices: int, *, bytes_per_number: int = 4
) -> dict[str, int]:
    """Bytes that each device receives for one set, by formula: by this module and by a gather of all keys.

    Both ways move as many bytes, since slots are of fixed size; they differ in the number of exchanges.
    """
    num_local = num_keys // num_devices
    slots = num_slots(num_local, head_dim, eps)
    message = bytes_per_number * head_dim * (head_dim + slots) + 5 * slots + 4 + 12
    return {
        "selected": (num_devices - 1) * message,
        "gathered": (num_devices - 1) * num_local * head_dim * bytes_per_number,
    }


def merge_shards(stream: OnePassStream, states: Sequence[OnePassState], num_keys: int) -> UniversalSet:
    """The set of a stream whose parts were seen by different machines, as if one had seen it all.

    Args:
      stream: As used for every part.
      states: One for each part, made by `stream.init(start=position of its first key)`; in any order.
      num_keys: Of the whole stream.

    Raises:
      ValueError: The parts leave a gap, overlap, or go past the end: a shard is missing, or came twice. And what
        `stream.finish` raises.
    """
    parts = sorted((counts.to_int(s.start), counts.to_int(s.gram.num_keys), i) for i, s in enumerate(states))
    reached = 0
    for start, length, _ in parts:
        if start != reached:
            what = "are missing" if start > reached else "came twice"
            raise ValueError(
                f"keys {min(start, reached)} to {max(start, reached) - 1} {what}: every key needs one shard"
            )
        reached += length
    if reached != num_keys:
        raise ValueError(f"the shards end at key {reached}, the stream at {num_keys=}: a shard is missing or cut short")
    merge = jax.jit(stream.merge)
    merged = [states[i] for _, _, i in parts]
    while len(merged) > 1:  # in pairs, so that rounding adds up log many times
        pairs = [merge(a, b) for a, b in zip(merged[::2], merged[1::2], strict=False)]
        merged = pairs + merged[2 * len(pairs) :]
    return stream.finish(merged[0])


def _local_gram(keys, dtype):
    num_local, head_dim = keys.shape
    chunk = min(_CHUNK_ROWS, num_local)
    num_chunks = -(-num_local // chunk)
    padded = jnp.pad(keys, ((0, num_chunks * chunk - num_local), (0, 0))).reshape(num_chunks, chunk, head_dim)

    def step(gram, item):
        place, rows = item
        return add_keys(gram, rows, jnp.minimum(chunk, num_local - place * chunk), floor=float("inf"))[0], None

    gram, _ = jax.lax.scan(step, init_gram(head_dim, dtype), (jnp.arange(num_chunks), padded))
    return gram


def _take(keys, mine, slots):
    """The rows of `mine`, in `slots` slots: keys, their rows, which slots are filled, how many found none."""
    (rows,) = jnp.nonzero(mine, size=slots, fill_value=0)
    total = jnp.sum(mine, dtype=jnp.int32)
    valid = jnp.arange(slots) < total
    return jnp.where(valid[:, None], keys[rows], 0), rows.astype(jnp.int32), valid, jnp.maximum(total - slots, 0)


def _bad_keys(gram):
    return jnp.stack([gram.num_bad, gram.first_bad[1].astype(jnp.int32), gram.num_tiny])


def _global_gram(factors, bad, local, num_local):
    num_bad, first_bad, num_tiny = bad.T
    worst = jnp.argmax(num_bad > 0)
    return from_factors(factors.reshape(-1, factors.shape[-1]), local)._replace(
        num_keys=jnp.array([0, len(factors) * num_local], jnp.uint32),
        num_bad=jnp.sum(num_bad),
        num_tiny=jnp.sum(num_tiny),
        first_bad=jnp.stack([jnp.uint32(0), (worst * num_local + first_bad[worst]).astype(jnp.uint32)]),
    )


def _gather(tree, axis):
    return jax.tree.map(lambda x: jax.lax.all_gather(x, axis), tree)
