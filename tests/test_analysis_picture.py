"""The picture marks exactly what the layer keeps, beside the scores and the attention of that very layer."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from levattn.analysis import plot_attention
from levattn.analysis.picture import kept_patches, outline, view_layer
from levattn.attention import AttentionSpec
from levattn.models import ModelConfig, ViT, unrolled_to_scan

SPEC = AttentionSpec("leverage", k=5, keep_prefix=1)
CONFIG = ModelConfig("mu/1", width=16, depth=2, mlp_dim=16, num_classes=3, pool="cls", attention=SPEC)
RNG = np.random.default_rng(0)
IMAGE = RNG.integers(0, 256, (4, 6, 1), np.uint8)


def init(config, image):
    return jax.jit(ViT(config).init)(jax.random.key(0), np.zeros((1, *image.shape), np.float32))["params"]


@pytest.fixture(scope="module")
def params():
    return init(CONFIG, IMAGE)


def capture(config, params, image):
    images = (image[None].astype(np.float32) / 255 - 0.5) / 0.5
    sown = jax.jit(lambda p, x: ViT(config).apply({"params": p}, x, capture=True, mutable=["intermediates"]))(
        {**params}, images
    )[1]["intermediates"]["Transformer"]
    return sown["encoderblock_1"]["MultiHeadDotProductAttention_0"]


def test_marks_are_the_indices_that_the_layer_selected_less_the_class_token(params):
    view = view_layer(CONFIG, params, IMAGE)
    indices = np.asarray(capture(CONFIG, params, IMAGE)["indices"][0])[0]
    marks = kept_patches(view.kept, (4, 6), num_prefix=1)
    assert marks.shape == (2, 4, 6)
    for head, mark in enumerate(marks):
        expected = {divmod(index - 1, 6) for index in indices[head].tolist() if index > 0}
        assert {tuple(place) for place in np.argwhere(mark).tolist()} == expected
        assert len(expected) == 4
    assert view.kept[:, 0].all()


def test_scores_and_attention_are_those_of_float64_from_the_captured_queries_and_keys(params):
    view = view_layer(CONFIG, params, IMAGE)
    sown = capture(CONFIG, params, IMAGE)
    queries, keys = (np.asarray(sown[name][0][0], np.float64) for name in ("queries", "keys"))
    for head in range(2):
        left = np.linalg.svd(keys[:, head], full_matrices=False)[0]
        np.testing.assert_allclose(view.scores[head], np.sum(left**2, axis=-1), atol=2e-3)
        logits = queries[0, head] @ keys[:, head].T / np.sqrt(8)
        np.testing.assert_allclose(view.attention[head], np.exp(logits) / np.exp(logits).sum(), rtol=1e-4)


def test_without_a_class_token_attention_is_the_mean_over_queries_and_all_keys_are_patches():
    config = dataclasses.replace(CONFIG, pool="gap", attention=AttentionSpec("row_norm", k=3))
    view = view_layer(config, init(config, IMAGE), IMAGE, layer=0)
    np.testing.assert_allclose(view.attention.sum(axis=-1), 1, rtol=1e-5)
    assert kept_patches(view.kept, (4, 6), num_prefix=0).sum(axis=(1, 2)).tolist() == [3, 3]


def test_a_scanned_model_is_looked_into_like_an_unrolled_one(params):
    scanned = dataclasses.replace(CONFIG, scan=True)
    for layer in (0, -1):
        ours = view_layer(scanned, unrolled_to_scan(params), IMAGE, layer=layer)
        theirs = view_layer(CONFIG, params, IMAGE, layer=layer)
        np.testing.assert_array_equal(ours.kept, theirs.kept)
        np.testing.assert_allclose(ours.scores, theirs.scores, atol=1e-4)


@given(mask=arrays(bool, st.tuples(st.integers(1, 5), st.integers(1, 5))))
def test_the_outline_separates_every_marked_cell_from_every_other(mask):
    """Brute force: a side belongs to the outline if and only if its two cells differ; outside nothing is marked."""
    marked = {(x, y) for y, x in np.argwhere(mask).tolist()}
    expected = set()
    for x in range(mask.shape[1]):
        for y in range(mask.shape[0]):
            sides = {
                (x, y - 1): ((x, y), (x + 1, y)),
                (x, y + 1): ((x, y + 1), (x + 1, y + 1)),
                (x - 1, y): ((x, y), (x, y + 1)),
                (x + 1, y): ((x + 1, y), (x + 1, y + 1)),
            }
            expected |= {side for cell, side in sides.items() if (cell in marked) != ((x, y) in marked)}
    assert sorted(outline(mask)) == sorted(expected)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_grey_pixels_are_drawn_as_png_and_as_svg_and_each_of_three_rows_holds_the_outlines(params, tmp_path):
    for name in ("a.png", "a.svg"):
        plot_attention(CONFIG, params, IMAGE, tmp_path / name)
        assert 5_000 < (tmp_path / name).stat().st_size < 300_000
    assert pixels(tmp_path / "a.png").std() > 10
    marks = kept_patches(view_layer(CONFIG, params, IMAGE).kept, (4, 6), num_prefix=1)
    drawn = re.findall(r"<path d=[^>]*stroke: #d55e00", (tmp_path / "a.svg").read_text())
    assert len(drawn) == 3 * sum(len(outline(mark)) for mark in marks)


def test_colour_images_in_patches_are_drawn_and_only_the_heads_asked_for(tmp_path):
    attention = AttentionSpec("random", k=7)
    config = dataclasses.replace(CONFIG, variant="mu/8", num_heads=4, pool="gap", attention=attention)
    image = RNG.integers(0, 256, (32, 48, 3), np.uint8)
    params = init(config, image)
    plot_attention(config, params, image, tmp_path / "four.png", layer=0)
    plot_attention(config, params, image, tmp_path / "two.png", layer=0, heads=(3, 1))
    assert pixels(tmp_path / "two.png").shape[1] < pixels(tmp_path / "four.png").shape[1]
    assert (tmp_path / "four.png").stat().st_size < 600_000


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({"attention": AttentionSpec("dense")}, {}, "attends densely"),
        ({}, {"layer": 2}, r"layer=2 must be in \[-2, 1\]"),
        ({}, {"heads": (0, 2)}, r"must be in \[0, 1\]"),
    ],
)
def test_what_cannot_be_shown_is_refused(params, tmp_path, changes, options, message):
    with pytest.raises(ValueError, match=message):
        plot_attention(dataclasses.replace(CONFIG, **changes), params, IMAGE, tmp_path / "a.png", **options)
    assert not list(tmp_path.iterdir())
