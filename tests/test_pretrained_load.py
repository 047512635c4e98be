"""Published checkpoints: what is read is the model that was saved, and what does not fit is told, all at once."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
from checkpoints import random_params, save_torch, to_timm
from flax.traverse_util import flatten_dict

from levattn.models import ModelConfig
from levattn.models.pretrained import LoadOptions, Preprocess, read_pretrained
from levattn.models.pretrained.posemb import resize_positions

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
# As timm builds them: heads 64 wide, the exact GELU.
TIMM = ModelConfig("B/4", 5, width=128, depth=2, num_heads=2, mlp_dim=24, pool="cls", activation="gelu_exact")
SIZE = 16


def assert_same_params(pretrained, params):
    found = flatten_dict(pretrained.params, sep="/")
    assert found.keys() == params.keys()
    for name, array in params.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    "model, class_position",
    [
        (TIMM, True),
        (dataclasses.replace(TIMM, layer_scale=1.0), False),
        (dataclasses.replace(TIMM, num_registers=3), False),
        (dataclasses.replace(TIMM, pool="gap", num_registers=2, final_norm="pooled"), False),
        (dataclasses.replace(TIMM, pool="gap", final_norm="pooled", class_token=True), True),
        (dataclasses.replace(TIMM, pool="gap", num_classes=0), False),
        (dataclasses.replace(TIMM, pre_norm=True, layer_norm_eps=1e-5), True),
    ],
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_state_dicts_of_timm_come_back(tmp_path, model, class_position, suffix):
    params = random_params(model, SIZE)
    if model.pre_norm:  # the LayerNorm has the bias
        params["embedding/bias"] *= 0
    state = {name: np.ascontiguousarray(x) for name, x in to_timm(params, class_position=class_position).items()}
    path = tmp_path / f"vit_tiny{suffix}"
    if suffix == ".pth":
        save_torch(path, state, wrapped_in=("model",))
    else:
        safetensors.numpy.save_file(state, path)
    pretrained = read_pretrained(path)
    assert_same_params(pretrained, params)
    alike = dataclasses.replace(pretrained.model, class_token=model.class_token, layer_scale=model.layer_scale)
    assert alike == model
    assert (pretrained.layout, pretrained.name) == ("timm", "vit_tiny")
    assert pretrained.head == ("classifier" if model.num_classes else None)


def save_timm(path, **changed):
    state = {name: np.ascontiguousarray(x) for name, x in to_timm(random_params(TIMM, SIZE)).items()} | changed
    safetensors.numpy.save_file({name: x for name, x in state.items() if x is not None}, path)
    return path


def test_what_no_tensor_tells_comes_from_the_config_beside_the_file(tmp_path):
    save_timm(tmp_path / "model.safetensors")
    config = {
        "architecture": "vit_base_patch16_224",
        "model_args": {"num_heads": 4, "act_layer": "quick_gelu"},
        "pretrained_cfg": {"tag": "mine", "input_size": [3, 16, 16], "crop_pct": 0.8, "interpolation": "bilinear"},
    }
    config["pretrained_cfg"] |= {"mean": [0, 0, 0], "std": [1, 1, 1]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    pretrained = read_pretrained(tmp_path)
    assert (pretrained.model.dims.num_heads, pretrained.model.activation) == (4, "quick_gelu")
    assert pretrained.preprocess == Preprocess(16, 20, "bilinear", (0.0,) * 3, (1.0,) * 3)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("vit_tiny_patch16_224.augreg_in21k", {}),
        ("deit_tiny_patch16_224-a1311bcf", IMAGENET),
        ("mae_pretrain_vit_base", IMAGENET),
        ("vit_base_patch16_224.mae", IMAGENET),
        (
            "vit_base_patch16_224_miil.in21k",
            {"mean": (0.0,) * 3, "std": (1.0,) * 3, "interpolation": "bilinear", "resize": 18},
        ),
    ],
)
def test_and_else_from_the_name(tmp_path, name, expected):
    preprocess = read_pretrained(save_timm(tmp_path / f"{name}.safetensors")).preprocess
    assert preprocess == Preprocess(**({"image_size": SIZE, "resize": 17} | expected))


def test_everything_that_does_not_fit_is_told_in_one_error(tmp_path):
    path = save_timm(
        tmp_path / "vit.safetensors",
        **{
            "blocks.1.mlp.fc2.bias": None,
            "blocks.1.attn.proj.weight": np.zeros((128, 64), np.float32),
            "blocks.0.adapter.weight": np.zeros(3, np.float32),
        },
    )
    with pytest.raises(ValueError, match="recognised as timm, but these tensors do not fit") as error:
        read_pretrained(path)
    lines = {line.strip() for line in str(error.value).splitlines()[1:]}
    assert lines == {
        "blocks.1.mlp.fc2.bias (128,) is missing",
        "blocks.1.attn.proj.weight is (128, 64), not (128, 128)",
        "blocks.0.adapter.weight is not known here",
    }


def test_an_unknown_family_is_shown_by_its_names_beside_the_known_ones(tmp_path):
    arrays = {f"layer{i}.conv1.weight": np.zeros((2, 3), np.float32) for i in range(20)}
    safetensors.numpy.save_file(arrays, tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match=r"of no layout that is known here \(.*big_vision.*timm.*\)") as error:
        read_pretrained(tmp_path / "resnet.safetensors")
    assert "among its 20 tensors" in str(error.value)
    assert "conv1.weight (2, 3)" in str(error.value)


def test_a_head_of_zeros_is_refused_unless_asked_for(tmp_path):
    path = save_timm(tmp_path / "vit.safetensors", **{"head.weight": np.zeros((5, 128), np.float32)})
    with pytest.raises(ValueError, match=r"head/kernel is all zeros.*allow_zero_head=True"):
        read_pretrained(path)
    assert not read_pretrained(path, LoadOptions(allow_zero_head=True)).params["head"]["kernel"].any()


def test_another_image_size_resizes_positions_and_preprocessing(tmp_path):
    path = save_timm(tmp_path / "vit.safetensors")
    small, large = read_pretrained(path), read_pretrained(path, LoadOptions(32))
    assert (large.preprocess.image_size, large.preprocess.resize) == (32, 2 * small.preprocess.resize)
    expected = resize_positions(small.params["pos_embedding"], (4, 4), (8, 8), "bicubic_antialias")
    np.testing.assert_array_equal(large.params["pos_embedding"], expected)
    with pytest.raises(ValueError, match="multiple of the patch size 4"):
        read_pretrained(path, LoadOptions(30))


@pytest.mark.parametrize(
    "extra, what",
    [
        ({"blocks.0.attn.q_norm.weight": (64,)}, "normalised queries and keys"),
        ({"blocks.0.norm1.bias": None}, "RMSNorm"),
        ({"pos_embed": None}, "no learned positions"),
        ({"norm.weight": None, "norm.bias": None}, "no last LayerNorm"),
        ({"blocks.0.attn.relative_position_bias_table": (4, 2)}, "relative positions"),
        ({"pos_embed": (1, 14, 128)}, "square"),
    ],
)
def test_relatives_that_are_no_plain_vit_are_refused_by_what_they_are(tmp_path, extra, what):
    changed = {name: shape and np.ones(shape, np.float32) for name, shape in extra.items()}
    with pytest.raises(ValueError, match=what):
        read_pretrained(save_timm(tmp_path / "vit.safetensors", **changed))


def test_the_encoder_is_found_inside_a_larger_model(tmp_path):
    """MoCo v3 keeps the model beside its moving average, open_clip an image tower beside one for text."""
    params = random_params(dataclasses.replace(TIMM, num_classes=0), SIZE)
    state = {name: np.ascontiguousarray(x) for name, x in to_timm(params).items()}
    moco = {f"base_encoder.{name}": x for name, x in state.items()}
    moco |= {f"momentum_encoder.{name}": x + 1 for name, x in state.items()} | {"predictor.0.weight": np.zeros((2, 2))}
    save_torch(tmp_path / "moco.pth.tar", {f"module.{name}": x for name, x in moco.items()}, wrapped_in=("state_dict",))
    assert_same_params(read_pretrained(tmp_path / "moco.pth.tar"), params)
    two = {f"visual.trunk.{name}": x for name, x in state.items()} | {"text.token_embedding.weight": np.zeros((2, 2))}
    safetensors.numpy.save_file(two, tmp_path / "two.safetensors")
    assert_same_params(read_pretrained(tmp_path / "two.safetensors"), params)
    twins = {f"{side}.{name}": x for name, x in state.items() for side in ("left", "right")}
    safetensors.numpy.save_file(twins, tmp_path / "twins.safetensors")
    with pytest.raises(ValueError, match=r"several image encoders: left\., right\."):
        read_pretrained(tmp_path / "twins.safetensors")
