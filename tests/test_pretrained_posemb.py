"""Position embeddings land on another grid where the libraries that published them would put them."""

import jax
import numpy as np
import pytest
import scipy.ndimage

from levattn.models.pretrained.posemb import resize_matrix, resize_positions

GRIDS = [((14, 14), (24, 24)), ((14, 14), (9, 9)), ((7, 7), (14, 10)), ((16, 16), (37, 16)), ((3, 3), (1, 2))]
METHODS = ("bicubic", "bicubic_antialias", "bilinear_corners")


def positions_of(grid):
    return np.random.default_rng(0).normal(size=(1, grid[0] * grid[1], 4)).astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_constants_and_the_same_grid(method):
    for old, new in [(14, 24), (24, 14), (7, 7), (5, 1)]:
        np.testing.assert_allclose(resize_matrix(old, new, method).sum(axis=1), 1, atol=1e-12)
    np.testing.assert_allclose(resize_matrix(7, 7, method), np.eye(7), atol=1e-12)
    positions = positions_of((4, 4))
    assert resize_positions(positions, (4, 4), (4, 4), method) is positions


@pytest.mark.parametrize("old, new", GRIDS)
def test_bilinear_corners_is_scipys_zoom_as_big_vision_calls_it(old, new):
    positions = positions_of(old)
    zoom = (new[0] / old[0], new[1] / old[1], 1)
    expected = scipy.ndimage.zoom(positions.reshape(*old, 4).astype(np.float64), zoom, order=1)
    found = resize_positions(positions, old, new, "bilinear_corners")
    np.testing.assert_allclose(found.reshape(*new, 4), expected, atol=1e-6)


@pytest.mark.parametrize("old, new", GRIDS)
def test_bicubic_antialias_is_that_of_jax(old, new):
    positions = positions_of(old)
    expected = jax.image.resize(positions.reshape(*old, 4), (*new, 4), "bicubic")
    found = resize_positions(positions, old, new, "bicubic_antialias")
    np.testing.assert_allclose(found.reshape(*new, 4), expected, atol=1e-5)


def test_bicubic_repeats_edges_and_weighs_as_cubic_convolution_does():
    """Doubling: each new pixel lies a quarter before or behind an old one. By hand, for a = -3/4."""
    at_quarter = np.array([-0.10546875, 0.87890625, 0.26171875, -0.03515625])  # of the old pixels -1, 0, 1 and 2
    matrix = resize_matrix(6, 12, "bicubic")
    np.testing.assert_allclose(matrix[5, 1:5], at_quarter)
    np.testing.assert_allclose(matrix[6, 1:5], at_quarter[::-1])
    np.testing.assert_allclose(matrix[0, :2], [at_quarter[3] + at_quarter[2] + at_quarter[1], at_quarter[0]])


@pytest.mark.optin
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("old, new", GRIDS)
def test_both_bicubic_methods_are_torchs_interpolate(old, new, antialias):
    torch = pytest.importorskip("torch")
    positions = positions_of(old)
    grid = torch.from_numpy(positions).reshape(1, *old, 4).permute(0, 3, 1, 2).double()
    expected = torch.nn.functional.interpolate(grid, size=new, mode="bicubic", align_corners=False, antialias=antialias)
    found = resize_positions(positions, old, new, "bicubic_antialias" if antialias else "bicubic")
    np.testing.assert_allclose(found.reshape(*new, 4), expected[0].permute(1, 2, 0).numpy(), atol=1e-6)
