"""Universal sets of |x|^p for keys that pass by in chunks: quadratic forms are merged where keys no longer fit.

A set of keys is summed up by a positive semidefinite form M with

    sum_l |<k_l, y>|^p  >=  (y^T M y)^(p/2)    for every y,

from which the sensitivity of any of its keys k is at most (k^T M^+ k)^(p/2), now and after whatever else arrives.
Lewis weights give such a form for a chunk. The forms of two sets of keys are *merged* into one for both by the same
argument, with forms in place of keys: sum_b a_b^(p/2) >= (sum_b c_b a_b)^(p/2), with a_b = y^T M_b y, holds for

    p <= 2:  c_b <= t_b^(p/2 - 1), t_b the largest a_b where sum_b c_b a_b = 1;
    p >= 2:  c_b = q_b^(1 - 2/p), sum_b q_b = 1    (Hölder).

Nothing is sampled: what is promised holds always, not with high probability. Sets alike in distribution lose nothing
when merged; sets unlike each other loosen the bound, never break it. Derived for this project, after the
merge-and-reduce of coresets; memory is D^2 numbers for each doubling of the number of keys, in float64 on the host.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float, Int

from levattn.core.basis import Basis, orthonormal_basis, real_array
from levattn.core.lewis import check_power, solve_weights
from levattn.universal.chunks import check_chunk
from levattn.universal.sets import SLACK, UniversalSet, check_eps, narrowed, passes

Factor = Float[np.ndarray, "r D"]  # M = factor^T factor
_ITERATIONS = 20
# Lewis weights need only be near: the form is scaled to be valid for whatever weights it is made of.
_TOLERANCE = 1e-2
_ROUNDING = 1e-9
# Keys longer, or shorter and not 0, leave float64 with the forms that are made of them.
_LARGEST, _SMALLEST = 1e290, 1e-290


class LewisState(NamedTuple):
    """Keys so far, as a pytree of NumPy arrays.

    Attributes:
      levels: Forms of 1, 2, 4, ... chunks; one without rows where there is none.
      keys: Those that may yet be in the set.
      positions: Where they stood in the whole stream.
      bounds: Upper bounds on their sensitivities, as small as they have been seen.
      dropped: Sum of the bounds of the keys that were let go.
      sifted_at: Waiting keys that were left when they were last scored anew.
      num_keys: Keys so far.
      start: Position of the first key that this state saw.
      first_bad: Position of the first key with a NaN or infinity; -1: none.
    """

    levels: tuple[Factor, ...]
    keys: Float[np.ndarray, "N D"]
    positions: Int[np.ndarray, " N"]
    bounds: Float[np.ndarray, " N"]
    dropped: float
    sifted_at: int
    num_keys: int
    start: int
    first_bad: int


@dataclasses.dataclass(frozen=True)
class LewisStream:
    """The universal set of |x|^p, 0.1 <= p <= 100, in one pass. Methods are pure and run on the host, in float64.

    The set contains every key of sensitivity at least eps. It may hold keys of less: `scores` are upper bounds.

    Args:
      head_dim: Width of the keys, D.
      eps: The threshold, in (0, 1].
      p: The power.
      max_waiting: Most keys that may wait; for keys that no bound tells apart, there is no limit by itself.

    Raises:
      ValueError: For a width, threshold, power or limit out of range.
    """

    head_dim: int
    eps: float
    p: float
    max_waiting: int = 1_000_000

    def __post_init__(self):
        check_eps(self.eps)
        if self.head_dim < 1:
            raise ValueError(f"head_dim={self.head_dim} must be at least 1")
        check_power(self.p)
        if self.max_waiting < 1:
            raise ValueError(f"max_waiting={self.max_waiting} must be at least 1")

    def init(self, start: int = 0) -> LewisState:
        """No keys yet; `start` is the position of the first to come in the whole stream."""
        if start < 0:
            raise ValueError(f"{start=} must not be negative")
        nothing = np.zeros((0, self.head_dim))
        return LewisState((), nothing, np.zeros(0, np.int64), np.zeros(0), 0.0, 0, 0, int(start), -1)

    def update(
        self, state: LewisState, keys: Float[Array | np.ndarray, "C D"], num_valid: int | None = None
    ) -> LewisState:
        """Takes in the next keys.

        Args:
          state: Keys so far.
          keys: A chunk. Any number of rows; thousands are best, since every chunk becomes a form.
          num_valid: How many leading rows of it count. None: all.

        Cost: 4 C D^2 operations for each of the ten or so iterations of the Lewis weights.

        Raises:
          ValueError: More than `max_waiting` keys would have to wait; and as `summarise`.
        """
        state, keys = self.summarise(state, keys, num_valid)
        if not len(keys):
            return state
        form = self.form(state)
        bounds = self.bounds(form, keys)
        stays = passes(bounds, self.eps)
        first = state.start + state.num_keys - len(keys)
        state = state._replace(
            keys=np.concatenate([state.keys, keys[stays]]),
            positions=np.concatenate([state.positions, first + np.flatnonzero(stays)]),
            bounds=np.concatenate([state.bounds, bounds[stays]]),
            dropped=state.dropped + float(np.sum(bounds[~stays])),
        )
        return self._sift(state, form) if len(state.keys) > 2 * state.sifted_at else state

    def summarise(
        self, state: LewisState, keys: Float[Array | np.ndarray, "C D"], num_valid: int | None = None
    ) -> tuple[LewisState, Float[np.ndarray, "V D"]]:
        """As `update`, but no key waits: the first of two passes.

        Returns:
          The state, and the keys of the chunk that count, in float64; a key that is not finite counts as zero here, and
          is refused at the end.

        Raises:
          ValueError: For a chunk of another width, a `num_valid` that is negative or above the number of rows, entries
            that are no real numbers, or a finite key of a size beyond 1e-290 to 1e290.
        """
        keys = real_array("keys", keys)
        check_chunk(keys, self.head_dim, num_valid)
        keys = keys[:num_valid].astype(np.float64)
        sizes = np.max(np.abs(keys), axis=1, initial=0)
        is_lost = (sizes > 0) & (sizes < _SMALLEST) | (sizes > _LARGEST) & (sizes < math.inf)
        if np.any(is_lost):
            raise ValueError(
                f"a key of size {sizes[np.argmax(is_lost)]:.3g} is beyond {_SMALLEST:g} to {_LARGEST:g}: multiply all "
                "keys by a power of two, which changes no set"
            )
        is_bad = ~np.all(np.isfinite(keys), axis=1)
        first_bad = state.first_bad
        if np.any(is_bad):
            keys[is_bad] = 0
            first_bad = state.start + state.num_keys + int(np.argmax(is_bad)) if first_bad < 0 else first_bad
        levels = _carry(state.levels, _form_of_keys(keys, self.p), self.p) if len(keys) else state.levels
        return state._replace(levels=levels, num_keys=state.num_keys + len(keys), first_bad=first_bad), keys

    def merge(self, first: LewisState, second: LewisState) -> LewisState:
        """The state after the keys of both, wherever they were seen.

        To take in more keys afterwards, the second must have seen those that follow the first's.

        Raises:
          ValueError: For states of another width, or with a waiting key in common.
        """
        for state in (first, second):
            check_chunk(state.keys, self.head_dim, None)
        if len(repeated := np.intersect1d(first.positions, second.positions)):
            raise ValueError(
                f"key {repeated[0]} waits in both states: give every part of the stream its own start, merge it once"
            )
        levels = first.levels
        for level, factor in enumerate(second.levels):
            if factor.size:
                levels = _carry(levels, factor, self.p, level)
        bad = [s.first_bad for s in (first, second) if s.first_bad >= 0]
        merged = LewisState(
            levels=levels,
            keys=np.concatenate([first.keys, second.keys]),
            positions=np.concatenate([first.positions, second.positions]),
            bounds=np.concatenate([first.bounds, second.bounds]),
            dropped=first.dropped + second.dropped,
            sifted_at=0,
            num_keys=first.num_keys + second.num_keys,
            start=min(first.start, second.start),
            first_bad=min(bad, default=-1),
        )
        return self._sift(merged, self.form(merged))

    def form(self, state: LewisState) -> Basis:
        """Coordinates in which the form of all keys so far is the identity: what `bounds` takes."""
        factors = [factor for factor in state.levels if factor.size]
        return orthonormal_basis(_merge_forms(factors, self.p) if factors else np.zeros((1, self.head_dim)))

    def bounds(self, form: Basis, keys: Float[np.ndarray, "C D"]) -> Float[np.ndarray, " C"]:
        """Upper bounds, at most 1, on the sensitivities of keys that went into the form. Cost: 2 C D^2 operations."""
        keys = np.asarray(keys, np.float64)
        scores = np.sum(np.square(form.rows(keys)), axis=1) ** (self.p / 2)
        scores *= (1 + form.relative_error + _ROUNDING) ** self.p
        return np.where(form.is_resolved(keys) & (scores < 1), scores, 1)  # of NaN nothing is known

    def finish(self, state: LewisState) -> UniversalSet:
        """The set, every waiting key scored once more against all that came.

        Raises:
          ValueError: No key came, or some key was not finite; the message says which.
        """
        check_stream(state)
        return self.select(self._sift(state, self.form(state)))

    def select(self, state: LewisState) -> UniversalSet:
        """The set of the keys that wait in a state."""
        order, total = np.argsort(state.positions, kind="stable"), state.dropped + float(np.sum(state.bounds))
        scores = state.bounds[order].astype(np.float32)
        scores = np.where(scores < state.bounds[order], np.nextafter(scores, np.float32(2)), scores)
        return UniversalSet(
            indices=state.positions[order],
            scores=scores.astype(np.float32),
            eps=float(self.eps),
            size_bound=float(min(total / (self.eps * (1 - SLACK)), state.num_keys)),
            guarantee=f"f = |x|^{self.p:g}: every key whose sensitivity is at least eps is in the set, for all "
            "queries, for keys taken as exact to 16 D roundings of float64; scores are upper bounds from merged Lewis "
            "forms, so that the set may hold keys of less",
            keys=narrowed(state.keys[order]),
        )

    def _sift(self, state, form):
        bounds = np.minimum(state.bounds, self.bounds(form, state.keys))
        stays = passes(bounds, self.eps)
        if np.sum(stays) > self.max_waiting:
            raise ValueError(
                f"{np.sum(stays)} keys would have to wait, more than max_waiting={self.max_waiting}: "
                "raise eps or the limit, or take two passes"
            )
        return state._replace(
            keys=state.keys[stays],
            positions=state.positions[stays],
            bounds=bounds[stays],
            dropped=state.dropped + float(np.sum(bounds[~stays])),
            sifted_at=int(np.sum(stays)),
        )


def check_stream(state: LewisState) -> None:
    """Raises a ValueError if no key came or one was not finite."""
    if state.first_bad >= 0:
        raise ValueError(
            f"keys hold NaN or infinity, the first at position {state.first_bad}: mask or drop such keys first"
        )
    if not state.num_keys:
        raise ValueError("there are no keys: the stream was empty")


def _form_of_keys(keys, p):
    """A valid form of a chunk."""
    if not np.any(keys):
        return np.zeros((0, keys.shape[1]))
    weights = solve_weights(orthonormal_basis(keys).rows(keys), p, tolerance=_TOLERANCE)
    keys, weights = keys[weights > 0], weights[weights > 0]  # to leave keys out only lowers the form
    log_coefficients = (1 - 2 / p) * np.log(weights)
    coefficients = np.exp(log_coefficients - np.max(log_coefficients))  # `_valid` sees to their scale
    keys, coefficients = keys[coefficients > 0], coefficients[coefficients > 0]
    basis = orthonormal_basis(np.sqrt(coefficients)[:, None] * keys)
    return _valid(basis, coefficients, np.sum(np.square(basis.rows(keys)), axis=1), p)


def _merge_forms(factors, p):
    """One valid form for the keys of several: a fixed point of the coefficients, as Lewis weights are for keys."""
    coefficients = np.ones(len(factors))
    for _ in range(_ITERATIONS if p != 2 else 1):
        basis = orthonormal_basis(np.concatenate([c**0.5 * f for c, f in zip(coefficients, factors, strict=True)]))
        rows = [basis.rows(factor) for factor in factors]
        squares = np.array([np.linalg.norm(r, 2) ** 2 for r in rows])
        valid = _valid(basis, coefficients, squares, p)
        if p <= 2:
            proposed = squares ** (p / 2 - 1)
        else:
            proposed = (coefficients * np.array([np.sum(np.square(r)) for r in rows])) ** (1 - 2 / p)
        if np.allclose(proposed, coefficients, rtol=_TOLERANCE):
            break
        coefficients = np.sqrt(proposed * coefficients)
    return valid


def _valid(basis, coefficients, squares, p):
    """The form, scaled to what the head of this file asks of the coefficients; `squares` are the t_b."""
    if p > 2:
        log_scale = -(1 - 2 / p) * np.log(np.sum(coefficients ** (p / (p - 2))))
    else:
        seen = squares > 0
        log_scale = (2 / p) * np.min((p / 2 - 1) * np.log(squares[seen]) - np.log(coefficients[seen]))
    return basis.unwhiten * np.exp((log_scale - _ROUNDING) / 2)


def _carry(levels, factor, p, level=0):
    """Adds a form of 2^level chunks as binary addition does."""
    levels = [*levels, *([np.zeros((0, factor.shape[1]))] * (level + 1 - len(levels)))]
    while level < len(levels) and levels[level].size:
        factor = _merge_forms([levels[level], factor], p) if factor.size else levels[level]
        levels[level] = np.zeros((0, factor.shape[1]))
        level += 1
    levels = levels if level < len(levels) else [*levels, None]
    levels[level] = factor
    return tuple(levels)
