"""The functions f of attention f(<q, k>) / sum f, and what their growth says about sensitivities.

A function has *growth* (lower, upper, constant) if f(0) = 0 and, for all |a| >= |b| > 0,

    f(a) <= constant (|a| / |b|)^upper f(b)    and    constant f(a) >= (|a| / |b|)^lower f(b).

That is all a universal set needs, see `levattn.core.sensitivity`. exp grows faster than any power: it has none.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float

# Where a stated growth is tried: magnitudes, both signs.
_TRIED = np.logspace(-6, 6, 241)


class GrowthBound(NamedTuple):
    """Between which powers a function grows, up to a constant. See the head of this file."""

    lower: float | int
    upper: float | int
    constant: float | int = 1.0


@runtime_checkable
class AttentionFunction(Protocol):
    """f >= 0, applied elementwise to a NumPy or JAX array of inner products; `growth` is None where it has no bound."""

    @property
    def growth(self) -> GrowthBound | None: ...

    def __call__(self, x: Float[Array | np.ndarray, "..."]) -> Float[Array | np.ndarray, "..."]: ...


@dataclasses.dataclass(frozen=True)
class Power:
    """f(x) = |x|^p, p > 0. p = 2 is the square of LevAttention, whose sensitivities are the leverage scores.

    Raises:
      ValueError: For p that is not a positive number.
    """

    p: int | float = 2

    def __post_init__(self):
        if not 0 < self.p < float("inf"):
            raise ValueError(f"p={self.p!r} must be a positive number")

    @property
    def growth(self) -> GrowthBound:
        return GrowthBound(self.p, self.p)

    @property
    def is_even(self) -> bool:
        """Whether p is an even integer: |x|^p is then a polynomial, and its row sums a quadratic form."""
        return self.p % 2 == 0

    def __call__(self, x):
        return x * x if self.p == 2 else abs(x) ** self.p


@dataclasses.dataclass(frozen=True)
class Huber:
    """f(x) = x^2 / 2 up to `threshold` in magnitude, a straight line of the same slope beyond.

    Raises:
      ValueError: For a threshold that is not a positive number.
    """

    threshold: float | int = 1.0

    def __post_init__(self):
        if not 0 < self.threshold < float("inf"):
            raise ValueError(f"threshold={self.threshold!r} must be a positive number")

    @property
    def growth(self) -> GrowthBound:
        return GrowthBound(lower=1, upper=2)

    def __call__(self, x):
        size = abs(x)
        line = self.threshold * (size - self.threshold / 2)
        return x.__array_namespace__().where(size <= self.threshold, x * x / 2, line)


@dataclasses.dataclass(frozen=True)
class Softmax:
    """f(x) = exp(x). No growth bound, and no small universal set in the worst case: only a heuristic is offered."""

    @property
    def growth(self) -> None:
        return None

    def __call__(self, x):
        return x.__array_namespace__().exp(x)


@dataclasses.dataclass(frozen=True)
class Growth:
    """A function of the user's, with the growth that the user states for it.

        cauchy = Growth(lambda x: np.log1p(x * x), lower=0, upper=2)

    The bound is tried on magnitudes from 1e-6 to 1e6 of both signs: that finds slips, it proves nothing.

    Args:
      fn: f >= 0, elementwise on arrays.
      lower: Power that f grows by at least; 0 for a function that levels off.
      upper: Power that f grows by at most.
      constant: Slack of both, at least 1.

    Raises:
      ValueError: For growth that cannot be (lower > upper, say) or that `fn` was seen to break.
    """

    fn: Callable
    lower: float | int
    upper: float | int
    constant: float | int = 1.0

    def __post_init__(self):
        if not 0 <= self.lower <= self.upper < float("inf") or self.upper == 0:
            raise ValueError(f"lower={self.lower}, upper={self.upper} must satisfy 0 <= lower <= upper, 0 < upper")
        if not 1 <= self.constant < float("inf"):
            raise ValueError(f"constant={self.constant} must be at least 1")
        self._try()

    @property
    def growth(self) -> GrowthBound:
        return GrowthBound(self.lower, self.upper, self.constant)

    def __call__(self, x):
        return self.fn(x)

    def _try(self):
        sides = np.stack([np.asarray(self.fn(sign * _TRIED), np.float64) for sign in (1, -1)])
        if not np.all(np.isfinite(sides) & (sides >= 0)):
            raise ValueError("fn must be finite and not negative: give an f >= 0, for arguments of either sign")
        if np.any(np.asarray(self.fn(np.zeros(1)))):
            raise ValueError("fn must be 0 at 0: keys that a query does not meet must get nothing")
        # For each magnitude b, over all a >= b: f(a) <= C (a/b)^upper f(b) compares f(a) / a^upper with f(b) / b^upper.
        rising, falling = sides / _TRIED**self.lower, sides / _TRIED**self.upper
        peak_after = np.maximum.accumulate(np.max(falling, 0)[::-1])[::-1]
        trough_after = np.minimum.accumulate(np.min(rising, 0)[::-1])[::-1]
        allowed = self.constant * (1 + 1e-9)
        too_fast = peak_after > allowed * np.min(falling, 0)
        too_slow = np.max(rising, 0) > allowed * trough_after
        for broken, bound in ((too_fast, f"upper={self.upper}"), (too_slow, f"lower={self.lower}")):
            if np.any(broken):
                where = float(_TRIED[np.argmax(broken)])
                raise ValueError(
                    f"{bound}, constant={self.constant} is not a growth bound of fn: it fails from |x| = {where:.3g} "
                    "on; widen the powers or the constant"
                )
