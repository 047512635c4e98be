"""Plots are written without a warning, show every method, and stay small."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_analysis_results import row

from levattn.analysis import plot_accuracy
from levattn.analysis.plots import spread

METHODS = ("leverage", "row_norm", "random", "kmeans")
ROWS = [
    row("dense", 65, accuracy=0.978),
    *(row(m, k, accuracy=0.2 + k / 50 + i / 50) for i, m in enumerate(METHODS) for k in (8, 16, 32)),
    row("leverage", 16, "leverage k=16", 0.967),
    row("dense", 65, "leverage k=16", 0.25),
]


def test_the_png_is_small_and_not_blank(tmp_path):
    plot_accuracy(ROWS, tmp_path / "new" / "accuracy.png", num_classes=10)
    path = tmp_path / "new" / "accuracy.png"
    assert path.stat().st_size < 200_000
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 400
    assert 0.01 < np.mean(pixels.min(axis=-1) < 200) < 0.5


def test_the_svg_is_the_same_file_each_time(tmp_path):
    plot_accuracy(ROWS, tmp_path / "a.svg")
    plot_accuracy(ROWS, tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    assert "<svg" in (tmp_path / "a.svg").read_text()


def texts(path):
    """What an SVG says: matplotlib writes each string as a comment before its outlines."""
    return [
        line[len("<!-- ") : -len(" -->")] for line in map(str.strip, path.read_text().splitlines()) if "<!--" in line
    ]


def test_lines_are_named_with_their_accuracy_at_the_largest_k(tmp_path):
    plot_accuracy(ROWS, tmp_path / "a.svg", num_classes=10)
    shown = texts(tmp_path / "a.svg")
    expected = {f"{m} {100 * (0.2 + 32 / 50 + i / 50):.1f}" for i, m in enumerate(METHODS)}
    assert expected | {"dense 97.8", "guessing 10.0", "96.7", "8", "16", "32"} <= set(shown)
    assert "trained with leverage attention" in shown


@pytest.mark.parametrize(
    "rows",
    [
        [row("dense", 65)],
        [row("leverage", 1, accuracy=0.0)],
        [row("leverage", 16, "leverage k=16", 1.0)],
        [row("kmeans", 8), row("leverage", 8), row("leverage", 32), row("my_method", 32)],
        [*ROWS, *(r | {"dataset": "other"} for r in ROWS)],
    ],
    ids=["dense", "one_point", "trained", "ragged", "two_panels"],
)
def test_whatever_rows_there_are_can_be_drawn(rows, tmp_path):
    plot_accuracy(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size < 200_000


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\.png or \.svg"):
        plot_accuracy(ROWS, tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="rows"):
        plot_accuracy([], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


@given(heights=st.lists(st.floats(0, 100), max_size=8), gap=st.floats(0.1, 10))
def test_labels_never_overlap_keep_their_order_and_stay_where_there_is_room(heights, gap):
    at = spread(heights, gap)
    order = np.argsort(heights, kind="stable")
    assert all(at[b] - at[a] >= gap - 1e-6 for a, b in itertools.pairwise(order))
    if all(heights[b] - heights[a] >= gap for a, b in itertools.pairwise(order)):
        np.testing.assert_allclose(at, heights, atol=1e-6)
