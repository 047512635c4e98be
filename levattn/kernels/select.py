"""The keys of highest leverage score: scores of all keys, and the best of them."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int


def scores(
    keys: Float[Array, "B S H D"],
    whiten: Float[Array, "B H D D"],
    *,
    rows: int = 512,
    block: int = 128,
    interpret: bool = False,
) -> Float[Array, "B H S"]:
    """Squared norms of the whitened keys, their leverage scores.

    Args:
      keys: Keys, in bfloat16; D a power of two of at least 16.
      whiten: W of each head.
      rows: Keys that one program scores.
      block: Keys scored at once.
      interpret: Run on any device, slowly.

    Returns:
      ||W k||^2 in float32. Cost: 2 B H S D^2 operations on matrix units, three times for the accuracy of float32; the
      keys are read once.
    """
    batch, num_keys, heads, head_dim = keys.shape
    block = min(block, max(16, pl.next_power_of_2(num_keys)))
    rows = min(rows, pl.cdiv(num_keys, block) * block)
    return pl.pallas_call(
        partial(_score_kernel, num_keys=num_keys, rows=rows, block=block),
        grid=(batch, heads, pl.cdiv(num_keys, rows)),
        in_specs=[
            pl.BlockSpec((None, num_keys, None, head_dim), lambda b, h, p: (b, 0, h, 0)),
            pl.BlockSpec((None, None, head_dim, head_dim), lambda b, h, p: (b, h, 0, 0)),
        ],
        out_specs=pl.BlockSpec((None, None, num_keys), lambda b, h, p: (b, h, 0)),
        out_shape=jax.ShapeDtypeStruct((batch, heads, num_keys), jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="scores",
    )(keys, whiten)


def _score_kernel(keys_ref, whiten_ref, score_ref, *, num_keys, rows, block):
    first = pl.program_id(2) * rows
    whiten = _split(whiten_ref[...])

    def score(i, _):
        start = first + i * block
        is_key = start + jnp.arange(block) < num_keys
        keys = plgpu.load(keys_ref.at[pl.ds(start, block), :], mask=is_key[:, None], other=0)
        whitened = sum(plgpu.dot(keys, part, trans_b=True) for part in whiten)
        plgpu.store(score_ref.at[pl.ds(start, block)], jnp.sum(whitened * whitened, axis=1), mask=is_key)

    jax.lax.fori_loop(0, rows // block, score, None)


def _split(matrix):
    """Three bfloat16 matrices that add up to one of float32, for matrix units that multiply half precision."""
    parts = []
    for _ in range(3):
        parts.append(matrix.astype(jnp.bfloat16))
        matrix -= parts[-1].astype(jnp.float32)
    return parts


def top(
    scores: Float[Array, "B H S"],
    k: int,
    *,
    keep_prefix: int = 0,
    rows: int = 1024,
    interpret: bool = False,
) -> Int[Array, "B H K"]:
    """Indices of the k largest scores of each head, in falling order, ties by index, as `jax.lax.top_k` has them.

    A head with a score that is NaN gets S for all its indices, the place of no key.

    Args:
      scores: Not negative.
      k: How many, at most S.
      keep_prefix: Leading keys that come first whatever their score.
      rows: Scores among which one program looks; the best of each stretch are compared again.
      interpret: Run on any device, slowly.

    Returns:
      The indices. Cost: k passes over the scores, in registers.
    """
    num_keys = scores.shape[2]
    sound = ~jnp.any(jnp.isnan(scores), axis=-1, keepdims=True)
    if keep_prefix:
        scores = jnp.where(jnp.arange(num_keys) < keep_prefix, jnp.inf, scores)
    indices = None
    while indices is None or indices.shape[2] > k:
        scores, indices = _best_of_stretches(scores, indices, k, rows, interpret)
    return jnp.where(sound, indices, num_keys)


def _best_of_stretches(scores, indices, k, rows, interpret):
    """The k best of every `rows` candidates, and where they are; `indices` says so of the candidates, if given."""
    batch, heads, num = scores.shape
    size = max(min(pl.next_power_of_2(num), rows), pl.next_power_of_2(2 * k))
    parts = pl.cdiv(num, size)
    candidates = pl.BlockSpec((None, None, num), lambda b, h, p: (b, h, 0))
    best = pl.BlockSpec((None, None, k), lambda b, h, p: (b, h, p))
    given = [scores] if indices is None else [scores, indices]
    return pl.pallas_call(
        partial(_top_kernel, num=num, k=k, size=size, is_last=parts == 1),
        grid=(batch, heads, parts),
        in_specs=[candidates] * len(given),
        out_specs=[best, best],
        out_shape=[jax.ShapeDtypeStruct((batch, heads, parts * k), dtype) for dtype in (jnp.float32, jnp.int32)],
        compiler_params=plgpu.CompilerParams(num_warps=max(1, size // 512), num_stages=1),
        interpret=interpret,
        name="top",
    )(*given)


def _top_kernel(score_ref, *refs, num, k, size, is_last):
    *given, top_ref, index_ref = refs
    first = pl.program_id(2) * size
    at = jnp.arange(size)
    exists = first + at < num
    scores = plgpu.load(score_ref.at[pl.ds(first, size)], mask=exists, other=-1.0)

    def take(i, scores):
        best = jnp.argmax(scores)
        index_ref[i] = given[0][jnp.minimum(first + best, num - 1)] if given else first + best
        if not is_last:
            top_ref[i] = jnp.max(scores)
        return jnp.where(at == best, -2.0, scores)

    jax.lax.fori_loop(0, k, take, scores)
