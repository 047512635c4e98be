"""Universal sets of x^2 for keys that pass by once, in chunks, in memory that does not grow with their number.

Leverage scores only fall as keys arrive. A key whose score among the keys so far is below eps is therefore dropped
for good, and what is left at the end, scored once more, is the set that an offline computation finds. The scores so
far sum to at most the rank, so that no more than D / eps keys wait: D^2 + D^2 / eps numbers, to a constant.
Source: LevAttention (ICLR 2025, arXiv 2410.05462), its streaming section; the one-pass rule is this project's.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt

from levattn.universal import counts
from levattn.universal.chunks import cast_keys, check_chunk
from levattn.universal.running_gram import (
    RunningGram,
    add_keys,
    init_gram,
    merge_grams,
    rank,
    rounding_tolerance,
    score,
    sharpen,
    slack,
)
from levattn.universal.sets import UniversalSet, check_eps, narrowed, passes

# Positions of slots and counts of waiting keys are int32.
_MOST_SLOTS = (1 << 31) - 1
_SMALLEST_EPS = 1e-20  # squares of less are lost among those of float32


class OnePassState(NamedTuple):
    """Keys so far. A pytree of arrays of fixed shapes; `N` is the capacity of the stream.

    Attributes:
      gram: Of all keys so far.
      keys: Those that may yet be in the set; `num_kept` of them, then rubbish.
      positions: Where they stood in the whole stream, as two uint32 (high, low).
      num_kept: See above.
      num_lost: Keys that there was no room for. The set cannot be had then, and `finish` says so.
      num_repeated: Keys that waited in both of two states that were merged: some were seen twice, and `finish` says so.
      start: Position of the first key that this state saw.
    """

    gram: RunningGram
    keys: Float[Array, "N D"]
    positions: UInt[Array, "N 2"]
    num_kept: Int[Array, ""]
    num_lost: Int[Array, ""]
    num_repeated: Int[Array, ""]
    start: UInt[Array, "2"]


@dataclasses.dataclass(frozen=True)
class OnePassStream:
    """The universal set of x^2 in one pass. Methods are pure; all but `finish` may be jitted.

        stream = OnePassStream(head_dim=64, eps=0.01)
        state, update = stream.init(), jax.jit(stream.update)
        for chunk in chunks:
            state = update(state, chunk)
        universal = stream.finish(state)

    Args:
      head_dim: Width of the keys, D.
      eps: The threshold, in [1e-20, 1].
      capacity: Keys that may wait. None: 2 D / eps. More means rarer housekeeping; fewer than D / eps may not do.
      dtype: float32, or float64 (with `jax_enable_x64`) for keys of condition numbers beyond about 1e4.

    Raises:
      ValueError: For a width, threshold, capacity or dtype out of range.
    """

    head_dim: int
    eps: float
    capacity: int | None = None
    dtype: Any = jnp.float32

    def __post_init__(self):
        if check_eps(self.eps) < _SMALLEST_EPS:
            raise ValueError(
                f"eps={self.eps} must be at least {_SMALLEST_EPS}: below, every key is as good as in the set"
            )
        init_gram(self.head_dim, self.dtype)
        if self.capacity is not None and self.capacity < 1:
            raise ValueError(f"capacity={self.capacity} must be at least 1: None takes 2 D / eps")

    @property
    def floor(self) -> float:
        """A computed score below this is below eps, whatever the rounding."""
        return self.eps * (1 - slack(self.dtype))

    @property
    def num_slots(self) -> int:
        """Keys that may wait: the capacity, or what it is by default."""
        return self.capacity or math.ceil(2 * self.head_dim / self.eps)

    def init(self, start: int = 0) -> OnePassState:
        """No keys yet.

        Args:
          start: Position of the first key to come in the whole stream, of which this state may see a part.

        Raises:
          ValueError: If it is negative, or more keys may have to wait than int32 counts.
        """
        if start < 0:
            raise ValueError(f"{start=} must not be negative")
        if (capacity := self.num_slots) > _MOST_SLOTS:
            raise ValueError(
                f"eps={self.eps} would let {capacity} keys wait: raise it, or give capacity=, the number of keys"
            )
        return OnePassState(
            gram=init_gram(self.head_dim, self.dtype),
            keys=jnp.zeros((capacity, self.head_dim), self.dtype),
            positions=jnp.zeros((capacity, 2), jnp.uint32),
            num_kept=jnp.zeros((), jnp.int32),
            num_lost=jnp.zeros((), jnp.int32),
            num_repeated=jnp.zeros((), jnp.int32),
            start=counts.to_count(start),
        )

    def update(
        self, state: OnePassState, keys: Float[Array | np.ndarray, "C D"], num_valid: Int[Array, ""] | int | None = None
    ) -> OnePassState:
        """Takes in the next keys.

        Args:
          state: Keys so far.
          keys: A chunk. Each shape is compiled under jit: pad chunks to one size. There, JAX casts what is wider than
            the stream's dtype on its own, with no look at what that loses: cast before.
          num_valid: How many leading rows of it count. None: all; a traced number above that counts as all.

        Raises:
          ValueError: For a chunk of another width, a `num_valid` that is negative or above the number of rows, or a key
            beyond the range of the dtype.

        Returns:
          The state after them. Cost: 4 C D^2 operations; a QR factorisation and a pass over the waiting keys whenever
          the number of keys has doubled, the room is full, or something new comes.
        """
        check_chunk(keys, self.head_dim, num_valid)
        if not len(keys):
            return state
        keys = cast_keys(keys, self.dtype) if isinstance(keys, np.ndarray) else jnp.asarray(keys)
        num_valid = len(keys) if num_valid is None else jnp.clip(num_valid, 0, len(keys))
        capacity = len(state.keys)
        gram, scores = add_keys(
            state.gram,
            keys,
            num_valid,
            floor=self.floor,
            refresh_if=lambda s: state.num_kept + jnp.sum(self._may_stay(s)) > capacity,
        )
        kept = jax.lax.cond(
            gram.num_refreshes > state.gram.num_refreshes,
            lambda: self._sift(gram, state.keys, state.positions, jnp.arange(capacity) < state.num_kept, capacity),
            lambda: (state.keys, state.positions, state.num_kept, jnp.int32(0)),
        )
        arrives = self._may_stay(scores)
        waiting, positions, num_kept, num_lost = jax.lax.cond(
            jnp.any(arrives), lambda: self._append(kept, keys, arrives, state), lambda: kept
        )
        return state._replace(
            gram=gram, keys=waiting, positions=positions, num_kept=num_kept, num_lost=state.num_lost + num_lost
        )

    def merge(self, first: OnePassState, second: OnePassState) -> OnePassState:
        """The state after the keys of both, wherever and in whichever order they were seen.

        To take in more keys afterwards, the second must have seen those that follow the first's. The two must have no
        key in common; `finish` refuses where one that waits in both shows that they had. Cost: one QR and one SVD of
        D x D matrices, a sort of the waiting keys and 2 D^2 operations for each.

        Raises:
          ValueError: For states of another width.
        """
        for state in (first, second):
            check_chunk(state.keys, self.head_dim, None)
        gram = merge_grams(first.gram, second.gram)
        # Bad keys are counted from the start of the state that holds them.
        moved = counts.add(second.gram.first_bad, counts.subtract(second.start, first.start))
        gram = gram._replace(first_bad=jnp.where(first.gram.num_bad > 0, first.gram.first_bad, moved))
        there = [jnp.arange(len(s.keys)) < s.num_kept for s in (first, second)]
        keys, positions, is_there = (
            jnp.concatenate(pair)
            for pair in ((first.keys, second.keys), (first.positions, second.positions), tuple(there))
        )
        num_repeated = first.num_repeated + second.num_repeated + _num_repeated(positions, is_there)
        keys, positions, num_kept, num_lost = self._sift(gram, keys, positions, is_there, len(first.keys))
        num_lost += first.num_lost + second.num_lost
        return OnePassState(gram, keys, positions, num_kept, num_lost, num_repeated, first.start)

    def finish(self, state: OnePassState) -> UniversalSet:
        """The set, every waiting key scored once more against all that came. Runs on the host.

        Raises:
          ValueError: No key came, some key was not finite or too small for the dtype, some were seen twice, or there
            was no room for all that had to wait.
        """
        gram = finish_gram(state.gram, counts.to_int(state.start))
        if num_repeated := int(state.num_repeated):
            raise ValueError(
                f"{num_repeated} keys waited in both of two states that were merged: a part of the stream was merged "
                "twice; give every part its own start, and merge it once"
            )
        if num_lost := int(state.num_lost):
            raise ValueError(
                f"{num_lost} keys had to wait and found capacity={len(state.keys)} full, so that the set is not known: "
                "leave capacity to the stream, use dtype=float64 for ill-conditioned keys, or take two passes"
            )
        num_kept = int(state.num_kept)
        keys = np.asarray(state.keys[:num_kept])
        scores = np.asarray(score_bounds(gram, state.keys))[:num_kept]
        pairs = np.asarray(state.positions[:num_kept]).astype(np.int64)
        return select(gram, (pairs[:, 0] << 32) + pairs[:, 1], scores, keys, self.eps)

    def _may_stay(self, scores):
        return scores >= self.floor

    def _sift(self, gram, keys, positions, is_there, capacity):
        """Scores waiting keys anew and moves those that stay to the front."""
        stays = is_there & self._may_stay(score(gram, keys))
        order = jnp.argsort(~stays, stable=True)[:capacity]
        num_stay = jnp.sum(stays, dtype=jnp.int32)
        num_kept = jnp.minimum(num_stay, capacity)
        return keys[order], positions[order], num_kept, num_stay - num_kept

    def _append(self, kept, keys, arrives, state):
        waiting, positions, num_kept, num_lost = kept
        capacity = len(waiting)
        slots = jnp.where(arrives, num_kept + jnp.cumsum(arrives) - 1, capacity)  # the others fall off the end
        came_at = counts.add_small(counts.add(state.start, state.gram.num_keys), jnp.arange(len(keys)))
        total = num_kept + jnp.sum(arrives, dtype=jnp.int32)
        return (
            waiting.at[slots].set(keys.astype(waiting.dtype), mode="drop"),
            positions.at[slots].set(came_at, mode="drop"),
            jnp.minimum(total, capacity),
            num_lost + jnp.maximum(total - capacity, 0),
        )


def _num_repeated(positions, is_there):
    """Keys whose position is that of another one."""
    high, low = positions[:, 0], positions[:, 1]
    order = jnp.lexsort((low, high, ~is_there))
    high, low, is_there = high[order], low[order], is_there[order]
    return jnp.sum(is_there[1:] & (high[1:] == high[:-1]) & (low[1:] == low[:-1]), dtype=jnp.int32)


def finish_gram(gram: RunningGram, start: int = 0) -> RunningGram:
    """The final Gram matrix, at its sharpest: what the second of two passes scores keys by.

    Raises:
      ValueError: No key came, or some key was not finite (the message says which) or too small for the dtype.
    """
    if num_bad := int(gram.num_bad):
        raise ValueError(
            f"{num_bad} of {counts.to_int(gram.num_keys)} keys hold NaN or infinity, the first at position "
            f"{start + counts.to_int(gram.first_bad)}: mask or drop such keys first"
        )
    if num_tiny := int(gram.num_tiny):
        dtype = gram.gram.dtype
        raise ValueError(
            f"{num_tiny} keys are not 0, but below {jnp.finfo(dtype).tiny:.3g}, which {dtype} takes for 0: multiply "
            "all keys by a power of two, which changes no set, or compute in float64 (--precision double)"
        )
    if not counts.to_int(gram.num_keys):
        raise ValueError("there are no keys: the stream was empty")
    return jax.jit(sharpen)(gram)


@jax.jit
def score_bounds(gram: RunningGram, keys: Float[Array, "C D"]) -> Float[Array, " C"]:
    """Upper bounds on the leverage scores of keys under a final Gram matrix, at most 1, rounding included."""
    return jnp.minimum(score(gram, keys) * (1 + slack(gram.gram.dtype)), 1)


def select(
    gram: RunningGram,
    positions: Int[np.ndarray, " N"],
    bounds: Float[np.ndarray, " N"],
    keys: Float[np.ndarray, "N D"],
    eps: float,
) -> UniversalSet:
    """The set among keys that were scored by `score_bounds`.

    Args:
      gram: From `finish_gram`.
      positions: Of the keys in the stream.
      bounds: Their scores; every key that is not given must be known to score less than eps.
      keys: The keys.
      eps: The threshold.
    """
    bounds = np.asarray(bounds, np.float32)
    chosen = np.flatnonzero(passes(bounds, eps))
    chosen = chosen[np.argsort(positions[chosen], kind="stable")]
    inflation = float(jnp.max(jnp.where(gram.unresolved, 1, gram.inflation)))
    head_dim, num_resolved = gram.factor.shape[1], int(rank(gram))
    bound = num_resolved * inflation * (1 + slack(gram.gram.dtype)) / eps
    roundings, dtype = rounding_tolerance(head_dim), gram.gram.dtype
    share = roundings * float(jnp.finfo(dtype).eps)
    guarantee = (
        "f = x^2: every key whose leverage score is at least eps is in the set, for all queries, for keys taken as "
        f"exact to {roundings} roundings of {dtype}, {share:.1g} of their parts; scores are upper "
        f"bounds, too large by at most a factor {inflation:.4g} for the rounding of {dtype}"
    )
    num_unresolved = int(np.sum(bounds[chosen] >= 1))
    if num_resolved < head_dim:
        guarantee += (
            f"; {num_resolved} of {head_dim} directions are resolved: a key with a part in the others, beyond those "
            "roundings, is kept with score 1"
        )
        bound += num_unresolved
    return UniversalSet(
        indices=positions[chosen],
        scores=bounds[chosen],
        eps=float(eps),
        size_bound=float(min(bound, counts.to_int(gram.num_keys))),
        guarantee=guarantee,
        keys=narrowed(keys[chosen]),
    )
