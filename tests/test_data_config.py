"""Mistakes in a data configuration are refused when it is made, by the name of the field."""

import numpy as np
import pytest

from levattn.data import DataConfig, normalize
from levattn.data.splits import parse_split


@pytest.mark.parametrize(
    "field, changes",
    [
        ("source", {"source": "digit"}),
        ("crop", {"crop": "random_resize"}),
        ("interpolation", {"interpolation": "bicubik"}),
        ("train_split", {"train_split": "train[:90%"}),
        ("image_size", {"image_size": 0}),
        ("eval_resize", {"eval_resize": 256}),
        ("eval_resize", {"eval_resize": 200, "image_size": 224}),
        ("mean", {"mean": (0.5, 0.5, 0.5)}),
        ("std", {"std": (0.0,)}),
        ("crop_area_min", {"crop_area_min": 0.0}),
        ("crop_padding", {"crop_padding": -1}),
        ("randaugment_magnitude", {"randaugment_magnitude": 11}),
        ("num_workers", {"num_workers": -1}),
    ],
)
def test_each_bad_value_is_refused_by_its_field(field, changes):
    with pytest.raises(ValueError, match=field):
        DataConfig(**changes)


def test_a_mistyped_source_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'fashion_mnist'"):
        DataConfig(source="fashion-mnist")


@pytest.mark.parametrize(
    "text, kept",
    [
        ("train", range(10)),
        ("train[:30%]", range(3)),
        ("train[30%:]", range(3, 10)),
        ("train[-2:]", range(8, 10)),
        ("train[2:5]", range(2, 5)),
        ("train[:-10%]", range(9)),
        ("train[:100]", range(10)),
    ],
)
def test_slices_of_a_split_keep_what_python_slices_would(text, kept):
    assert list(range(10))[parse_split(text).slice(10)] == list(kept)
    assert str(parse_split(text)) == text


def test_an_empty_slice_is_refused():
    with pytest.raises(ValueError, match="empty"):
        parse_split("train[5:5]").slice(10)


def test_normalize_equals_float64_arithmetic_and_accepts_jax_arrays_under_strict_promotion():
    import jax

    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), dtype=np.uint8)
    config = DataConfig(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    expected = (images / 255.0 - np.array(config.mean)) / np.array(config.std)
    np.testing.assert_allclose(normalize(images, config), expected, rtol=1e-5, atol=1e-6)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        on_device = jax.jit(lambda images: normalize(images, config))(jax.numpy.asarray(images))
    assert on_device.dtype == np.float32
    np.testing.assert_allclose(on_device, expected, rtol=1e-5, atol=1e-6)


def test_normalize_refuses_three_means_for_grey_images():
    config = DataConfig(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    with pytest.raises(ValueError, match="mean"):
        normalize(np.zeros((1, 2, 2, 1), np.uint8), config)
