"""Mean, spread and extremes over a stream of batches, in memory that does not grow with it."""

import numpy as np
from jaxtyping import Float, Shaped


class Moments:
    """Of arrays that come in batches; the first axis is that of the examples.

    A value that is NaN does not count. Sums are float64, and deviations are taken from each batch's own mean before
    batches are joined (Chan, Golub and LeVeque, 1979): nothing cancels.

    Attributes:
      count: Values so far.
      mean: Their mean; NaN where there is none.
      min: The smallest.
      max: The largest.
    """

    def __init__(self):
        self.count = self.mean = self.min = self.max = self._squares = None

    def add(self, batch: Shaped[np.ndarray, "B *N"]) -> None:
        """Counts a batch in."""
        batch = np.asarray(batch, np.float64)
        if self.count is None:
            self.count, self.mean, self._squares = (np.zeros(batch.shape[1:]) for _ in range(3))
            self.min, self.max = (np.full(batch.shape[1:], np.nan) for _ in range(2))
        counts = ~np.isnan(batch)
        count = counts.sum(axis=0)
        mean = batch.sum(axis=0, where=counts) / np.maximum(count, 1)
        squares = np.square(batch - mean).sum(axis=0, where=counts)
        total = np.maximum(self.count + count, 1)
        known = np.where(self.count > 0, self.mean, 0)
        self._squares = self._squares + squares + np.square(mean - known) * self.count * count / total
        self.mean = np.where(self.count + count > 0, known + (mean - known) * count / total, np.nan)
        self.count = self.count + count
        for x in batch:
            self.min, self.max = np.fmin(self.min, x), np.fmax(self.max, x)

    @property
    def std(self) -> Float[np.ndarray, "*N"]:
        """The standard deviation of the examples (divisor n - 1); NaN of fewer than two."""
        return np.where(self.count > 1, np.sqrt(self._squares / np.maximum(self.count - 1, 1)), np.nan)

    @property
    def standard_error(self) -> Float[np.ndarray, "*N"]:
        """The standard error of the mean: `std` over the root of `count`."""
        return np.asarray(self.std / np.sqrt(np.maximum(self.count, 1)))
