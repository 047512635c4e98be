"""DINOv2 under its authors' names, and as a part of larger models; its outputs: test_pretrained_hugging_face.py."""

import json
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
from reference_vit import golden_arrays
from test_pretrained_hugging_face import CASES, save_case

from levattn.models.pretrained import LoadOptions, read_pretrained

PLAIN, GIANT, REGISTERS = CASES[5], CASES[6], CASES[8]


def as_its_authors_name_it(case):
    """The arrays of a file of the transformers library, as github.com/facebookresearch/dinov2 has them."""
    renamed, projections = {}, {}
    names = {
        "embeddings.patch_embeddings.projection": "patch_embed.proj",
        "embeddings.position_embeddings": "pos_embed",
        "embeddings.": "",
        "encoder.layer.": "blocks.",
        "attention.output.dense": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
        "weights_in": "w12",
        "weights_out": "w3",
        "layernorm": "norm",
    }
    for name, array in golden_arrays(case["shapes"]).items():
        for old, new in names.items():
            name = name.replace(old, new)
        if match := re.fullmatch(r"(blocks.\d+.)attention.attention.(query|key|value)(.*)", name):
            projections.setdefault(f"{match[1]}attn.qkv{match[3]}", {})[match[2]] = array
        else:
            renamed[name] = array
    for name, parts in projections.items():
        renamed[name] = np.concatenate([parts["query"], parts["key"], parts["value"]])
    return renamed


@pytest.mark.parametrize("case", [PLAIN, GIANT, REGISTERS], ids=["plain", "swiglu", "registers"])
def test_both_namings_are_one_model(case, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    safetensors.numpy.save_file(as_its_authors_name_it(case), tmp_path / "dinov2.safetensors")
    got = read_pretrained(tmp_path / "dinov2.safetensors", LoadOptions(24))
    (tmp_path / "transformers").mkdir()
    expected = read_pretrained(save_case(tmp_path / "transformers", case), LoadOptions(24))
    assert (got.model, got.layout, got.preprocess) == (expected.model, expected.layout, expected.preprocess)
    jax.tree.map(np.testing.assert_array_equal, got.params, expected.params)


def test_names_of_its_authors_tell_what_does_not_fit(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2}))
    arrays = as_its_authors_name_it(REGISTERS)
    del arrays["blocks.1.attn.qkv.bias"]
    arrays["blocks.1.mlp.fc2.bias"], arrays["dino_head.last_layer.weight"] = np.zeros((2, 9), np.float32)
    safetensors.numpy.save_file(arrays, tmp_path / "dinov2.safetensors")
    with pytest.raises(ValueError, match="recognised as DINOv2 with registers") as error:
        read_pretrained(tmp_path / "dinov2.safetensors")
    for problem in (
        "blocks.1.attn.qkv.bias (96,) is missing",
        "blocks.1.mlp.fc2.bias is (9,), not (32,)",
        "dino_head.last_layer.weight is not known here",
    ):
        assert problem in str(error.value)


def test_what_is_built_on_a_backbone_is_left_out(tmp_path):
    (tmp_path / "alone").mkdir(), (tmp_path / "inside").mkdir()
    expected = read_pretrained(save_case(tmp_path / "alone", PLAIN), LoadOptions(16))
    arrays = golden_arrays(PLAIN["shapes"])
    changed = dict.fromkeys(arrays) | {f"backbone.{name}": array for name, array in arrays.items()}
    changed |= {"neck.layers.0.weight": np.ones((3, 3), np.float32), "head.weight": np.ones((3, 3), np.float32)}
    got = read_pretrained(save_case(tmp_path / "inside", PLAIN, changed=changed), LoadOptions(16))
    assert got.model == expected.model
    jax.tree.map(np.testing.assert_array_equal, got.params, expected.params)
