"""Methods that merge: no key is dropped, a slot is the mean of its members, and the fit helps where it should."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from levattn.attention import AttentionSpec, get_method, lev_attention
from levattn.attention.groups import grouping_points
from levattn.attention.kmeans import farthest_points, farthest_points_of_strips
from levattn.attention.local import window_neighbours, window_size
from levattn.attention.matched import settle

MERGING = ["leverage_merged", "leverage_groups", "groups", "matched"]
BATCH, GRID, HEADS, WIDTH = 2, (5, 6), 2, 8
TOKENS = GRID[0] * GRID[1] + 1

apply = jax.jit(lev_attention, static_argnames=("spec", "grid"))


@functools.partial(jax.jit, static_argnames=("spec", "grid"))
def choose(query, key, value, spec, mask=None, grid=None):
    return get_method(spec.method)(query, key, value, spec=spec, mask=mask, grid=grid)


def _inputs(seed=0, tokens=TOKENS):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(BATCH, tokens, HEADS, WIDTH)), jnp.float32) for _ in range(3))


def _image_like(seed=0):
    """Tokens that change smoothly over the grid, and queries that look for keys like their own."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: GRID[0], : GRID[1]].reshape(2, -1, 1) / 2
    waves = rng.normal(size=(2, BATCH, 1, HEADS * WIDTH))
    smooth = np.sin(waves[0] * y + waves[1] * x + rng.normal(size=(BATCH, 1, HEADS * WIDTH)))
    tokens = np.concatenate([rng.normal(size=(BATCH, 1, HEADS * WIDTH)), smooth], axis=1)
    tokens = tokens.reshape(BATCH, TOKENS, HEADS, WIDTH)
    query, key = 3 * tokens, tokens
    return tuple(jnp.asarray(a, jnp.float32) for a in (query, key, rng.normal(size=tokens.shape) * 0.1 + tokens))


def _error(out, query, key, value):
    dense = apply(query, key, value, AttentionSpec("dense"))
    return float(jnp.linalg.norm(out - dense) / jnp.linalg.norm(dense))


@pytest.mark.parametrize("method", MERGING)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), prefix=st.integers(0, 2))
def test_every_key_is_in_one_slot_and_a_slot_is_the_mean_of_its_members(method, seed, prefix):
    query, key, value = _inputs(seed)
    coreset = choose(query, key, value, AttentionSpec(method, k=7, keep_prefix=prefix))
    for b, h in np.ndindex(BATCH, HEADS):
        slots = np.asarray(coreset.assignment[b, h])
        assert np.all((slots >= 0) & (slots < 7))
        assert np.all(np.asarray(coreset.valid[b, h]) == np.isin(np.arange(7), slots))
        for slot in set(slots.tolist()):
            members = np.flatnonzero(slots == slot)
            np.testing.assert_allclose(coreset.keys[b, slot, h], key[b, members, h].mean(0), atol=1e-5)
            if method != "matched":  # fits its values
                np.testing.assert_allclose(coreset.values[b, slot, h], value[b, members, h].mean(0), atol=1e-5)
            assert coreset.indices[b, h, slot] == (members[0] if len(members) == 1 else -1)
        for token in range(prefix):
            assert np.sum(slots == slots[token]) == 1


@pytest.mark.parametrize("method", MERGING)
def test_equal_keys_in_one_slot_cost_nothing(method):
    """Five distinct tokens, each many times: five slots hold all there is to know."""
    distinct = _inputs(tokens=5)
    which = np.random.default_rng(1).permutation(np.arange(40) % 5)
    query, key, value = (x[:, which] for x in distinct)
    spec = AttentionSpec(method, k=5, num_iters=8)
    if method.startswith("leverage"):  # equal keys have equal scores, so each kept one is of the same kind
        query, key, value = (
            jnp.concatenate([x, y[:, -1:].repeat(30, 1)], 1) for x, y in zip(distinct, distinct, strict=True)
        )
        spec = AttentionSpec(method, k=6, keep_prefix=4)
    assert _error(apply(query, key, value, spec), query, key, value) < 2e-3


@pytest.mark.parametrize("method", MERGING)
@pytest.mark.parametrize("window", [None, "cross", (3, 3), 3])
def test_padding_is_never_seen_and_gradients_stay_finite(method, window):
    query, key, value = _inputs()
    mask = jnp.arange(TOKENS) < jnp.array([TOKENS - 4, 0])[:, None]
    poisoned = [jnp.where(mask[:, :, None, None], x, jnp.nan) for x in (key, value)]
    spec = AttentionSpec(method, k=14, keep_prefix=1, local_window=window)

    def loss(query, key, value):
        out = lev_attention(query, key, value, spec, mask=mask, grid=GRID)
        return jnp.sum(jnp.where(mask[:, :, None, None], jnp.sin(out), 0)), out

    grads, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(query, *poisoned)
    assert all(np.all(np.isfinite(x)) for x in (*grads, out))
    other = [jnp.where(mask[:, :, None, None], x, 7.0) for x in (key, value)]
    np.testing.assert_allclose(out, jax.jit(loss)(query, *other)[1], atol=1e-6)


@pytest.mark.parametrize("method", ["leverage_groups", "groups"])
@pytest.mark.parametrize("window", ["cross", (3, 5), 3])
def test_a_group_counts_less_its_members_in_the_window(method, window):
    query, key, value = _inputs()
    spec = AttentionSpec(method, k=9, keep_prefix=1, local_window=window)
    coreset = choose(query, key, value, spec)
    out = apply(query, key, value, spec, grid=GRID)
    neighbours = window_neighbours(TOKENS, window, 1, GRID)
    for b, h, t in np.ndindex(BATCH, HEADS, TOKENS):
        near = neighbours[t][neighbours[t] >= 0]
        slots = np.asarray(coreset.assignment[b, h])
        sizes, left = np.bincount(slots, minlength=9), np.bincount(np.delete(slots, near), minlength=9)
        weights = np.exp(np.asarray(coreset.log_weights[b, h], np.float64)) * left / np.maximum(sizes, 1)
        keys = np.concatenate([coreset.keys[b, :, h], key[b, near, h]])
        values = np.concatenate([coreset.values[b, :, h], value[b, near, h]])
        mass = np.concatenate([weights, np.ones(len(near))]) * np.exp(keys @ query[b, t, h] / WIDTH**0.5)
        np.testing.assert_allclose(out[b, t, h], mass @ values / mass.sum(), atol=1e-5)


def test_distances_of_grouping_points_are_mean_squared_differences_of_logits():
    query, key, value = _inputs()
    points = grouping_points(query, key, value).points[..., :WIDTH]  # few coordinates stay as they are
    logits = np.einsum("bthd,bshd->bhts", query, key) / WIDTH**0.5
    expected = np.mean((logits[..., 3] - logits[..., 17]) ** 2, axis=-1)
    np.testing.assert_allclose(np.sum((points[:, :, 3] - points[:, :, 17]) ** 2, -1), expected, rtol=1e-3)


def test_grouping_points_keep_distances_of_wide_heads_whose_keys_and_values_have_few_directions():
    rng = np.random.default_rng(0)
    latent, width = rng.normal(size=(1, 50, 2, 12)), 48
    query = jnp.float32(rng.normal(size=(1, 50, 2, width)))
    key, value = (
        jnp.float32(np.einsum("bshr,hrd->bshd", latent, rng.normal(size=(2, 12, width)))) + 3 for _ in range(2)
    )
    points = np.float64(grouping_points(query, key, value).points)
    assert points.shape[-1] < 2 * width
    logits = np.einsum("bthd,bshd->bhts", query, np.float64(key)) / width**0.5
    of_logits = np.mean((logits[..., :, None] - logits[..., None, :]) ** 2, axis=2)
    values = np.moveaxis(np.float64(value), 1, 2)
    of_values = np.sum((values[..., :, None, :] - values[..., None, :, :]) ** 2, axis=-1)
    # Values weigh a quarter, relative to the spread of each.
    expected = of_logits + 0.25 * of_values * np.sum(of_logits, (2, 3), keepdims=True) / np.sum(
        of_values, (2, 3), keepdims=True
    )
    found = np.sum((points[..., :, None, :] - points[..., None, :, :]) ** 2, axis=-1)
    np.testing.assert_allclose(found, expected, rtol=5e-3, atol=1e-3 * expected.max())


@pytest.mark.parametrize("seed", range(3))
def test_each_refinement_of_the_published_form_brings_the_output_closer_to_dense(seed):
    inputs = _image_like(seed)
    options = {"k": 14, "keep_prefix": 1}
    error = {
        method: _error(apply(*inputs, AttentionSpec(method, **options), grid=GRID), *inputs)
        for method in ("leverage", "leverage_merged", "groups", "matched")
    }
    assert error["matched"] < error["groups"] < error["leverage"]
    assert error["leverage_merged"] < error["leverage"]


def test_the_fit_gets_the_landmarks_mass_and_output_right():
    """With every query a landmark, weights and values are fitted to all of them: better than the unfitted guess."""
    inputs = _image_like()
    spec = AttentionSpec("matched", k=14)
    fitted = _error(apply(*inputs, spec, grid=GRID), *inputs)
    assert _error(apply(*inputs, AttentionSpec("matched", k=14, num_landmarks=TOKENS), grid=GRID), *inputs) <= fitted
    unfitted = AttentionSpec("groups", k=14 - window_size("cross"), keep_prefix=1, local_window="cross")
    assert fitted < _error(apply(*inputs, unfitted, grid=GRID), *inputs)


def test_matched_counts_its_window_in_k():
    spec = settle(AttentionSpec("matched", k=14), TOKENS, GRID)
    assert (spec.k, spec.keep_prefix, spec.local_window, spec.num_landmarks) == (9, 1, "cross", 28)
    few = settle(AttentionSpec("matched", k=8), TOKENS, GRID)
    assert few.k + window_size(few.local_window) == 8
    assert settle(AttentionSpec("matched", k=TOKENS), TOKENS, GRID).local_window is None
    assert settle(AttentionSpec("leverage", k=14), TOKENS, GRID) == AttentionSpec("leverage", k=14)
    with pytest.raises(ValueError, match="k=9 must exceed 9 keys of local_window"):
        settle(AttentionSpec("matched", k=9, local_window=(3, 3)), TOKENS, GRID)


@pytest.mark.parametrize("num_points, num_strips", [(24, 3), (25, 3), (70, 8)])
def test_seeds_by_strips_are_each_the_farthest_of_its_strip_and_all_distinct(num_points, num_strips):
    """Against a plain loop; 130 tokens do not divide evenly, some do not exist."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(1, 1, 130, 3)).astype(np.float32)
    exists = np.ones((1, 1, 130), bool)
    exists[..., :2] = exists[..., 40] = False
    seeds = np.asarray(jax.jit(farthest_points_of_strips, static_argnums=2)(points, exists, num_points))[0, 0]
    assert seeds.shape == (num_points,)
    length = int(np.ceil(130 / num_strips))
    chosen: list[int] = []
    while len(chosen) < num_points:
        centres = np.concatenate([points[0, 0, chosen], np.zeros((1 if not chosen else 0, 3))])
        distances = np.square(points[0, 0, :, None] - centres).sum(-1)
        distances = np.minimum(distances.min(-1), np.square(points[0, 0]).sum(-1))
        distances = np.where(exists[0, 0], distances, -1)
        chosen += [int(start + distances[start : start + length].argmax()) for start in range(0, 130, length)]
    np.testing.assert_array_equal(seeds, chosen[:num_points])
    assert len(set(seeds.tolist())) == num_points
    assert np.all(exists[0, 0, seeds])


def test_a_few_seeds_by_strips_are_the_farthest_points():
    points = np.random.default_rng(1).normal(size=(2, 2, 40, 4)).astype(np.float32)
    exists = np.ones((2, 2, 40), bool)
    seeds = [jax.jit(f, static_argnums=2)(points, exists, 15) for f in (farthest_points, farthest_points_of_strips)]
    np.testing.assert_array_equal(*seeds)


@pytest.mark.parametrize("method", ["groups", "matched"])
def test_seeding_by_strips_costs_little_accuracy(method):
    inputs = _image_like()
    spec = AttentionSpec(method, k=24, keep_prefix=1)
    strips = dataclasses.replace(spec, seeding="strips")
    farthest, by_strips = (_error(apply(*inputs, s, grid=GRID), *inputs) for s in (spec, strips))
    assert farthest != by_strips
    assert by_strips < 1.5 * farthest


@pytest.mark.parametrize("method", MERGING)
def test_queries_of_other_tokens_than_the_keys_are_served(method):
    query, key, value = _inputs()
    out = apply(query[:, :3], key, value, AttentionSpec(method, k=9, keep_prefix=1))
    assert out.shape == (BATCH, 3, HEADS, WIDTH)
    assert np.all(np.isfinite(out))
