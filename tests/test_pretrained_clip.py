"""Image towers of CLIP under every name that they go by; their outputs: test_pretrained_hugging_face.py."""

import json
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
from reference_vit import golden_arrays
from test_pretrained_hugging_face import CASES, save_case

from levattn.models.pretrained import Preprocess, read_pretrained
from levattn.models.pretrained.hub_config import CLIP

BOTH_TOWERS, TOWER, SIGLIP = CASES[10], CASES[11], CASES[13]


def as_open_clip_names_it(case):
    """The arrays of the image tower, and some of a text tower, as github.com/mlfoundations/open_clip has them."""
    renamed, projections = {}, {}
    names = {
        "embeddings.patch_embedding": "conv1",
        "embeddings.class_embedding": "class_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layrnorm": "ln_pre",
        "post_layernorm": "ln_post",
        "encoder.layers.": "transformer.resblocks.",
        "layer_norm": "ln_",
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for name, array in golden_arrays(case["shapes"]).items():
        if name == "visual_projection.weight":
            renamed["visual.proj"] = np.ascontiguousarray(array.T)
        if not name.startswith("vision_model."):
            continue
        name = name.replace("vision_model.", "visual.")
        for old, new in names.items():
            name = name.replace(old, new)
        if match := re.fullmatch(r"(.*)self_attn.(q|k|v)_proj.(weight|bias)", name):
            projections.setdefault(f"{match[1]}attn.in_proj_{match[3]}", {})[match[2]] = array
        else:
            renamed[name] = array
    for name, parts in projections.items():
        renamed[name] = np.concatenate([parts["q"], parts["k"], parts["v"]])
    text = {"transformer.resblocks.0.attn.in_proj_weight": (24, 8), "positional_embedding": (4, 8), "logit_scale": ()}
    return renamed | {name: np.ones(shape, np.float32) for name, shape in text.items()}


def four_times_as_wide():
    """A width whose number of heads is known."""
    sizes = {32: 128, 96: 384}
    arrays = as_open_clip_names_it(BOTH_TOWERS)
    return {name: np.resize(array, [sizes.get(n, n) for n in array.shape]) for name, array in arrays.items()}


def save_open_clip(folder, *, changed=None, **model_cfg):
    arrays = as_open_clip_names_it(BOTH_TOWERS) | (changed or {})
    safetensors.numpy.save_file(arrays, folder / "open_clip_model.safetensors")
    config = {"model_cfg": {"vision_cfg": {"width": 32, "head_width": 16}} | model_cfg, "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return folder


def test_open_clip_and_transformers_are_one_model(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    got = read_pretrained(save_open_clip(tmp_path / "a", quick_gelu=True))
    expected = read_pretrained(save_case(tmp_path / "b", BOTH_TOWERS))
    assert (got.model, got.preprocess, got.head) == (expected.model, expected.preprocess, expected.head)
    jax.tree.map(np.testing.assert_array_equal, got.params, expected.params)


@pytest.mark.parametrize(
    "name, activation",
    [
        ("ViT-B-16-laion2b_s34b_b88k", "gelu_exact"),
        ("vit_b_32-quickgelu-laion400m_e31", "quick_gelu"),
        ("vit_base_patch32_clip_224.laion400m_e32", "gelu_exact"),
        ("vit_base_patch16_clip_224.openai", "quick_gelu"),
        ("DFN2B-CLIP-ViT-B-16", "quick_gelu"),
        ("DFN2B-CLIP-ViT-L-14-39B", "gelu_exact"),
    ],
)
def test_without_a_config_the_name_tells_the_activation(name, activation, tmp_path):
    safetensors.numpy.save_file(four_times_as_wide(), tmp_path / f"{name}.safetensors")
    assert read_pretrained(tmp_path / f"{name}.safetensors").model.activation == activation


def test_a_config_that_names_no_activation_means_the_exact_one(tmp_path):
    (tmp_path / "metaclip_400m").mkdir()
    assert read_pretrained(save_open_clip(tmp_path / "metaclip_400m")).model.activation == "gelu_exact"


def test_openais_own_files_are_told_by_the_numbers_in_them(tmp_path):
    arrays = four_times_as_wide()
    safetensors.numpy.save_file(arrays, tmp_path / "others.safetensors")
    arrays |= {"input_resolution": np.array(16), "context_length": np.array(4), "vocab_size": np.array(3)}
    safetensors.numpy.save_file(arrays, tmp_path / "ViT-B-16.safetensors")
    assert read_pretrained(tmp_path / "others.safetensors").model.activation == "gelu_exact"
    assert read_pretrained(tmp_path / "ViT-B-16.safetensors").model.activation == "quick_gelu"


def test_normalisation_is_that_of_the_config(tmp_path):
    save_open_clip(tmp_path)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["preprocess_cfg"] = {"mean": [0.5, 0.25, 0.5], "std": [0.5, 0.5, 1]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    expected = Preprocess(16, 16, "bicubic", mean=(0.5, 0.25, 0.5), std=(0.5, 0.5, 1.0))
    assert read_pretrained(tmp_path).preprocess == expected


def test_layer_scale_of_small_open_clip_models_is_read(tmp_path):
    scales = {
        f"visual.transformer.resblocks.{layer}.ls_{i}.gamma": np.full(32, 0.1 * layer + i, np.float32)
        for layer in range(2)
        for i in (1, 2)
    }
    pretrained = read_pretrained(save_open_clip(tmp_path, changed=scales))
    assert pretrained.model.layer_scale is not None
    for layer in range(2):
        block = pretrained.params["Transformer"][f"encoderblock_{layer}"]
        for i in range(2):
            np.testing.assert_allclose(block[f"LayerScale_{i}"]["scale"], 0.1 * layer + i + 1)


def test_towers_alone_and_buffers_of_old_files_are_read(tmp_path):
    """A tower saved by version 4 of the library has a prefix, and the numbers of its positions."""
    (tmp_path / "new").mkdir(), (tmp_path / "old").mkdir()
    expected = read_pretrained(save_case(tmp_path / "new", TOWER))
    arrays = golden_arrays(TOWER["shapes"])
    changed = dict.fromkeys(arrays) | {f"vision_model.{name}": array for name, array in arrays.items()}
    changed["vision_model.embeddings.position_ids"] = np.arange(17)[None]
    got = read_pretrained(save_case(tmp_path / "old", TOWER, changed=changed))
    assert got.model == expected.model
    assert got.preprocess == expected.preprocess == Preprocess(16, 16, "bicubic", **CLIP)
    jax.tree.map(np.testing.assert_array_equal, got.params, expected.params)


def test_heads_that_do_not_read_the_class_token_are_refused(tmp_path):
    """The library's classifiers on CLIP average tokens before the last LayerNorm."""
    changed = {"classifier.weight": np.ones((5, 32), np.float32), "visual_projection.weight": None}
    with pytest.raises(ValueError, match=r"a CLIPForImageClassification, .* through no last LayerNorm"):
        read_pretrained(save_case(tmp_path, BOTH_TOWERS, changed=changed))


@pytest.mark.parametrize(
    "missing, message",
    [
        ("head.attention.in_proj_bias", "is missing"),
        ("head.mlp.fc1.weight", r"head.mlp.fc1.weight \(48, 32\) is missing"),
    ],
)
def test_siglips_pooling_must_be_whole(missing, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_pretrained(save_case(tmp_path, SIGLIP, changed={missing: None}))
