"""Online leverage scores agree with a float64 SVD of every prefix, and their threshold serves every causal row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from levattn.core import online
from levattn.universal.online import causal_universal_set
from tests import reference

online_leverage_scores = jax.jit(online.online_leverage_scores, static_argnames="chunk")

NUM_KEYS, WIDTH = 150, 16


def _random(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _conditioned(condition, num_keys=NUM_KEYS, width=WIDTH):
    left, _ = np.linalg.qr(_random(0, num_keys, width).astype(np.float64))
    right, _ = np.linalg.qr(_random(1, width, width).astype(np.float64))
    return ((left * np.geomspace(1, 1 / condition, width)) @ right).astype(np.float32)


def _with_huge_key(size):
    keys = _random(2, NUM_KEYS, WIDTH)
    keys[70] *= np.float32(size)
    return keys


CASES = {
    "gaussian": _random(0, NUM_KEYS, WIDTH),
    "heavy tails": np.random.default_rng(13).standard_cauchy((NUM_KEYS, WIDTH)).astype(np.float32),
    "a zero key first": np.concatenate([np.zeros((1, WIDTH), np.float32), _random(3, NUM_KEYS - 1, WIDTH)]),
    "a tiny key first": np.concatenate([1e-4 * _random(4, 1, WIDTH), _random(3, NUM_KEYS - 1, WIDTH)]),
    "one huge key": _with_huge_key(1e4),
    "keys that grow": _random(5, NUM_KEYS, WIDTH) * np.geomspace(1, 1e6, NUM_KEYS, dtype=np.float32)[:, None],
    "keys that shrink": _random(5, NUM_KEYS, WIDTH) * np.geomspace(1e6, 1, NUM_KEYS, dtype=np.float32)[:, None],
    "condition 1e3": _conditioned(1e3),
    "condition 1e4": _conditioned(1e4),
    "all zero": np.zeros((NUM_KEYS, WIDTH), np.float32),
}
# Exact duplicates and products of thin matrices: of their roundings no more than of a rank is made.
DEFICIENT = {
    "rank 4": _random(6, NUM_KEYS, 4) @ _random(7, 4, WIDTH),
    "rank 1": _random(8, NUM_KEYS, 1) @ _random(9, 1, WIDTH),
    "identical keys": np.ones((NUM_KEYS, 1), np.float32) * _random(10, 1, WIDTH),
    "two keys, repeated": np.repeat(_random(11, 2, WIDTH), NUM_KEYS // 2, axis=0),
    "rank 4, then all": np.concatenate([_random(6, 75, 4) @ _random(7, 4, WIDTH), _random(12, 75, WIDTH)]),
}


@pytest.mark.parametrize("name", CASES | DEFICIENT)
@pytest.mark.parametrize("chunk", [16, 64])
def test_scores_equal_the_definition_on_every_prefix(name, chunk):
    keys = (CASES | DEFICIENT)[name]
    scores = np.asarray(online_leverage_scores(jnp.asarray(keys), chunk=chunk))
    expected = reference.online_leverage_scores(keys, rounding=2e-6 if name in DEFICIENT else 1e-13)
    np.testing.assert_allclose(scores, expected, atol=2e-3)


def test_a_long_sequence_gathers_no_error():
    keys = np.concatenate([_conditioned(1e4, 6000), _random(0, 2000, WIDTH)])
    scores = np.asarray(online_leverage_scores(jnp.asarray(keys), chunk=64), np.float64)
    with jax.enable_x64(True):
        expected = online.online_leverage_scores(jnp.asarray(keys, jnp.float64), chunk=64)
    np.testing.assert_allclose(scores, expected, atol=2e-3)
    # The last score is an offline one.
    np.testing.assert_allclose(expected[-1], reference.leverage_scores(keys)[-1], rtol=1e-6)


def test_the_chunk_is_no_part_of_the_definition():
    keys = jnp.asarray(_random(0, NUM_KEYS, WIDTH))
    expected = online_leverage_scores(keys, chunk=1)
    for chunk in (7, 1000):  # and those in common use are compared with the definition
        np.testing.assert_allclose(online_leverage_scores(keys, chunk=chunk), expected, atol=1e-3)


@pytest.mark.parametrize("chunk", [16, 64])
def test_no_later_key_moves_a_score(chunk):
    keys = _random(0, NUM_KEYS, WIDTH)
    keys[:3] = 0
    scores = np.asarray(online_leverage_scores(jnp.asarray(keys), chunk=chunk))
    for first_changed in (1, 3, 20, 63, 64, 100):
        for scale in (0, 1, 1e6):
            other = keys.copy()
            other[first_changed:] = scale * _random(1, NUM_KEYS - first_changed, WIDTH)
            moved = np.asarray(online_leverage_scores(jnp.asarray(other), chunk=chunk))
            np.testing.assert_allclose(moved[:first_changed], scores[:first_changed], atol=1e-6)


def test_a_score_never_falls_below_the_offline_score_and_the_first_in_a_direction_is_one():
    keys = _random(0, NUM_KEYS, WIDTH)
    scores = np.asarray(online_leverage_scores(jnp.asarray(keys)))
    assert np.all(scores >= reference.leverage_scores(keys) - 1e-5)
    np.testing.assert_allclose(scores[:WIDTH], 1, atol=1e-4)


def test_heads_and_batch_elements_are_scored_apart_and_masked_tokens_are_as_if_absent():
    keys = _random(0, 2, 40, 3, 8)
    mask = np.ones((2, 40), bool)
    mask[0, 5:9] = False
    keys[0, 5:9] = np.nan
    scores = np.asarray(online_leverage_scores(jnp.asarray(keys), mask=jnp.asarray(mask), chunk=16))
    for b in range(2):
        for h in range(3):
            expected = reference.online_leverage_scores(keys[b, mask[b], h])
            np.testing.assert_allclose(scores[b, h, mask[b]], expected, atol=2e-3)
    assert np.all(scores[0, :, 5:9] == 0)


def test_bfloat16_keys_are_scored_in_float32():
    keys = jnp.asarray(_random(0, 60, 8), jnp.bfloat16)
    scores = online_leverage_scores(keys)
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, reference.online_leverage_scores(np.asarray(keys, np.float32)), atol=1e-3)


def _adversarial(seed, kind):
    """Keys of every awkward kind, with queries that look where a key is alone."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(60, 6))
    match kind:
        case 1:
            keys *= rng.lognormal(sigma=3, size=(60, 1))
        case 2:
            keys = rng.normal(size=(60, 2)) @ rng.normal(size=(2, 6))
        case 3:
            keys = keys[rng.integers(0, 8, 60)]
        case 4:
            keys[rng.random(60) < 0.5] = 0
        case 5:
            keys *= np.logspace(0, -6, 6)
    return keys.astype(np.float32)


@given(seed=st.integers(0, 2**16), kind=st.integers(0, 5), eps=st.sampled_from([0.02, 0.1, 0.5, 1.0]))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_heavy_entry_of_every_causal_row_lies_on_the_set(seed, kind, eps):
    keys = _adversarial(seed, kind)
    found = causal_universal_set(keys, eps)
    wide = keys.astype(np.float64)
    for i in range(0, 60, 3):
        seen = wide[: i + 1]
        # For each key the query of the largest entry, (K_i^T K_i)^+ k_j, and some at random.
        queries = np.concatenate([seen @ np.linalg.pinv(seen.T @ seen, rcond=1e-13, hermitian=True), wide[::7]])
        products = np.square(queries @ seen.T)
        totals = products.sum(axis=1, keepdims=True)
        entries = products / np.where(totals > 0, totals, 1)
        heavy = np.flatnonzero(np.any(entries >= eps, axis=0))
        assert set(heavy) <= set(found.indices)
    assert len(found) <= found.size_bound


def test_the_set_of_a_prefix_is_the_part_of_the_set_in_it():
    keys = _random(0, 300, WIDTH)
    found = causal_universal_set(keys, 0.1)
    for length in (1, 256, 257):
        np.testing.assert_array_equal(
            causal_universal_set(keys[:length], 0.1).indices, found.indices[found.indices < length]
        )


def test_the_set_resolves_what_float32_keys_can_express():
    scale = np.logspace(0, -7, WIDTH).astype(np.float32)
    keys = _random(0, NUM_KEYS, WIDTH) * scale
    keys[100] = 0
    keys[100, -1] = 30 * scale[-1]  # alone in a direction 7 orders of magnitude below the rest
    assert 100 in causal_universal_set(keys, 0.5).indices


def test_the_set_stays_small_on_a_long_sequence():
    found = causal_universal_set(_random(0, 2000, WIDTH), 0.1)
    assert len(found) < WIDTH / 0.1 * 4  # D log(condition) / eps, far from 2000


@pytest.mark.parametrize(
    "keys, options, named",
    [
        (np.ones((3, 2), np.float32), {"eps": 0.0}, "eps=0.0"),
        (np.ones((3, 2), np.float32), {"eps": 0.1, "chunk": 0}, "chunk=0"),
        (np.ones((0, 2), np.float32), {"eps": 0.1}, "keys.shape"),
        (np.array([[1.0, 2.0], [np.nan, 1.0]], np.float32), {"eps": 0.1}, "token 1"),
    ],
)
def test_bad_arguments_are_named(keys, options, named):
    with pytest.raises(ValueError, match=named):
        causal_universal_set(keys, **options)


def test_workspace_is_a_copy_of_the_keys_and_no_more():
    def temporary(num_keys):
        shape = jax.ShapeDtypeStruct((num_keys, WIDTH), jnp.float32)
        return online_leverage_scores.lower(shape, chunk=64).compile().memory_analysis().temp_size_in_bytes

    growth = (temporary(64 * 640) - temporary(64 * 64)) / (64 * 576)  # bytes a key
    assert growth <= 2 * 4 * (WIDTH + 1)


def test_the_same_under_vmap():
    keys = jnp.asarray(_random(0, 3, NUM_KEYS, WIDTH))
    expected = np.stack([online_leverage_scores(k, chunk=16) for k in keys])
    batched = jax.jit(jax.vmap(functools.partial(online.online_leverage_scores, chunk=16)))(keys)
    np.testing.assert_allclose(batched, expected, atol=1e-3)


@pytest.mark.parametrize("size", [1e-300, 1e-170, 1e-40, 1e200])
def test_the_set_does_not_depend_on_the_scale_of_the_keys(size):
    keys = _random(0, NUM_KEYS, WIDTH).astype(np.float64)
    np.testing.assert_array_equal(
        causal_universal_set(keys * size, 0.1).indices, causal_universal_set(keys, 0.1).indices
    )


def test_the_limit_of_the_causal_promise_is_stated_and_holds():
    for part in (1e-9, 1e-6):  # of the longest key so far
        keys = np.array([[1, 0], [0, part], [1, 0]])
        assert 1 in causal_universal_set(keys, 0.5).indices
    assert "less than about 1e-10 of the longest" in causal_universal_set(keys, 0.5).guarantee
    with pytest.raises(ValueError, match="token 1 has size 1e-200"):
        causal_universal_set(np.array([[1.0, 0.0], [0.0, 1e-200]]), 0.5)
