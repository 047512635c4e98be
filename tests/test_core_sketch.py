"""What is random keeps its promise over many seeds: no leverage score above its bound, no heavy entry missed."""

import numpy as np
import pytest

from levattn.core import Power, countsketch_heavy_entries, heavy_entries, sensitivity_bounds, sketched_leverage_bounds
from levattn.core.countsketch import num_tables_for
from levattn.core.sketch import embedding_rows, sparse_embedding
from levattn.universal import sketched_universal_set, universal_set

WIDTH = 6


def _keys(seed, num_keys=20_000):
    """Mostly short keys; a few that are long, on their own, or come in pairs that a sketch may cancel."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(num_keys, WIDTH))
    keys[:, -1] = 0
    keys[:3] *= [[100], [30], [10]]
    keys[3, -1] = 1
    keys[4:6, -1] = [1, -1]
    return keys


def test_an_embedding_adds_every_key_once_with_a_sign():
    keys = np.zeros((500, 500))
    np.fill_diagonal(keys, np.arange(1, 501))
    sketch = sparse_embedding(keys, 40, seed=0)
    np.testing.assert_array_equal(np.abs(sketch).sum(0), np.arange(1, 501))
    assert np.all(np.count_nonzero(sketch, axis=0) == 1)
    assert 0.3 < np.mean(sketch[sketch != 0] > 0) < 0.7


def test_an_embedding_keeps_the_expected_square_of_every_length():
    keys = _keys(0, 300)
    vector = np.random.default_rng(1).normal(size=WIDTH)
    lengths = [np.sum((sparse_embedding(keys, 50, seed=seed) @ vector) ** 2) for seed in range(400)]
    assert np.mean(lengths) == pytest.approx(np.sum((keys @ vector) ** 2), rel=0.2)


@pytest.mark.parametrize("distortion", [0.5, 1, 3])
def test_an_embedding_lengthens_by_more_than_its_distortion_no_more_often_than_stated(distortion):
    failure, basis = 0.1, np.linalg.qr(_keys(0, 5000))[0]
    num_rows = embedding_rows(WIDTH, distortion, failure)
    largest = [np.linalg.norm(sparse_embedding(basis, num_rows, seed=seed), 2) ** 2 for seed in range(100)]
    assert np.mean(np.array(largest) > 1 + distortion) <= failure


@pytest.mark.parametrize("num_directions", [None, 2, 4])
def test_sketched_bounds_stay_above_the_scores_over_many_seeds(num_directions):
    keys, misses = _keys(0), 0
    exact = sensitivity_bounds(keys, Power(2))
    for seed in range(60):
        bounds = sketched_leverage_bounds(keys, failure=0.05, num_directions=num_directions, seed=seed)
        assert np.all(bounds <= 1)
        misses += np.any(bounds < exact * (1 - 1e-9))
    assert misses <= 0.05 * 60


def test_bounds_without_a_sketch_are_the_scores():
    keys = _keys(0, 40)
    np.testing.assert_allclose(sketched_leverage_bounds(keys), sensitivity_bounds(keys, Power(2)), rtol=1e-9)


def test_nothing_is_claimed_of_keys_that_cancel_in_the_sketch():
    keys = np.concatenate([np.tile([1.0, 0], (51, 1)), np.tile([0, 1.0], (2, 1))])
    for seed in range(20):  # one row: in a quarter of the cases the last two keys cancel in both embeddings
        bounds = sketched_leverage_bounds(keys, distortion=100, failure=0.5, seed=seed)
        assert np.all(bounds[-2:] > 0.01)


def test_screening_by_directions_leaves_what_matters_as_sharp_as_without():
    keys, eps = _keys(0), 0.01
    sharp = sketched_leverage_bounds(keys, seed=3)
    screened = sketched_leverage_bounds(keys, num_directions=3, refine_above=eps, seed=3)
    np.testing.assert_allclose(screened[sharp >= eps], sharp[sharp >= eps], rtol=1e-9)
    assert np.all(screened >= sharp * (1 - 1e-9))


@pytest.mark.parametrize("eps", [0.5, 0.05, 0.005])
def test_a_sketched_set_contains_the_exact_one_and_is_not_much_larger(eps):
    for seed in range(12):
        keys = _keys(seed)
        exact, sketched = universal_set(keys, eps), sketched_universal_set(keys, eps, num_directions=3, seed=seed)
        assert set(exact.indices) <= set(sketched.indices)
        assert len(sketched) <= len(universal_set(keys, eps / 16))
        assert "probability" in sketched.guarantee


@pytest.mark.parametrize("eps", [0.5, 0.1, 0.03])
def test_countsketch_recovers_the_heavy_entries_and_only_these_over_many_seeds(eps):
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(400, WIDTH)) * np.exp(2 * rng.normal(size=(400, 1)))
    queries = np.concatenate([rng.normal(size=(40, WIDTH)), keys[:10], np.zeros((1, WIDTH))])
    exact, missed = heavy_entries(queries, keys, eps), 0
    for seed in range(12):
        # All keys, so that buckets are shared: the universal set alone would be too small for that.
        found = countsketch_heavy_entries(queries, keys, eps, key_indices=np.arange(400), failure=0.02, seed=seed)
        truth = dict(zip(zip(exact.query_indices, exact.key_indices, strict=True), exact.values, strict=True))
        got = dict(zip(zip(found.query_indices, found.key_indices, strict=True), found.values, strict=True))
        assert set(got) <= set(truth)
        np.testing.assert_allclose([truth[place] for place in got], list(got.values()), rtol=1e-9)
        missed += len(got) < len(truth)
    assert missed <= 1


def test_more_tables_fail_less_often():
    counts = [num_tables_for(10.0**-power) for power in range(1, 9)]
    assert counts == sorted(counts)
    assert all(count % 2 for count in counts)
    rng = np.random.default_rng(0)
    wrong = rng.random((20_000, num_tables_for(0.01))) < 0.25
    assert np.mean(np.median(wrong, axis=1)) < 0.01


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"distortion": 0}, "distortion"),
        ({"failure": 0.0}, "failure"),
        ({"failure": 1.5}, "failure"),
        ({"num_directions": 0}, "num_directions"),
    ],
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        sketched_universal_set(np.eye(3), 0.1, **arguments)


def test_bad_arrays_and_thresholds_are_refused():
    with pytest.raises(ValueError, match="eps"):
        sketched_universal_set(np.eye(3), 2.0)
    with pytest.raises(ValueError, match="NaN"):
        sketched_universal_set(np.full((3, 2), np.nan), 0.1)
    with pytest.raises(ValueError, match="num_rows"):
        sparse_embedding(np.eye(3), 0)
    with pytest.raises(ValueError, match="failure"):
        countsketch_heavy_entries(np.eye(3), np.eye(3), 0.1, failure=0.0)
    with pytest.raises(ValueError, match="eps"):
        countsketch_heavy_entries(np.eye(3), np.eye(3), 0.0)
