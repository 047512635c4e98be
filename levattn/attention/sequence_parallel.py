"""LevAttention for one long input whose tokens are spread over devices.

Ring attention, or a gather of all keys and values, moves every key to every device. Here the devices agree on the k
keys of each head that all of them hold at the highest rank, and only those travel: a D x D Gram matrix, k scores a
device, and k keys and values a head, whatever the number of tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float

from levattn.attention.coreset import Coreset, attend, zero_masked
from levattn.attention.select import num_kept
from levattn.attention.spec import AttentionSpec
from levattn.core.leverage import gram_matrix, scores_from_gram


def sequence_parallel_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H D"],
    spec: AttentionSpec,
    *,
    mesh: Mesh,
    axis: str = "sequence",
    batch_axis: str | None = None,
    mask: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B T H D"]:
    """`lev_attention` with queries, keys and values split over devices by token: the same output, the same gradients.

    Under jit, with arrays of the global shapes. Works by itself for arrays that lie elsewhere; they are then moved.

    Args:
      query: Queries; their number must be a multiple of the devices along `axis`, as that of the keys.
      key: Keys.
      value: Values.
      spec: The method, "leverage" or "row_norm", and its options but for local windows; `score_method` "gram".
      mesh: The devices.
      axis: The axis of the mesh that the tokens are split over.
      batch_axis: The axis that the batch is split over, if any.
      mask: True for the tokens that exist: pad a sequence with False to a length that divides.

    Returns:
      The outputs, split as the queries. All NaN for a head with a key that is not finite, wherever that key is.

    Raises:
      ValueError: For an axis that the mesh lacks, a length that does not divide, or a spec that cannot be had.

    Cost: of the operations of `lev_attention`, the share of one device in each but the D x D factorisation, which all
    devices repeat. Bytes between devices: see `communicated_bytes`.
    """
    _check(query, key, spec, mesh, axis, batch_axis)
    if mask is None:
        mask = jnp.ones(key.shape[:2], bool)
    tokens = PartitionSpec(batch_axis, axis)

    def of_one_device(query, key, value, mask):
        key, value = zero_masked(mask, key, value)
        scores = _scores(jax.lax.stop_gradient(key), mask, spec, axis)
        return _attend(query, _shared_coreset(key, value, scores, mask, spec, axis), scores, axis)

    return jax.shard_map(of_one_device, mesh=mesh, in_specs=(tokens,) * 4, out_specs=tokens)(query, key, value, mask)


def _attend(query, coreset: Coreset, scores, axis: str) -> jax.Array:
    """`attend`, and NaN where some device has a score that is no number: a top-k would pass over it in silence."""
    is_bad = jax.lax.pmax(jnp.any(~jnp.isfinite(scores), axis=-1).astype(jnp.int32), axis) > 0
    return jnp.where(is_bad[:, None, :, None], jnp.nan, attend(query, coreset))


def _scores(key, mask, spec, axis):
    """Scores of this device's keys among the keys of all devices."""
    key = key.astype(jnp.float32)
    if spec.centre:
        present = mask[:, :, None, None]
        total = jax.lax.psum(jnp.sum(key, axis=1), axis)
        number = jax.lax.psum(jnp.sum(mask, axis=1), axis)
        mean = total / jnp.maximum(number, 1)[:, None, None]
        # As in `centre_keys`: what is equal in all tokens becomes exactly zero. The least comes as a largest, negated.
        ends = jnp.stack([jnp.where(present, x, -jnp.inf).max(axis=1) for x in (key, -key)])
        largest, least = jax.lax.pmax(ends, axis) * jnp.array([1.0, -1.0])[:, None, None, None]
        key = jnp.where(present, key - jnp.clip(mean, least, largest)[:, None], 0)
    if spec.method == "row_norm":
        norms = jnp.swapaxes(jnp.sum(jnp.square(key), axis=-1), 1, 2)
        total = jax.lax.psum(jnp.sum(norms, axis=-1, keepdims=True), axis)
        return key.shape[-1] * norms / jnp.where(total == 0, 1, total)
    gram = jax.lax.psum(gram_matrix(key), axis)
    if spec.ridge:
        head_dim = gram.shape[-1]
        mean_power = jnp.trace(gram, axis1=-2, axis2=-1) / head_dim
        gram += spec.ridge * mean_power[..., None, None] * jnp.eye(head_dim, dtype=gram.dtype)
    scores, _ = scores_from_gram(key, gram)
    return jnp.where(mask[:, None], scores, 0)


def _shared_coreset(key, value, scores, mask, spec, axis):
    """The coreset of all devices' keys, the same on each. Only scores and places are gathered, then the kept keys."""
    num_local, head_dim = key.shape[1], key.shape[3]
    shard, num_keys = jax.lax.axis_index(axis), num_local * jax.lax.axis_size(axis)
    slots = num_kept(spec, num_keys, head_dim)
    places = shard * num_local + jnp.arange(num_local)
    ranking = jnp.where(places < spec.keep_prefix, jnp.inf, scores)
    ranking = jnp.where(mask[:, None], ranking, -jnp.inf)
    best, local = jax.lax.top_k(ranking, min(slots, num_local))
    # In order of devices, so that ties go to the lowest place, as on one device.
    best, places = (jax.lax.all_gather(x, axis, axis=2, tiled=True) for x in (best, places[local]))
    top, chosen = jax.lax.top_k(best, slots)
    indices = jnp.take_along_axis(places, chosen, axis=-1)
    valid = top >= (-jnp.finfo(top.dtype).max if spec.eps is None else spec.eps)

    mine = valid & (indices // num_local == shard)
    along = jnp.swapaxes(jnp.where(mine, indices % num_local, 0), 1, 2)[..., None]
    is_mine = jnp.swapaxes(mine, 1, 2)[..., None]
    # Each slot is filled by the device that holds its key, and summed with the zeros of the others.
    keys, values = (
        jax.lax.psum(jnp.where(is_mine, jnp.take_along_axis(x, along, axis=1), 0), axis) for x in (key, value)
    )
    return Coreset(keys, values, jnp.zeros(indices.shape, jnp.float32), indices, valid)


def _check(query, key, spec, mesh, axis, batch_axis):
    for name in (axis, *([batch_axis] if batch_axis else [])):
        if name not in mesh.shape:
            raise ValueError(f"the mesh has no axis {name!r}, only {tuple(mesh.shape)}")
    num_shards = mesh.shape[axis]
    for what, x in (("queries", query), ("keys", key)):
        if x.shape[1] % num_shards:
            raise ValueError(
                f"{x.shape[1]} {what} do not divide among {num_shards} devices: pad them, and mask the keys"
            )
    if spec.method not in ("leverage", "row_norm"):
        raise ValueError(f"method={spec.method!r} must be 'leverage' or 'row_norm' to be split over tokens")
    if spec.causal or spec.power is not None:
        raise ValueError(f"causal={spec.causal} and power={spec.power} must be False and None to be split over tokens")
    if spec.local_window is not None:
        raise ValueError(f"local_window={spec.local_window!r} must be None: windows reach over the edges of devices")
    if spec.method == "leverage" and spec.score_method != "gram":
        raise ValueError(f"score_method={spec.score_method!r} must be 'gram': it is the one that adds up over devices")


class CommunicatedBytes(NamedTuple):
    """Bytes that each device receives for one forward pass of one layer.

    Attributes:
      selected: By `sequence_parallel_attention`.
      gathered: By an all-gather of all keys and values.
      ring: By ring attention, which passes every block of keys and values round. As much, in pieces.
    """

    selected: int
    gathered: int
    ring: int


def communicated_bytes(
    spec: AttentionSpec,
    *,
    batch: int,
    num_tokens: int,
    num_heads: int,
    head_dim: int,
    num_devices: int,
    bytes_per_number: int = 4,
) -> CommunicatedBytes:
    """What travels, by formula. An all-reduce of n numbers is counted as 2 n (p - 1) / p, as rings and trees do it.

    Args:
      spec: As handed to `sequence_parallel_attention`.
      batch: Inputs on the devices of one sequence group, B.
      num_tokens: Of one input, over all devices, S.
      num_heads: Heads, H.
      head_dim: Head width, D.
      num_devices: That the tokens are split over.
      bytes_per_number: Of keys and values; scores and Gram matrices are float32.
    """
    heads, others = batch * num_heads, num_devices - 1
    slots = num_kept(spec, num_tokens, head_dim)
    candidates = min(slots, num_tokens // num_devices)
    summed = 2 * others / num_devices
    # The Gram matrix or the sum of the norms, the mean key and both ends, and whether some score is no number.
    shared = 4 * ((head_dim**2 if spec.method == "leverage" else 1) + (3 * head_dim if spec.centre else 0) + 1)
    selected = heads * (summed * shared + others * candidates * 8 + summed * slots * 2 * head_dim * bytes_per_number)
    everything = heads * others * (num_tokens // num_devices) * 2 * head_dim * bytes_per_number
    return CommunicatedBytes(round(selected), everything, everything)
