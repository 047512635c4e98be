"""Every heavy entry is found and nothing else, against the attention matrix written out in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from levattn.core import Growth, Huber, Power, Softmax, heavy_entries, heavy_entries_blocks
from levattn.core.countsketch import countsketch_heavy_entries
from levattn.core.heavy import checked_indices
from levattn.core.rowsums import exact_row_sums, jl_row_sums, sampled_row_sums

FUNCTIONS = {
    **{f"|x|^{p}": Power(p) for p in (0.5, 1, 1.5, 2, 3, 4, 6, 8)},
    "huber": Huber(0.5),
    "log(1 + x^2)": Growth(lambda x: np.log1p(x * x), lower=0, upper=2),
}


def attention(queries, keys, f):
    values = f(np.asarray(queries, np.float64) @ np.asarray(keys, np.float64).T)
    sums = values.sum(1, keepdims=True)
    return np.divide(values, sums, out=np.zeros_like(values), where=sums > 0)


def found_matrix(entries, shape):
    out = np.zeros(shape)
    out[entries.query_indices, entries.key_indices] = entries.values
    assert np.count_nonzero(out) == len(entries.values)  # none twice, none zero
    return out


def assert_exact(entries, expected, eps):
    found = found_matrix(entries, expected.shape)
    assert np.all(found[expected >= eps] > 0), "a heavy entry was missed"
    assert np.all(expected[found > 0] >= eps * (1 - 1e-6)), "an entry that is not heavy was returned"
    np.testing.assert_allclose(found[found > 0], expected[found > 0], rtol=1e-6)


def inputs(seed, num_queries=80, num_keys=120, width=6, dtype=np.float32):
    """Keys of very different lengths, repeated and zero ones; queries along keys, zero, and orthogonal to most."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(num_keys, width)) * np.exp(2 * rng.normal(size=(num_keys, 1)))
    queries = rng.normal(size=(num_queries, width))
    queries[: num_queries // 4] = keys[rng.integers(num_keys, size=num_queries // 4)]
    kind = seed % 4
    if kind == 1:
        keys[num_keys // 3 :] = keys[: num_keys - num_keys // 3]
        queries[-1] = 0
    if kind == 2:
        keys[:, -1] = 0
        keys[-1] = 0
        queries[-2:] = np.eye(width)[-1]  # orthogonal to every key
    if kind == 3:
        keys[0] *= 1e6
        keys[1:, -1] = 0
    return queries.astype(dtype), keys.astype(dtype)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("seed", range(8))
def test_every_heavy_entry_is_found_and_no_other(name, seed):
    f, (queries, keys) = FUNCTIONS[name], inputs(seed)
    expected = attention(queries, keys, f)
    for eps in (0.5, 0.1, 0.02):
        assert_exact(heavy_entries(queries, keys, eps, f), expected, eps)


@given(
    seed=st.integers(0, 2**16),
    num_queries=st.integers(1, 30),
    num_keys=st.integers(1, 60),
    width=st.integers(1, 7),
    eps=st.floats(1e-3, 1),
    name=st.sampled_from(list(FUNCTIONS)),
)
@settings(max_examples=150, deadline=None)
def test_nothing_is_missed_at_any_shape_and_threshold(seed, num_queries, num_keys, width, eps, name):
    queries, keys = inputs(seed, num_queries, num_keys, width)
    f = FUNCTIONS[name]
    assert_exact(heavy_entries(queries, keys, eps, f), attention(queries, keys, f), eps)


@pytest.mark.parametrize("condition", [1e3, 1e6, 1e9])
@pytest.mark.parametrize("p", [2, 4])
def test_normalisers_survive_queries_along_the_weakest_directions(condition, p):
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(200, 8)))
    right, _ = np.linalg.qr(rng.normal(size=(8, 8)))
    keys = (left * np.geomspace(1, 1 / condition, 8)) @ right
    queries = np.concatenate([right, rng.normal(size=(20, 8)), rng.normal(size=(20, 4)) @ right[4:]])
    expected = np.sum(np.abs(queries @ keys.T) ** p, axis=1)
    np.testing.assert_allclose(exact_row_sums(keys, Power(p), num_queries=10**6)(queries), expected, rtol=1e-6)
    eps = 0.03
    assert_exact(heavy_entries(queries, keys, eps, Power(p)), attention(queries, keys, Power(p)), eps)


@pytest.mark.parametrize("p", [2, 4])
def test_normalisers_survive_queries_that_all_but_cancel(p):
    rng = np.random.default_rng(0)
    keys = (rng.integers(-5, 6, (300, 2)) @ np.array([[1, 1, 0], [0, 1, 1]])).astype(np.float64)
    queries = 2.0**40 * np.array([1, -1, 1]) + np.eye(3)  # the long part is orthogonal to every key; sums are exact
    expected = np.sum((queries @ keys.T) ** p, axis=1)
    assert np.all(expected > 0)
    np.testing.assert_allclose(exact_row_sums(keys, Power(p), num_queries=10**6)(queries), expected, rtol=1e-7)


def test_an_entry_of_exactly_eps_is_found():
    for num_keys in (2, 3, 4, 5, 8, 10, 100):
        keys = np.eye(num_keys)  # of a query of ones every key has a share of 1 / n
        for p in (1, 2, 4):
            assert len(heavy_entries(np.ones((1, num_keys)), keys, 1 / num_keys, Power(p)).values) == num_keys


def test_a_query_orthogonal_to_all_keys_has_no_entries():
    keys, queries = np.eye(3)[:2], np.array([[0, 0, 1.0], [0, 0, 0], [1, 0, 0]])
    for p in (1, 2, 4):
        entries = heavy_entries(queries, keys, 1e-3, Power(p))
        np.testing.assert_array_equal(entries.query_indices, [2])
        np.testing.assert_array_equal(entries.key_indices, [0])


def test_blocks_of_any_size_join_to_the_same_entries():
    queries, keys = inputs(0)
    whole = heavy_entries(queries, keys, 0.05)
    for block_bytes in (1, 5000, 1 << 26):
        blocks = list(heavy_entries_blocks(queries, keys, 0.05, block_bytes=block_bytes))
        assert len(blocks) == (len(queries) if block_bytes == 1 else len(blocks))
        for at, part in enumerate(whole):
            np.testing.assert_allclose(np.concatenate([block[at] for block in blocks]), part, rtol=1e-12)


def test_entries_come_by_query_and_then_by_key():
    queries, keys = inputs(0)
    entries = heavy_entries(queries, keys, 0.05, key_indices=np.arange(len(keys))[::-1])
    places = list(zip(entries.query_indices, entries.key_indices, strict=True))
    assert places == sorted(places)


def test_jax_arrays_and_bfloat16_are_taken_as_they_are():
    queries, keys = inputs(0)
    for dtype in (jnp.float32, jnp.bfloat16):
        q, k = jnp.asarray(queries, dtype), jnp.asarray(keys, dtype)
        expected = attention(np.asarray(q, np.float32), np.asarray(k, np.float32), Power(2))
        assert_exact(heavy_entries(q, k, 0.1), expected, 0.1)


@pytest.mark.parametrize("p", [2, 4, 6])
def test_quadratic_forms_give_the_row_sums_of_even_powers(p):
    queries, keys = inputs(0, num_queries=500, num_keys=3000, width=4)
    sums = exact_row_sums(keys, Power(p), num_queries=10**9)
    expected = np.sum(np.abs(queries.astype(np.float64) @ keys.astype(np.float64).T) ** p, axis=1)
    np.testing.assert_allclose(sums(queries.astype(np.float64)), expected, rtol=1e-7)


@pytest.mark.parametrize("name", ["|x|^1", "|x|^3", "huber", "|x|^4"])
def test_sampled_row_sums_keep_their_relative_error_over_many_seeds(name):
    f, rng = FUNCTIONS[name], np.random.default_rng(0)
    keys = rng.normal(size=(30_000, 3))
    keys[:5] *= 30  # a few keys dominate rows: uniform sampling would not do
    queries = rng.normal(size=(50, 3))
    expected = np.sum(f(queries @ keys.T), axis=1)
    for seed in range(12):
        sums = sampled_row_sums(keys, f, 0.3, len(queries), failure=0.01, seed=seed)
        assert sums.failure == 0.01  # it is sampled indeed
        np.testing.assert_allclose(sums(queries), expected, rtol=0.3)


def test_projected_row_sums_keep_their_relative_error_over_many_seeds():
    rng = np.random.default_rng(0)
    keys, queries = rng.normal(size=(400, 300)), rng.normal(size=(20, 300))
    expected = np.sum((queries @ keys.T) ** 2, axis=1)
    for seed in range(10):
        sums = jl_row_sums(keys, 0.4, len(queries), failure=0.01, seed=seed)
        assert sums.failure == 0.01
        np.testing.assert_allclose(sums(queries), expected, rtol=0.4)


def test_approximate_normalisers_miss_no_heavy_entry_and_keep_the_stated_precision():
    rng = np.random.default_rng(0)
    keys, queries = rng.normal(size=(30_000, 3)), rng.normal(size=(100, 3))
    keys[:5] *= 300
    f, eps, delta = Power(1), 0.02, 0.3
    expected = attention(queries, keys, f)
    for seed in range(5):
        sums = sampled_row_sums(keys, f, delta, len(queries), failure=0.01, seed=seed)
        found = found_matrix(heavy_entries(queries, keys, eps, f, row_sums=sums), expected.shape)
        assert np.all(found[expected >= eps] > 0)
        assert np.all(expected[found > 0] >= eps * (1 - delta) / (1 + delta) * (1 - 1e-6))
        np.testing.assert_allclose(found[found > 0], expected[found > 0], rtol=delta / (1 - delta))


def test_approximation_that_would_save_nothing_is_exact():
    _, keys = inputs(0)
    for sums in (sampled_row_sums(keys, Power(1), 0.1, 10), jl_row_sums(keys, 0.1, 10)):
        assert sums.failure == 0
        assert sums.relative_error < 1e-6


GOOD = np.ones((4, 2))
BAD = {
    "nan query": ((np.array([[np.nan, 1]]), GOOD, 0.1), "queries"),
    "infinite key": ((GOOD, np.array([[1, 0], [np.inf, 1]]), 0.1), r"keys\[1\]"),
    "no keys": ((GOOD, np.ones((0, 2)), 0.1), "keys.shape"),
    "no queries": ((np.ones((0, 2)), GOOD, 0.1), "queries.shape"),
    "eps of nought": ((GOOD, GOOD, 0.0), "eps"),
    "eps above one": ((GOOD, GOOD, 1.5), "eps"),
    "eps that is no number": ((GOOD, GOOD, float("nan")), "eps"),
    "softmax": ((GOOD, GOOD, 0.1, Softmax()), "growth"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name):
    arguments, said = BAD[name]
    for function in (heavy_entries, heavy_entries_blocks):  # the generator too, before its first block
        with pytest.raises(ValueError, match=said):
            function(*arguments)


def test_keys_of_another_width_or_place_are_refused():
    with pytest.raises((ValueError, TypeError), match=r"width|shape|D"):
        heavy_entries(GOOD, np.ones((4, 3)), 0.1)
    for wrong in ([4], [-1]):
        with pytest.raises(ValueError, match="key_indices"):
            heavy_entries(GOOD, GOOD, 0.1, key_indices=np.array(wrong))


def test_row_sums_beyond_float64_are_reported():
    eighth = Growth(lambda x: np.abs(x) ** 8, 8, 8)  # as any function: that it does not see the scale is not known
    with pytest.raises(ValueError, match="overflows"), np.errstate(over="ignore", invalid="ignore"):
        heavy_entries(np.full((1, 2), 1e38), np.full((3, 2), 1e38), 0.1, eighth)


@pytest.mark.parametrize("p", [1, 2, 6, 7, 12])
def test_powers_do_not_see_the_scale_of_queries_and_keys(p):
    rng = np.random.default_rng(p)
    queries, keys = rng.normal(size=(9, 3)), rng.normal(size=(12, 3))
    plain = heavy_entries(queries, keys, 0.15, Power(p))
    assert len(plain.values)
    rows = 2.0 ** rng.integers(-300, 300, size=(9, 1))  # each query its own: all products stay in range
    for by_queries, by_keys in ((1e-30, 1e-30), (1e-170, 1e170), (1e100, 1e190), (rows, 2.0**-700)):
        scaled = heavy_entries(queries * by_queries, keys * by_keys, 0.15, Power(p))
        np.testing.assert_array_equal(scaled.query_indices, plain.query_indices)
        np.testing.assert_array_equal(scaled.key_indices, plain.key_indices)
        np.testing.assert_allclose(scaled.values, plain.values, rtol=1e-9)


def test_key_indices_are_looked_at_once_each_and_a_mask_is_refused():
    plain = heavy_entries(GOOD, GOOD, 0.1)
    twice = heavy_entries(GOOD, GOOD, 0.1, key_indices=np.repeat(np.arange(len(GOOD)), 2))
    np.testing.assert_array_equal(twice.key_indices, plain.key_indices)
    with pytest.raises(ValueError, match=r"key_indices.dtype=dtype\('bool'\) must be an integer"):
        checked_indices(np.ones(len(GOOD), bool), len(GOOD))


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e-40, 1e170])
def test_neither_keys_nor_queries_have_a_scale_under_powers(scale):
    queries, keys = inputs(0, num_queries=5, num_keys=40, width=3, dtype=np.float64)
    for p in (1, 2, 6):
        expected = heavy_entries(queries, keys, 0.1, Power(p))
        for found in (
            heavy_entries(queries * scale, keys, 0.1, Power(p)),
            heavy_entries(queries, keys * scale, 0.1, Power(p)),
        ):
            np.testing.assert_array_equal(found.key_indices, expected.key_indices)
            np.testing.assert_allclose(found.values, expected.values, rtol=1e-6)
    expected = heavy_entries(queries, keys, 0.1)
    np.testing.assert_array_equal(
        countsketch_heavy_entries(queries * scale, keys * scale, 0.1).key_indices, expected.key_indices
    )


def test_a_query_that_only_meets_a_key_whose_square_underflows_gives_it_all():
    keys = np.array([[1.0, 0.0], [0.0, 1e-200]])
    found = heavy_entries(np.array([[0.0, 1.0], [1.0, 0.0]]), keys, 0.5)
    np.testing.assert_array_equal(found.key_indices, [1, 0])
    np.testing.assert_allclose(found.values, 1)
    with pytest.raises(ValueError, match="underflows float64 for query 0"):
        heavy_entries(np.array([[0.0, 1.0], [1.0, 0.0]]), keys, 0.5, Huber(1))


@pytest.mark.parametrize("p, scale", [(100, 1e3), (40, 1e9), (12, 1e9)])
def test_row_sums_of_high_powers_stay_finite(p, scale):
    rng = np.random.default_rng(0)
    queries, keys = rng.normal(size=(9, 5)), rng.normal(size=(60, 5)) * scale
    products = np.abs(queries @ keys.T)
    expected = attention(queries / products.max(1, keepdims=True), keys, Power(p))
    assert_exact(heavy_entries(queries, keys, 0.05, Power(p)), expected, 0.05)


@pytest.mark.parametrize("scale", [1e-200, 1e160, 1e200, 1e305])
def test_row_sums_that_are_given_serve_keys_of_any_scale(scale):
    queries, keys = inputs(0, num_queries=9, num_keys=40, width=3, dtype=np.float64)
    keys /= np.abs(keys).max()
    given = heavy_entries(queries, keys * scale, 0.1, row_sums=exact_row_sums(keys * scale, Power(2)))
    assert_exact(given, attention(queries, keys, Power(2)), 0.1)


def test_no_threshold_is_so_small_that_zeros_pass_it():
    found = heavy_entries(np.eye(4), np.eye(4) / 2, 5e-324)
    np.testing.assert_array_equal(found.key_indices, np.arange(4))
    np.testing.assert_array_equal(found.values, 1)
