"""What tensors do not tell comes from a config, a published name or whoever loads it; a guess is said to be one."""

import argparse
import dataclasses
import json
import warnings

import jax
import numpy as np
import pytest
import safetensors.numpy
from checkpoints import random_params, save_torch, to_old_naming, to_timm
from PIL import Image
from reference_vit import golden_arrays
from test_pretrained_clip import four_times_as_wide
from test_pretrained_hugging_face import CASES, VIT, save_case
from test_pretrained_load import IMAGENET, SIZE, TIMM, assert_same_params, save_timm

import levattn
from levattn.analysis.evaluation import describe_model, run_evaluation
from levattn.data import DataConfig, normalize, open_source
from levattn.data.transforms import resize_short_and_centre_crop
from levattn.models.pretrained import Content, LoadOptions, Preprocess, read_content, read_pretrained
from levattn.models.pretrained.hub_config import CLIP
from levattn.models.pretrained.layouts.timm import _preprocess
from levattn.models.pretrained.posemb import resize_positions
from levattn.training.config import EvalConfig
from levattn.training.loaded import load_model

DEIT = Preprocess(SIZE, 17, **IMAGENET)
ALL = ("heads", "activation", "shape of images", "mean and std", "resize")


def state_of(model=TIMM):
    params = random_params(model, SIZE)
    return params, {name: np.ascontiguousarray(x) for name, x in to_timm(params).items()}


# Files


@pytest.mark.parametrize("residue", range(0, 256, 8))
def test_a_header_of_any_length_is_that_of_safetensors(tmp_path, residue):
    """The first byte is the low one of the header's length, and may be the magic number of any format."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header = header.ljust(256 + residue)
    data = np.array([1, 2], np.float32).tobytes()
    (tmp_path / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    np.testing.assert_array_equal(read_content(tmp_path / "w.safetensors").arrays["w"], [1, 2])


@pytest.mark.parametrize("suffix", ["onnx", "safetensors", "pth", "npz"])
def test_an_empty_file_is_said_to_be_empty(tmp_path, suffix):
    (tmp_path / f"x.{suffix}").touch()
    with pytest.raises(ValueError, match="is empty: download it again"):
        read_content(tmp_path / f"x.{suffix}")


def test_bytes_under_the_name_of_json_are_told_to_be_none(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x80\x81")
    with pytest.raises(ValueError, match=r"x\.json' is not valid JSON"):
        levattn.load_pretrained(tmp_path / "x.json")


# Guesses


@pytest.mark.parametrize(
    "name, guessed",
    [
        ("best", ALL),
        ("deit_lookalike", ALL),
        ("vit_tiny_patch16_224.augreg_in21k", ()),
        ("deit_small_patch16_224-cd65a155", ()),
        ("mae_pretrain_vit_base", ()),
        ("flexivit_small.1200ep_in1k", ()),
    ],
)
def test_what_a_name_does_not_tell_is_said_to_be_guessed(tmp_path, name, guessed):
    path = save_timm(tmp_path / f"{name}.safetensors")
    assert read_pretrained(path).guessed == guessed
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        levattn.load_pretrained(path)
    assert [all(what in str(warning.message) for what in guessed) for warning in caught] == [True] * bool(guessed)


def test_a_config_beside_the_file_leaves_nothing_to_guess(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "deit_small_patch16_224"}))
    pretrained = read_pretrained(save_timm(tmp_path / "best.safetensors"))
    assert (pretrained.guessed, pretrained.preprocess) == ((), DEIT)


def test_the_name_of_a_published_model_goes_before_all_else(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_small_patch16_224"}))
    path = save_timm(tmp_path / "best.safetensors")
    pretrained = levattn.load_pretrained(path, arch="timm/deit_medium_patch4_224.fb_in1k")
    assert (pretrained.preprocess, pretrained.name) == (DEIT, "best")


@pytest.mark.parametrize(
    "arch, message",
    [
        ("resnet50", "no published model's name, such as"),
        ("deit_medium_patch16_224", "patches of 16 pixels, and .* has patches of 4 pixels"),
        ("vit_tiny_patch4_224", "tokens 192 wide, and .* has tokens 128 wide"),
    ],
)
def test_a_name_that_is_not_that_of_the_model_is_refused(tmp_path, arch, message):
    with pytest.raises(ValueError, match=message):
        levattn.load_pretrained(save_timm(tmp_path / "best.safetensors"), arch=arch)


def test_a_name_is_refused_where_it_tells_nothing(tmp_path):
    np.savez(tmp_path / "vit.npz", **to_old_naming(random_params(dataclasses.replace(TIMM, activation="gelu"), SIZE)))
    with pytest.raises(ValueError, match="tells nothing of a model of big_vision"):
        levattn.load_pretrained(tmp_path / "vit.npz", arch="vit_base_patch16_224")


@pytest.mark.parametrize(
    "args, expected",
    [
        ({"model": "deit_base_patch4_224"}, DEIT),
        ({"model": "vit_base_patch4_224", "mean": [0.1, 0.2, 0.3], "std": (0.5, 0.5, 0.5)}, {"mean": (0.1, 0.2, 0.3)}),
        ({"model": "vit_base_patch4_224", "crop_pct": 0.5, "interpolation": "bilinear"}, {"resize": 32}),
        ({"model": "deit_base_patch4_224", "input_size": 224, "opt": "adamw", "mean": None}, DEIT),
    ],
)
def test_what_a_training_script_left_beside_the_weights_is_read(tmp_path, args, expected):
    """As timm's own saver writes it: the name under "arch", the options as a Namespace under "args"."""
    params, state = state_of()
    beside = {"arch": args["model"], "args": argparse.Namespace(**args, lr=0.1, betas=(0.9, 0.95), resume=None)}
    save_torch(tmp_path / "model_best.pth.tar", state, wrapped_in=("state_dict",), beside=beside)
    pretrained = read_pretrained(tmp_path / "model_best.pth.tar")
    assert_same_params(pretrained, params)
    assert pretrained.guessed == ()
    found = dataclasses.asdict(pretrained.preprocess)
    expected = dataclasses.asdict(expected) if isinstance(expected, Preprocess) else expected
    assert {name: found[name] for name in expected} == expected


def test_the_options_of_the_model_in_a_training_script_are_read(tmp_path):
    args = argparse.Namespace(model="mine", model_kwargs={"num_heads": 4, "act_layer": "quick_gelu"}, crop_pct=0.9)
    save_torch(tmp_path / "x.pth", state_of()[1], wrapped_in=("state_dict",), beside={"args": args})
    pretrained = read_pretrained(tmp_path / "x.pth")
    assert (pretrained.model.dims.num_heads, pretrained.model.activation) == (4, "quick_gelu")
    assert pretrained.guessed == ("shape of images", "mean and std", "resize")


def test_options_nested_without_end_cost_nothing(tmp_path):
    deep = {"x": 1}
    for _ in range(60):
        deep = {"a": deep, "b": deep}
    save_torch(tmp_path / "x.pth", state_of()[1], wrapped_in=("state_dict",), beside={"args": {"deep": deep}})
    assert read_content(tmp_path / "x.pth").metadata["training"]["args"] == {"deep": {}}


@pytest.mark.parametrize(
    "changed, guessed",
    [
        ({}, ("mean and std", "resize")),
        ({"config": None, "name": "vit-base-patch16-224"}, ()),
        ({"config": None, "name": "mine"}, ALL),
    ],
)
def test_guesses_on_models_of_transformers(tmp_path, changed, guessed):
    folder = tmp_path / changed.get("name", "mine")
    folder.mkdir()
    if changed:  # heads 64 wide
        state = {"vit." + name: x for name, x in to_hugging_face(random_params(TIMM, SIZE)).items()}
        safetensors.numpy.save_file(state, folder / "model.safetensors")
    else:
        save_case(folder, VIT, config=VIT["config"] | {"model_type": "vit"})
    assert read_pretrained(folder).guessed == guessed


def to_hugging_face(params):
    """An encoder without a head as the transformers library names it."""
    state = to_timm({name: x for name, x in params.items() if not name.startswith("head/")})
    names = {
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "blocks.": "encoder.layer.",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    found = {}
    for name, array in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        name = name.replace("norm.", "layernorm.") if name.startswith("norm.") else name
        if "attn.qkv" in name:
            for part, rows in zip(("query", "key", "value"), np.split(array, 3), strict=True):
                found[name.replace("attn.qkv", f"attention.attention.{part}")] = np.ascontiguousarray(rows)
        else:
            found[name] = np.ascontiguousarray(array)
    return found


@pytest.mark.parametrize(
    "name, size, resize",
    [  # of timm's own definitions
        ("vit_base_patch16_224.augreg2_in21k_ft_in1k", 224, 248),
        ("vit_base_patch16_384.augreg_in21k_ft_in1k", 384, 384),
        ("deit3_base_patch16_224.fb_in1k", 224, 248),
        ("deit3_base_patch16_224.fb_in22k_ft_in1k", 224, 224),
        ("vit_large_patch14_clip_224.openai", 224, 224),
        ("vit_base_patch16_clip_224.openai", 224, 248),
        ("vit_base_patch16_clip_224.laion2b_ft_in12k_in1k", 224, 235),
        ("vit_little_patch16_reg4_gap_256.sbb_in1k", 256, 269),
        ("vit_base_patch16_siglip_384.webli", 384, 426),
        ("flexivit_small.1200ep_in1k", 240, 252),
        ("vit_medium_patch16_gap_240.sw_in12k", 240, 252),
        ("vit_base_patch16_224_miil.in21k", 224, 256),
        ("vit_small_patch14_dinov2.lvd142m", 518, 518),
    ],
)
def test_the_crop_of_published_models_is_timms(tmp_path, name, size, resize):
    assert _preprocess(size, {}, Content(tmp_path / f"{name}.safetensors", {}, {}).name).resize == resize


# Shapes and names


@pytest.mark.parametrize("teller", ["hugging_face", "img_size", "input_size", "name", "long_name", "arch", "user"])
def test_images_that_are_not_square_have_a_grid_of_their_own_where_something_tells(tmp_path, teller):
    """4 x 16 patches are as many as 8 x 8. Resized, the positions are those of their own grid."""
    params = random_params(TIMM, 32)
    state = {name: np.ascontiguousarray(x) for name, x in to_timm(params).items()}
    file = {"name": "vit_base_patch4_16x64", "long_name": "vit_base_patch4_gap_016_064.tag"}.get(teller, "model")
    told = {"arch": "vit_medium_patch4_16x64.tag"} if teller == "arch" else {}
    native = {"image_size": (16, 64)} if teller == "user" else {}
    if teller in ("img_size", "input_size"):
        config = {"img_size": {"model_args": {"img_size": [16, 64]}}}
        config["input_size"] = {"pretrained_cfg": {"input_size": [3, 16, 64]}}
        (tmp_path / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch4_224"} | config[teller]))
    elif teller == "hugging_face":
        state = {"vit." + name: x for name, x in to_hugging_face(params).items()}
        told = {"arch": "vit-base-patch4-224"}
        (tmp_path / "config.json").write_text(json.dumps({"image_size": [16, 64], "num_attention_heads": 2}))
    path = tmp_path / f"{file}.safetensors"
    safetensors.numpy.save_file(state, path)

    wide = read_pretrained(path, LoadOptions(**told, **native))
    assert (wide.preprocess.image_size, min(wide.preprocess.resize, 32)) == ((16, 64), wide.preprocess.resize)
    assert "shape of images" not in wide.guessed
    np.testing.assert_array_equal(wide.params["pos_embedding"], params["pos_embedding"])
    if teller != "user":  # who has said the other size
        method = "bicubic" if teller == "hugging_face" else "bicubic_antialias"
        for size, grid in ((32, (8, 8)), ((32, 64), (8, 16))):
            got = read_pretrained(path, LoadOptions(size, **told))
            expected = resize_positions(params["pos_embedding"], (4, 16), grid, method)
            np.testing.assert_array_equal(got.params["pos_embedding"], expected)
            assert got.preprocess.image_size == size


def test_a_size_to_come_is_none_that_a_published_model_was_trained_on(tmp_path):
    """16 x 64 pixels have as many patches as the 32 x 32 that the model is known to have seen."""
    params = random_params(TIMM, 32)
    path = tmp_path / "vit_medium_patch4_32.safetensors"
    safetensors.numpy.save_file({name: np.ascontiguousarray(x) for name, x in to_timm(params).items()}, path)
    expected = resize_positions(params["pos_embedding"], (8, 8), (4, 16), "bicubic_antialias")
    got = read_pretrained(path, LoadOptions((16, 64)))
    np.testing.assert_array_equal(got.params["pos_embedding"], expected)


@pytest.mark.parametrize("case", [VIT, CASES[5]], ids=["ViT", "DINOv2"])
def test_the_grid_of_positions_goes_before_the_size_in_the_preprocessor(tmp_path, case):
    """2 x 8 patches in the config, beside a preprocessor that makes squares."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 32, "crop_size": 24}))
    pretrained = read_pretrained(save_case(tmp_path, case, config=case["config"] | {"image_size": [8, 32]}))
    stored = next(x for name, x in golden_arrays(case["shapes"]).items() if name.endswith("position_embeddings"))
    assert (pretrained.preprocess.image_size, pretrained.preprocess.resize) == ((8, 32), 8)
    np.testing.assert_array_equal(pretrained.params["pos_embedding"], stored[:, -16:])


def test_a_square_number_of_positions_is_a_guess_where_nothing_tells(tmp_path):
    path = save_timm(tmp_path / "best.safetensors")
    assert read_pretrained(path).preprocess.image_size == SIZE
    for size in (None, 2 * SIZE, (SIZE, 2 * SIZE)):  # the last two are not what it was trained on
        assert "shape of images" in read_pretrained(path, LoadOptions(size)).guessed


def test_evaluation_asks_for_a_square_of_a_model_that_has_none(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "x", "model_args": {"img_size": [8, 32]}}))
    path = save_timm(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="images of 8x32 pixels, and data are prepared as squares: give image_size"):
        load_model(path, "fake:num_classes=5,size=20,channels=3")
    loaded = load_model(path, "fake:num_classes=5,size=20,channels=3", options=LoadOptions(SIZE))
    assert (loaded.config.data.image_size, loaded.params["pos_embedding"].shape) == (SIZE, (1, 16, 128))


@pytest.mark.parametrize("size", [-16, [], [4, 4, 4], "16"])
def test_sizes_in_a_config_that_are_none_are_refused(tmp_path, size):
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": size}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"image_size=.* is neither a side|recognised as timm, but"):
        read_pretrained(save_timm(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("size", [0, -8, (16, 0)])
def test_a_size_that_is_none_is_refused(tmp_path, size):
    with pytest.raises(ValueError, match=r"image_size=.* must be pixels"):
        levattn.load_pretrained(save_timm(tmp_path / "model.safetensors"), image_size=size)


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (16, 64), (18, 34), (200, 22)])
@pytest.mark.parametrize("crop", [(16, 64), (64, 16)])
def test_a_crop_that_is_no_square_is_covered_by_the_image_and_cut_from_its_centre(shape, crop):
    image = np.zeros((*shape, 3), np.uint8)
    image[: shape[0] // 2], image[:, : shape[1] // 2, 1] = (255, 0, 0), 255
    pixels = Preprocess(crop, 20, mean=(0.0,) * 3, std=(1.0,) * 3)(image)
    assert pixels.shape == (*crop, 3)
    # Both edges stay in the middle, within two pixels, and no side of the crop lies outside of the image.
    for axis, channel in ((1, 0), (0, 1)):
        profile = pixels[..., channel].mean(axis=axis) - pixels[-1, -1, channel]
        assert abs(np.sum(profile) / profile[0] - crop[1 - axis] / 2) <= 2


def test_positions_that_do_not_fit_the_size_in_the_config_are_refused(tmp_path):
    path = save_timm(tmp_path / "model.safetensors")
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"img_size": 20}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="17 positions, which are not those of 5 x 5 patches"):
        read_pretrained(path)


def test_a_square_number_that_leaves_the_class_token_no_position_is_refused(tmp_path):
    """14 x 12 patches and a class token are 13 x 13 positions."""
    width = VIT["shapes"]["vit.embeddings.position_embeddings"][-1]
    changed = {"vit.embeddings.position_embeddings": np.ones((1, 169, width), np.float32)}
    config = {name: value for name, value in VIT["config"].items() if name != "image_size"}
    with pytest.raises(ValueError, match="169 positions, which are not those of a square of patches"):
        read_pretrained(save_case(tmp_path, VIT, changed=changed, config=config))


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.module.", "model.net."])
@pytest.mark.parametrize("layout", ["timm", "transformers", "open_clip"])
def test_what_training_code_puts_before_all_names_is_taken_off(tmp_path, prefix, layout):
    if layout == "timm":
        arrays = state_of()[1]
    elif layout == "transformers":
        arrays = dict(safetensors.numpy.load_file(save_case(tmp_path, VIT) / "model.safetensors"))
    else:
        arrays = four_times_as_wide()
    found = []
    for name in ("vit_tiny_patch16_224", "vit_tiny_patch16_224_wrapped"):
        safetensors.numpy.save_file(arrays, tmp_path / f"{name}.safetensors")
        found.append(read_pretrained(tmp_path / f"{name}.safetensors"))
        arrays = {prefix + name: x for name, x in arrays.items()}
    assert found[0].model == found[1].model
    jax.tree.map(np.testing.assert_array_equal, found[0].params, found[1].params)


def test_of_weights_and_their_average_the_average_is_read_and_that_is_said(tmp_path):
    params, state = state_of()
    both = {f"model.{name}": x + 1 for name, x in state.items()}
    both |= {f"ema_model.module.{name}": x for name, x in state.items()}
    both["ema_model.n_averaged"] = np.array(3)
    save_torch(tmp_path / "last.ckpt", both, wrapped_in=("state_dict",))
    pretrained = read_pretrained(tmp_path / "last.ckpt")
    assert_same_params(pretrained, params)
    assert "averaged over training, under 'ema_model.module.', are read" in pretrained.notes[0]


def test_a_prefix_as_long_as_a_name_may_be_is_no_trouble(tmp_path):
    safetensors.numpy.save_file({"model." * 2000 + "w": np.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="of no layout that is known here"):
        read_pretrained(tmp_path / "x.safetensors")


def test_the_decoder_of_mae_is_not_taken_for_its_encoder(tmp_path):
    """Version 5 of the library names the decoder's blocks as those of an encoder."""
    encoder = to_hugging_face(random_params(TIMM, SIZE))
    arrays = {f"decoder.decoder_encoder.{name}": x[..., :1] for name, x in encoder.items()}
    arrays |= {f"vit.{name}": x for name, x in encoder.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit_mae", "image_size": SIZE}))
    pretrained = read_pretrained(tmp_path)
    assert pretrained.head is None
    assert pretrained.params["cls"].shape == (1, 1, 128)
    assert pretrained.preprocess.mean == IMAGENET["mean"]


@pytest.mark.parametrize(
    "name, outputs, head, guessed",
    [
        ("vit_base_patch16_clip_224.openai_ft_in12k", 512, "classifier", False),
        ("vit_base_patch16_clip_224.openai", 512, "projection", False),
        ("vit_base_patch16_clip_224.openai", 1000, "classifier", False),
        ("mine", 512, "projection", True),
        ("mine", 5, "classifier", False),
    ],
)
def test_a_classifier_of_clip_with_a_bias_of_zeros_is_told_by_name_and_size(tmp_path, name, outputs, head, guessed):
    model = dataclasses.replace(TIMM, pre_norm=True, layer_norm_eps=1e-5, num_classes=outputs)
    state = state_of(model)[1] | {"head.bias": np.zeros(outputs, np.float32)}
    safetensors.numpy.save_file(state, tmp_path / f"{name}.safetensors")
    pretrained = read_pretrained(tmp_path / f"{name}.safetensors")
    assert (pretrained.head, "head" in pretrained.guessed) == (head, guessed)
    assert pretrained.preprocess.mean == (CLIP["mean"] if name != "mine" else (0.5, 0.5, 0.5))


# The download cache of Hugging Face


@pytest.fixture
def cache(tmp_path, monkeypatch):
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return tmp_path / "hf" / "hub"


def download(cache, repository, revision, **changed):
    """As the library lays it out: blobs by their hash, and links to them in a snapshot."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot, blob = folder / "snapshots" / revision, folder / "blobs" / f"of{revision}"
    snapshot.mkdir(parents=True)
    blob.parent.mkdir(exist_ok=True)
    save_timm(blob, **changed)
    (snapshot / "model.safetensors").symlink_to(blob)
    return folder


@pytest.mark.parametrize("spec", ["timm/{}", "hf-hub:timm/{}"])
def test_the_name_of_a_repository_finds_its_main_snapshot_in_the_cache(cache, spec):
    name = "deit_tiny_patch16_224.fb_in1k"
    folder = download(cache, f"timm/{name}", "a" * 40, **{"head.bias": np.full(5, 7, np.float32)})
    download(cache, f"timm/{name}x", "c" * 40)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("a" * 40)
    save_timm(folder / "other")
    (folder / "snapshots" / ("b" * 40)).mkdir()
    pretrained = levattn.load_pretrained(spec.format(name))
    assert (pretrained.name, pretrained.preprocess) == (name, DEIT)
    assert pretrained.params["head"]["bias"][0] == 7


def test_without_a_branch_the_newest_snapshot_is_taken(cache):
    download(cache, "google/vit_base_patch4_224", "a" * 40)
    assert levattn.load_pretrained("google/vit_base_patch4_224").name == "vit_base_patch4_224"


def test_a_repository_that_was_not_downloaded_is_told_with_the_command(cache):
    for load_fn in (levattn.load_pretrained, load_model):
        with pytest.raises(FileNotFoundError, match=r"nothing is downloaded here, so run `hf download google/vit-x`"):
            load_fn("google/vit-x")


def test_results_on_a_repository_go_under_runs(cache, tmp_path, monkeypatch):
    from levattn.analysis.evaluation import _folder_for_results

    download(cache, "timm/deit_tiny_patch16_224", "a" * 40)
    trained = load_model("timm/deit_tiny_patch16_224", "fake:num_classes=5,size=20,channels=3")
    config = EvalConfig("timm/deit_tiny_patch16_224")
    assert _folder_for_results(config, trained).as_posix() == "runs/deit_tiny_patch16_224"
    assert _folder_for_results(dataclasses.replace(config, checkpoint=str(tmp_path)), trained) == tmp_path


# What people see


def test_a_model_is_described_with_what_is_a_guess(tmp_path):
    trained = load_model(save_timm(tmp_path / "best.safetensors"), "fake:num_classes=5,size=20,channels=3")
    text = describe_model(trained)
    for part in (
        "2 heads (a guess), gelu_exact (a guess), output: classifier",
        "images at 16 x 16 pixels (a guess), cut from a short side of 17, bicubic (a guess)",
        "mean 0.5, 0.5, 0.5, std 0.5, 0.5, 0.5 (a guess)",
        "--arch=",
    ):
        assert part in text
    known = load_model(
        tmp_path / "best.safetensors", trained.config.data.source, options=LoadOptions(arch="vit_medium_patch4_224")
    )
    assert "guess" not in describe_model(known)


def test_a_calibration_says_on_how_many_images_and_that_it_found_nothing_better(tmp_path, capsys):
    (tmp_path / "photographs" / "all").mkdir(parents=True)
    for i in range(3):
        Image.effect_noise((20 + i, 24), 60).convert("RGB").save(tmp_path / "photographs" / "all" / f"{i}.png")
    path = save_timm(tmp_path / "vit_medium_patch4_224.safetensors")
    asked = {"attention": ("leverage",), "k": (17,), "calibrate": 32, "out": str(tmp_path / "out")}
    run_evaluation(EvalConfig(str(path), source=f"folder:{tmp_path / 'photographs'}", **asked))
    out = capsys.readouterr().out
    assert "calibrated on 3 images, all there are: 32 were asked for" in out
    assert "no other choice came nearer to dense attention: k=17 is kept in every layer" in out
    assert json.loads((tmp_path / "out" / "budgets.json").read_text())["num_images"] == 3


def test_photographs_that_lie_flat_are_told_where_to_go(tmp_path):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="without classes go into one subfolder, which is enough"):
        open_source(DataConfig(source=f"folder:{tmp_path}"), "train")


@pytest.mark.parametrize("shape", [(40, 60), (61, 33), (24, 24), (20, 20), (21, 90)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("channels", [1, 3])
def test_one_call_makes_a_photograph_the_input_that_evaluation_makes_of_it(shape, interpolation, channels):
    photograph = np.random.default_rng(0).integers(0, 256, (*shape, channels), dtype=np.uint8)
    mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.4)[:channels]
    preprocess = Preprocess(20, 24, interpolation, mean, std)
    cut = resize_short_and_centre_crop(photograph, 20, short_side=24, interpolation=interpolation)
    expected = normalize(cut[None], DataConfig(source="fake", mean=mean, std=std))[0]
    np.testing.assert_array_equal(preprocess(photograph), expected)
    pillow = Image.fromarray(photograph[:, :, 0] if channels == 1 else photograph)
    np.testing.assert_array_equal(preprocess(pillow), expected)


def test_photographs_of_other_forms_are_converted_or_refused():
    preprocess = Preprocess(8, 8)
    grey = np.arange(200, dtype=np.uint8).reshape(10, 20)
    np.testing.assert_array_equal(preprocess(grey), preprocess(np.stack([grey] * 3, axis=-1)))
    turned = Image.fromarray(grey)
    turned.getexif()[0x0112] = 6  # of a camera held upright
    np.testing.assert_array_equal(preprocess(turned), preprocess(np.rot90(grey, -1)))
    for wrong in (
        grey / 255,
        np.zeros((3, 10, 10), np.uint8),
        np.zeros((2, 10, 10, 3), np.uint8),
        np.zeros(3, np.uint8),
    ):
        with pytest.raises(ValueError, match="must be uint8"):
            preprocess(wrong)


def test_every_case_of_the_library_still_loads_without_a_note(tmp_path):
    for i, case in enumerate(CASES):
        (tmp_path / str(i)).mkdir()
        assert read_pretrained(save_case(tmp_path / str(i), case), LoadOptions(16)).notes == ()
