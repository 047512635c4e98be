"""What an attention method may be asked for: one frozen, hashable record, safe as a static jit argument."""

import dataclasses
from typing import Literal, get_args

from levattn.core.leverage import ScoreMethod

# Methods whose keys stand for themselves alone.
_KEEPING = ("dense", "leverage", "row_norm", "random", "kmeans", "oracle")


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """An attention method and the options that every selecting method shares.

    Args:
      method: A name in `levattn.attention.registry.METHODS`.
      k: Keys kept per head, the always-kept ones included, local tokens apart (the method "matched" counts these
        in). With `eps` it caps the number kept; None then means the bound `head_dim / eps` on the size of the
        universal set.
      k_per_head: A k for each head, in place of `k`: heads of one k run together, so that cost follows the sum. None:
        `k` for all.
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
      seeding: Where the methods that merge keys start their groups: "farthest" points, one after the other, or
        "strips": the farthest point in each of up to eight strips of the sequence at a time. The steps that wait for
        each other are then k / 8, or eight, if that is more: accelerators spend most of their time on these.
      num_landmarks: Queries whose dense attention the method "matched" is fitted to. None: 2 k.
      seed: Of the methods that draw at random, where no `rng` is handed in.
      causal: Each query sees tokens up to its own alone, with the methods "dense" and "leverage": see
        `levattn.attention.causal.attend_causal`. Of a window, the half that lies behind counts.
      power: Attend with weights |<q, k>|^power, at least 1, in place of softmax's exp(<q, k> / sqrt(D)), with methods
        that keep keys as they are. Then `eps` of method "leverage" is a promise: no entry of the attention matrix that
        is left out reaches it. See `levattn.attention.polynomial`. None: softmax.

    Raises:
      ValueError: Naming the field that is out of its range.
    """

    method: str = "dense"
    k: int | None = 32
    k_per_head: tuple[int, ...] | None = None
    eps: float | None = None
    keep_prefix: int = 0
    local_window: int | tuple[int, int] | Literal["cross"] | None = None
    score_method: ScoreMethod = "gram"
    centre: bool = False
    ridge: float = 0.0
    num_iters: int = 4
    seeding: Literal["farthest", "strips"] = "farthest"
    num_landmarks: int | None = None
    seed: int = 0
    causal: bool = False
    power: int | float | None = None
    implementation: Literal["auto", "xla", "pallas"] = "auto"

    def __post_init__(self):
        if self.k is None and self.eps is None and self.k_per_head is None:
            raise ValueError("k=None needs eps: give the number of keys or a threshold")
        if self.k_per_head is not None:
            object.__setattr__(self, "k_per_head", tuple(self.k_per_head))  # hashable, also after a JSON round trip
            if not self.k_per_head or min(self.k_per_head) < max(self.keep_prefix, 1):
                raise ValueError(
                    f"k_per_head={self.k_per_head} must be one k for each head, at least 1 and at least "
                    f"keep_prefix={self.keep_prefix}"
                )
        if self.k is not None and self.k < 1:
            raise ValueError(f"k={self.k} must be at least 1")
        if self.eps is not None and not 0 < self.eps <= 1:
            raise ValueError(f"eps={self.eps} must be in (0, 1]")
        if self.keep_prefix < 0:
            raise ValueError(f"keep_prefix={self.keep_prefix} must not be negative")
        if self.k is not None and self.k_per_head is None and self.keep_prefix > self.k:
            raise ValueError(f"keep_prefix={self.keep_prefix} must not exceed k={self.k}")
        window = self.local_window
        sides = () if window in (None, "cross") else (window,) if isinstance(window, int) else window
        if isinstance(sides, str) or any(side < 1 or side % 2 == 0 for side in sides) or len(sides) > 2:
            raise ValueError(
                f"local_window={window!r} must be an odd number of tokens, a pair of odd numbers or 'cross'"
            )
        if self.score_method not in get_args(ScoreMethod):
            raise ValueError(f"score_method={self.score_method!r} must be one of {', '.join(get_args(ScoreMethod))}")
        if self.ridge < 0:
            raise ValueError(f"ridge={self.ridge} must not be negative")
        if self.seeding not in ("farthest", "strips"):
            raise ValueError(f"seeding={self.seeding!r} must be 'farthest' or 'strips'")
        if self.implementation not in ("auto", "xla", "pallas"):
            raise ValueError(f"implementation={self.implementation!r} must be 'auto', 'xla' or 'pallas'")
        if self.num_iters < 0:
            raise ValueError(f"num_iters={self.num_iters} must not be negative")
        if self.num_landmarks is not None and self.num_landmarks < 1:
            raise ValueError(f"num_landmarks={self.num_landmarks} must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed} must be at least 0 and below 2**63")
        if self.causal:
            self._check_causal()
        if self.power is not None:
            self._check_power()

    def _check_causal(self):
        if self.method not in ("dense", "leverage"):
            raise ValueError(
                f"method={self.method!r} must be 'dense' or 'leverage' with causal=True: it sees the future"
            )
        if not isinstance(self.local_window, int | None):
            raise ValueError(f"local_window={self.local_window!r} must be a number of tokens with causal=True")
        for field, unset in (("centre", False), ("ridge", 0.0), ("power", None)):
            if getattr(self, field) != unset:
                raise ValueError(f"{field}={getattr(self, field)} must be {unset} with causal=True")

    def _check_power(self):
        if not 1 <= self.power < float("inf"):
            raise ValueError(f"power={self.power} must be at least 1: below, gradients have no bound; None is softmax")
        if self.method not in _KEEPING:
            raise ValueError(f"method={self.method!r} must be one of {_KEEPING} with power: others weigh for softmax")
        if self.local_window is not None or self.centre:
            raise ValueError(
                f"local_window={self.local_window!r} must be None and centre={self.centre} False with power: "
                "both are for softmax"
            )
        if self.method == "leverage" and self.eps is not None and (self.k is not None or self.ridge):
            raise ValueError(
                f"k={self.k} must be None and ridge={self.ridge} 0 with power and eps: eps is a promise then, which a "
                "cap or lower scores would break; give k alone for the best k without one"
            )
