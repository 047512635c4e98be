"""LevAttention as a function on arrays, as a Flax attention function, and as a Flax module."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Shaped

from levattn.attention.budgets import in_head_order, join_coresets, run_by_budget
from levattn.attention.causal import attend_causal
from levattn.attention.coreset import Coreset, attend
from levattn.attention.dense import attend_dense
from levattn.attention.fused import attend_fused, takes
from levattn.attention.local import attend_with_window
from levattn.attention.matched import settle
from levattn.attention.polynomial import attend_polynomial, polynomial_probabilities, universal_spec
from levattn.attention.registry import get_method
from levattn.attention.scored import dense_probabilities
from levattn.attention.select import is_selected
from levattn.attention.spec import AttentionSpec
from levattn.core.finite import check_finite


def lev_attention(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H D"],
    spec: AttentionSpec,
    *,
    mask: Bool[Array, "B S"] | None = None,
    grid: tuple[int, int] | None = None,
    rng: Key[Array, ""] | None = None,
) -> Float[Array, "B T H D"]:
    """Attention of every query over the keys that a method keeps.

    Args:
      query: Queries.
      key: Keys.
      value: Values.
      spec: The method and its options.
      mask: True for the tokens that exist.
      grid: Rows and columns of patches, for a 2-D window of local tokens.
      rng: For methods that draw at random.

    Returns:
      The outputs, in the dtype of `query`.

    Raises:
      ValueError: For an unknown method, more keys asked for than there are, a window that does not fit, or keys that
        are not finite (under `jax.jit` the outputs of their head are NaN; see `levattn.core.finite`).
    """
    check_finite("keys", key, mask)
    if spec.k_per_head is not None and spec.method != "dense":

        def attend_some(query, key, value, spec, rng):
            return lev_attention(query, key, value, spec, mask=mask, grid=grid, rng=rng)

        return in_head_order(run_by_budget(attend_some, query, key, value, spec, rng), spec, axis=2)
    if spec.causal:
        return attend_causal(query, key, value, spec, mask=mask)
    if spec.method == "dense" and spec.power is None:
        return attend_dense(query, key, value, mask)
    if takes(query, key, value, spec, mask):
        return attend_fused(query, key, value, spec, grid=grid, rng=rng)
    coreset = choose_coreset(query, key, value, spec, mask=mask, grid=grid, rng=rng)
    spec = _settled(spec, key.shape[1], grid)
    return attend_coreset(query, key, value, coreset, spec, mask=mask, grid=grid)


def choose_coreset(query, key, value, spec: AttentionSpec, *, mask=None, grid=None, rng=None) -> Coreset:
    """The keys of every head as `spec.method` chooses them; where k differs by head, with slots that hold nothing."""
    if spec.k_per_head is not None:

        def choose_some(query, key, value, spec, rng):
            return choose_coreset(query, key, value, spec, mask=mask, grid=grid, rng=rng)

        return join_coresets(run_by_budget(choose_some, query, key, value, spec, rng), spec)
    spec = _settled(spec, key.shape[1], grid)
    return get_method(spec.method)(query, key, value, spec=spec, mask=mask, rng=rng, grid=grid)


def attend_coreset(query, key, value, coreset: Coreset, spec: AttentionSpec, *, mask=None, grid=None) -> jax.Array:
    """Attention over a coreset that is at hand, and over the local window that `spec` asks for."""
    if spec.power is not None:
        return attend_polynomial(query, key, value, coreset, spec, mask)
    if spec.local_window is None:
        return attend(query, coreset)
    return attend_with_window(query, key, value, coreset, spec, mask, grid)


def _settled(spec: AttentionSpec, num_keys: int, grid: tuple[int, int] | None) -> AttentionSpec:
    return settle(spec, num_keys, grid) if spec.power is None else universal_spec(spec, num_keys)


@dataclasses.dataclass(frozen=True, eq=False)
class LevAttention:
    """`lev_attention` in the form of Flax's `attention_fn`: parameters keep their names and shapes.

        nn.MultiHeadDotProductAttention(num_heads=6, attention_fn=LevAttention(AttentionSpec("leverage", k=32)))

    With `sow_weights=True` Flax hands the module over, and this function sows into its `intermediates`: `queries`,
    `keys`, `values`, the `indices` and `valid` of the coreset, and `attention_mass`, the share of dense
    attention that falls on the kept keys, averaged over the queries (`B H`; its cost is that of dense attention).
    Keys that a method merges with others do not count as kept.

    Attributes:
      spec: The method and its options.
      grid: Rows and columns of patches, for a 2-D window of local tokens.
      rng: For methods that draw at random.
    """

    spec: AttentionSpec
    grid: tuple[int, int] | None = None
    rng: Any = None

    def __post_init__(self):
        get_method(self.spec.method)  # an unknown name is refused before anything is traced

    def __call__(
        self,
        query: Float[Array, "B T H D"],
        key: Float[Array, "B S H D"],
        value: Float[Array, "B S H D"],
        mask: Shaped[Array, "..."] | None = None,
        module: nn.Module | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
    ) -> Float[Array, "B T H D"]:
        """Args are Flax's; a mask may hide keys (`B 1 1 S`), not single pairs of query and key; there is no dropout."""
        if dropout_rate and not deterministic:
            raise ValueError(f"{dropout_rate=} must be 0: attention weights over selected keys are not dropped")
        if mask is not None:
            if mask.ndim != 4 or mask.shape[1:3] != (1, 1):
                raise ValueError(
                    f"{mask.shape=} must be (batch, 1, 1, keys): a token mask, the same for all queries; for causal "
                    "attention leave the mask out and give AttentionSpec(causal=True)"
                )
            mask = jnp.broadcast_to(mask[:, 0, 0] != 0, key.shape[:2])
        if module is not None:
            self._sow(module, query, key, value, mask)
        return lev_attention(query, key, value, self.spec, mask=mask, grid=self.grid, rng=self.rng)

    def _sow(self, module, query, key, value, mask):
        if self.spec.causal:
            raise ValueError("sow_weights needs causal=False: causal queries share no keys; see `causal.seen_keys`")
        spec = self.spec
        coreset = choose_coreset(query, key, value, spec, mask=mask, grid=self.grid, rng=self.rng)
        kept = is_selected(coreset.indices, coreset.valid, key.shape[1])
        if spec.power is None:
            probs = dense_probabilities(query, key, mask)
        else:
            probs = polynomial_probabilities(query, key, spec.power, mask)
        mass = jnp.sum(probs, axis=-1, where=kept[:, :, None])
        found = {
            "queries": query,
            "keys": key,
            "values": value,
            "indices": coreset.indices,
            "valid": coreset.valid,
            "attention_mass": jnp.mean(mass, axis=-1),
        }
        for name, x in found.items():
            module.sow("intermediates", name, x)


class LevSelfAttention(nn.Module):
    """Multi-head self-attention over the kept keys, with the parameters of Flax's own multi-head attention.

    Attributes:
      num_heads: Heads, H; the width must be a multiple.
      spec: The method and its options.
      dtype: Of the computation. Parameters stay in float32.
    """

    num_heads: int
    spec: AttentionSpec = AttentionSpec("leverage")
    dtype: Any = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T C"],
        mask: Bool[Array, "B T"] | None = None,
        grid: tuple[int, int] | None = None,
        sow_weights: bool = False,
    ) -> Float[Array, "B T C"]:
        rng = self.make_rng("selection") if self.has_rng("selection") else None
        attention = nn.MultiHeadDotProductAttention(
            num_heads=self.num_heads,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            attention_fn=LevAttention(self.spec, grid, rng),
            name="MultiHeadDotProductAttention_0",
        )
        return attention(x, mask=None if mask is None else mask[:, None, None], sow_weights=sow_weights)
