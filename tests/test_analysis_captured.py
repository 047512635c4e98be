"""What sets of keys capture, how alike they are, and what keys are like: as float64 counts them one by one."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from levattn.analysis.captured import attention_by_key, captured, near_keys
from levattn.analysis.key_spectra import key_spectra
from levattn.analysis.moments import Moments
from levattn.analysis.overlap import chance_jaccard, jaccard, pairwise_jaccard
from levattn.analysis.views import VIEWS, paired_views, same_patches

RNG = np.random.default_rng(0)
EPS = (0.02, 0.1, 0.5)
GRID, PREFIX = (3, 4), 1
QUERY, KEY = (jnp.asarray(3 * RNG.normal(size=(2, 13, 3, 5)), jnp.float32) for _ in range(2))
KEPT = RNG.random((4, 2, 3, 13)) < np.asarray([0.0, 0.2, 0.6, 1.0])[:, None, None, None]
NEAR = near_keys(13, (3, 3), PREFIX, GRID)
SETS_OF_BLOCKS = {"one block": 1 << 26, "blocks that the queries do not fill": 4 * 2 * 3 * 13 * 5}


def attention(power):
    products = np.einsum("bthd,bshd->bhts", *(np.asarray(x, np.float64) for x in (QUERY, KEY)))
    weights = np.exp(products / np.sqrt(5)) if power is None else np.abs(products) ** power
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("power", [None, 2])
@pytest.mark.parametrize("block_bytes", SETS_OF_BLOCKS.values(), ids=SETS_OF_BLOCKS)
def test_captured_mass_and_heavy_entries_are_those_of_the_matrix_in_float64(power, block_bytes):
    found = attention_by_key(QUERY, KEY, NEAR, eps=EPS, power=power, block_bytes=block_bytes)
    ours = captured(found, jnp.asarray(KEPT))
    matrix = attention(power)
    np.testing.assert_allclose(found.effective_keys, np.mean(1 / np.sum(matrix**2, axis=-1), axis=-1), rtol=1e-4)
    np.testing.assert_allclose(np.sum(found.local_mass, axis=-1), np.mean(np.sum(matrix * NEAR, -1), -1), rtol=1e-4)
    for number, kept in enumerate(KEPT):
        on_set = np.broadcast_to(kept[:, :, None], matrix.shape)
        for on, mass, heavy in (
            (on_set, ours.mass, ours.heavy),
            (on_set | NEAR, ours.mass_with_local, ours.heavy_with_local),
        ):
            np.testing.assert_allclose(mass[number], np.mean(np.sum(matrix * on, -1), -1), rtol=1e-4, atol=1e-6)
            for i, eps in enumerate(EPS):
                counted = np.sum((matrix >= eps) & on, axis=(-2, -1)) / 13
                np.testing.assert_allclose(heavy[number, i], counted, rtol=1e-5)


def test_near_keys_are_the_patches_around_a_patch_and_no_class_token():
    for query, key in itertools.product(range(13), repeat=2):
        is_near = query > 0 and key > 0
        if is_near:
            (row, column), (other_row, other_column) = divmod(query - 1, 4), divmod(key - 1, 4)
            is_near = abs(row - other_row) <= 1 and abs(column - other_column) <= 1
        assert NEAR[query, key] == is_near
    assert not near_keys(13, None, PREFIX, None).any()
    assert near_keys(5, 3, 0, None).sum() == 13


def test_jaccard_is_that_of_python_sets_and_of_empty_sets_one():
    sets = [set(np.flatnonzero(kept).tolist()) for kept in KEPT[:, 0, 0]]
    expected = np.array([[len(a & b) / len(a | b) if a | b else 1 for b in sets] for a in sets])
    kept = jnp.moveaxis(jnp.asarray(KEPT), 0, 2)
    np.testing.assert_allclose(jaccard(*jnp.broadcast_arrays(kept[0, 0, :, None], kept[0, 0])), expected, rtol=1e-6)
    batched = pairwise_jaccard(kept, kept[..., :2, :])
    assert batched.shape == (2, 3, 4, 2)
    np.testing.assert_allclose(batched[0, 0], expected[:, :2], rtol=1e-6)


def test_chance_is_the_mean_over_all_pairs_of_sets():
    for size_a, size_b in ((2, 3), (1, 1), (0, 2), (4, 4), (0, 0)):
        pairs = list(
            itertools.product(itertools.combinations(range(5), size_a), itertools.combinations(range(5), size_b))
        )
        indices = [len({*a} & {*b}) / len({*a, *b}) if a or b else 1 for a, b in pairs]
        assert chance_jaccard(size_a, size_b, 5) == pytest.approx(np.mean(indices))
    with pytest.raises(ValueError, match="size_b=6"):
        chance_jaccard(2, 6, 5)


def test_rank_and_condition_are_those_that_the_keys_were_made_with():
    left, right = (np.linalg.qr(RNG.normal(size=(n, 6)))[0] for n in (40, 6))
    values = np.array([[8, 4, 2, 1, 0.5, 0.25], [1e3, 10, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0]])
    keys = np.einsum("sr,nr,dr->nsd", left, values, right)
    found = key_spectra(keys)
    assert found.rank.tolist() == [6, 3, 6, 0]
    np.testing.assert_allclose(found.condition, [32, 1e3, 1, np.nan], rtol=1e-9)
    shares = values[0] ** 2 / np.sum(values[0] ** 2)
    np.testing.assert_allclose(found.effective_rank[[0, 2, 3]], [np.exp(-np.sum(shares * np.log(shares))), 6, 0])
    axes = np.eye(6) * np.asarray([1e6, 1, 1, 1, 1, 1e-4])  # far from 1 only by the scale of columns
    assert key_spectra(axes).scaled_condition == pytest.approx(1)
    assert key_spectra(keys[:0]).rank.shape == (0,)
    with pytest.raises(ValueError, match="finite"):
        key_spectra(np.full((3, 2), np.nan))


def test_moments_are_those_of_all_examples_at_once_and_skip_what_is_nan():
    values = 1e6 + RNG.normal(size=(11, 3))
    values[2, 0] = values[:5, 1] = np.nan
    moments = Moments()
    for part in (values[:4], values[4:5], values[5:]):
        moments.add(part)
    np.testing.assert_allclose(moments.mean, np.nanmean(values, axis=0), rtol=1e-12)
    np.testing.assert_allclose(moments.std, np.nanstd(values, axis=0, ddof=1), rtol=1e-6)
    np.testing.assert_allclose(moments.standard_error, moments.std / np.sqrt([10, 6, 11]))
    np.testing.assert_array_equal(moments.max, np.nanmax(values, axis=0))
    np.testing.assert_array_equal(moments.min, np.nanmin(values, axis=0))
    nothing = Moments()
    nothing.add(np.full((2, 1), np.nan))
    assert np.isnan(nothing.mean).all()
    assert np.isnan(nothing.std).all()


@pytest.mark.parametrize("name", VIEWS)
def test_patches_that_are_said_to_be_the_same_show_the_same_pixels(name):
    patch, grid = 4, (3, 5)
    image = np.kron(RNG.random((1, *grid, 3)), np.ones((1, patch, patch, 1))).astype(np.float32)
    images = (image - 0.4) / 0.3
    first, second = paired_views(name, jnp.asarray(images), patch, (0.4,), (0.3,))
    first = images if first is None else first
    assert first.shape == second.shape == images.shape

    def patches(x):
        x = np.asarray(x)[0].reshape(grid[0], patch, grid[1], patch, 3)
        return np.moveaxis(x, 2, 1).reshape(-1, patch, patch, 3)

    places_first, places_second = same_patches(name, grid)
    ours, theirs = patches(first)[places_first], patches(second)[places_second]
    if name == "flip":
        theirs = theirs[:, :, ::-1]
    if name == "colour":
        pixels = 0.3 * theirs + 0.4
        assert pixels.min() >= 0
        assert pixels.max() <= 1 + 1e-6
        assert np.std(pixels) < np.std(0.3 * ours + 0.4)
    else:
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert len(places_first) == len(set(places_second.tolist())) == (8 if name == "crop" else 15)


def test_another_view_is_refused():
    with pytest.raises(ValueError, match="view 'blur' must be one of flip, colour, crop"):
        paired_views("blur", jnp.zeros((1, 4, 4, 1)), 4, (0.5,), (0.5,))
