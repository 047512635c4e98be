"""Crops, shifts, flips and RandAugment against PIL and plain numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from levattn.data.randaugment import OPERATIONS, randaugment
from levattn.data.transforms import flip, random_resized_crop, resize_short_and_centre_crop, shift_over_zeros


def photo(height, width, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("height, width", [(100, 60), (60, 100), (61, 61), (20, 33)])
def test_evaluation_geometry_equals_resize_and_crop_by_pil(height, width, interpolation):
    image = photo(height, width)
    short = min(height, width)
    resized = Image.fromarray(image).resize(
        (width * 40 // short, height * 40 // short), getattr(Image.Resampling, interpolation.upper())
    )
    left, top = round((resized.width - 32) / 2), round((resized.height - 32) / 2)
    expected = np.asarray(resized.crop((left, top, left + 32, top + 32)))
    actual = resize_short_and_centre_crop(image, 32, short_side=40, interpolation=interpolation)
    np.testing.assert_array_equal(actual, expected)


def test_an_image_of_the_right_size_is_left_alone():
    image = photo(28, 28, 1)
    np.testing.assert_array_equal(resize_short_and_centre_crop(image, 28), image)


def test_grey_images_keep_their_channel():
    assert resize_short_and_centre_crop(photo(9, 12, 1), 6).shape == (6, 6, 1)
    assert random_resized_crop(photo(9, 12, 1), 6, np.random.default_rng(0)).shape == (6, 6, 1)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**32))
def test_random_resized_crop_shows_a_rectangle_inside_the_image(height, width, seed):
    """A horizontal and a vertical ramp give the rectangle away: its values are increasing and in range."""
    ramps = np.stack(np.broadcast_arrays(np.arange(height)[:, None] * 4, np.arange(width) * 4), axis=-1)
    image = np.concatenate([ramps, ramps[:, :, :1]], axis=-1).astype(np.uint8)
    crop = random_resized_crop(image, 16, np.random.default_rng(seed)).astype(int)
    assert (np.diff(crop[:, :, 0], axis=0) >= 0).all()
    assert (np.diff(crop[:, :, 1], axis=1) >= 0).all()
    assert crop[:, :, 0].max() <= 4 * (height - 1)
    assert crop[:, :, 1].max() <= 4 * (width - 1)


def test_random_resized_crop_takes_the_area_and_aspect_it_promises():
    ramp_y, ramp_x = np.meshgrid(np.arange(200), np.arange(200), indexing="ij")
    image = np.stack([ramp_y, ramp_x, ramp_x], axis=-1).astype(np.uint8)
    rng = np.random.default_rng(0)
    sides = []
    for _ in range(500):
        crop = random_resized_crop(image, 8, rng, area_min=0.25).astype(float)
        # Pixel centres of 8 samples span 7/8 of the side.
        sides.append((np.ptp(crop[:, 0, 0]) * 8 / 7, np.ptp(crop[0, :, 1]) * 8 / 7))
    heights, widths = np.array(sides).T
    area, aspect = heights * widths / 200**2, widths / heights
    assert area.min() > 0.23
    assert area.max() < 1.02
    assert aspect.min() > 0.72
    assert aspect.max() < 1.39
    assert np.abs(np.log(aspect)).max() > 0.2
    assert 0.5 < area.mean() < 0.65  # Uniform in [0.25, 1] has mean 0.625; wide and tall ones fit less often.


@settings(max_examples=40, deadline=None)
@given(st.integers(-9, 9), st.integers(-9, 9))
def test_a_shift_equals_padding_and_cutting_a_window(dy, dx):
    image = photo(7, 6)
    padded = np.pad(image, ((10, 10), (10, 10), (0, 0)))
    moved = shift_over_zeros(image[None], np.array([[dy, dx]]))[0]
    np.testing.assert_array_equal(moved, padded[10 - dy : 17 - dy, 10 - dx : 16 - dx])


def test_flip_mirrors_the_chosen_rows_and_no_other():
    images = np.stack([photo(5, 6, 1, seed) for seed in range(3)])
    flipped = flip(images.copy(), np.array([True, False, True]))
    np.testing.assert_array_equal(flipped, np.stack([images[0, :, ::-1], images[1], images[2, :, ::-1]]))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_keeps_mode_and_size_and_zero_strength_is_mild(name, channels):
    image = photo(20, 24, channels)
    pil = Image.fromarray(image[:, :, 0] if channels == 1 else image)
    for sign in (1, -1):
        for strength in (0.0, 0.5, 1.0):
            result = OPERATIONS[name](pil, strength, sign)
            assert (result.size, result.mode) == (pil.size, pil.mode)
    if name not in ("AutoContrast", "Equalize", "Invert"):
        np.testing.assert_array_equal(np.asarray(OPERATIONS[name](pil, 0.0, 1)), np.asarray(pil))


def test_full_strength_is_what_the_documentation_says():
    image = Image.fromarray(photo(20, 24))
    pixels = np.asarray(image)
    shifted = np.asarray(OPERATIONS["TranslateX"](image, 1.0, -1))
    assert (shifted[:, :10] == 128).all()  # 0.45 of 24 is 10.8 pixels.
    np.testing.assert_array_equal(np.asarray(OPERATIONS["Solarize"](image, 1.0, 1)), 255 - pixels)
    np.testing.assert_array_equal(np.asarray(OPERATIONS["Posterize"](image, 1.0, 1)), pixels & 0xF0)
    np.testing.assert_array_equal(
        np.asarray(OPERATIONS["SolarizeAdd"](image, 1.0, 1)),
        np.where(pixels < 128, np.minimum(pixels.astype(int) + 110, 255), pixels),
    )
    np.testing.assert_array_equal(
        np.asarray(OPERATIONS["Rotate"](image, 1.0, 1)),
        np.asarray(image.rotate(30, Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))),
    )
    np.testing.assert_array_equal(np.asarray(OPERATIONS["Invert"](image, 1.0, 1)), np.asarray(ImageOps.invert(image)))


def test_randaugment_depends_on_its_generator_and_nothing_else():
    image = photo(16, 16)
    results = [
        randaugment(image, np.random.default_rng(seed), num_layers=2, magnitude=10).tobytes() for seed in range(60)
    ]
    again = randaugment(image, np.random.default_rng(7), num_layers=2, magnitude=10).tobytes()
    assert again == results[7]
    assert len(set(results)) > 40
