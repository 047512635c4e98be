"""Learned position embeddings on another grid of patches, exactly as the code resizes them that they come from."""

import math
from typing import Literal

import numpy as np
from jaxtyping import Float

_MAX_NUMBERS = 2**26  # In float64 half a GiB; ViT-G/14 at 2,000 x 2,000 pixels has half of that.

Resize = Literal["bicubic", "bicubic_antialias", "bilinear_corners"]


def resize_positions(
    positions: Float[np.ndarray, "1 S C"], old_grid: tuple[int, int], new_grid: tuple[int, int], method: Resize
) -> Float[np.ndarray, "1 T C"]:
    """Interpolates position embeddings, in float64 inside.

    Args:
      positions: Of the patches alone, in row-major order.
      old_grid: Their rows and columns.
      new_grid: Rows and columns wanted.
      method: See `resize_matrix`.

    Returns:
      Embeddings of the new grid in the dtype of the old; the same array if the grids are equal.

    Raises:
      ValueError: Their number is not that of the old grid, or they would take more than half a GiB in float64.
    """
    if positions.shape[1] != math.prod(old_grid):
        raise ValueError(f"{positions.shape[1]} position embeddings are not those of {old_grid} patches")
    if old_grid == new_grid:
        return positions
    if math.prod(new_grid) * positions.shape[-1] > _MAX_NUMBERS:
        raise ValueError(f"position embeddings of {new_grid} patches are too many: take a smaller image_size")
    grid = positions.reshape(*old_grid, -1).astype(np.float64)
    rows, columns = (resize_matrix(old, new, method) for old, new in zip(old_grid, new_grid, strict=True))
    resized = np.einsum("ij,jkc->ikc", rows, np.einsum("lk,jkc->jlc", columns, grid))
    return resized.reshape(1, -1, grid.shape[-1]).astype(positions.dtype)


def resize_matrix(old: int, new: int, method: Resize) -> Float[np.ndarray, "new old"]:
    """The linear map of one axis.

    - "bicubic": `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`, without antialiasing: cubic
      convolution with a = -0.75, edges repeated. Of the transformers library and of DINOv2.
    - "bicubic_antialias": the same with `antialias=True`, which means a = -0.5, a kernel that widens when the grid
      shrinks, and weights outside the grid given to those inside. Of timm; `jax.image.resize` does the same.
    - "bilinear_corners": `scipy.ndimage.zoom(order=1)`: linear, the corners of both grids in the same place. Of
      big_vision and vision_transformer.

    Args:
      old: Length of the axis.
      new: Length wanted.
      method: As above.
    """
    if method == "bilinear_corners":
        at = np.linspace(0, old - 1, new)
        return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old)))
    at = (np.arange(new) + 0.5) * (old / new) - 0.5  # centres of the new pixels, in old pixels
    if method == "bicubic_antialias":
        weights = _cubic((at[:, None] - np.arange(old)) / max(old / new, 1), a=-0.5)
        return weights / weights.sum(axis=1, keepdims=True)
    taps = np.floor(at)[:, None] + np.arange(-1, 3)
    matrix = np.zeros((new, old))
    np.add.at(
        matrix,
        (np.arange(new)[:, None], np.clip(taps, 0, old - 1).astype(int)),
        _cubic(at[:, None] - taps, a=-0.75),
    )
    return matrix


def _cubic(x: Float[np.ndarray, "*shape"], a: float) -> Float[np.ndarray, "*shape"]:
    """The cubic convolution kernel (Keys, 1981)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = ((x - 5) * x + 8) * a * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))
