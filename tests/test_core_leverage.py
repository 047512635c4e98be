"""Leverage scores agree with the definition by a float64 SVD, on the inputs that break naive code."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import levattn
from tests import reference

leverage_scores = jax.jit(levattn.leverage_scores, static_argnames=("method", "centre", "ridge"))


def _random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


CASES = {
    "gaussian": _random(0, 197, 64),
    "rank 8 of 64": _random(1, 197, 8) @ _random(2, 8, 64),
    "rank 1": _random(3, 197, 1) @ _random(4, 1, 64),
    "identical keys": np.ones((197, 1), np.float32) * _random(5, 1, 64),
    "many identical keys": np.ones((5000, 1), np.float32) * _random(6, 1, 64),
    "two keys, repeated": np.repeat(_random(7, 2, 64), 400, axis=0),
    "fewer keys than widths": _random(8, 10, 64),
    "single key": _random(9, 1, 64),
    "zero key among others": np.concatenate([np.zeros((1, 16), np.float32), _random(10, 40, 16)]),
    "all zero": np.zeros((20, 8), np.float32),
    "a zero column": _random(11, 50, 8) * np.array([1, 1, 0, 1, 1, 1, 1, 1], np.float32),
    "columns over twelve decades": _random(12, 197, 64) * np.logspace(-6, 6, 64).astype(np.float32),
    "heavy tails": np.random.default_rng(13).standard_cauchy((197, 64)).astype(np.float32),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", ["gram", "refined", "svd", "auto"])
def test_scores_equal_the_svd_definition(name, method):
    scores = np.asarray(leverage_scores(jnp.asarray(CASES[name]), method=method))
    atol = 1e-3 if method == "refined" else 5e-4
    np.testing.assert_allclose(scores, reference.leverage_scores(CASES[name]), atol=atol)


@pytest.mark.parametrize("condition", [1e2, 1e3, 1e4])
def test_accurate_routes_hold_on_ill_conditioned_keys_where_the_gram_route_may_not(condition):
    left, _ = np.linalg.qr(_random(0, 197, 32).astype(np.float64))
    right, _ = np.linalg.qr(_random(1, 32, 32).astype(np.float64))
    keys = ((left * np.geomspace(1, 1 / condition, 32)) @ right).astype(np.float32)
    expected = reference.leverage_scores(keys)
    for method in ("refined", "svd", "auto"):
        np.testing.assert_allclose(leverage_scores(jnp.asarray(keys), method=method), expected, atol=1e-4)
    # The documented damping of the Gram route makes scores too small, never too large.
    assert np.all(leverage_scores(jnp.asarray(keys), method="gram") <= expected + 1e-4)


def test_auto_leaves_the_gram_route_for_one_enormous_key():
    keys = np.concatenate([_random(0, 196, 32), 1e4 * _random(1, 1, 32)])
    np.testing.assert_allclose(leverage_scores(jnp.asarray(keys)), reference.leverage_scores(keys), atol=1e-4)


@given(
    num_keys=st.sampled_from([1, 5, 40]),  # few shapes, since each is compiled
    head_dim=st.sampled_from([1, 5, 12]),
    rank=st.integers(1, 12),
    seed=st.integers(0, 2**16),
    exponent=st.integers(-8, 8),
)
@settings(max_examples=60, deadline=None)
def test_scores_lie_in_the_unit_interval_and_sum_to_the_rank(num_keys, head_dim, rank, seed, exponent):
    keys = _random(seed, num_keys, rank) @ _random(seed + 1, rank, head_dim) * np.float32(10.0**exponent)
    scores = np.asarray(leverage_scores(jnp.asarray(keys), method="svd"))
    assert np.all((scores >= 0) & (scores <= 1 + 1e-5))
    assert abs(scores.sum() - np.round(scores.sum())) < 1e-3
    np.testing.assert_allclose(scores, reference.leverage_scores(keys), atol=1e-3)


@pytest.mark.parametrize("method", ["gram", "svd", "auto"])
def test_heads_and_batch_elements_are_scored_apart(method):
    keys = _random(0, 3, 50, 4, 16)
    scores = leverage_scores(jnp.asarray(keys), method=method)
    for b in range(3):
        for h in range(4):
            np.testing.assert_allclose(scores[b, h], reference.leverage_scores(keys[b, :, h]), atol=1e-3)


@pytest.mark.parametrize("method", ["gram", "svd"])
def test_masked_tokens_score_zero_and_change_nothing(method):
    keys = _random(0, 2, 30, 2, 8)
    mask = np.ones((2, 30), bool)
    mask[0, 20:] = False
    mask[1, ::3] = False
    keys[0, 20:] = np.nan  # what stands in a padded place must not matter
    for centre in (False, True):
        scores = np.asarray(leverage_scores(jnp.asarray(keys), mask=jnp.asarray(mask), method=method, centre=centre))
        for b in range(2):
            alone = leverage_scores(jnp.asarray(keys[b : b + 1, mask[b]]), method=method, centre=centre)
            np.testing.assert_allclose(scores[b][:, mask[b]], alone[0], atol=1e-4)
            assert np.all(scores[b][:, ~mask[b]] == 0)


@pytest.mark.parametrize("method", ["gram", "svd", "auto"])
@pytest.mark.parametrize("num_keys", [40, 5])
def test_ridge_scores_equal_their_closed_form(method, num_keys):
    keys = _random(0, num_keys, 8)
    wide = keys.astype(np.float64)
    gram = wide.T @ wide
    expected = np.einsum("sd,de,se->s", wide, np.linalg.inv(gram + 0.3 * np.trace(gram) / 8 * np.eye(8)), wide)
    np.testing.assert_allclose(leverage_scores(jnp.asarray(keys), method=method, ridge=0.3), expected, rtol=1e-3)


def test_centred_scores_do_not_see_a_common_shift():
    keys = _random(0, 60, 8)
    shifted = leverage_scores(jnp.asarray(keys + 5), centre=True)
    np.testing.assert_allclose(shifted, leverage_scores(jnp.asarray(keys - keys.mean(0))), atol=1e-4)


@pytest.mark.parametrize("is_masked", [False, True])
def test_centred_keys_that_are_all_equal_score_zero(is_masked):
    keys = jnp.broadcast_to(jnp.asarray(_random(1, 8, 1, 1, 8)), (8, 40, 1, 8))
    mask = jnp.arange(40) < jnp.arange(33, 41)[:, None] if is_masked else None
    score = functools.partial(leverage_scores, method="gram", centre=True)
    for scores in (score(keys, mask=mask), jax.jit(score)(keys, mask=mask)):
        np.testing.assert_array_equal(scores, 0)


def test_bfloat16_keys_are_accumulated_in_float32():
    keys = jnp.asarray(_random(0, 3000, 16), jnp.bfloat16)
    scores = leverage_scores(keys)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, reference.leverage_scores(np.asarray(keys, np.float32)), rtol=1e-3)


def test_routes_agree_under_jit_and_vmap():
    keys = jnp.asarray(_random(0, 4, 20, 8))
    expected = np.stack([leverage_scores(k) for k in keys])
    np.testing.assert_allclose(jax.jit(jax.vmap(leverage_scores))(keys), expected, atol=1e-4)


@pytest.mark.parametrize(
    "arguments, named",
    [({"method": "lu"}, "method"), ({"ridge": -1.0}, "ridge")],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises((ValueError, TypeError), match=named):
        leverage_scores(jnp.ones((4, 2)), **arguments)
