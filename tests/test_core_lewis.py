"""Lewis weights solve their equation, checked in float64 through an SVD, where plain iterations do not converge."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from levattn.core import Power, lewis_weights
from levattn.universal import LewisStream, universal_set
from tests import reference

POWERS = (0.5, 1, 1.5, 2, 3, 4, 6, 8)


def _random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def _conditioned(seed, num_keys, width, condition):
    left, _ = np.linalg.qr(_random(seed, num_keys, width))
    right, _ = np.linalg.qr(_random(seed + 1, width, width))
    return (left * np.geomspace(1, 1 / condition, width)) @ right


CASES = {
    "gaussian": _random(0, 197, 16),
    "condition 1e6": _conditioned(1, 197, 16, 1e6),
    "condition 1e9": _conditioned(3, 197, 16, 1e9),
    "condition 1e6, rounded to float32": _conditioned(5, 197, 16, 1e6).astype(np.float32),
    "columns over twelve decades": _random(7, 100, 12) * np.logspace(-6, 6, 12),
    "row lengths over ten decades": _random(8, 300, 8) * np.exp(4 * _random(9, 300, 1)),
    "heavy tails": np.random.default_rng(10).standard_cauchy((197, 16)) ** 3,
    "rank 4 of 16": _random(11, 100, 4) @ _random(12, 4, 16),
    "fewer keys than widths": _random(13, 10, 16),
    "every key ten times": np.repeat(_random(14, 20, 8), 10, axis=0),
    "identical keys": np.ones((500, 1)) * _random(15, 1, 8),
    "zero keys among others": np.concatenate([np.zeros((3, 8)), _random(16, 50, 8)]),
    "one enormous key": np.concatenate([1e10 * _random(17, 1, 8), _random(18, 60, 8)]),
    "all but a few keys tiny": np.concatenate([1e-7 * _random(19, 100, 8), _random(20, 20, 8)]),
}


def _residual(keys, weights, p):
    """max |log| of the defining equation, evaluated on the keys after a change of basis (which it does not see)."""
    keys = np.asarray(keys, np.float64) / np.abs(keys).max()
    keys = keys / np.where(np.linalg.norm(keys, axis=0) > 0, np.linalg.norm(keys, axis=0), 1)
    left, singular, _ = np.linalg.svd(keys, full_matrices=False)
    left = left[:, singular > 1e-12 * singular[0]]
    alive = weights > 0
    left, weights = left[alive], weights[alive]
    middle = left.T @ (weights[:, None] ** (1 - 2 / p) * left)
    quadratic = np.einsum("sd,de,se->s", left, np.linalg.inv(middle), left)
    return np.max(np.abs(np.log(weights) - p / 2 * np.log(quadratic)))


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("name", CASES)
def test_weights_solve_the_defining_equation_and_sum_to_the_rank(name, p):
    keys = CASES[name]
    weights = lewis_weights(keys, p)
    assert _residual(keys, weights, p) < 1e-5 * max(1, p)
    scaled = keys / np.where(np.linalg.norm(keys, axis=0) > 0, np.linalg.norm(keys, axis=0), 1)
    assert weights.sum() == pytest.approx(np.linalg.matrix_rank(scaled, tol=1e-11 * np.linalg.norm(scaled)), rel=1e-4)
    assert np.all((weights >= 0) & (weights <= 1))


def test_weights_for_two_are_the_leverage_scores():
    keys = _random(0, 197, 16).astype(np.float32)
    np.testing.assert_allclose(lewis_weights(keys, 2), reference.leverage_scores(keys), rtol=1e-6)


def test_zero_keys_weigh_nothing():
    weights = lewis_weights(np.concatenate([np.zeros((3, 4)), np.eye(4)]), 1)
    np.testing.assert_allclose(weights, [0, 0, 0, 1, 1, 1, 1], atol=1e-6)
    assert not np.any(lewis_weights(np.zeros((5, 3)), 4))


@given(seed=st.integers(0, 2**16), p=st.sampled_from(POWERS), spread=st.floats(0, 6))
@settings(max_examples=60, deadline=None)
def test_weights_do_not_see_an_invertible_change_of_coordinates(seed, p, spread):
    keys = _random(seed, 40, 5) * np.exp(_random(seed + 1, 40, 1))
    mixed = keys @ _conditioned(seed + 2, 5, 5, 10**spread)
    np.testing.assert_allclose(lewis_weights(mixed, p), lewis_weights(keys, p), rtol=1e-4, atol=1e-12)


def test_weights_that_have_not_settled_are_not_returned():
    with pytest.raises(RuntimeError, match="max_iters=2"):
        lewis_weights(CASES["heavy tails"], 8, max_iters=2)


@pytest.mark.parametrize("p", [0, -1, float("nan"), float("inf")])
def test_bad_powers_are_named(p):
    with pytest.raises(ValueError, match="p="):
        lewis_weights(np.eye(3), p)


@pytest.mark.parametrize("p", [0.1, 0.2, 20, 100])
def test_weights_settle_at_the_ends_of_the_stated_range(p):
    for name in ("gaussian", "heavy tails", "row lengths over ten decades", "rank 4 of 16", "one enormous key"):
        assert lewis_weights(CASES[name], p).sum() == pytest.approx(
            4 if name == "rank 4 of 16" else CASES[name].shape[1]
        )


@pytest.mark.parametrize("p", [0.001, 0.01, 1000])
def test_a_power_out_of_range_is_refused_before_the_work(p):
    keys = CASES["gaussian"]
    for find in (
        lambda: lewis_weights(keys, p),
        lambda: universal_set(keys, 0.5, Power(p)),
        lambda: LewisStream(4, 0.1, float(p)),
    ):
        with pytest.raises(ValueError, match="must be a positive number from"):
            find()
