"""Lewis weights: leverage scores of the keys after each is scaled by a power of its own weight.

For p > 0 they are the w that solve w_j = (k_j^T (K^T W^(1-2/p) K)^+ k_j)^(p/2); they sum to the rank of K, and bound
the sensitivities of |x|^p as the leverage scores do those of x^2. Source: Cohen and Peng, l_p row sampling by Lewis
weights (STOC 2015, arXiv 1412.0588).
"""

import numpy as np
from jaxtyping import Array, Float

from levattn.core.basis import at_unit_scale, checked_matrix, orthonormal_basis

# Powers for which the iteration was seen to settle on whatever keys. It takes ln(1 / tolerance) max(1 / p, p / 4)
# steps, and beyond these float64 does not hold the powers of the weights that go with them.
SMALLEST_POWER, LARGEST_POWER = 0.1, 100
# A Gram matrix with a smaller Cholesky pivot is left for Householder QR.
_SAFE_PIVOT = 1e-4


def lewis_weights(
    keys: Float[Array | np.ndarray, "S D"], p: float | int, *, tolerance: float = 1e-6, max_iters: int = 2000
) -> Float[np.ndarray, " S"]:
    """Lewis weights of the keys of one head, in float64 on the host.

    Iterates w <- w (t / w)^(2p / (p + 2)), with t the leverage scores of W^(1/2-1/p) K; the exponent is the one at
    which the error shrinks by |p - 2| / (p + 2) an iteration near the solution, for every p. The plain iteration
    (exponent p/2) converges for p < 4 only.

    Args:
      keys: Keys; any conditioning that float64 can express.
      p: Power, from 0.1 to 100. 2 gives leverage scores.
      tolerance: Accepted max |log(t_j / w_j)|, measured afresh on the weights that are returned.
      max_iters: Iterations before giving up.

    Returns:
      Weights in [0, 1], 0 for zero keys.

    Raises:
      ValueError: For a p out of range, or keys that are not finite.
      RuntimeError: The tolerance was not met: weights that do not solve the equation are never returned.

    Cost: 4 S D^2 operations an iteration, ten to fifty of them for p from 0.5 to 8, hundreds at the ends of the range;
    S D numbers of memory in float64.
    """
    check_power(p)
    keys = at_unit_scale(checked_matrix("keys", keys))
    return solve_weights(orthonormal_basis(keys).rows(keys), p, tolerance, max_iters)


def check_power(p: float | int) -> None:
    """Raises a ValueError for a power that Lewis weights are not offered for."""
    if not SMALLEST_POWER <= p <= LARGEST_POWER:
        raise ValueError(
            f"{p=} must be a positive number from {SMALLEST_POWER} to {LARGEST_POWER}: beyond, Lewis weights take "
            "thousands of iterations and leave float64"
        )


def solve_weights(
    rows: Float[np.ndarray, "S r"], p: float | int, tolerance: float = 1e-6, max_iters: int = 2000
) -> Float[np.ndarray, " S"]:
    """As `lewis_weights`, of rows whose columns are orthonormal already."""
    check_power(p)
    weights = np.zeros(len(rows))
    alive = np.linalg.norm(rows, axis=1) > 0
    rows = rows[alive]
    if rows.size == 0:
        return weights
    power, step = 0.5 - 1 / p, 2 * p / (p + 2)

    # Scaling rows once by the whole of w would make them ill-conditioned, and their Gram matrix useless. Scaling an
    # orthonormal basis of the last iterate by the change in w does not: near the solution the change is 1.
    log_weights = np.zeros(len(rows))
    scaled, is_fresh = rows, True
    scores = np.sum(scaled**2, axis=1)
    best = np.inf
    for _ in range(max_iters):
        gap = np.log(np.maximum(scores, np.finfo(float).tiny)) - log_weights
        residual = np.max(np.abs(gap))
        if residual <= tolerance:
            if is_fresh:
                weights[alive] = np.minimum(np.exp(log_weights), 1)
                return weights
            scaled, is_fresh = _orthonormal(np.exp(power * log_weights)[:, None] * rows), True  # free of drift
        else:
            if residual > 2 * best:  # seen for no p; a shorter step always shrinks the error in the end
                step, best = step / 2, residual
            best = min(best, residual)
            log_weights = log_weights + step * gap
            scaled, is_fresh = _orthonormal(np.exp(power * step * gap)[:, None] * scaled), False
        scores = np.sum(scaled**2, axis=1)
    raise RuntimeError(
        f"Lewis weights for {p=} did not settle in {max_iters=}: max |log(t / w)| is {residual:.1e}, "
        f"{tolerance=}; raise either of the two"
    )


def _orthonormal(matrix):
    """An orthonormal basis of the columns: Cholesky where the Gram matrix is safe, else Householder QR."""
    norms = np.linalg.norm(matrix, axis=0)
    matrix = matrix / np.where(norms > 0, norms, 1)
    try:
        factor = np.linalg.cholesky(matrix.T @ matrix)
        if np.min(np.diag(factor)) ** 2 > _SAFE_PIVOT:
            return np.linalg.solve(factor, matrix.T).T
    except np.linalg.LinAlgError:
        pass
    return np.linalg.qr(matrix)[0]
