"""Gram matrices of chunks in which no key reaches a threshold, summed on the host until the stream asks for them.

Once a stream is long, hardly a key reaches the threshold, and all that most chunks change is the Gram matrix. There a
CPU's BLAS is the faster: it makes one half of a symmetric matrix, and needs neither masks nor branches. A *backlog*
takes in such a chunk after it has seen that every score in it is below the threshold: of well-conditioned keys by
their weighted norms and, for the few that are long, by their scores; of others by whitening them all. The first keys of
a stream, and chunks that hold a heavy key, are left to `add_keys`.
"""

import numpy as np
from jaxtyping import Float

from levattn.universal import counts
from levattn.universal.running_gram import LARGEST_GROWTH, RunningGram, add_summed

# Rows whose products BLAS may add up in whichever order. Fewer were seen to round no better, and take longer.
_BLOCK_ROWS = 1024
# Larger weights belong to columns whose squares may underflow.
_LARGEST_WEIGHT = 1e24


class Backlog:
    """Chunks that came after those in a `RunningGram`. Not thread-safe: one for each part of a stream.

        backlog = Backlog(gram, floor)
        for chunk in chunks:
            if not backlog.takes(chunk):
                gram, scores = add_keys(backlog.settle(gram), chunk, len(chunk), floor=floor)
                backlog = Backlog(gram, floor)
        gram = backlog.settle(gram)

    Args:
      gram: Keys so far.
      floor: No key that may reach this score is taken. Nothing is where the Gram matrix is on an accelerator, which
        is better off with the keys themselves.
    """

    @np.errstate(over="ignore")
    def __init__(self, gram: RunningGram, floor: float):
        self._floor, self._num_keys, self._room = floor, 0, 0
        if any(device.platform != "cpu" for device in gram.gram.devices()) or np.any(gram.unresolved):
            return
        self._inflation = np.array(gram.inflation)
        self._rounding, self._norm_weights = np.square(gram.rounding), np.square(gram.norm_weights)
        if not np.all(self._rounding < _LARGEST_WEIGHT):
            return
        # At twice the number of keys `add_keys` whitens anew.
        self._room = 2 * counts.to_int(gram.refreshed_at) - counts.to_int(gram.num_keys) - 1
        self._whiten = np.array(gram.whiten)
        # Ill-conditioned keys are whitened one by one, others all at once in their Gram matrix.
        self._is_mild = bool(np.all(self._norm_weights < _LARGEST_WEIGHT))
        self._last = np.float64(self._whiten) if self._is_mild else np.eye(len(self._whiten))
        self._metric = self._last @ self._last.T
        self._sum = np.zeros(self._metric.shape)
        self._scratch = np.empty((0, len(self._whiten)), self._whiten.dtype)

    @np.errstate(over="ignore", invalid="ignore")
    def takes(self, keys: Float[np.ndarray, "C D"]) -> bool:
        """Takes in the next keys if it can; the caller has to add them, after `settle`, where it does not.

        Cost: C D^2 operations of BLAS, three times as many for ill-conditioned keys; much less if refused.
        """
        if self._num_keys + len(keys) > self._room:
            return False
        rows = keys = np.asarray(keys, self._whiten.dtype)
        if len(self._scratch) < len(keys):
            self._scratch = np.empty_like(keys)
        if self._is_mild:
            # Of what is not finite nothing is known, here and below.
            is_short = self._squares(keys) @ self._norm_weights < self._floor
            if not np.all(is_short):
                long = keys[~is_short]
                if not self._are_light(long @ self._whiten, long):
                    return False
        else:
            rows = keys @ self._whiten
            if not self._are_light(rows, keys):
                return False
        added = _block_gram(rows)
        if not np.vdot(added, self._metric) <= LARGEST_GROWTH:  # the trace, once whitened
            return False
        self._sum += added
        self._num_keys += len(keys)
        return True

    def settle(self, gram: RunningGram) -> RunningGram:
        """The Gram matrix that the backlog was made for, and all that it took; it must not be used any more."""
        if not self._num_keys:
            return gram
        added = self._last.T @ self._sum @ self._last
        return add_summed(gram, added.astype(self._whiten.dtype), counts.to_count(self._num_keys))

    def _are_light(self, rows, keys):
        """Whether every score is below the floor; as in `running_gram`, from whitened rows."""
        lengths = np.sqrt(self._squares(rows) @ self._inflation)
        lengths += np.sqrt(self._squares(keys) @ self._rounding)
        return np.max(np.square(lengths), initial=0) < self._floor

    def _squares(self, rows):
        return np.square(rows, out=self._scratch[: len(rows)])


def _block_gram(rows):
    """rows^T rows, block by block."""
    num_whole = len(rows) - len(rows) % _BLOCK_ROWS
    blocks, rest = rows[:num_whole].reshape(-1, _BLOCK_ROWS, rows.shape[1]), rows[num_whole:]
    return np.sum(blocks.mT @ blocks, axis=0) + rest.T @ rest
