"""Files of big_vision and vision_transformer give back the model that was put into them."""

import dataclasses

import numpy as np
import pytest
from checkpoints import random_params, to_old_naming
from flax.traverse_util import flatten_dict, unflatten_dict

from levattn.models import ModelConfig, unrolled_to_scan
from levattn.models.pretrained import AS_PUBLISHED, LoadOptions, Preprocess, read_pretrained

MODEL = ModelConfig("B/4", num_classes=5, width=16, depth=3, num_heads=2, mlp_dim=24, pool="gap", class_token=False)
CLS = dataclasses.replace(MODEL, pool="cls", class_token=True)
SIZE = 16


def assert_reads(path, model, params, options=AS_PUBLISHED):
    """The file is read as this model with these parameters."""
    pretrained = read_pretrained(path, options)
    assert (pretrained.layout, pretrained.model) == ("big_vision", model)
    found = flatten_dict(pretrained.params, sep="/")
    assert found.keys() == params.keys()
    for name, array in params.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=1e-7, err_msg=name)
    return pretrained


@pytest.mark.parametrize(
    "model",
    [
        MODEL,
        CLS,
        dataclasses.replace(MODEL, pool="map"),
        dataclasses.replace(CLS, rep_size=8),
        dataclasses.replace(MODEL, rep_size=16, num_classes=0),
        dataclasses.replace(MODEL, qkv_bias=False),
        ModelConfig("mu/8", num_classes=3, class_token=False),
    ],
    ids=["gap", "cls", "map", "cls-rep", "gap-rep", "no bias", "mu"],
)
@pytest.mark.parametrize("prefix", ["", "params/", "opt/target/"])
def test_models_of_big_vision_come_back(tmp_path, model, prefix):
    params = random_params(model, SIZE)
    other = {"opt/mu/head/kernel": np.zeros(3), "chrono": np.zeros(1)} if prefix == "params/" else {}
    np.savez(tmp_path / "vit.npz", **{prefix + name: x for name, x in params.items()}, **other)
    pretrained = assert_reads(tmp_path / "vit.npz", model, params)
    assert pretrained.head == ("classifier" if model.num_classes else None)
    assert pretrained.name == "vit"
    resize = round(SIZE * 8 / 7) if model.num_classes else SIZE
    assert pretrained.preprocess == Preprocess(SIZE, resize, "bilinear", (0.5,) * 3, (0.5,) * 3)


def test_fixed_positions_are_told_by_their_absence(tmp_path):
    model = dataclasses.replace(MODEL, posemb="sincos2d")
    params = random_params(model, SIZE)
    np.savez(tmp_path / "vit.npz", **params)
    assert_reads(tmp_path / "vit.npz", model, params, LoadOptions(SIZE))
    assert read_pretrained(tmp_path / "vit.npz").preprocess.image_size == 224


def test_scanned_layers_are_taken_apart(tmp_path):
    params = random_params(MODEL, SIZE)
    stacked = flatten_dict(unrolled_to_scan(unflatten_dict(params, sep="/")), sep="/")
    np.savez(tmp_path / "vit.npz", **{f"params/{name}": np.asarray(x) for name, x in stacked.items()})
    assert_reads(tmp_path / "vit.npz", MODEL, params)


@pytest.mark.parametrize("prefix", ["params/img/", "img/"])
def test_of_two_towers_the_image_tower_is_taken_and_its_head_is_a_projection(tmp_path, prefix):
    model = dataclasses.replace(MODEL, pool="map")
    params = random_params(model, SIZE)
    root = prefix.removesuffix("img/")
    text = {f"{root}txt/Encoder_0/encoderblock_0/x": np.zeros(2), f"{root}t": np.zeros(1), f"{root}b": np.zeros(1)}
    np.savez(tmp_path / "siglip.npz", **{prefix + name: x for name, x in params.items()}, **text)
    pretrained = assert_reads(tmp_path / "siglip.npz", model, params)
    assert (pretrained.head, pretrained.preprocess.resize) == ("projection", SIZE)


@pytest.mark.parametrize("rep_size", [False, 16])
def test_augreg_files_come_back_with_the_position_of_the_class_token_in_the_token(tmp_path, rep_size):
    model = dataclasses.replace(CLS, rep_size=rep_size)
    params = random_params(model, SIZE)
    np.savez(tmp_path / "B_16-i21k-300ep--imagenet2012-res_384.npz", **to_old_naming(params))
    pretrained = assert_reads(tmp_path / "B_16-i21k-300ep--imagenet2012-res_384.npz", model, params)
    assert pretrained.preprocess == Preprocess(SIZE, SIZE, "bilinear")


def test_named_sizes_are_found_again(tmp_path):
    model = ModelConfig("Ti/16", num_classes=2, pool="cls")
    np.savez(tmp_path / "vit.npz", **random_params(model, 32))
    found = read_pretrained(tmp_path / "vit.npz").model
    assert (found.variant, found.width, found.dims) == ("Ti/16", None, model.dims)


@pytest.mark.parametrize(
    "extra, what",
    [
        ({"conv_root/kernel": (7, 7, 3, 64)}, "a ResNet before its blocks"),
        ({"embedding/kernel": (48, 16)}, r"a dense layer \(NaFlex\)"),
        ({"Transformer/encoderblock_1/MoeMlpBlock_3/w": (1,)}, "mixtures of experts"),
    ],
)
def test_relatives_that_are_no_plain_vit_are_refused_by_what_they_are(tmp_path, extra, what):
    params = random_params(MODEL, SIZE) | {name: np.ones(shape, np.float32) for name, shape in extra.items()}
    np.savez(tmp_path / "vit.npz", **params)
    with pytest.raises(ValueError, match=what):
        read_pretrained(tmp_path / "vit.npz")
