"""What an attention method may be asked for: one frozen, hashable record, safe as a static jit argument."""

import dataclasses
from typing import Literal

ScoreMethod = Literal["auto", "gram", "svd"]


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """An attention method and the options that every selecting method shares.

    Args:
      method: A name in `levattn.attention.registry.METHODS`.
      k: Keys kept per head, the always-kept ones included, local tokens apart (the method "matched" counts these
        in). With `eps` it caps the number kept; None then means the bound `head_dim / eps` on the size of the
        universal set.
      eps: Keep the keys whose score is at least `eps` instead of a fixed number. Shapes stay static: what falls
        below the threshold is marked invalid.
      keep_prefix: Leading tokens (the class token: 1) that are always kept.
      local_window: Tokens around each query that it also attends to. An int w is a 1-D window of w tokens (odd)
        over the sequence; a pair (h, w) is a window on the patch grid, behind the `keep_prefix`
        leading tokens; "cross" is a patch and the four beside, above and below it. None: no local tokens.
      score_method: How leverage scores are computed, see `levattn.core.leverage.leverage_scores`.
      centre: Take scores (and distances) of mean-centred keys. Softmax does not see a shift of all keys.
      ridge: Ridge of the leverage scores, relative to the mean squared singular value of the keys.
      num_iters: Lloyd iterations of the methods that group keys.
      num_landmarks: Queries whose dense attention the method "matched" is fitted to. None: 2 k.
      seed: Of the methods that draw at random, where no `rng` is handed in.

    Raises:
      ValueError: Naming the field that is out of its range.
    """

    method: str = "dense"
    k: int | None = 32
    eps: float | None = None
    keep_prefix: int = 0
    local_window: int | tuple[int, int] | Literal["cross"] | None = None
    score_method: ScoreMethod = "gram"
    centre: bool = False
    ridge: float = 0.0
    num_iters: int = 4
    num_landmarks: int | None = None
    seed: int = 0

    def __post_init__(self):
        if self.k is None and self.eps is None:
            raise ValueError("k=None needs eps: give the number of keys or a threshold")
        if self.k is not None and self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1")
        if self.eps is not None and not 0 < self.eps <= 1:
            raise ValueError(f"eps={self.eps} must be in (0, 1]")
        if self.keep_prefix < 0:
            raise ValueError(f"keep_prefix={self.keep_prefix} must not be negative")
        if self.k is not None and self.keep_prefix > self.k:
            raise ValueError(f"keep_prefix={self.keep_prefix} must not exceed k={self.k}")
        window = self.local_window
        sides = () if window in (None, "cross") else (window,) if isinstance(window, int) else window
        if isinstance(sides, str) or any(side < 1 or side % 2 == 0 for side in sides) or len(sides) > 2:
            raise ValueError(
                f"local_window={window!r} must be an odd number of tokens, a pair of odd numbers or 'cross'"
            )
        if self.score_method not in ("auto", "gram", "svd"):
            raise ValueError(f"score_method={self.score_method!r} must be 'auto', 'gram' or 'svd'")
        if self.ridge < 0:
            raise ValueError(f"ridge={self.ridge} must not be negative")
        if self.num_iters < 0:
            raise ValueError(f"num_iters={self.num_iters} must not be negative")
        if self.num_landmarks is not None and self.num_landmarks < 1:
            raise ValueError(f"num_landmarks={self.num_landmarks} must be at least 1")
