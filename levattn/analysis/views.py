"""Other views of an image, and which patches of two views show the same thing."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

VIEWS = ("flip", "colour", "crop")


def paired_views(
    name: str, images: Float[Array, "B h w c"], patch: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[Float[Array, "B h w c"] | None, Float[Array, "B h w c"]]:
    """Two views of each image whose patches can be compared one by one, see `same_patches`.

    flip: the image, and its mirror image.
    colour: the image, and one of 0.7 times the contrast, a fifth brighter and, with three channels, of half the
      saturation.
    crop: two crops of the image, enlarged by one patch: the upper left one and the lower right one, a patch apart.

    Args:
      name: One of `VIEWS`.
      images: Normalised.
      patch: Side of a patch in pixels.
      mean: Of the normalisation.
      std: Of the normalisation.

    Returns:
      The first, None where it is the image itself, and the second.

    Raises:
      ValueError: There is no such view.
    """
    if name == "flip":
        return None, images[:, :, ::-1]
    if name == "colour":
        return None, _recoloured(images, jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32))
    if name == "crop":
        batch, height, width, channels = images.shape
        large = jax.image.resize(images, (batch, height + patch, width + patch, channels), "bicubic")
        return large[:, :height, :width], large[:, patch:, patch:]
    raise ValueError(f"view {name!r} must be one of {', '.join(VIEWS)}")


def same_patches(name: str, grid: tuple[int, int]) -> tuple[Int[np.ndarray, " P"], Int[np.ndarray, " P"]]:
    """Patches of the first and of the second view that show the same thing, as places on the grid, row by row."""
    places = np.arange(grid[0] * grid[1]).reshape(grid)
    first, second = {
        "flip": (places, places[:, ::-1]),
        "colour": (places, places),
        "crop": (places[1:, 1:], places[:-1, :-1]),
    }[name]
    return first.ravel(), second.ravel()


def _recoloured(images, mean, std):
    pixels = images * std + mean
    if images.shape[-1] == 3:
        grey = jnp.sum(pixels * jnp.asarray([0.299, 0.587, 0.114]), axis=-1, keepdims=True)
        pixels = (pixels + grey) / 2
    level = jnp.mean(pixels, axis=(1, 2, 3), keepdims=True)
    pixels = jnp.clip(1.2 * (level + 0.7 * (pixels - level)), 0, 1)
    return (pixels - mean) / std
