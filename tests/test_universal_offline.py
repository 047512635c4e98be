"""A universal set holds every heavy entry of queries that it never saw, is no larger than it says, and can be sized."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import levattn
from levattn.core import Growth, Huber, Power, Softmax
from levattn.universal import choose_eps, universal_set
from tests import reference

FUNCTIONS = {
    **{f"|x|^{p}": Power(p) for p in (0.5, 1, 1.5, 2, 3, 4, 6, 8)},
    "huber": Huber(0.5),
    "log(1 + x^2)": Growth(lambda x: np.log1p(x * x), lower=0, upper=2),
}


def _attention(queries, keys, f):
    values = f(queries @ keys.astype(np.float64).T)
    sums = values.sum(1, keepdims=True)
    return np.divide(values, sums, out=np.zeros_like(values), where=sums > 0)


def _keys(seed, num_keys=150, width=5):
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(num_keys, width)) * np.exp(1.5 * rng.normal(size=(num_keys, 1)))
    if seed % 2:
        keys[num_keys // 2 :] = keys[: num_keys - num_keys // 2]
        keys[0] = 0
    return keys.astype(np.float32)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("seed", range(6))
def test_every_heavy_entry_of_unseen_queries_lies_in_the_set(name, seed):
    f, keys, rng = FUNCTIONS[name], _keys(seed), np.random.default_rng(seed)
    queries = [rng.normal(size=(500, 5)) * np.exp(2 * rng.normal(size=(500, 1))), keys.astype(np.float64)]
    queries.append(keys @ np.linalg.pinv(keys.T @ keys))  # the worst there are for the square
    received = _attention(np.concatenate(queries), keys, f).max(0)
    for eps in (0.5, 0.1, 0.02, 0.005):
        found = universal_set(keys, eps, f)
        assert set(np.flatnonzero(received >= eps)) <= set(found.indices)
        assert len(found) <= found.size_bound
        assert np.all(received[found.indices] <= found.scores)
        assert np.all(np.diff(found.indices) > 0)
        assert found.indices.dtype == np.int64
        assert found.scores.dtype == np.float32


@given(seed=st.integers(0, 2**16), num_keys=st.integers(1, 80), width=st.integers(1, 8), eps=st.floats(1e-3, 1))
@settings(max_examples=100, deadline=None)
def test_sets_for_powers_are_as_small_as_the_paper_says(seed, num_keys, width, eps):
    keys = _keys(seed, num_keys, width)
    rank = np.linalg.matrix_rank(keys.astype(np.float64))
    for p in (0.5, 1, 2, 4):
        found = universal_set(keys, eps, Power(p))
        assert len(found) <= found.size_bound <= rank ** max(1, p / 2) / eps * (1 + 1e-4)


def test_the_set_for_the_square_is_that_of_the_leverage_scores():
    keys = _keys(0)
    found, scores = universal_set(keys, 0.05, keep_keys=True), reference.leverage_scores(keys)
    np.testing.assert_array_equal(found.indices, np.flatnonzero(scores >= 0.05))
    np.testing.assert_allclose(found.scores, scores[found.indices], rtol=1e-6)
    np.testing.assert_array_equal(found.keys, keys[found.indices])
    assert found.size_bound == pytest.approx(5 / 0.05, rel=1e-4)
    assert universal_set(keys, 0.05).keys is None


def test_a_key_whose_score_is_exactly_eps_is_kept():
    for copies in (2, 3, 5, 7, 10, 49):
        keys = np.tile(np.random.default_rng(copies).normal(size=(1, 6)), (copies, 1)).astype(np.float32)
        for p in (1, 2, 3, 4):
            assert len(universal_set(keys, 1 / copies, Power(p))) == copies


def test_every_key_counts_where_there_are_fewer_keys_than_widths():
    for p in (0.5, 1, 2, 4):
        assert len(universal_set(np.random.default_rng(0).normal(size=(4, 9)), 1.0, Power(p))) == 4


def test_zero_keys_alone_make_an_empty_set():
    found = universal_set(np.zeros((5, 3), np.float32), 0.1, keep_keys=True)
    assert len(found) == 0
    assert found.keys.shape == (0, 3)


def test_softmax_is_served_without_a_promise():
    keys = _keys(0)
    found = levattn.universal_set(keys, 0.05, Softmax())
    assert found.guarantee.startswith("no guarantee")
    np.testing.assert_array_equal(found.indices, universal_set(keys, 0.05).indices)
    for f in FUNCTIONS.values():
        assert "whatever the queries" in universal_set(keys, 0.05, f).guarantee


@pytest.mark.parametrize(
    "keys, eps, said",
    [
        (np.eye(3), 0.0, "eps"),
        (np.eye(3), 1.01, "eps"),
        (np.eye(3), float("nan"), "eps"),
        (np.full((2, 2), np.inf), 0.1, r"keys\[0\]"),
        (np.ones((0, 3)), 0.1, "keys.shape"),
        (np.ones((3, 0)), 0.1, "keys.shape"),
    ],
)
def test_bad_input_is_named(keys, eps, said):
    with pytest.raises(ValueError, match=said):
        universal_set(keys, eps)


@pytest.mark.parametrize("f", [Power(1), Power(2), Power(4), Huber(1), Softmax()])
@pytest.mark.parametrize("size", [1, 7, 40, 75, 149, 150, 1000])
def test_eps_for_a_size_makes_the_largest_set_of_no_more_keys(f, size):
    keys = _keys(0)
    eps = choose_eps(keys, f, size=size)
    assert len(universal_set(keys, eps, f)) == min(size, 150)


def test_eps_for_a_size_leaves_out_keys_that_tie():
    keys = np.concatenate([np.repeat(np.eye(3), 4, axis=0), 10 * np.eye(3)[:1]])
    assert len(universal_set(keys, choose_eps(keys, size=5))) == 1
    assert len(universal_set(keys, choose_eps(keys, size=9))) == 9
    with pytest.raises(ValueError, match="3 keys have a score of 1"):
        choose_eps(np.eye(3), size=2)


@pytest.mark.parametrize("p", [1, 2, 4, 100])
def test_eps_for_a_mass_does_not_see_the_scale_of_queries_or_keys(p):
    keys, queries = _keys(0).astype(np.float64), np.random.default_rng(1).normal(size=(20, 5))
    plain = choose_eps(keys, Power(p), mass=0.8, queries=queries)
    for by_queries, by_keys in ((1e-200, 1.0), (1.0, 1e160), (1e200, 1e200), (1e-15, 1e-15)):
        scaled = choose_eps(keys * by_keys, Power(p), mass=0.8, queries=queries * by_queries)
        np.testing.assert_allclose(scaled, plain, rtol=1e-3)
    with pytest.raises(ValueError, match="underflows"):
        choose_eps(keys, Huber(1), mass=0.8, queries=queries * 1e-200)


@pytest.mark.parametrize("f", [Power(1), Power(2), Power(4), Huber(1)])
@pytest.mark.parametrize("mass", [0.2, 0.5, 0.9, 0.999])
def test_eps_for_a_mass_captures_it_and_a_larger_one_does_not(f, mass):
    keys, queries = _keys(0), np.random.default_rng(1).normal(size=(60, 5))
    attention = _attention(queries, keys, f)

    def captured(eps):
        return attention[:, universal_set(keys, eps, f).indices].sum(1).mean()

    eps = choose_eps(keys, f, mass=mass, queries=queries)
    assert captured(eps) >= mass * (1 - 1e-9)
    assert eps == 1 or captured(min(1, eps * 1.001)) < mass


def test_eps_for_a_mass_under_softmax_measures_the_softmax_of_scaled_products():
    keys, queries = _keys(0), np.random.default_rng(1).normal(size=(60, 5))
    attention = reference.softmax(queries @ keys.T / np.sqrt(5))
    kept = universal_set(keys, choose_eps(keys, Softmax(), mass=0.8, queries=queries), Softmax()).indices
    assert attention[:, kept].sum(1).mean() >= 0.8
    assert len(kept) < 150


def test_a_calibrated_eps_covers_new_queries_as_often_as_stated():
    keys, rng, covered = _keys(0), np.random.default_rng(2), []
    for _ in range(60):
        queries = rng.normal(size=(40 + 25, 5))
        eps = choose_eps(keys, mass=0.7, queries=queries[:40], coverage=0.8)
        mass = _attention(queries[40:], keys, Power(2))[:, universal_set(keys, eps).indices].sum(1)
        covered.append(np.mean(mass >= 0.7))
    assert np.mean(covered) >= 0.8 - 0.03
    assert np.mean(covered) < 0.95  # and not by keeping everything


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({}, "exactly one"),
        ({"size": 3, "mass": 0.5}, "exactly one"),
        ({"size": 0}, "size"),
        ({"size": True}, "int"),
        ({"size": 3, "queries": np.ones((2, 5))}, "leave them out"),
        ({"size": 3, "coverage": 0.5}, "leave them out"),
        ({"mass": 0.5}, "queries"),
        ({"mass": 1.0, "queries": np.ones((2, 5))}, "mass"),
        ({"mass": 0.5, "queries": np.full((2, 5), np.nan)}, "queries"),
        ({"mass": 0.5, "queries": np.ones((9, 5)), "coverage": 0.95}, "at least 19 queries"),
        ({"mass": 0.5, "queries": np.ones((9, 5)), "coverage": 1.0}, "coverage"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        choose_eps(_keys(0), **arguments)


@pytest.mark.parametrize("f", [Power(1), Power(2), Power(4), Huber()])
@pytest.mark.parametrize("scale", [1e-170, 1e-40, 1e160])
def test_the_set_is_that_of_all_multiples_of_the_keys(f, scale):
    keys = np.random.default_rng(0).normal(size=(200, 5))
    np.testing.assert_array_equal(universal_set(scale * keys, 0.05, f).indices, universal_set(keys, 0.05, f).indices)
