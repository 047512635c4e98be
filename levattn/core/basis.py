"""An orthonormal basis of the keys' columns, in float64 on the host: what exact scores and certificates stand on.

If K = Q R with orthonormal columns of Q, then <q, k> = <R q, k R^-1>: sensitivities, Lewis weights and attention are
the same for the rows of Q as for the keys, and their numbers are as tame as they can be. R is made over blocks of rows,
so that memory does not grow with the number of keys. Unlike `levattn.core.leverage`, which is made for speed on
accelerators, all that is here comes with a bound on its rounding error.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

_BLOCK_BYTES = 1 << 24  # of rows that are held in float64 at a time: fewer, and QR spends its time on calls
_FEATURE_ROWS = 4096  # rows at a time where each has more features than entries
_EPS = float(np.finfo(np.float64).eps)
_SAFE_SQUARE = 1e-6  # smallest over largest eigenvalue of a Gram matrix that is relied on
# A key with a part of more roundings a column (relative to its own length) in the directions that the rank cut drops is
# not resolved. Keys that are products of thin matrices, rounded, were seen to have a quarter of it.
_RESOLVED = 16 * _EPS
_SAFE_EXPONENT = 32

Features = Callable[[np.ndarray], np.ndarray]  # of a block of rows


def checked_matrix(name: str, matrix: Shaped[Array | np.ndarray, "..."]) -> Float[np.ndarray, "S D"]:
    """`matrix` as a NumPy array of at least float32, if it can be computed with.

    Raises:
      ValueError: Not two-dimensional, empty, not of real numbers, with a mask, or with NaN or infinity; `name` says
        which argument it was.
    """
    matrix = real_array(name, matrix)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise ValueError(f"{name}.shape={matrix.shape} must be (rows, width) with at least one of each: give one head")
    # float16 and bfloat16 become float32; what is wider than float64 LAPACK does not take.
    dtype = np.result_type(matrix.dtype, np.float32)
    matrix = matrix.astype(dtype if dtype.itemsize <= 8 else np.float64, copy=False)
    for start, block in row_blocks(matrix, dtype=matrix.dtype):
        if not np.all(np.isfinite(block)):
            row = start + int(np.argmin(np.all(np.isfinite(block), axis=1)))
            raise ValueError(f"{name}[{row}] holds NaN or infinity: mask or drop such rows first")
    return matrix


def real_array(name: str, array: Shaped[Array | np.ndarray, "..."]) -> Shaped[np.ndarray, "..."]:
    """`array` in host memory, as it is, if its entries are real numbers and all of them count.

    Raises:
      ValueError: It holds complex numbers, objects or text, or has a mask; `name` says which argument it was.
    """
    if isinstance(array, np.ma.MaskedArray):
        raise ValueError(f"{name} is a masked array, whose mask would not be looked at: give the rows that count")
    array = np.asarray(array)
    if not (array.dtype.kind in "biuf" or jnp.issubdtype(array.dtype, jnp.floating)):
        raise ValueError(f"{name} has dtype {array.dtype}: it must be of real numbers, float32 or float64 at best")
    return array


def at_unit_scale(matrix: Float[np.ndarray, "S D"]) -> Float[np.ndarray, "S D"]:
    """The matrix times a power of two, in float64, if its entries are so large or small that squares or powers of them
    might leave float64. What is the same for all multiples of the keys is then that of the keys, to the last bit.
    """
    exponent = _exponent_beyond_safe(matrix)
    return np.ldexp(matrix.astype(np.float64), -exponent) if exponent else matrix


def _exponent_beyond_safe(matrix):
    exponent = int(np.frexp(max(matrix.max(), -matrix.min()))[1])
    return 0 if abs(exponent) < _SAFE_EXPONENT else exponent


def row_blocks(
    matrix: Float[np.ndarray, "S D"], size: int | None = None, dtype=np.float64
) -> Iterator[tuple[int, Float[np.ndarray, "b D"]]]:
    """(first row, rows in `dtype`) of consecutive blocks."""
    size = size or max(1, _BLOCK_BYTES // (8 * matrix.shape[1]))
    for start in range(0, len(matrix), size):
        yield start, matrix[start : start + size].astype(dtype, copy=False)


def triangular_factor(
    matrix: Float[np.ndarray, "S D"], features_fn: Features | None = None
) -> Float[np.ndarray, "r F"]:
    """R of a QR factorisation: |R x| = |K x| for every x. Cost: 2 S D^2; memory: D^2 numbers and a block."""
    factor = None
    for block in _blocks(matrix, features_fn):
        factor = np.linalg.qr(block if factor is None else np.concatenate([factor, block]), mode="r")
    return factor


def _blocks(matrix, features_fn):
    if features_fn is None:
        return (block for _, block in row_blocks(matrix))
    return (features_fn(block) for _, block in row_blocks(matrix, _FEATURE_ROWS))


def gram(matrix: Float[np.ndarray, "S D"], features_fn: Features | None = None) -> Float[np.ndarray, "F F"]:
    """K^T K in float64, over blocks of rows. Cost: S D^2."""
    total = 0
    for block in _blocks(matrix, features_fn):
        total = total + block.T @ block
    return total


@dataclasses.dataclass(frozen=True, eq=False)
class Basis:
    """Coordinates in which the keys have orthonormal columns: <q, k> = <coordinates(q), rows(k)>.

    Attributes:
      whiten: Times a key, its row of Q; the squared norm of that row is the key's leverage score.
      unwhiten: `whiten @ unwhiten` projects onto the directions that are kept.
      column_norms: Norms of the columns of K.
      condition: Largest over smallest singular value kept, columns scaled to equal norms.
      is_squared: Whether it came from the Gram matrix, whose rounding error the condition number enters squared.
    """

    whiten: Float[np.ndarray, "D r"]
    unwhiten: Float[np.ndarray, "r D"]
    column_norms: Float[np.ndarray, " D"]
    condition: float
    is_squared: bool

    @property
    def rank(self) -> int:
        return self.whiten.shape[1]

    @property
    def relative_error(self) -> float:
        """By how much, relatively, a squared norm of rows may be off by rounding."""
        return float(self._error(self.condition))

    def rows(self, keys: Float[np.ndarray, "S D"]) -> Float[np.ndarray, "S r"]:
        """Rows of Q."""
        return keys @ self.whiten

    def coordinates(self, queries: Float[np.ndarray, "T D"]) -> Float[np.ndarray, "T r"]:
        """R q: its squared norm is sum_l <q, k_l>^2."""
        return queries @ self.unwhiten.T

    def coordinate_error(
        self, queries: Float[np.ndarray, "T D"], coordinates: Float[np.ndarray, "T r"]
    ) -> Float[np.ndarray, " T"]:
        """By how much, relatively, |R q|^2 may be off by rounding; infinite where it is 0 for a q that is not.

        The nearer a query is to orthogonal to all keys, the more of it cancels.
        """
        reach = np.linalg.norm(queries * self.column_norms, axis=1) * self._largest_singular
        found = np.linalg.norm(coordinates, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(reach > 0, self._error(reach / found), 0)

    def is_resolved(self, keys: Float[np.ndarray, "S D"]) -> Bool[np.ndarray, " S"]:
        """Whether a key lies in the kept directions, but for 16 D roundings of its length. All do at full rank."""
        if self.rank == len(self.whiten):
            return np.ones(len(keys), bool)
        scaled = keys * _inverse(self.column_norms)
        scaled /= _one_if_zero(np.max(np.abs(scaled), axis=1, keepdims=True))  # no square underflows
        residual = scaled - (scaled * self.column_norms) @ self.whiten @ self.unwhiten * _inverse(self.column_norms)
        tolerance = _RESOLVED * len(self.whiten)
        return np.linalg.norm(residual, axis=1) <= tolerance * np.linalg.norm(scaled, axis=1)

    @property
    def _largest_singular(self) -> float:
        return float(np.linalg.norm(self.unwhiten[0] * _inverse(self.column_norms))) if self.rank else 0.0

    def _error(self, amplification):
        return 8 * len(self.whiten) * _EPS * amplification ** (2 if self.is_squared else 1)


def _inverse(norms):
    return 1 / _one_if_zero(norms)


def _one_if_zero(norms):
    return np.where(norms > 0, norms, 1)


def orthonormal_basis(matrix: Float[np.ndarray, "S D"], features_fn: Features | None = None) -> Basis:
    """The basis of the row space of a matrix, up to numerical rank.

    Columns are scaled to equal norms. The Gram matrix is enough up to a condition number of 1e3; beyond, QR, whose
    error grows with the condition number and not with its square. There, singular values under 32 D eps (float64) of
    the largest count as rank deficiency. Cost: S D^2 operations, thrice that with QR.

    Args:
      matrix: Finite, of any scale; entries below 1e-150 of the largest count as 0.
      features_fn: Where the basis of features of the rows is wanted, the function from a block of rows to them.
    """
    if features_fn is None and (exponent := _exponent_beyond_safe(matrix)):
        basis = orthonormal_basis(np.ldexp(matrix.astype(np.float64), -exponent))
        return dataclasses.replace(
            basis,
            whiten=np.ldexp(basis.whiten, -exponent),
            unwhiten=np.ldexp(basis.unwhiten, exponent),
            column_norms=np.ldexp(basis.column_norms, exponent),
        )
    squares = gram(matrix, features_fn)
    width, norms = len(squares), np.sqrt(np.diag(squares))
    if not np.any(norms):
        return Basis(np.zeros((width, 0)), np.zeros((0, width)), norms, condition=1.0, is_squared=False)
    scale = _inverse(norms)
    values, vectors = np.linalg.eigh(squares * scale * scale[:, None])
    if values[0] > _SAFE_SQUARE * values[-1]:
        singular, right, is_squared = np.sqrt(values[::-1]), vectors.T[::-1], True
    else:
        factor = triangular_factor(matrix, features_fn)
        _, singular, right = np.linalg.svd(factor * scale, full_matrices=False)
        kept = singular > 32 * width * _EPS * singular[0]
        singular, right, is_squared = singular[kept], right[kept], False
    return Basis(
        whiten=scale[:, None] * right.T / singular,
        unwhiten=singular[:, None] * right * norms,
        column_norms=norms,
        condition=float(singular[0] / singular[-1]),
        is_squared=is_squared,
    )
