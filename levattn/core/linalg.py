"""Factorisations and solves of stacks of small matrices, safe to run side by side in one program on CPUs.

LAPACK calls of jaxlib 0.10 share their work out over the threads of XLA:CPU and wait for it, on such a thread. As many
calls at once as there are threads then wait for each other for ever: two layers without a path between them are enough
on two cores. So triangular matrices are inverted by matmuls, which suits accelerators as well, and where jaxlib is that
old the rest goes through a stack one matrix after the other, which takes no longer. Under `vmap` the matrices of the
mapped axis still go together.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import jaxlib
from jaxtyping import Array, Float

_SHARES_OUT = tuple(int(part) for part in jaxlib.__version__.split(".")[:2]) < (0, 11)


def product(subscripts: str, left: Array, right: Array) -> Float[Array, "..."]:
    """`jnp.einsum` of two arrays of any float dtype with a float32 result.

    Accelerators multiply half precision as it is; XLA:CPU has such a product in some orders of axes only.
    """
    if jax.default_backend() == "cpu":
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
    return jnp.einsum(subscripts, left, right, preferred_element_type=jnp.float32)


def cholesky(matrices: Float[Array, "*batch D D"]) -> Float[Array, "*batch D D"]:
    """Lower Cholesky factors; NaN where a matrix is not positive definite. Cost: D^3 / 3 operations each."""
    return _each(jnp.linalg.cholesky, matrices)


def inverse_triangular(factors: Float[Array, "*batch D D"]) -> Float[Array, "*batch D D"]:
    """Inverses of lower triangular matrices; what stands above the diagonal is not looked at.

    From the diagonal up, pairs of inverted blocks A, B are joined with the block C below A: the inverse of
    [[A, 0], [C, B]] is [[A', 0], [-B' C A', B']]. Cost: 2 D^3 / 3 operations each, in log2 D batches of matmuls.
    """
    size = factors.shape[-1]
    num_blocks = 1 << max(size - 1, 0).bit_length()  # a power of two: the identity fills up what is missing
    pad = num_blocks - size
    padded = jnp.pad(factors, [(0, 0)] * (factors.ndim - 2) + [(0, pad), (0, pad)])
    padded += jnp.diag(jnp.arange(num_blocks) >= size).astype(factors.dtype)
    inverse = 1 / jnp.diagonal(padded, axis1=-2, axis2=-1)[..., None, None]
    while num_blocks > 1:
        num_blocks //= 2
        side = padded.shape[-1] // num_blocks
        tiles = padded.reshape(*padded.shape[:-2], num_blocks, side, num_blocks, side)
        below = jnp.moveaxis(jnp.diagonal(tiles, axis1=-4, axis2=-2), -1, -3)[..., side // 2 :, : side // 2]
        first, second = inverse[..., ::2, :, :], inverse[..., 1::2, :, :]
        corner = -_product(_product(second, below), first)
        rows = [[first, jnp.zeros_like(first)], [corner, second]]
        inverse = jnp.concatenate([jnp.concatenate(row, axis=-1) for row in rows], axis=-2)
    return inverse[..., 0, :size, :size]


def inverse_cholesky(
    matrices: Float[Array, "*batch D D"],
) -> tuple[Float[Array, "*batch D D"], Float[Array, "*batch D D"]]:
    """The lower Cholesky factors L and their inverses. Cost: D^3 operations each."""
    factors = cholesky(matrices)
    return factors, inverse_triangular(factors)


def cholesky_solve(
    matrices: Float[Array, "*batch D D"], right_sides: Float[Array, "*batch D N"]
) -> Float[Array, "*batch D N"]:
    """Solutions X of A X = B for positive definite A. Cost: D^3 + 4 D^2 N operations each, the same backwards."""
    _, inverse = inverse_cholesky(jax.lax.stop_gradient(matrices))

    def solve(_, right_sides):
        return _product(jnp.swapaxes(inverse, -1, -2), _product(inverse, right_sides))

    # Its derivatives are solves, too; those of the factorisation would be triangular ones by LAPACK.
    return jax.lax.custom_linear_solve(lambda x: _product(matrices, x), right_sides, solve, symmetric=True)


def svd(
    matrices: Float[Array, "*batch S D"],
) -> tuple[Float[Array, "*batch S R"], Float[Array, "*batch R"], Float[Array, "*batch R D"]]:
    """Thin singular value decompositions U, s, V^T with R = min(S, D)."""
    return _each(lambda matrix: tuple(jnp.linalg.svd(matrix, full_matrices=False)), matrices)


def qr_factor(matrices: Float[Array, "*batch S D"]) -> Float[Array, "*batch R D"]:
    """The factors R of QR decompositions, R = min(S, D) rows. Cost: 2 S D^2 operations each."""
    return _each(lambda matrix: jnp.linalg.qr(matrix, mode="r"), matrices)


def _product(left: Array, right: Array) -> Array:
    return jnp.matmul(left, right, precision="highest")


def _each(function: Callable, matrices: Array):
    batch = matrices.shape[:-2]
    if not batch or not _SHARES_OUT or jax.default_backend() != "cpu":
        return function(matrices)
    found = jax.lax.map(function, matrices.reshape(-1, *matrices.shape[-2:]))
    return jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]), found)
