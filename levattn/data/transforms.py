"""Crops of one uint8 image, shifts and flips of a batch. Whatever is random is passed in."""

import math

import cv2
import numpy as np
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from levattn.data.decode import check_size

cv2.setNumThreads(0)  # Batches are loaded by threads or processes; threads inside them would only get in the way.

_PIL_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


def random_resized_crop(
    image: UInt8[np.ndarray, "h w c"], size: int, rng: np.random.Generator, *, area_min: float = 0.05
) -> UInt8[np.ndarray, "size size c"]:
    """Cuts a random rectangle and resizes it to a square: the Inception crop.

    The area is uniform in [area_min, 1] of the image, the aspect ratio log-uniform in [3/4, 4/3]. After ten rectangles
    that do not fit, the largest centred one of the nearest allowed aspect ratio is taken. The resize is bilinear
    without antialiasing, as in the usual ImageNet recipes.

    Args:
      image: the whole image.
      size: side of the result, in pixels.
      rng: source of randomness.
      area_min: smallest fraction of the area.

    Returns:
      The crop.
    """
    top, left, height, width = _random_rectangle(*image.shape[:2], rng, area_min)
    crop = image[top : top + height, left : left + width]
    return cv2.resize(crop, (size, size), interpolation=cv2.INTER_LINEAR).reshape(size, size, -1)


def _random_rectangle(height: int, width: int, rng: np.random.Generator, area_min: float) -> tuple[int, int, int, int]:
    for area, aspect, y, x in rng.random((10, 4)):
        area = height * width * (area_min + (1 - area_min) * area)
        aspect = math.exp(math.log(3 / 4) + math.log(16 / 9) * aspect)
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return int(y * (height - crop_height + 1)), int(x * (width - crop_width + 1)), crop_height, crop_width
    crop_width = min(width, max(1, round(height * 4 / 3)))
    crop_height = min(height, max(1, round(width * 4 / 3)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


def shift_over_zeros(
    images: UInt8[np.ndarray, "b h w c"], shifts: Int[np.ndarray, "b 2"]
) -> UInt8[np.ndarray, "b h w c"]:
    """Moves each image down and right by its shift in pixels (negative: up and left), filling with zeros.

    The same as padding by zeros on every side and cutting a window of the original size.
    """
    _, height, width, _ = images.shape
    moved = np.zeros_like(images)
    shifts = np.clip(shifts, (-height, -width), (height, width))
    for image, result, (dy, dx) in zip(images, moved, shifts.tolist(), strict=True):
        source = image[max(-dy, 0) : height - max(dy, 0), max(-dx, 0) : width - max(dx, 0)]
        result[max(dy, 0) : height + min(dy, 0), max(dx, 0) : width + min(dx, 0)] = source
    return moved


def flip(images: UInt8[np.ndarray, "b h w c"], flipped: Bool[np.ndarray, " b"]) -> UInt8[np.ndarray, "b h w c"]:
    """Mirrors the images where `flipped` left to right, in place, and returns them."""
    for row in np.flatnonzero(flipped).tolist():
        images[row] = cv2.flip(images[row], 1).reshape(images.shape[1:])
    return images


def resize_short_and_centre_crop(
    image: UInt8[np.ndarray, "h w c"], size: int, *, short_side: int | None = None, interpolation: str = "bicubic"
) -> UInt8[np.ndarray, "size size c"]:
    """Resizes the short side, keeping the aspect ratio, and cuts the centre: the evaluation geometry.

    The long side is rounded down; the resize is PIL's, antialiased. An image that already has the short side is
    only cropped.

    Args:
      image: the whole image.
      size: side of the result, in pixels.
      short_side: short side before the crop, in pixels; None means `size`.
      interpolation: "bicubic" or "bilinear".

    Returns:
      The crop.

    Raises:
      ImageError: for an image so thin that it would have more than `decode.MAX_PIXELS` pixels before the cut.
    """
    short_side = size if short_side is None else short_side
    height, width = image.shape[:2]
    short = min(height, width)
    if short != short_side:
        height, width = height * short_side // short, width * short_side // short
        check_size(width, height)
        image = _pil_resize(image, height, width, _PIL_FILTERS[interpolation])
    top, left = round((height - size) / 2), round((width - size) / 2)
    return image[top : top + size, left : left + size]


def _pil_resize(image: np.ndarray, height: int, width: int, resample: Image.Resampling) -> np.ndarray:
    # PIL knows no arrays of one channel.
    pil = Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image)
    return np.asarray(pil.resize((width, height), resample)).reshape(height, width, -1)
