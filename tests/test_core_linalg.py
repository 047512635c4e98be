"""Factorisations of stacks: those of each matrix, by numpy in float64, and never waiting for each other."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from levattn.core import linalg

SHAPES = [(), (3,), (2, 3), (0,)]
SIZE, WIDE = 5, 9


def _positive(batch, seed=0):
    root = np.random.default_rng(seed).normal(size=(*batch, SIZE, WIDE))
    return root @ np.swapaxes(root, -1, -2) + np.eye(SIZE)


def _right_sides(batch, *shape):
    return np.random.default_rng(1).normal(size=(*batch, *shape))


def _close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("batch", SHAPES)
def test_each_matrix_of_a_stack_is_treated_as_numpy_would(batch):
    matrices, tall = _positive(batch), _right_sides(batch, WIDE, SIZE)
    lower = np.linalg.cholesky(matrices)
    _close(linalg.cholesky(jnp.float32(matrices)), lower)
    factor, inverse = linalg.inverse_cholesky(jnp.float32(matrices))
    _close(factor, lower)
    _close(inverse, np.linalg.inv(lower))
    right = _right_sides(batch, SIZE, 4)
    _close(linalg.cholesky_solve(jnp.float32(matrices), jnp.float32(right)), np.linalg.solve(matrices, right))
    _close(linalg.inverse_triangular(jnp.float32(lower)), np.linalg.inv(lower))
    left, singular, right = linalg.svd(jnp.float32(tall))
    _close(singular, np.linalg.svd(tall, compute_uv=False))
    _close(jnp.einsum("...sr,...r,...rd->...sd", left, singular, right), tall)
    triangle = linalg.qr_factor(jnp.float32(tall))
    assert triangle.shape == (*batch, SIZE, SIZE)
    _close(jnp.swapaxes(triangle, -1, -2) @ triangle, np.swapaxes(tall, -1, -2) @ tall)


@pytest.mark.parametrize("size", [1, 2, 3, 16, 64, 100])
def test_inverses_of_ill_conditioned_triangles_are_as_accurate_as_substitution(size):
    rng = np.random.default_rng(size)
    lower = np.tril(rng.normal(size=(size, size)) * 0.3) * np.geomspace(1, 1e-4, size)[:, None]
    lower[np.diag_indices(size)] = np.geomspace(1, 1e-4, size)
    lower = np.float32(lower)
    above = np.triu(np.full((size, size), 9.0, np.float32), 1)  # not looked at
    found = np.float64(linalg.inverse_triangular(jnp.float32(lower + above)))
    by_substitution = scipy.linalg.solve_triangular(lower, np.eye(size, dtype=np.float32), lower=True)
    exact = scipy.linalg.solve_triangular(np.float64(lower), np.eye(size), lower=True)
    errors = [np.linalg.norm(x - exact) / np.linalg.norm(exact) for x in (found, by_substitution)]
    assert errors[0] < 10 * errors[1] + 1e-6
    np.testing.assert_array_equal(found, np.tril(found))


def test_gradients_and_vmap_pass_through_a_solve():
    matrices, right = jnp.float32(_positive((2, 3))), jnp.float32(_right_sides((2, 3), SIZE, 4))

    def loss(matrices, right):
        return jnp.sum(jnp.sin(linalg.cholesky_solve(matrices, right)))

    found = jax.jit(jax.grad(loss, argnums=(0, 1)))(matrices, right)
    expected = jax.grad(lambda a, b: jnp.sum(jnp.sin(jnp.linalg.inv(a) @ b)), argnums=(0, 1))(matrices, right)
    _close(found[1], expected[1])
    symmetric = [x + jnp.swapaxes(x, -1, -2) for x in (found[0], expected[0])]
    _close(*symmetric)
    np.testing.assert_allclose(jax.vmap(linalg.cholesky)(matrices), linalg.cholesky(matrices), rtol=1e-6)


def test_independent_stacks_in_one_program_do_not_wait_for_each_other_for_ever():
    code = """
import jax, jax.numpy as jnp
from levattn.core import linalg
stacks = [jnp.broadcast_to((2.0 + i) * jnp.eye(64), (256, 64, 64)) for i in range(8)]
run = jax.jit(lambda stacks: [linalg.inverse_cholesky(x)[1].sum() for x in stacks])
for _ in range(10):  # without the remedy the first one hangs
    jax.block_until_ready(run(stacks))
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
