"""Merged Lewis forms bound every sensitivity, for every p, however the stream was cut: no sampling, no exception."""

import jax
import numpy as np
import pytest
from scipy.optimize import minimize

from levattn.universal import merge_reduce
from levattn.universal.merge_reduce import LewisStream
from levattn.universal.passes import stream_universal_set

WIDTH, EPS = 4, 0.1
POWERS = [0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0]


def _random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


CASES = {
    "gaussian": _random(0, 200, WIDTH),
    "heavy tails": np.random.default_rng(1).standard_cauchy((200, WIDTH)),
    "growing": _random(2, 200, WIDTH) * 1.1 ** np.arange(200)[:, None],
    "shrinking": _random(3, 200, WIDTH) * 0.9 ** np.arange(200)[:, None],
    "one axis at a time": np.eye(WIDTH)[np.arange(200) * WIDTH // 200],
    "rank 2": _random(4, 200, 2) @ _random(5, 2, WIDTH),
    "duplicates and zeros": np.repeat(_random(6, 5, WIDTH), 40, axis=0) * (np.arange(200) % 3 > 0)[:, None],
    "condition 1e6": _random(7, 200, WIDTH) * np.logspace(0, -6, WIDTH) @ np.linalg.qr(_random(8, WIDTH, WIDTH))[0],
    "one huge key": np.concatenate([_random(9, 100, WIDTH), 1e6 * _random(10, 1, WIDTH), _random(11, 99, WIDTH)]),
    "fewer than the width": _random(12, 2, WIDTH),
}


def _run(stream, keys, size=23, start=0):
    state = stream.init(start)
    for first in range(0, len(keys), size):
        state = stream.update(state, keys[first : first + size])
    return state


def _seen_sensitivities(keys, p, seed=0):
    """Lower bounds on the sensitivities: the best of many queries, the sharpest of them improved by search."""
    scale = np.linalg.norm(keys, axis=0)
    keys = keys / np.where(scale > 0, scale, 1)
    pseudo = np.linalg.pinv(keys)
    queries = np.concatenate(
        [_random(seed, 200, WIDTH), keys, pseudo.T, (keys @ np.linalg.pinv(keys.T @ keys))], axis=0
    )
    # Down-weighting what other keys contribute most leads to the query that singles a key out.
    for _ in range(6):
        weights = 1 / (np.abs(keys @ pseudo) + 1e-3).max(axis=1)
        pseudo = np.linalg.pinv(keys * weights[:, None])
        queries = np.concatenate([queries, pseudo.T])

    def shares(queries):
        powers = np.abs(queries @ keys.T) ** p
        total = powers.sum(axis=1, keepdims=True)
        return np.divide(powers, total, out=np.zeros_like(powers), where=total > 0)

    found = shares(queries).max(axis=0)
    for key in np.argsort(-found)[:4]:
        best = queries[np.argmax(shares(queries)[:, key])]
        result = minimize(
            lambda y, key=key: -shares(y[None])[0, key], best, method="Nelder-Mead", options={"maxiter": 200}
        )
        found[key] = max(found[key], -result.fun)
    return found


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("name", CASES)
def test_no_query_finds_a_share_above_the_bound_and_no_heavy_key_is_missing(name, p):
    keys = CASES[name]
    stream = LewisStream(WIDTH, EPS, p)
    state = _run(stream, keys)
    bounds = stream.bounds(stream.form(state), keys)
    seen = _seen_sensitivities(keys, p)
    assert np.all(bounds >= seen - 1e-9)
    found = stream.finish(state)
    assert set(np.flatnonzero(seen >= EPS)) <= set(found.indices)
    assert np.all(found.scores >= seen[found.indices] - 1e-9)
    assert len(found) <= found.size_bound
    np.testing.assert_array_equal(found.keys, keys[found.indices])


@pytest.mark.parametrize("p", POWERS)
def test_the_form_of_a_stream_never_exceeds_the_sum_of_powers(p):
    for name, keys in CASES.items():
        stream = LewisStream(WIDTH, EPS, p)
        form = stream.form(_run(stream, keys))
        queries = np.concatenate([_random(1, 500, WIDTH), keys])
        quadratic = np.sum(np.square(form.coordinates(queries)), axis=1)
        powers = np.sum(np.abs(queries @ keys.T) ** p, axis=1)
        assert np.all(powers * (1 + 1e-6) >= quadratic ** (p / 2)), name


@pytest.mark.parametrize("p", POWERS)
def test_merging_two_equal_streams_loses_nothing(p):
    factor = np.linalg.qr(CASES["gaussian"], mode="r")
    merged = merge_reduce._merge_forms([factor, factor], p)
    gram = factor.T @ factor
    np.testing.assert_allclose(merged.T @ merged, 2 ** (2 / p) * gram, rtol=1e-2, atol=1e-6 * np.max(gram))


def test_at_p_2_the_set_is_that_of_leverage_scores():
    keys = CASES["heavy tails"]
    left, _ = np.linalg.qr(keys)
    expected = np.flatnonzero(np.sum(left**2, axis=1) >= EPS)
    np.testing.assert_array_equal(
        LewisStream(WIDTH, EPS, 2.0).finish(_run(LewisStream(WIDTH, EPS, 2.0), keys)).indices, expected
    )


@pytest.mark.parametrize("p", [1.0, 3.0])
def test_parts_seen_apart_and_merged_in_any_order_miss_nothing(p):
    keys = CASES["growing"]
    seen = set(np.flatnonzero(_seen_sensitivities(keys, p) >= EPS))
    stream = LewisStream(WIDTH, EPS, p)
    parts = [_run(stream, keys[a:b], start=a) for a, b in ((0, 10), (10, 120), (120, 200))]
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        first, second, third = (parts[i] for i in order)
        merged = stream.merge(stream.merge(first, second), third)
        assert merged.num_keys == 200
        assert seen <= set(stream.finish(merged).indices)


@pytest.mark.parametrize("p", [0.5, 1.0, 4.0])
def test_two_passes_miss_nothing_and_keep_no_more_than_the_sum_of_bounds_allows(p):
    keys = CASES["heavy tails"].astype(np.float32)
    found = stream_universal_set(lambda: [keys], WIDTH, EPS, p=p, num_passes=2, chunk_rows=50)
    one = stream_universal_set(lambda: [keys], WIDTH, EPS, p=p, num_passes=1, chunk_rows=50)
    seen = set(np.flatnonzero(_seen_sensitivities(keys.astype(float), p) >= EPS))
    assert seen <= set(found.indices)
    assert seen <= set(one.indices)
    assert len(found) <= found.size_bound


def test_memory_grows_with_the_logarithm_of_the_stream():
    stream = LewisStream(WIDTH, 1.0, 1.0)
    state = stream.init()
    for _ in range(65):
        state = stream.update(state, CASES["gaussian"][:20])
    assert len(state.levels) == 7
    assert sum(factor.size for factor in state.levels) <= 7 * WIDTH**2
    assert all(isinstance(leaf, np.ndarray | int | float) for leaf in jax.tree.leaves(state))


def test_what_cannot_be_had_is_named():
    keys = CASES["gaussian"].copy()
    keys[[31, 60], 1] = np.nan
    with pytest.raises(ValueError, match="first at position 31"):
        LewisStream(WIDTH, EPS, 1.0).finish(_run(LewisStream(WIDTH, EPS, 1.0), keys))
    with pytest.raises(ValueError, match="first at position 31"):
        stream_universal_set(lambda: [keys], WIDTH, EPS, p=1.0, num_passes=2, chunk_rows=50)
    with pytest.raises(ValueError, match="no keys"):
        LewisStream(WIDTH, EPS, 1.0).finish(LewisStream(WIDTH, EPS, 1.0).init())
    with pytest.raises(ValueError, match="more than max_waiting=3"):
        _run(LewisStream(WIDTH, 0.01, 1.0, max_waiting=3), CASES["gaussian"])
    for arguments, named in (((0, 0.1, 1.0), "head_dim"), ((4, 0.0, 1.0), "eps"), ((4, 0.1, 0.0), "p=0")):
        with pytest.raises(ValueError, match=named):
            LewisStream(*arguments)


@pytest.mark.parametrize("p", [0.1, 100.0])
def test_scale_is_no_matter_and_the_ends_of_the_range_are_sound(p):
    keys = CASES["heavy tails"]
    stream = LewisStream(WIDTH, EPS, p)
    found = stream.finish(_run(stream, keys))
    assert set(np.flatnonzero(_seen_sensitivities(keys, p) >= EPS)) <= set(found.indices)
    for size in (2.0**-600, 2.0**600):
        np.testing.assert_array_equal(stream.finish(_run(stream, keys * size)).indices, found.indices)
    with pytest.raises(ValueError, match="1e-300 is beyond"):
        stream.update(stream.init(), np.full((1, WIDTH), 1e-300))
