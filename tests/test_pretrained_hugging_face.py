"""Checkpoints as the transformers library saves them give the outputs of that library."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from peers import import_transformers
from reference_vit import forward, golden_arrays, golden_images

from levattn.models import ViT
from levattn.models.pretrained import Content, LoadOptions, Preprocess, read_pretrained
from levattn.models.pretrained.encoder import default_heads
from levattn.models.pretrained.hub_config import read_preprocess
from levattn.models.vit import EncoderBlock

CASES = json.loads((Path(__file__).parent / "golden" / "transformers_vit.json").read_text())["cases"]
VIT, DISTILLED, CLIP = CASES[0], CASES[4], CASES[10]


def save_case(folder, case, *, changed=None, config=None):
    """The folder that the library saves; `changed` arrays in place of some, None for one that is left out."""
    arrays = golden_arrays(case["shapes"]) | (changed or {})
    arrays = {name: array for name, array in arrays.items() if array is not None}
    safetensors.numpy.save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    if config != {}:
        (folder / "config.json").write_text(json.dumps(config or case["config"]))
    return folder


def float64_outputs(pretrained, images):
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), dict(pretrained.params))
    return forward(params, images, pretrained.model)


@pytest.mark.parametrize("size", ["16", "24"])
@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{case['model']}" for i, case in enumerate(CASES)])
def test_outputs_are_the_librarys_own_at_any_size(case, size, tmp_path):
    """Golden outputs, printed by the library in float64. If this fails, files that it saved mean something else here:
    mend the reader. The library resizes position embeddings in float32."""
    pretrained = read_pretrained(save_case(tmp_path, case), LoadOptions(int(size)))
    expected = np.array(case["outputs"][size])
    got = float64_outputs(pretrained, golden_images(int(size)))
    np.testing.assert_allclose(got, expected, atol=1e-6 * np.abs(expected).max())
    assert np.std(expected) > 1e-2


def test_flax_agrees_with_the_golden_outputs(tmp_path):
    pretrained = read_pretrained(save_case(tmp_path, DISTILLED), LoadOptions(16))
    images = golden_images(16).astype(np.float32)
    logits = jax.jit(ViT(pretrained.model).apply)({"params": pretrained.params}, images)
    np.testing.assert_allclose(logits, DISTILLED["outputs"]["16"], atol=1e-5)


@pytest.mark.parametrize(
    "case, fields, head",
    [
        (0, {"num_classes": 5, "pool": "cls", "num_prefix_tokens": 1, "layer_norm_eps": 1e-12}, "classifier"),
        (1, {"activation": "gelu", "num_classes": 2}, "classifier"),
        (2, {"rep_size": 32, "num_classes": 0}, None),
        (3, {"distilled": False, "num_registers": 1}, "classifier"),
        (4, {"distilled": True, "num_registers": 0, "num_classes": 3}, "classifier"),
        (6, {"activation": "swiglu", "layer_scale": 1.0}, None),
        (7, {"pool": "cls_gap", "num_classes": 2}, "classifier"),
        (8, {"num_registers": 4, "pool": "cls", "num_classes": 0}, None),
        (10, {"head_bias": False, "pre_norm": True, "activation": "quick_gelu", "num_classes": 6}, "projection"),
        (12, {"activation": "gelu_exact", "layer_norm_eps": 1e-5}, "projection"),
        (13, {"pool": "map", "class_token": None, "num_prefix_tokens": 0, "activation": "gelu"}, None),
    ],
)
def test_what_each_family_is_read_as(case, fields, head, tmp_path):
    pretrained = read_pretrained(save_case(tmp_path, CASES[case]), LoadOptions(16))
    assert {name: getattr(pretrained.model, name) for name in fields} == fields
    assert pretrained.head == head


def test_everything_that_does_not_fit_is_told_at_once(tmp_path):
    layer = "vit.encoder.layer.1."
    changed = {
        f"{layer}attention.attention.key.weight": None,
        f"{layer}attention.attention.key.bias": None,
        "vit.embeddings.patch_embeddings.projection.bias": None,
        "vit.layernorm.bias": np.zeros(7, np.float32),
        "vit.embeddings.detection_tokens": np.zeros((1, 9, 32), np.float32),
    }
    with pytest.raises(ValueError, match="recognised as transformers ViT") as error:
        read_pretrained(save_case(tmp_path, VIT, changed=changed))
    for problem in (
        f"{layer}attention.attention.key.weight (32, 32) is missing",
        f"{layer}attention.attention.key.bias (32,) is missing",
        "vit.embeddings.patch_embeddings.projection.bias (32,) is missing",
        "vit.layernorm.bias is (7,), not (32,)",
        "vit.embeddings.detection_tokens is not known here",
    ):
        assert problem in str(error.value)


def test_heads_without_a_config_are_those_of_published_widths(tmp_path):
    with pytest.raises(ValueError, match=r"width 32 .* put the config.json"):
        read_pretrained(save_case(tmp_path, VIT, config={}))
    shapes = {name: [{32: 128, 48: 256}.get(n, n) for n in shape] for name, shape in VIT["shapes"].items()}
    pretrained = read_pretrained(save_case(tmp_path, VIT | {"shapes": shapes}, config={}))
    assert pretrained.model.dims.num_heads == 2
    assert (pretrained.model.activation, pretrained.model.layer_norm_eps) == ("gelu_exact", 1e-12)


@pytest.mark.parametrize("width, num_heads", [(192, 3), (1024, 16), (1152, 16), (1280, 16), (1536, 24), (1664, 16)])
def test_published_encoders_have_these_heads(width, num_heads):
    assert default_heads(width) == num_heads


@pytest.mark.parametrize(
    "case, config, changed, message",
    [
        (VIT, {"hidden_act": "relu"}, {}, "hidden_act='relu' in the config is not one of gelu,"),
        (CASES[2], {"pooler_act": "relu"}, {}, "pooler_act='relu'"),
        (VIT, {"num_attention_heads": 5}, {}, "num_heads=5 in the config does not divide the width 32"),
        (VIT, {}, {"vit.embeddings.position_embeddings": np.zeros((1, 19, 32), np.float32)}, "19 positions, .* square"),
        (
            VIT,
            {},
            {"vit.embeddings.patch_embeddings.projection.weight": np.zeros((32, 3, 4, 2), np.float32)},
            "no convolution",
        ),
        (VIT, {}, {"classifier.weight": np.zeros((5, 32), np.float32)}, "all zeros"),
        (VIT, {}, {"vit.embeddings.patch_embeddings.projection.weight": None}, "the checkpoint lacks 'vit.embeddings"),
    ],
    ids=["activation", "pooler", "heads", "positions", "patches", "zero head", "no patches"],
)
def test_what_this_vit_is_not_is_refused(case, config, changed, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_pretrained(save_case(tmp_path, case, changed=changed, config=case["config"] | config))


def test_names_of_modules_are_read_as_those_of_files_are(tmp_path):
    """Version 5 of the library calls its modules otherwise than the files it saves; exports have the modules' names."""
    modules = {
        "encoder.layer.": "layers.",
        "attention.attention.query": "attention.q_proj",
        "attention.attention.key": "attention.k_proj",
        "attention.attention.value": "attention.v_proj",
        "attention.output.dense": "attention.o_proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    changed = {}
    for name, array in golden_arrays(DISTILLED["shapes"]).items():
        changed[name] = None
        for old, new in modules.items():
            name = name.replace(old, new)
        changed[name] = array
    (tmp_path / "files").mkdir(), (tmp_path / "modules").mkdir()
    expected = read_pretrained(save_case(tmp_path / "files", DISTILLED), LoadOptions(16))
    got = read_pretrained(save_case(tmp_path / "modules", DISTILLED, changed=changed), LoadOptions(16))
    assert got.model == expected.model
    jax.tree.map(np.testing.assert_array_equal, got.params, expected.params)


def test_pretraining_by_masked_patches_leaves_its_decoder_behind(tmp_path):
    extra = {"decoder.mask_token": (1, 1, 8), "decoder.decoder_layers.0.output.dense.weight": (8, 8)}
    changed = {name: np.ones(shape, np.float32) for name, shape in extra.items()}
    changed |= {"classifier.weight": None, "classifier.bias": None}
    pretrained = read_pretrained(save_case(tmp_path, VIT, changed=changed))
    assert (pretrained.head, pretrained.model.num_classes) == (None, 0)


@pytest.mark.parametrize(
    "kind, name",
    [
        ("beit", "BeitForImageClassification"),
        ("audio-spectrogram-transformer", "ASTModel"),
        ("yolos", "YolosForObjectDetection"),
        ("dpt", "DPTForSemanticSegmentation"),
        ("vilt", "ViltModel"),
        ("vision-encoder-decoder", "VisionEncoderDecoderModel"),
    ],
)
def test_models_whose_names_are_alike_and_that_are_no_vit_are_refused_by_name(kind, name, tmp_path):
    config = VIT["config"] | {"model_type": kind} | {"architectures": [name]}
    with pytest.raises(ValueError, match=f"is a {name} of transformers .* no plain Vision"):
        read_pretrained(save_case(tmp_path, VIT, config=config))


def test_what_is_of_no_layout_is_named_by_its_config(tmp_path):
    safetensors.numpy.save_file({"layers.0.weight": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["SwinModel"], "model_type": "swin"}))
    with pytest.raises(ValueError, match="is a SwinModel, of no layout that is known here"):
        read_pretrained(tmp_path)


def test_the_library_saves_blocks_of_vit_msn_without_the_prefix_of_the_rest(tmp_path):
    arrays = golden_arrays(VIT["shapes"])
    changed = dict.fromkeys(arrays) | {name.replace("vit.encoder.", "encoder."): x for name, x in arrays.items()}
    (tmp_path / "vit").mkdir(), (tmp_path / "msn").mkdir()
    expected = read_pretrained(save_case(tmp_path / "vit", VIT))
    got = read_pretrained(
        save_case(tmp_path / "msn", VIT, changed=changed, config=VIT["config"] | {"model_type": "vit_msn"})
    )
    assert (got.model, got.preprocess.mean) == (expected.model, IMAGENET["mean"])
    jax.tree.map(np.testing.assert_array_equal, got.params, expected.params)


def test_an_encoder_without_a_class_token_averages_its_patches(tmp_path):
    """I-JEPA; its positions are those of the patches alone."""
    embeddings = "vit.embeddings."
    positions = golden_arrays(VIT["shapes"])[f"{embeddings}position_embeddings"][:, 1:]
    changed = {f"{embeddings}cls_token": None, f"{embeddings}position_embeddings": positions}
    config = VIT["config"] | {"model_type": "ijepa"}
    pretrained = read_pretrained(save_case(tmp_path, VIT, changed=changed, config=config))
    assert (pretrained.model.pool, pretrained.model.num_prefix_tokens, pretrained.head) == ("gap", 0, "classifier")
    np.testing.assert_array_equal(pretrained.params["pos_embedding"], positions)


def test_a_classifier_on_siglip_averages_its_patches_and_leaves_the_pooling_out(tmp_path):
    (tmp_path / "tower").mkdir(), (tmp_path / "classifier").mkdir()
    tower = read_pretrained(save_case(tmp_path / "tower", CASES[13]))
    rng = np.random.default_rng(0)
    kernel, bias = rng.normal(size=(5, 32)).astype(np.float32), rng.normal(size=5).astype(np.float32)
    changed = {"classifier.weight": kernel, "classifier.bias": bias}
    pretrained = read_pretrained(save_case(tmp_path / "classifier", CASES[13], changed=changed))
    assert (pretrained.model.pool, pretrained.head, "MAPHead_0" in pretrained.params) == ("gap", "classifier", False)
    images = golden_images(16)
    tokens = {name: value for name, value in dict(tower.params).items() if name != "MAPHead_0"}
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tokens)
    mean = forward(params, images, dataclasses.replace(tower.model, pool="gap"))
    np.testing.assert_allclose(float64_outputs(pretrained, images), mean @ kernel.T + bias, rtol=1e-9)


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@pytest.mark.parametrize(
    "found, expected",
    [
        ({}, Preprocess(96, 100, "bilinear")),
        ({"size": 64, "resample": 3}, Preprocess(64, 64, "bicubic")),
        ({"size": {"height": 64, "width": 64}, "resample": 2}, Preprocess(64, 64, "bilinear")),
        ({"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}}, Preprocess(64, 72, "bilinear")),
        ({"size": 72, "crop_size": 64, "do_center_crop": False}, Preprocess(72, 72, "bilinear")),
        ({"size": 72, "crop_size": 64, "do_center_crop": True}, Preprocess(64, 72, "bilinear")),
        ({"size": 70}, Preprocess(64, 70, "bilinear")),  # 6 pixels that no patch of 8 would see
        (
            {"image_mean": list(IMAGENET["mean"]), "image_std": list(IMAGENET["std"])},
            Preprocess(96, 100, "bilinear", **IMAGENET),
        ),
        ({"do_normalize": False}, Preprocess(96, 100, "bilinear", (0.0,) * 3, (1.0,) * 3)),
    ],
)
def test_preprocessing_is_what_lies_beside_the_file(found, expected, tmp_path):
    content = Content(tmp_path, {}, {"preprocessor": found})
    assert read_preprocess(content, Preprocess(96, 100, "bilinear"), patch=8) == expected


def test_images_that_are_not_square_are_refused(tmp_path):
    content = Content(tmp_path, {}, {"preprocessor": {"size": {"height": 64, "width": 72}}})
    with pytest.raises(ValueError, match=r"size=.*is no square"):
        read_preprocess(content, Preprocess(), patch=8)


@pytest.mark.parametrize(
    "case, expected",
    [
        (VIT, Preprocess(16, 16, "bilinear")),
        (DISTILLED, Preprocess(16, 18, "bicubic", **IMAGENET)),
        (CASES[5], Preprocess(224, 256, "bicubic", **IMAGENET)),
        (CASES[13], Preprocess(16, 16, "bicubic")),
    ],
    ids=["ViT", "DeiT", "DINOv2", "SigLIP"],
)
def test_preprocessing_without_a_file_is_the_familys(case, expected, tmp_path):
    assert read_pretrained(save_case(tmp_path, case)).preprocess == expected


def test_the_file_beside_the_weights_sets_the_size_of_images(tmp_path):
    """Positions come for another size than DINOv2 is used at, and are resized to that."""
    preprocessor = {"size": {"shortest_edge": 32}, "crop_size": {"height": 24, "width": 24}, "resample": 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    pretrained = read_pretrained(save_case(tmp_path, CASES[5]))
    assert pretrained.preprocess == Preprocess(24, 32, "bicubic", **IMAGENET)
    np.testing.assert_allclose(float64_outputs(pretrained, golden_images(24)), CASES[5]["outputs"]["24"], atol=1e-6)


# What follows compares with the library itself: each class that is read, small, and those of the published sizes.

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
SMALL_VIT, CLASSES = SMALL | {"intermediate_size": 48}, {"num_labels": 5}
TWO = {"vision_config": SMALL_VIT, "text_config": {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 20}}


@pytest.mark.optin
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, fields, output, head",
    [
        ("ViTModel", SMALL_VIT, "pooler_output", None),
        ("ViTForImageClassification", SMALL_VIT | CLASSES, "logits", "classifier"),
        ("DeiTModel", SMALL_VIT, "pooler_output", None),
        ("DeiTForImageClassification", SMALL_VIT | CLASSES, "logits", "classifier"),
        ("DeiTForImageClassificationWithTeacher", SMALL_VIT | CLASSES, "logits", "classifier"),
        ("ViTMSNModel", SMALL_VIT, "first", None),
        ("ViTMSNForImageClassification", SMALL_VIT | CLASSES, "logits", "classifier"),
        ("ViTMAEModel", SMALL_VIT | {"mask_ratio": 0.0}, "first", None),
        ("IJepaModel", SMALL_VIT, "mean", None),
        ("IJepaForImageClassification", SMALL_VIT | CLASSES, "logits", "classifier"),
        ("Dinov2Model", SMALL, "pooler_output", None),
        ("Dinov2ForImageClassification", SMALL | CLASSES, "logits", "classifier"),
        ("Dinov2WithRegistersModel", SMALL, "pooler_output", None),
        ("Dinov2WithRegistersForImageClassification", SMALL | CLASSES, "logits", "classifier"),
        ("CLIPModel", TWO | {"projection_dim": 12}, "features", "projection"),
        ("CLIPVisionModel", SMALL_VIT, "pooler_output", None),
        ("CLIPVisionModelWithProjection", SMALL_VIT | {"projection_dim": 12}, "image_embeds", "projection"),
        ("AltCLIPVisionModel", SMALL_VIT, "pooler_output", None),
        ("ChineseCLIPVisionModel", SMALL_VIT, "pooler_output", None),
        ("MetaClip2VisionModelWithProjection", SMALL_VIT | {"projection_dim": 12}, "image_embeds", "projection"),
        ("SiglipModel", TWO, "features", None),
        ("SiglipVisionModel", SMALL_VIT, "pooler_output", None),
        ("SiglipForImageClassification", TWO | CLASSES, "logits", "classifier"),
    ],
)
def test_classes_of_the_library_give_its_outputs(name, fields, output, head, tmp_path):
    transformers = import_transformers()
    import torch

    model = random_model(getattr(transformers, name), fields)
    model.save_pretrained(tmp_path)
    pretrained = read_pretrained(tmp_path, LoadOptions(16))
    assert pretrained.head == head
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2))
    with torch.no_grad():
        found = model.get_image_features(pixel_values=pixels) if output == "features" else model(pixel_values=pixels)
    match output:
        case "first":
            expected = found.last_hidden_state[:, 0]
        case "mean":
            expected = found.last_hidden_state.mean(1)
        case "features":
            expected = getattr(found, "pooler_output", found)
        case _:
            expected = found[output]
    got = jax.jit(ViT(pretrained.model).apply)({"params": pretrained.params}, images)
    expected = expected.numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.optin
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, fields",
    [
        ("BeitForImageClassification", SMALL_VIT),
        ("Data2VecVisionModel", SMALL_VIT),
        ("ASTModel", {"num_hidden_layers": 1, "hidden_size": 24, "intermediate_size": 8}),
        ("YolosModel", SMALL_VIT | {"image_size": [16, 16]}),
        ("VideoMAEModel", SMALL_VIT),
        ("CLIPForImageClassification", TWO),
        ("Siglip2VisionModel", {name: value for name, value in SMALL_VIT.items() if name != "image_size"}),
        ("DINOv3ViTModel", SMALL_VIT),
        ("SwinModel", {"depths": [1], "num_heads": [2]}),
    ],
)
def test_classes_of_the_library_that_are_not_read_are_refused_by_name(name, fields, tmp_path):
    random_model(getattr(import_transformers(), name), fields).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"is an? {name}"):
        read_pretrained(tmp_path)


def random_model(model_class, fields):
    """A model whose every parameter is random: what starts at 0 or 1 would hide a mistake."""
    import torch

    torch.manual_seed(0)
    model = model_class(model_class.config_class(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.03 * torch.randn_like(parameter)
    return model


VIT_S = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
VIT_L = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
DINO_S = {"hidden_size": 384, "num_attention_heads": 6, "patch_size": 14, "image_size": 518}


@pytest.mark.optin
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name, fields, output, variant",
    [
        ("ViTForImageClassification", VIT_S | {"num_labels": 1000}, "logits", "S/16"),
        ("ViTForImageClassification", {"num_labels": 1000}, "logits", "B/16"),
        ("ViTModel", {"patch_size": 32}, "pooler_output", "B/32"),
        ("ViTForImageClassification", VIT_L | {"num_labels": 1000}, "logits", "L/16"),
        ("DeiTForImageClassificationWithTeacher", {"num_labels": 1000}, "logits", "B/16"),
        ("Dinov2Model", DINO_S, "pooler_output", "S/14"),
        ("Dinov2WithRegistersForImageClassification", DINO_S | {"num_labels": 1000}, "logits", "S/14"),
        ("CLIPVisionModelWithProjection", {"patch_size": 16}, "image_embeds", "B/16"),
        ("SiglipVisionModel", {"patch_size": 16}, "pooler_output", "B/16"),
    ],
)
def test_published_sizes_agree_with_the_library_block_by_block(name, fields, output, variant, tmp_path):
    """Features or logits to 1e-4 of their size in float32; if not, the first block that differs is told."""
    transformers = import_transformers()
    import torch

    model = random_model(getattr(transformers, name), fields)
    model.save_pretrained(tmp_path)
    pretrained = read_pretrained(tmp_path)
    assert pretrained.model.variant == variant
    size = pretrained.preprocess.image_size
    images = np.random.default_rng(0).uniform(-1, 1, (1, size, size, 3)).astype(np.float32)

    with torch.no_grad():
        expected = model(torch.from_numpy(images.transpose(0, 3, 1, 2)), output_hidden_states=True)

    @jax.jit
    def apply(params, images):
        is_block = lambda module, _: isinstance(module, EncoderBlock)  # noqa: E731
        return ViT(pretrained.model).apply(
            {"params": params}, images, capture_intermediates=is_block, mutable=["intermediates"]
        )

    got, state = apply(pretrained.params, images)
    blocks = state["intermediates"]["Transformer"]
    for layer in range(pretrained.model.dims.depth - 1):  # the library shows the last one behind its LayerNorm
        ours, theirs = blocks[f"encoderblock_{layer}"]["__call__"][0], expected.hidden_states[layer + 1].numpy()
        error = np.abs(ours - theirs).max() / np.abs(theirs).max()
        assert error < 1e-4, f"block {layer} is the first to differ, by {error:.1e} of its largest entry"
    expected = expected[output].numpy()
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())
    assert np.std(expected) > 1e-3
