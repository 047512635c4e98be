"""A k for each head: heads of one budget run together, each group with a static k, so that compute follows the budgets.

The keys of every group are gathered as ever. Nothing is padded to the largest k but what is only looked at.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from levattn.attention.coreset import Coreset
from levattn.attention.spec import AttentionSpec

T = TypeVar("T")


def heads_by_budget(spec: AttentionSpec, num_heads: int) -> list[tuple[AttentionSpec, list[int]]]:
    """The distinct budgets, smallest first, each as a spec with one k and the heads that have it.

    Args:
      spec: With `k_per_head`, or without: then one entry holds all heads.
      num_heads: H.

    Raises:
      ValueError: If `k_per_head` is not one k for each head.
    """
    if spec.k_per_head is None:
        return [(spec, list(range(num_heads)))]
    if len(spec.k_per_head) != num_heads:
        raise ValueError(f"k_per_head={spec.k_per_head} must be one k for each of the {num_heads} heads")
    return [
        (
            dataclasses.replace(spec, k=k, k_per_head=None),
            [head for head, of_head in enumerate(spec.k_per_head) if of_head == k],
        )
        for k in sorted(set(spec.k_per_head))
    ]


def run_by_budget(
    run_fn: Callable[..., T],
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H D"],
    spec: AttentionSpec,
    rng: Key[Array, ""] | None = None,
) -> list[T]:
    """Calls `run_fn(query, key, value, spec, rng)` on the heads of each budget, in the order of `heads_by_budget`.

    Args:
      run_fn: Attention, or the choice of a coreset, of some heads that share a k.
      query: Queries of all heads.
      key: Keys of all heads.
      value: Values of all heads.
      spec: With `k_per_head`.
      rng: For methods that draw at random; every group draws anew.

    Raises:
      ValueError: If `k_per_head` is not one k for each head, or one exceeds the number of keys.
    """
    if max(spec.k_per_head) > key.shape[1]:
        raise ValueError(
            f"k_per_head={spec.k_per_head} must be in [1, {key.shape[1]}]: the sequence has {key.shape[1]} tokens"
        )
    rng = jax.random.key(spec.seed) if rng is None else rng
    groups = heads_by_budget(spec, key.shape[2])
    return [
        run_fn(*(x[:, :, jnp.array(heads)] for x in (query, key, value)), of_group, jax.random.fold_in(rng, i))
        for i, (of_group, heads) in enumerate(groups)
    ]


def in_head_order(parts: Sequence[Array], spec: AttentionSpec, axis: int) -> Array:
    """Joins arrays of the groups of `run_by_budget` along their axis of heads, every head back in its place."""
    heads = [head for _, of_group in heads_by_budget(spec, len(spec.k_per_head)) for head in of_group]
    places = sorted(range(len(heads)), key=heads.__getitem__)
    return jnp.take(jnp.concatenate(parts, axis=axis), jnp.array(places), axis=axis)


def join_coresets(parts: Sequence[Coreset], spec: AttentionSpec) -> Coreset:
    """One coreset of all heads, to be looked at: the smaller ones filled up with slots that hold nothing.

    Args:
      parts: Of the groups of `run_by_budget`.
      spec: With `k_per_head`.

    Returns:
      A coreset of as many slots as the largest; slots added are not valid and have index -1. Attention over it is that
      of the parts, at the cost of the largest k in every head.
    """
    num_slots = max(part.valid.shape[-1] for part in parts)

    def join(name: str, head_axis: int, slot_axis: int, fill: float | int | bool) -> Array:
        filled = []
        for part in parts:
            x = getattr(part, name)
            widths = [(0, 0)] * x.ndim
            widths[slot_axis] = (0, num_slots - x.shape[slot_axis])
            filled.append(jnp.pad(x, widths, constant_values=fill))
        return in_head_order(filled, spec, head_axis)

    assignment = None
    if parts[0].assignment is not None:
        assignment = in_head_order([part.assignment for part in parts], spec, axis=1)
    return Coreset(
        keys=join("keys", 2, 1, 0),
        values=join("values", 2, 1, 0),
        log_weights=join("log_weights", 1, 2, 0),
        indices=join("indices", 1, 2, -1),
        valid=join("valid", 1, 2, False),
        assignment=assignment,
    )
