"""No query gives a key a larger share of attention than its bound: against a search for the worst query."""

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

from levattn.core import Growth, Huber, Power, Softmax, sensitivity_bounds
from levattn.core.basis import checked_matrix
from levattn.core.sensitivity import num_tensor_features, tensor_power
from tests import reference

POWERS = (0.5, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
FUNCTIONS = {
    **{f"|x|^{p}": Power(p) for p in POWERS},
    "huber 1": Huber(1),
    "huber 0.1": Huber(0.1),
    "log(1 + x^2)": Growth(lambda x: np.log1p(x * x), lower=0, upper=2),
    "x^2 + |x|": Growth(lambda x: x * x + abs(x), lower=1, upper=2),
    "x^4 and |x|^3": Growth(lambda x: x**4 + 5 * abs(x) ** 3, lower=3, upper=4),
    "lopsided": Growth(lambda x: x * x * (2 + np.sign(x)), lower=2, upper=2, constant=3),
}


def _keys(seed, num_keys=24, width=3):
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(num_keys, width))
    if seed % 3 == 1:
        keys *= np.exp(2 * rng.normal(size=(num_keys, 1)))  # a few long keys
    if seed % 3 == 2:
        keys[: num_keys // 2] = keys[0]  # many equal ones
        keys[-1] = 0
    return keys


def _shares(f, keys, queries):
    """Rows of the attention matrix, straight from its definition."""
    values = f(queries @ keys.T)
    sums = values.sum(1, keepdims=True)
    return np.divide(values, sums, out=np.zeros_like(values), where=sums > 0)


def _search(f, keys, seed):
    """A lower bound on each sensitivity: the best of many queries, improved by direct search."""
    rng = np.random.default_rng(seed)
    width = keys.shape[1]
    # At random, along keys, orthogonal to all but a few keys (where sensitivities of |x|^p, p <= 1, are attained).
    queries = [rng.normal(size=(2000, width)), keys, np.linalg.pinv(keys.T @ keys) @ keys.T @ np.eye(len(keys))]
    queries[2] = queries[2].T
    for _ in range(300):
        chosen = keys[rng.choice(len(keys), width - 1, replace=False)]
        queries.append(np.linalg.svd(chosen)[2][-1:])
    queries = np.concatenate(queries)
    queries = np.concatenate([size * queries for size in (1e-2, 1, 1e2)])
    shares = _shares(f, keys, queries)
    found = shares.max(0)
    for key in np.argsort(-found)[:4]:
        start = queries[shares[:, key].argmax()]
        best = scipy.optimize.minimize(
            lambda y, key=key: -_shares(f, keys, y[None])[0, key], start, method="Nelder-Mead", options={"maxiter": 200}
        )
        found[key] = max(found[key], -best.fun)
    return found


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("seed", range(4))
def test_no_query_that_a_search_finds_exceeds_a_bound(name, seed):
    f, keys = FUNCTIONS[name], _keys(seed)
    bounds = sensitivity_bounds(keys, f)
    assert np.all(_search(f, keys, seed) <= bounds * (1 + 1e-9))
    assert np.all(bounds <= 1)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_attention_entry_exceeds_the_bound_of_its_key_over_many_sets_of_keys(name):
    f, rng = FUNCTIONS[name], np.random.default_rng(0)
    for seed in range(60):
        keys = _keys(seed, num_keys=int(rng.integers(1, 40)), width=int(rng.integers(1, 6)))
        queries = rng.normal(size=(200, keys.shape[1])) * np.exp(3 * rng.normal(size=(200, 1)))
        queries[:40] = keys[rng.integers(len(keys), size=40)]
        assert np.all(_shares(f, keys, queries).max(0) <= sensitivity_bounds(keys, f) * (1 + 1e-9))


@pytest.mark.parametrize("seed", range(9))
def test_bounds_for_the_square_are_attained_by_a_query(seed):
    keys = _keys(seed)
    queries = keys @ np.linalg.pinv(keys.T @ keys)
    np.testing.assert_allclose(np.diag(_shares(Power(2), keys, queries)), sensitivity_bounds(keys, Power(2)), atol=1e-9)


@given(seed=st.integers(0, 2**16), p=st.sampled_from(POWERS), num_keys=st.integers(1, 60), width=st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_bounds_of_powers_sum_to_no_more_than_the_paper_says(seed, p, num_keys, width):
    keys = _keys(seed, num_keys, width)
    rank = np.linalg.matrix_rank(keys)
    assert sensitivity_bounds(keys, Power(p)).sum() <= rank ** max(1, p / 2) * (1 + 1e-5)


@pytest.mark.parametrize("width", [3, 8])
@pytest.mark.parametrize("p", [4, 6])
def test_the_tensor_route_tightens_the_lewis_bound_of_even_powers(p, width, monkeypatch):
    keys = np.random.default_rng(0).normal(size=(2000, width))
    both = sensitivity_bounds(keys, Power(p))
    monkeypatch.setattr("levattn.core.sensitivity.MAX_TENSOR_FEATURES", 0)
    assert np.all(both <= sensitivity_bounds(keys, Power(p)))
    assert both.sum() <= num_tensor_features(width, p // 2) * (1 + 1e-6)


def test_tensor_powers_have_the_inner_products_that_they_are_made_for():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 4)), rng.normal(size=(9, 4))
    for degree in (1, 2, 3, 4):
        left, right = tensor_power(x, degree), tensor_power(y, degree)
        np.testing.assert_allclose(left @ right.T, (x @ y.T) ** degree, atol=1e-10)
        assert left.shape[1] == num_tensor_features(4, degree)


def _exact_leverage(keys):
    """By modified Gram-Schmidt, twice, in extended precision."""
    basis = np.array(keys, np.longdouble)
    for _ in range(2):
        for column in range(basis.shape[1]):
            for earlier in range(column):
                basis[:, column] -= basis[:, earlier] * (basis[:, earlier] @ basis[:, column])
            basis[:, column] /= np.sqrt(basis[:, column] @ basis[:, column])
    return np.asarray(np.sum(basis**2, axis=1), np.float64)


@pytest.mark.parametrize("condition", [1, 1e2, 2e3, 1e4, 1e6, 1e8, 1e10])
def test_rounding_errs_on_the_safe_side_and_by_little_on_ill_conditioned_keys(condition):
    rng = np.random.default_rng(0)
    for _ in range(10):
        left, _ = np.linalg.qr(rng.normal(size=(100, 8)))
        right, _ = np.linalg.qr(rng.normal(size=(8, 8)))
        keys = (left * np.geomspace(1, 1 / condition, 8)) @ right
        bounds, exact = sensitivity_bounds(keys, Power(2)), _exact_leverage(keys)
        assert np.all(bounds >= exact * (1 - 1e-12))
        np.testing.assert_allclose(bounds, exact, rtol=1e-3 if condition > 1e6 else 1e-6)


@pytest.mark.parametrize("size", [1e8, 1e14, 1e18, 1e30])
@pytest.mark.parametrize("num_huge", [1, 2, 5])
@pytest.mark.parametrize("p", [1, 2, 4])
def test_enormous_keys_do_not_hide_heavy_ones(size, num_huge, p):
    rng = np.random.default_rng(0)
    keys = rng.integers(-8, 9, (60, 8))
    keys[:, 7] = 0
    keys[:num_huge] = keys[0]
    keys[num_huge - 1, 3] += 1
    keys[30, 7] = 1  # the only key in a direction of its own: its sensitivity is 1
    mix = np.triu(rng.integers(-2, 3, (8, 8)), 1) + np.eye(8, dtype=int)
    keys = (keys @ (mix @ mix.T)).astype(np.float32)  # integers: exact
    keys[:num_huge] *= np.float32(2.0 ** round(np.log2(size)))
    assert sensitivity_bounds(keys, Power(p))[30] > 0.99


def test_scale_and_duplicates_of_rank_one_are_no_matter():
    for size in (1e-30, 1e-10, 1, 1e10, 1e30):
        keys = np.full((4000, 6), size, np.float32)
        np.testing.assert_allclose(sensitivity_bounds(keys, Power(2)), 1 / 4000, rtol=1e-6)
        np.testing.assert_allclose(sensitivity_bounds(keys, Power(1)), 1 / 4000, rtol=1e-5)


def test_zero_keys_have_no_sensitivity():
    keys = np.concatenate([np.zeros((2, 4)), np.random.default_rng(0).normal(size=(20, 4))])
    for p in (1, 2, 4):
        np.testing.assert_array_equal(sensitivity_bounds(keys, Power(p))[:2], 0)
        np.testing.assert_array_equal(sensitivity_bounds(np.zeros((5, 3)), Power(p)), 0)


def test_float32_and_bfloat16_keys_are_taken_as_they_are():
    import jax.numpy as jnp

    keys = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    np.testing.assert_allclose(sensitivity_bounds(jnp.asarray(keys), Power(2)), reference.leverage_scores(keys))
    rounded = jnp.asarray(keys, jnp.bfloat16)
    expected = reference.leverage_scores(np.asarray(rounded, np.float32))
    np.testing.assert_allclose(sensitivity_bounds(rounded, Power(2)), expected)


@pytest.mark.parametrize("name", ["huber 1", "log(1 + x^2)"])
def test_a_few_outliers_do_not_spoil_the_bounds_of_the_others(name):
    keys = np.random.default_rng(0).normal(size=(1000, 4))
    alone = sensitivity_bounds(keys, FUNCTIONS[name])
    outliers = 1e3 * np.random.default_rng(1).normal(size=(3, 4))
    among = sensitivity_bounds(np.concatenate([outliers, keys]), FUNCTIONS[name])
    assert np.all(among[3:] <= alone * 1.01)
    assert np.all(among[3:] < 0.05)


def test_softmax_has_no_bound():
    with pytest.raises(ValueError, match="no growth bound"):
        sensitivity_bounds(np.eye(3), Softmax())


@pytest.mark.parametrize(
    "keys, said", [(np.full((3, 2), np.nan), "NaN"), (np.ones((0, 2)), "shape"), (np.ones(3), "keys")]
)
def test_bad_keys_are_refused(keys, said):
    with pytest.raises((ValueError, TypeError), match=said):
        sensitivity_bounds(keys, Power(2))


@pytest.mark.parametrize(
    "fn, growth, said",
    [
        (lambda x: abs(x) ** 3, {"lower": 1, "upper": 2}, "upper=2"),
        (lambda x: abs(x) ** 0.5, {"lower": 1, "upper": 2}, "lower=1"),
        (lambda x: np.maximum(x, 0) ** 2, {"lower": 2, "upper": 2}, "growth bound"),
        (lambda x: 1 + x * x, {"lower": 0, "upper": 2}, "0 at 0"),
        (lambda x: x, {"lower": 1, "upper": 1}, "negative"),
        (np.abs, {"lower": 2, "upper": 1}, "lower <= upper"),
        (np.abs, {"lower": 1, "upper": 1, "constant": 0.5}, "constant"),
    ],
)
def test_growth_that_does_not_hold_is_refused(fn, growth, said):
    with pytest.raises(ValueError, match=said):
        Growth(fn, **growth)


def test_powers_and_thresholds_must_be_positive():
    for make in (Power, Huber):
        for number in (0, -1.0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match="positive"):
                make(number)


@pytest.mark.parametrize("f", [Power(1), Power(2), Power(4), Huber(1)])
@pytest.mark.parametrize("part", [1e-9, 1e-12])
def test_a_small_part_that_float64_holds_beside_an_enormous_key_is_not_lost(f, part):
    # (1, -1) meets the last key alone: its sensitivity is 1, and rank and condition number say nothing of it.
    keys = np.array([[1e10, 1e10], *[[1, 1]] * 20, [1 + part, 1 - part]])
    assert sensitivity_bounds(keys, f)[-1] > 0.99
    assert np.max(sensitivity_bounds(keys, f)[1:-1]) <= 0.06  # while those that are rounding apart share theirs


def test_keys_of_a_rank_below_the_width_by_rounding_are_taken_for_that_rank():
    rng = np.random.default_rng(0)
    for rank in (1, 4, 15):
        keys = rng.normal(size=(3000, rank)) @ rng.normal(size=(rank, 16))
        left, _, _ = np.linalg.svd(keys, full_matrices=False)
        expected = np.sum(left[:, :rank] ** 2, axis=1)
        np.testing.assert_allclose(sensitivity_bounds(keys, Power(2)), expected, rtol=1e-9)


@pytest.mark.parametrize("size", [1e-300, 1e-170, 1e170, 1e300])
def test_keys_whose_squares_leave_float64_are_bounded_among_their_like(size):
    keys = np.random.default_rng(0).normal(size=(30, 3))
    for p in (1, 2, 4):
        alone = sensitivity_bounds(keys, Power(p))
        np.testing.assert_allclose(sensitivity_bounds(size * keys, Power(p)), alone, rtol=1e-6)
        beside = sensitivity_bounds(np.concatenate([keys, [[0, 0, size]]]), Power(p))
        assert beside[-1] == pytest.approx(1) if size < 1 else np.all(beside[:-1] >= alone * (1 - 1e-6))


@pytest.mark.parametrize(
    "keys, said",
    [
        (np.ones((3, 2), complex), "complex128"),
        (np.ones((3, 2), object), "object"),
        (np.ones((3, 2), "U1"), "<U1"),
        (np.ma.masked_array(np.ones((3, 2)), np.eye(3, 2)), "masked"),
    ],
)
def test_what_is_no_matrix_of_real_numbers_is_refused(keys, said):
    with pytest.raises(ValueError, match=said):
        checked_matrix("keys", keys)


def test_long_doubles_and_integers_are_taken_as_numbers_that_lapack_takes():
    keys = np.random.default_rng(0).integers(-9, 9, (20, 3))
    for dtype, computed_in in ((np.longdouble, np.float64), (np.int64, np.float64), (np.int8, np.float32)):
        matrix = checked_matrix("keys", keys.astype(dtype))
        assert matrix.dtype == computed_in
        np.testing.assert_array_equal(matrix, keys)
