"""Attention with weights |<q, k>|^p: the kind for which a small universal set exists, whatever the queries.

A_ij = |<q_i, k_j>|^p / sum_l |<q_i, k_l>|^p, over all keys l, kept or not: rows of what is kept sum to less than 1 and
no weight is inflated. Source: LevAttention (ICLR 2025, arXiv 2410.05462), for p = 2 and even p.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from levattn.attention.coreset import Coreset, zero_masked
from levattn.attention.select import is_selected
from levattn.attention.spec import AttentionSpec
from levattn.core.leverage import gram_matrix

_BLOCK = 256  # keys at a time where a row's total has no shorter way
_SLACK = 1e-3  # of a threshold, relatively: float32 scores must not lose a heavy key by rounding
_SMALLEST = 1e-37  # products below count as zero: their reciprocal, in the gradient, would overflow


def attend_polynomial(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H D"],
    coreset: Coreset,
    spec: AttentionSpec,
    mask: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B T H D"]:
    """out(q) = sum over kept keys c of |<q, k_c>|^p value_c / sum over all keys l of |<q, k_l>|^p.

    With method "leverage", a threshold eps and `universal_spec`, no entry that is left out reaches eps, for keys of a
    condition number (columns scaled to equal norms) up to 1e5: beyond, float32 scores lose directions, and with them
    heavy keys (`levattn.universal_set` and `levattn.heavy_entries` compute in float64). A row's output is off by at
    most (1 - the kept mass of the row) times the longest value left out, and by float32 rounding. For even p that has
    a part of its own: the keys left out enter the total through their Gram matrix, to about 1e-7 |q|^p sum |k_l|^p over
    them, so that a row whose total is not far above that (a query all but orthogonal to the long ones among them, at
    condition numbers of 1e3 and more) may come out too small. Kept keys are summed one by one.

    Args:
      query: Queries.
      key: All keys. Products with queries below 1e-37 count as 0; for the scale of keys see `leverage_scores`.
      value: All values.
      coreset: Keys that stand for themselves, with their values.
      spec: Gives the power, at least 1.
      mask: True for the tokens that exist.

    Returns:
      The outputs, in the dtype of `query`; zeros for a query that is orthogonal to all keys. Gradients flow through the
      kept keys and values, and through all keys by the row totals. Cost: 4 B H T K D operations and those of
      `log_totals`.
    """
    logits, counts = _log_powers(query, coreset.keys, spec.power)
    counts &= coreset.valid[:, :, None]
    log_kept = jax.nn.logsumexp(logits, axis=-1, where=counts)
    log_total = log_kept
    if spec.method != "dense":
        is_kept = jnp.swapaxes(is_selected(coreset.indices, coreset.valid, key.shape[1]), 1, 2)
        others = jnp.where(is_kept[..., None], 0, key)
        parts = jnp.stack([log_kept, log_totals(query, others, spec.power, mask)])
        log_total = jax.nn.logsumexp(parts, axis=0, where=parts > -jnp.inf)
    weights = _exponential(logits, log_total, counts)
    return jnp.einsum("bhtk,bkhd->bthd", weights.astype(query.dtype), coreset.values)


def polynomial_probabilities(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S H D"],
    power: float | int,
    mask: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B H T S"]:
    """The dense matrix A of polynomial attention, in float32."""
    (key,) = zero_masked(mask, key)
    logits, counts = _log_powers(query, key, power)
    return _exponential(logits, jax.nn.logsumexp(logits, axis=-1, where=counts), counts)


def log_totals(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S H D"],
    power: float | int,
    mask: Bool[Array, "B S"] | None = None,
) -> Float[Array, "B H T"]:
    """log sum_l |<q, k_l>|^p for every query, over all keys that exist; -inf where the sum is 0.

    p = 2: q^T G q with the Gram matrix G, (2 S + 2 T) D^2 operations a head. Even p: the same with the p/2-fold tensor
    powers of queries and keys, of D^(p/2) entries, where that is cheaper than all products. Else all products, a block
    of keys at a time: 2 T S D operations, memory for T x 256. Through G, a total below about 1e-7 |q|^2 |K|^2 is
    rounding.

    Args:
      query: Queries.
      key: All keys.
      power: p, at least 1.
      mask: True for the tokens that exist.
    """
    (key,) = zero_masked(mask, key)
    head_dim, num_keys = key.shape[-1], key.shape[1]
    half = int(power) // 2
    if power == 2 * half and (power == 2 or head_dim ** (2 * half) <= num_keys * head_dim):
        features, gram = _tensor_power(query, half), gram_matrix(_tensor_power(key, half))
        images = jnp.einsum("bthf,bhfg->bthg", features, gram, precision="highest")
        totals = jnp.einsum("bthf,bthf->bht", images, features, precision="highest")
        is_positive = totals > _SMALLEST
        return jnp.where(is_positive, jnp.log(jnp.where(is_positive, totals, 1)), -jnp.inf)

    blocks = jnp.pad(key, ((0, 0), (0, -num_keys % _BLOCK), (0, 0), (0, 0)))
    blocks = jnp.moveaxis(blocks.reshape(key.shape[0], -1, _BLOCK, *key.shape[2:]), 1, 0)

    @jax.checkpoint
    def add(totals, keys):
        logits, counts = _log_powers(query, keys, power)
        logits = jnp.concatenate([logits, totals[..., None]], axis=-1)
        counts = jnp.concatenate([counts, totals[..., None] > -jnp.inf], axis=-1)
        return jax.nn.logsumexp(logits, axis=-1, where=counts), None

    batch, num_queries, heads, _ = query.shape
    return jax.lax.scan(add, jnp.full((batch, heads, num_queries), -jnp.inf), blocks)[0]


def universal_spec(spec: AttentionSpec, num_keys: int) -> AttentionSpec:
    """`spec` for choosing keys: eps becomes the leverage score below which no entry of the matrix A reaches it.

    With leverage scores t and u_l = <q, k_l>, u_j^2 <= t_j |u|^2. For p <= 2, |u|_2 <= |u|_p, so A_ij <= t_j^(p/2); for
    p >= 2, |u|_2 <= S^(1/2 - 1/p) |u|_p, so A_ij <= S^(p/2 - 1) t_j^(p/2). The promise is as good as the scores are
    (float32: up to a condition number of 1e5), so that score_method "gram" becomes "auto". Other methods than
    "leverage" promise nothing and stay as they are.

    Args:
      spec: With a power.
      num_keys: S.
    """
    if spec.eps is None or spec.method != "leverage":
        return spec
    threshold = (spec.eps / num_keys ** max(0.0, spec.power / 2 - 1)) ** (2 / spec.power)
    score_method = "auto" if spec.score_method == "gram" else spec.score_method
    return dataclasses.replace(spec, eps=(1 - _SLACK) * threshold, score_method=score_method)


def _log_powers(query, key, power) -> tuple[Float[Array, "B H T S"], Bool[Array, "B H T S"]]:
    """power * log |<q, k>|, and where the product is not zero."""
    products = jnp.abs(jnp.einsum("bthd,bshd->bhts", query, key, preferred_element_type=jnp.float32))
    counts = products > _SMALLEST
    return power * jnp.log(jnp.where(counts, products, 1)), counts


def _exponential(logits, log_total, counts):
    """exp(logits - log_total) where counted, else 0; without a NaN in the gradient of rows that have nothing."""
    log_total = jnp.where(log_total > -jnp.inf, log_total, 0)[..., None]
    return jnp.where(counts, jnp.exp(jnp.where(counts, logits - log_total, 0)), 0)


def _tensor_power(x: Float[Array, "B S H D"], degree: int) -> Float[Array, "B S H F"]:
    x = power = x.astype(jnp.float32)
    for _ in range(degree - 1):
        power = (power[..., None] * x[..., None, :]).reshape(*x.shape[:3], -1)
    return power
