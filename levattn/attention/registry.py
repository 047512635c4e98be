"""The methods by name: functions (query, key, value, *, spec, mask, rng, grid) -> Coreset. A new one is a line here."""

import difflib
from typing import Protocol, runtime_checkable

from jaxtyping import Array, Bool, Float, Key

from levattn.attention.coreset import Coreset
from levattn.attention.dense import dense
from levattn.attention.groups import groups, leverage_groups, leverage_merged
from levattn.attention.kmeans import kmeans
from levattn.attention.matched import matched
from levattn.attention.pivoted import pivoted
from levattn.attention.scored import leverage, oracle, random, row_norm
from levattn.attention.spec import AttentionSpec


@runtime_checkable
class Method(Protocol):
    """Chooses the weighted keys of every head.

    Args:
      query: Queries, for the methods that look at them.
      key: Keys.
      value: Values.
      spec: The options, see `AttentionSpec`.
      mask: True for the tokens that exist.
      rng: For the methods that draw at random; None falls back on `spec.seed`.
      grid: Rows and columns of patches, for the methods that look at neighbourhoods.

    Returns:
      A coreset of a static number of slots. Its indices carry no gradient, its keys and values do.
    """

    def __call__(
        self,
        query: Float[Array, "B T H D"],
        key: Float[Array, "B S H D"],
        value: Float[Array, "B S H D"],
        *,
        spec: AttentionSpec,
        mask: Bool[Array, "B S"] | None = None,
        rng: Key[Array, ""] | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Coreset: ...


METHODS: dict[str, Method] = {
    "dense": dense,
    "leverage": leverage,
    "row_norm": row_norm,
    "random": random,
    "kmeans": kmeans,
    "oracle": oracle,
    "leverage_merged": leverage_merged,
    "leverage_groups": leverage_groups,
    "groups": groups,
    "matched": matched,
    "pivoted": pivoted,
}


def get_method(name: str) -> Method:
    """The method called `name`.

    Raises:
      ValueError: For an unknown name, with the nearest known one.
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0)
    raise ValueError(f"attention method {name!r} is unknown: did you mean {near[0]!r}? Known: {', '.join(METHODS)}")
