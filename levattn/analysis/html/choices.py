"""What every method keeps of the keys of every head, in numbers of one or two bytes."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, Shaped

from levattn.analysis.html.logits import zigzag
from levattn.attention import AttentionSpec
from levattn.attention.coreset import Coreset
from levattn.attention.layer import choose_coreset
from levattn.attention.local import window_neighbours
from levattn.attention.matched import settle
from levattn.attention.select import is_selected

# Methods whose k best keys begin with the k - 1 best: one order says all.
RANKED = ("leverage", "row_norm", "random", "oracle")
# Methods whose keys stand for others, too, and so have weights.
WEIGHTED = ("leverage_merged", "leverage_groups", "groups", "matched", "pivoted")
WEIGHT_STEPS = 64  # In a log weight of 1.


def check_explorable(spec: AttentionSpec) -> None:
    """Refuses attention that the page cannot take again from logits and a choice of keys.

    Raises:
      ValueError: Naming the option.
    """
    for name in ("eps", "k_per_head", "causal", "power"):
        if (value := getattr(spec, name)) not in (None, False):
            raise ValueError(
                f"{name}={value} cannot be explored: the page shows softmax over k keys a head; leave it out"
            )


def method_facts(spec: AttentionSpec, ks: Sequence[int], num_tokens: int, grid: tuple[int, int]) -> dict[str, Any]:
    """What the page must know of a method beside its choices.

    Returns:
      name; ranked; weighted; and `windows`: for each k the tokens that each query sees around itself, None where it
      sees none.
    """
    windows = []
    for k in ks:
        settled = settle(dataclasses.replace(spec, k=k), num_tokens, grid)
        window, prefix = settled.local_window, settled.keep_prefix
        near = None if window is None else window_neighbours(num_tokens, window, prefix, grid)
        windows.append(None if near is None else [row[row >= 0].tolist() for row in near])
    name = spec.method
    return {"name": name, "ranked": name in RANKED, "weighted": name in WEIGHTED, "windows": windows}


def choices(
    query: Float[Array, "B T H D"],
    key: Float[Array, "B S H D"],
    value: Float[Array, "B S H D"],
    spec: AttentionSpec,
    ks: Sequence[int],
    *,
    grid: tuple[int, int],
    rng: Key[Array, ""],
) -> dict[str, Shaped[np.ndarray, "B ..."]]:
    """The choices of one method, for every k.

    Args:
      query: Queries.
      key: Keys.
      value: Values.
      spec: The method; its k does not count.
      ks: Numbers of keys.
      grid: Rows and columns of patches.
      rng: For methods that draw at random.

    Returns:
      Of a method that ranks keys `order` (`B H S`): all keys, the best first. Of others `slots` (`B k H S`): the slot
      of each key, the largest number of the dtype for none; and where slots have weights `log_weights` (`B k H K`),
      zigzag, in units of 1 / WEIGHT_STEPS.
    """
    num_keys = key.shape[1]
    dtype = np.uint8 if num_keys < 256 else np.uint16
    choose_fn = functools.partial(choose, query, key, value, rng, grid=grid)
    if spec.method in RANKED:
        return {"order": np.asarray(choose_fn(spec=dataclasses.replace(spec, k=num_keys)).indices).astype(dtype)}
    coresets = [choose_fn(spec=dataclasses.replace(spec, k=k)) for k in ks]
    slots = np.stack([_slot_of_each_key(coreset, num_keys) for coreset in coresets], axis=1)
    found = {"slots": np.where(slots < 0, np.iinfo(dtype).max, slots).astype(dtype)}
    if spec.method in WEIGHTED:
        found["log_weights"] = np.stack([_log_weights(coreset, max(ks)) for coreset in coresets], axis=1)
    return found


@functools.partial(jax.jit, static_argnames=("grid", "spec"))
def choose(query, key, value, rng, *, grid: tuple[int, int], spec: AttentionSpec) -> Coreset:
    """`choose_coreset`, compiled once for each spec."""
    return choose_coreset(query, key, value, spec, grid=grid, rng=rng)


def _slot_of_each_key(coreset: Coreset, num_keys: int) -> np.ndarray:
    if coreset.assignment is not None:
        return np.asarray(coreset.assignment)
    kept = is_selected(coreset.indices, coreset.valid, num_keys)
    at = jnp.where(coreset.valid, coreset.indices, -1)[:, :, None] == jnp.arange(num_keys)[:, None]
    return np.asarray(jnp.where(kept, jnp.argmax(at, axis=-1), -1))


def _log_weights(coreset: Coreset, most: int) -> np.ndarray:
    weights = np.asarray(jnp.where(coreset.valid, coreset.log_weights, 0), np.float64)
    steps = np.clip(np.rint(weights * WEIGHT_STEPS), -32767, 32767).astype(np.int32)
    return zigzag(np.pad(steps, ((0, 0), (0, 0), (0, most - steps.shape[-1]))))
