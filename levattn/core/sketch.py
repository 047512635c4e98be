"""Leverage scores in input sparsity time: from a sparse embedding of the keys, for sets that contain the exact one.

A sparse embedding adds each key, with a random sign, to one of m rows: S K, in as many operations as K has entries.
If K = Q R has rank r, then E |Q^T S^T S Q - I|_F^2 <= (r^2 + r) / m, so that by Markov's inequality
(S K)^T (S K) <= (1 + gamma) K^T K but with probability (r^2 + r) / (m gamma^2). Scores taken from S K in place of K are
then too small by at most a factor 1 + gamma, and raised by it they are upper bounds. Only this side is promised:
nothing heavy is missed. On the other side the scores are usually within a few per cent, at the m that this asks for.

Two embeddings of a few rows cost less than one of many: the larger of their two scores is too small only if both are.

Sources: Clarkson and Woodruff, STOC 2013 (arXiv 1207.6365); LevAttention (arXiv 2410.05462), section 3.
"""

import math

import numpy as np
import scipy.sparse
import scipy.special
from jaxtyping import Array, Float

from levattn.core.basis import Basis, at_unit_scale, checked_matrix, orthonormal_basis, row_blocks

NUM_EMBEDDINGS = 2  # independent ones; scores are the larger of theirs


def sparse_embedding(
    keys: Float[Array | np.ndarray, "S D"], num_rows: int, *, seed: int | tuple[int, ...] = 0
) -> Float[np.ndarray, "m D"]:
    """S K for a CountSketch S: every key is added to one of the rows, with a random sign.

    Args:
      keys: Keys of one head.
      num_rows: m.
      seed: Of buckets and signs.

    Returns:
      The sketch, float64. Cost: 2 S D operations.

    Raises:
      ValueError: For less than one row, or keys that are empty or not finite.
    """
    if num_rows < 1:
        raise ValueError(f"{num_rows=} must be at least 1")
    keys = checked_matrix("keys", keys)
    rng = np.random.default_rng(seed)
    sketch = np.zeros((num_rows, keys.shape[1]))
    for _, block in row_blocks(keys, 1 << 16):
        buckets = rng.integers(num_rows, size=len(block))
        signs = rng.choice([-1.0, 1.0], len(block))
        sketch += scipy.sparse.csr_array((signs, (buckets, np.arange(len(block)))), (num_rows, len(block))) @ block
    return sketch


def embedding_rows(width: int, distortion: float | int, failure: float) -> int:
    """Rows m of a sparse embedding that bounds |S K x|^2 by (1 + distortion) |K x|^2, unless with probability failure.

    Raises:
      ValueError: For a distortion that is not positive or a failure outside (0, 1).
    """
    if not distortion > 0:
        raise ValueError(f"{distortion=} must be positive")
    _check_probability(failure)
    return math.ceil((width**2 + width) / (distortion**2 * failure))


def sketched_leverage_bounds(
    keys: Float[Array | np.ndarray, "S D"],
    *,
    distortion: float | int = 3,
    failure: float = 1e-2,
    num_directions: int | None = None,
    refine_above: float | int | None = None,
    seed: int = 0,
) -> Float[np.ndarray, " S"]:
    """Upper bounds on all leverage scores, without a pass of S D^2 operations.

    Args:
      keys: Keys of one head.
      distortion: gamma: the bounds allow for a sketch that lengthens by 1 + gamma.
      failure: Probability that some bound is too small: half for the embeddings, half for the directions.
      num_directions: Row norms |k R^-1| are measured along so many Gaussian directions (Johnson and Lindenstrauss);
        the bounds are raised by what the shortest of all S can lose, a factor of 6 at 32 directions and a million
        keys, and by the sum of both embeddings' norms in place of the larger. None: the norms themselves.
      refine_above: Keys whose bound along the directions is at least this are bounded by the norms themselves.
      seed: Of the embeddings and the directions. The keys must not depend on it.

    Returns:
      Bounds in [0, 1]. Where the embeddings would have no fewer rows than there are keys, scores are not sketched.

    Raises:
      ValueError: For numbers out of range, or keys that are empty or not finite.

    Cost: 4 S D for the embeddings, 4 m D^2 for their factors with m = (D^2 + D) / (gamma^2 sqrt(failure / 2)) rows, and
    2 S D g for g directions (4 S D^2 without).
    """
    keys = at_unit_scale(checked_matrix("keys", keys))
    if num_directions is not None and num_directions < 1:
        raise ValueError(f"{num_directions=} must be at least 1")
    _check_probability(failure)
    num_rows = embedding_rows(keys.shape[1], distortion, (failure / 2) ** (1 / NUM_EMBEDDINGS))
    if NUM_EMBEDDINGS * num_rows < len(keys):
        sketches = (sparse_embedding(keys, num_rows, seed=(seed, at)) for at in range(NUM_EMBEDDINGS))
        bases, factor = [orthonormal_basis(sketch) for sketch in sketches], 1 + distortion
    else:
        bases, factor = [orthonormal_basis(keys)], 1.0

    def norms(block):
        return np.max([np.sum(basis.rows(block) ** 2, axis=1) for basis in bases], axis=0)

    screen = _screen(bases, num_directions, failure / 2 / len(keys), seed)
    bounds = np.empty(len(keys))
    for start, block in row_blocks(keys):
        found = norms(block) if screen is None else np.sum((block @ screen) ** 2, axis=1)
        if screen is not None and refine_above is not None:
            again = factor * found >= refine_above
            found[again] = norms(block[again])
        # Of a key outside of what a sketch spans nothing is known.
        is_known = np.all([basis.is_resolved(block) for basis in bases], axis=0)
        bounds[start : start + len(block)] = np.where(is_known, factor * found, 1)
    return np.minimum(bounds * (1 + max(basis.relative_error for basis in bases)), 1)


def _screen(bases: list[Basis], num_directions, failure_per_key, seed) -> np.ndarray | None:
    """What to multiply keys by, so that the squared norm is at least that under every basis, but for the failure.

    The norms under all bases together, one beside the other, are their sum, and directions measure it as one.
    """
    whiten = np.concatenate([basis.whiten for basis in bases], axis=1)
    if num_directions is None or num_directions >= whiten.shape[1]:
        return None
    gaussian = np.random.default_rng([seed, NUM_EMBEDDINGS]).normal(size=(whiten.shape[1], num_directions))
    # What a chi-squared variable of that many degrees of freedom falls below with that probability.
    shortest = 2 * float(scipy.special.gammaincinv(num_directions / 2, failure_per_key))
    return whiten @ gaussian / math.sqrt(shortest)


def _check_probability(failure):
    if not 0 < failure < 1:
        raise ValueError(f"{failure=} must be in (0, 1)")
