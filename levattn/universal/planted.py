"""Keys and queries whose heavy entries are known beforehand: what the experiments on the theory run on."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


def random_signs(rng: np.random.Generator, num_keys: int, width: int, logit: float = 1.0) -> Float[np.ndarray, "S D"]:
    """Keys, to be used as the queries too, for which softmax attention has no universal set but all keys.

    Random signs, scaled. Each row's product with itself is `width * logit`, with another row at most about
    sqrt(2 width log(num_keys)) * logit: exp makes the diagonal of attention near 1, whereas with f(x) = x^2 it is about
    D / (D + S). Source: LevAttention (ICLR 2025, arXiv 2410.05462), which shows that exp needs every key.

    Args:
      rng: Draws the signs.
      num_keys: S.
      width: D.
      logit: Scale of the logits, without the 1 / sqrt(D) of attention.
    """
    return (rng.choice([-1.0, 1.0], (num_keys, width)) * np.sqrt(logit)).astype(np.float32)


class Planted(NamedTuple):
    """Keys of which a few carry the signal.

    Attributes:
      keys: All keys, the planted ones at random places.
      queries: Each a planted key with noise.
      planted: Where the planted keys are, ascending.
    """

    keys: Float[np.ndarray, "S D"]
    queries: Float[np.ndarray, "T D"]
    planted: Int[np.ndarray, " P"]


def planted_keys(
    rng: np.random.Generator,
    num_keys: int,
    width: int,
    num_planted: int,
    *,
    noise: float = 0.1,
    num_background: int = 4,
    background: float = 3.0,
    num_queries: int = 64,
) -> Planted:
    """A few keys of length 1 in directions of their own, among many long ones that all look alike.

    The other keys lie in `num_background` common directions, with standard deviation `background` along each, plus
    noise of standard deviation `noise` in every direction. They are longer than the planted keys, so a row norm misses
    these. The leverage score of a planted key is about 1 / (1 + S noise^2), that of the others about D / S: as S
    grows, scores single out exactly the planted keys while D noise^2 is well below 1.

    Args:
      rng: Draws everything.
      num_keys: S.
      width: D, at least `num_planted + num_background`.
      num_planted: Planted keys, P.
      noise: See above.
      num_background: Common directions.
      background: See above.
      num_queries: T.

    Raises:
      ValueError: If the directions do not fit into the width, or the planted keys among the keys.
    """
    if num_planted + num_background > width:
        raise ValueError(f"{num_planted=} and {num_background=} must together not exceed {width=}")
    if not 1 <= num_planted <= num_keys:
        raise ValueError(f"{num_planted=} must be in [1, {num_keys}], the number of keys")
    directions, _ = np.linalg.qr(rng.normal(size=(width, width)))
    keys = background * rng.normal(size=(num_keys, num_background)) @ directions[:num_background]
    planted = np.sort(rng.choice(num_keys, num_planted, replace=False))
    keys[planted] = directions[num_background : num_background + num_planted]
    keys += noise * rng.normal(size=keys.shape) * ~np.isin(np.arange(num_keys), planted)[:, None]
    queries = keys[rng.choice(planted, num_queries)] + noise * rng.normal(size=(num_queries, width))
    return Planted(keys.astype(np.float32), queries.astype(np.float32), planted)
