"""The matrices that whiten keys, one warp a head: blocks of the Cholesky factor and its inverse in registers."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from levattn.core.leverage import inverse_norms

MAX_HEAD_DIM = 64  # Beyond, the blocks do not fit the registers of a warp.
_BLOCK = 32
_WIDTH = 2  # Columns that one step of elimination clears.


def whitening_of_head(
    grams: Float[Array, "B H D D"], *, shift: float, interpret: bool = False
) -> Float[Array, "B H D D"]:
    """Lower triangular W with W^T W = G^-1, as `levattn.core.leverage.whitening`.

    The factorisation is a chain of steps that wait for each other, so what counts is how long a step takes. One warp
    has no other to wait for. Four blocks rather than one: what is not on the diagonal then is products, on matrix units
    (float32 as three products of TF32).

    Args:
      grams: Gram matrices, float32; D a power of two between 16 and 64.
      shift: Added to the diagonal of the matrix whose columns are scaled to a unit diagonal.
      interpret: Run on any device, slowly.

    Returns:
      W. Cost: about D^3 operations a head.
    """
    batch, heads, head_dim, _ = grams.shape
    spec = pl.BlockSpec((None, None, head_dim, head_dim), lambda b, h: (b, h, 0, 0))
    precision = jax.lax.Precision.HIGHEST if interpret else jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    return pl.pallas_call(
        partial(_kernel, shift=shift, side=min(_BLOCK, head_dim), precision=precision),
        grid=(batch, heads),
        in_specs=[spec],
        out_specs=spec,
        out_shape=jax.ShapeDtypeStruct(grams.shape, jnp.float32),
        compiler_params=plgpu.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name="whitening",
    )(grams)


def _kernel(gram_ref, whiten_ref, *, shift, side, precision):
    dot = partial(plgpu.dot, precision=precision)
    num_blocks = gram_ref.shape[0] // side
    spans = [pl.ds(i * side, side) for i in range(num_blocks)]
    at = jnp.arange(side)
    scales = [inverse_norms(plgpu.load(gram_ref.at[i * side + at, i * side + at])) for i in range(num_blocks)]

    def load(i, j):
        scaled = gram_ref[spans[i], spans[j]] * scales[i][:, None] * scales[j][None, :]
        return scaled + shift * (at[:, None] == at[None, :]).astype(jnp.float32) if i == j else scaled

    left = {(i, j): load(i, j) for i in range(num_blocks) for j in range(i + 1)}
    factor, inverse = {}, {}
    for j in range(num_blocks):
        inverse[j, j] = _inverse_factor(left[j, j])
        below = range(j + 1, num_blocks)
        for i in below:
            factor[i, j] = dot(left[i, j], inverse[j, j], trans_b=True)
        for i in below:
            for m in range(j + 1, i + 1):
                left[i, m] -= dot(factor[i, j], factor[m, j], trans_b=True)
        for m in range(j):  # row j of the inverse, from the rows above it
            moved = sum(dot(factor[j, i], inverse[i, m]) for i in range(m, j))
            inverse[j, m] = -dot(inverse[j, j], moved)
    for i in range(num_blocks):
        for j in range(num_blocks):
            zeros = jnp.zeros((side, side), jnp.float32)
            whiten_ref[spans[i], spans[j]] = inverse[i, j] * scales[j][None, :] if j <= i else zeros


def _inverse_factor(matrix):
    """The inverse of the Cholesky factor of one block.

    Gaussian elimination of the matrix with the identity beside it, in place: of the identity, what elimination has
    filled by step j takes the columns that it has cleared. Rows and columns are spread over the lanes of the warp; to
    fetch two of each takes hardly longer than one.
    """
    side = matrix.shape[0]
    row, column = (jax.lax.broadcasted_iota(jnp.int32, (side, side), axis) for axis in (0, 1))
    at = jnp.arange(side)

    def eliminate(step, matrix):
        first = step * _WIDTH
        columns = [jnp.sum(jnp.where(column == first + c, matrix, 0), axis=1) for c in range(_WIDTH)]
        rows = [jnp.sum(jnp.where(row == first + c, matrix, 0), axis=0) for c in range(_WIDTH)]
        # The corner where they meet, as scalars: its elimination tells what each column does to the next ones.
        corner = {
            (c, d): jnp.sum(jnp.where(at == first + c, columns[d], 0), axis=0)
            for c in range(_WIDTH)
            for d in range(c + 1)
        }
        for d in range(_WIDTH):
            for c in range(d + 1, _WIDTH):
                for e in range(d + 1, c + 1):
                    corner[c, e] -= corner[c, d] / corner[d, d] * corner[e, d]
        factors = []
        for c in range(_WIDTH):
            for b in range(c):
                columns[c] -= factors[b] * corner[c, b]
                rows[c] -= corner[c, b] / corner[b, b] * rows[b]
            factors.append(jnp.where(at > first + c, columns[c] / corner[c, c], 0))
            # Column j: its factors m = c / p turn into -m, as c - m (p + 1) = -m.
            rows[c] += jnp.where(at == first + c, 1, 0)
        return matrix - sum(f[:, None] * r[None, :] for f, r in zip(factors, rows, strict=True))

    matrix = jax.lax.fori_loop(0, side // _WIDTH, eliminate, matrix)
    pivots = jnp.sum(jnp.where(row == column, matrix, 0), axis=1)
    unit = jnp.where(row > column, matrix, jnp.where(row == column, 1.0, 0.0))
    return unit * jax.lax.rsqrt(pivots)[:, None]
