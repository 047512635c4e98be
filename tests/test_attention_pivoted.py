"""The drawn keys follow the law of randomly pivoted Cholesky, and their weights are Nystroem's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from levattn.attention import AttentionSpec, lev_attention
from levattn.attention.pivoted import _RIDGE, draw_pivots, nystroem_weights, pivoted

BATCH, TOKENS, HEADS, WIDTH = 2, 23, 2, 6

apply = jax.jit(lev_attention, static_argnames="spec")
draw = jax.jit(draw_pivots, static_argnames=("num_pivots", "num_prefix"))


@functools.partial(jax.jit, static_argnames="spec")
def choose(query, key, value, spec, mask=None, rng=None):
    return pivoted(query, key, value, spec=spec, mask=mask, rng=rng)


def _inputs(seed=0, tokens=TOKENS):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(BATCH, tokens, HEADS, WIDTH)), jnp.float32) for _ in range(3))


def _error(out, query, key, value):
    dense = apply(query, key, value, AttentionSpec("dense"))
    return float(jnp.linalg.norm(out - dense) / jnp.linalg.norm(dense))


def test_two_draws_have_the_probabilities_of_the_residual_diagonal():
    """Against all pairs of five keys, enumerated in float64."""
    points = np.random.default_rng(1).normal(size=(5, 2)) * 0.8
    kernel = np.exp(points @ points.T)
    expected = np.zeros((5, 5))
    for first in range(5):
        residual = np.diag(kernel) - kernel[first] ** 2 / kernel[first, first]
        residual[first] = 0
        expected[first] = kernel[first, first] / np.trace(kernel) * residual / residual.sum()
    num_draws = 4000
    many = jnp.broadcast_to(jnp.asarray(points, jnp.float32), (num_draws, 1, 5, 2))
    pivots, drawn = draw(many, jnp.ones((num_draws, 1, 5), bool), 2, 0, jax.random.key(0))
    assert np.all(drawn)
    found = np.zeros((5, 5))
    np.add.at(found, tuple(np.asarray(pivots[:, 0]).T), 1 / num_draws)
    assert np.all(np.abs(found - expected) < 4.5 * np.sqrt(expected * (1 - expected) / num_draws) + 1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.1, 1.5))
def test_weights_solve_the_least_squares_problem_of_the_exponential_kernel(seed, scale):
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(1, 1, TOKENS, WIDTH)).astype(np.float32) * np.float32(scale)
    chosen = rng.permutation(TOKENS)[:7]
    indices = jnp.asarray(chosen)[None, None]
    found = _weights(jnp.asarray(points), jnp.ones((1, 1, TOKENS), bool), indices, jnp.ones((1, 1, 7), bool))[0, 0]
    kernel = np.exp(points[0, 0].astype(np.float64) @ points[0, 0].astype(np.float64).T)
    among = kernel[np.ix_(chosen, chosen)] + _RIDGE * np.diag(np.diag(kernel)[chosen])
    expected = np.linalg.solve(among, kernel[chosen])
    expected[:, chosen] = np.eye(7)
    np.testing.assert_allclose(found, expected, rtol=5e-3, atol=5e-3 * np.abs(expected).max())


_weights = jax.jit(nystroem_weights)


@pytest.mark.parametrize("prefix", [0, 2])
def test_no_key_is_drawn_twice_nor_one_that_does_not_exist_and_leading_ones_come_first(prefix):
    query, key, value = _inputs()
    mask = jnp.arange(TOKENS) < jnp.array([TOKENS, 5])[:, None]
    coreset = choose(query, key, value, AttentionSpec("pivoted", k=9, keep_prefix=prefix), mask)
    for b, h in np.ndindex(BATCH, HEADS):
        drawn = np.asarray(coreset.indices[b, h])[np.asarray(coreset.valid[b, h])]
        assert len(set(drawn.tolist())) == len(drawn) == min(9, (TOKENS, 5)[b])
        assert np.all(mask[b, drawn])
        np.testing.assert_array_equal(drawn[:prefix], np.arange(prefix))


def test_every_head_draws_for_itself_and_by_its_seed():
    query, key, value = (x[:, :, :1].repeat(HEADS, 2) for x in _inputs())
    found = [choose(query, key, value, AttentionSpec("pivoted", k=5, seed=seed)).indices for seed in (0, 0, 1)]
    np.testing.assert_array_equal(found[0], found[1])
    assert np.any(found[0] != found[2])
    assert np.any(found[0][:, 0] != found[0][:, 1])
    np.testing.assert_array_equal(
        choose(query, key, value, AttentionSpec("pivoted", k=5), rng=jax.random.key(1)).indices, found[2]
    )


def test_distinct_keys_that_come_many_times_are_all_drawn_and_cost_nothing():
    which = np.random.default_rng(1).permutation(np.arange(40) % 5)
    query, key, value = (x[:, which] for x in _inputs(tokens=5))
    assert _error(apply(query, key, value, AttentionSpec("pivoted", k=5)), query, key, value) < 5e-3


def test_the_error_falls_with_k_and_is_below_that_of_keys_without_weights():
    query, key, value = _inputs(tokens=64)
    errors = [_error(apply(query, key, value, AttentionSpec("pivoted", k=k)), query, key, value) for k in (4, 16, 48)]
    assert errors == sorted(errors, reverse=True)
    assert errors[1] < 0.6 * _error(apply(query, key, value, AttentionSpec("random", k=16)), query, key, value)


@jax.jit
def _gradients_and_output(query, key, value):
    def loss(query, key, value):
        out = lev_attention(query, key, value, AttentionSpec("pivoted", k=4))
        return jnp.sum(jnp.sin(out.astype(jnp.float32))), out

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, value)


@pytest.mark.parametrize("kind", ["huge", "zeros", "equal", "short", "bfloat16"])
def test_awkward_keys_give_outputs_within_the_range_of_the_values_and_finite_gradients(kind):
    query, key, value = _inputs(tokens=4 if kind == "short" else TOKENS)
    if kind == "huge":
        key = key.at[:, 3].mul(1e4)
    elif kind == "zeros":
        key = key * 0
    elif kind == "equal":
        key = key[:, :1] + 1e-6 * key
    elif kind == "bfloat16":
        query, key, value = (x.astype(jnp.bfloat16) for x in (query, key, value))
    grads, out = _gradients_and_output(query, key, value)
    assert all(np.all(np.isfinite(x)) for x in grads)
    slack = 0.05 if kind == "bfloat16" else 1e-4
    assert np.all(out <= value.max(axis=1, keepdims=True) + slack)
    assert np.all(out >= value.min(axis=1, keepdims=True) - slack)


def test_a_local_window_is_refused():
    with pytest.raises(ValueError, match="local_window=3 must be None with method 'pivoted'"):
        lev_attention(*_inputs(), AttentionSpec("pivoted", k=4, local_window=3))
