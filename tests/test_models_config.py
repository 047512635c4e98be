"""Sizes, names and rules: what a checkpoint or a config file relies on."""

import jax
import jax.numpy as jnp
import pytest

from levattn.attention import AttentionSpec
from levattn.models import ModelConfig, ViT, attention_specs, count_params, decode

A, B, DENSE = AttentionSpec("leverage", k=4), AttentionSpec("row_norm", k=4), AttentionSpec()

# Zhai et al. (arXiv 2106.04560), table 2, and Alabdulmohsin et al. (arXiv 2305.13035).
PUBLISHED = """
    Ti       192  12   768   3
    S        384  12  1536   6
    B        768  12  3072  12
    L       1024  24  4096  16
    So400m  1152  27  4304  16
    H       1280  32  5120  16
    g       1408  40  6144  16
"""


@pytest.mark.parametrize("row", PUBLISHED.split("\n")[1:-1])
def test_variants_have_the_published_sizes(row):
    name, *sizes = row.split()
    variant = decode(f"{name}/14")
    assert [variant.width, variant.depth, variant.mlp_dim, variant.num_heads, variant.patch] == [*map(int, sizes), 14]


@pytest.mark.parametrize(
    "variant, message",
    [
        ("SO400M/14", "did you mean 'So400m'"),
        ("s/16", "did you mean 'S'"),
        ("Z/16", "Known sizes: mu, Ti, S"),
        ("S", "needs a patch size .* 'S/16'"),
        ("S/0", "needs a patch size"),
        ("S/x", "needs a patch size"),
    ],
)
def test_unknown_variants_are_refused_with_the_next_step(variant, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(variant)


@pytest.mark.parametrize(
    "config, expected",
    [
        (ModelConfig("S/16"), 22_049_896),
        (ModelConfig("Ti/16", pool="cls"), 5_717_416 - 192),  # DeiT counts a position for the class token
        (ModelConfig("S/16", pool="cls"), 22_050_664 - 384),
        (ModelConfig("B/16", pool="cls"), 86_567_656 - 768),
        (ModelConfig("L/16", pool="cls", scan=True), 304_326_632 - 1024),
    ],
    ids=lambda value: value.variant if isinstance(value, ModelConfig) else str(value),
)
def test_parameter_counts_are_the_published_ones(config, expected):
    assert count_params(config, (224, 224, 3)) == expected


DINOV2 = {"variant": "S/14", "pool": "cls", "layer_scale": 1.0, "num_classes": 0}


@pytest.mark.parametrize(
    "fields, side, expected",
    [
        ({"variant": "Ti/16", "pool": "cls", "distilled": True}, 224, 5_910_800 - 2 * 192),  # positions, as above
        (DINOV2, 518, 22_056_192 - 384),
        ({**DINOV2, "num_registers": 4}, 518, 22_057_344),
    ],
    ids=["distilled DeiT", "DINOv2", "DINOv2 with registers"],
)
def test_parameter_counts_with_more_tokens_are_the_published_ones(fields, side, expected):
    assert count_params(ModelConfig(**fields), (side, side, 3)) == expected


def test_names_and_shapes_of_s16_are_big_visions():
    """A changed line here breaks every published checkpoint: change the reader, not this list."""
    config = ModelConfig("S/16", num_classes=10, pool="cls", rep_size=True)
    params = jax.eval_shape(ViT(config).init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    leaves = jax.tree.leaves_with_path(params)
    shapes = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape for path, leaf in leaves}

    def dense(name, *shape):
        return {f"{name}/kernel": shape, f"{name}/bias": shape[-1:]}

    def norm(name):
        return {f"{name}/scale": (384,), f"{name}/bias": (384,)}

    expected = {
        **dense("embedding", 16, 16, 3, 384),
        "pos_embedding": (1, 196, 384),
        "cls": (1, 1, 384),
        **norm("Transformer/encoder_norm"),
        **dense("pre_logits", 384, 384),
        **dense("head", 384, 10),
    }
    for layer in range(12):
        block = f"Transformer/encoderblock_{layer}"
        attention = f"{block}/MultiHeadDotProductAttention_0"
        expected |= norm(f"{block}/LayerNorm_0") | norm(f"{block}/LayerNorm_1")
        for name in ("query", "key", "value"):
            expected |= {f"{attention}/{name}/kernel": (384, 6, 64), f"{attention}/{name}/bias": (6, 64)}
        expected |= {f"{attention}/out/kernel": (6, 64, 384), f"{attention}/out/bias": (384,)}
        expected |= dense(f"{block}/MlpBlock_0/Dense_0", 384, 1536)
        expected |= dense(f"{block}/MlpBlock_0/Dense_1", 1536, 384)
    assert shapes == expected


def test_attention_leaves_the_parameter_tree_alone():
    trees = [
        jax.eval_shape(ViT(ModelConfig("mu/4", attention=spec)).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
        for spec in (DENSE, A)
    ]
    assert trees[0] == trees[1]


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"pool": "gap"}, 0),
        ({"pool": "cls"}, 1),
        ({"pool": "cls_gap"}, 1),
        ({"pool": "gap", "class_token": True}, 1),
        ({"pool": "cls", "num_registers": 4}, 5),
        ({"pool": "gap", "num_registers": 4}, 4),
        ({"pool": "cls", "distilled": True}, 2),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_tokens_before_the_patches_are_counted(fields, expected):
    assert ModelConfig(**fields).num_prefix_tokens == expected


@pytest.mark.parametrize(
    "rules, expected",
    [
        ((), "....."),
        ((("0-1", A),), "AA..."),
        ((("2,-1", A),), "..A.A"),
        ((("-3--2", A),), "..AA."),
        ((("even", A), ("odd", B)), "ABABA"),
        ((("0--1", A), ("1", B), ("1 , 3", DENSE)), "A.A.A"),
    ],
)
def test_rules_name_layers_and_the_last_one_wins(rules, expected):
    config = ModelConfig("mu/4", depth=5, attention_by_layer=rules)
    names = {A: "A", B: "B", DENSE: "."}
    assert "".join(names[spec] for spec in attention_specs(config)) == expected
    hash(config)


@pytest.mark.parametrize(
    "rule, message", [("5", "outside 0 to 4"), ("-6", "outside"), ("3-1", "backwards"), ("x", "'x' must")]
)
def test_rules_that_name_no_layer_are_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        attention_specs(ModelConfig("mu/4", depth=5, attention_by_layer=((rule, A),)))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"pool": "tok"}, "pool='tok' must be one of 'cls', 'gap', 'map'"),
        ({"posemb": "sincos"}, "did you mean 'sincos2d'"),
        ({"activation": "relu"}, "activation='relu'"),
        ({"dtype": "float16"}, "dtype='float16'"),
        ({"remat": "dots_savable"}, "did you mean 'dots_saveable'"),
        ({"width": 100}, "width=100 must be a multiple of num_heads=6"),
        ({"width": 6, "posemb": "sincos2d"}, "width=6 must be a multiple of 4"),
        ({"depth": 0}, "depth=0 must be at least 1"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"stochastic_depth": 1.0}, r"stochastic_depth=1.0 must be in \[0, 1\)"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"final_norm": "pool"}, "final_norm='pool' must be one of 'tokens', 'pooled'"),
        ({"num_registers": -1}, "num_registers=-1"),
        ({"pool": "cls", "class_token": False}, "class_token=False must be None or True for pool='cls'"),
        ({"pool": "gap", "distilled": True}, "distilled=True needs pool='cls'"),
        ({"pool": "cls", "distilled": True, "rep_size": True}, "needs .* rep_size=False"),
        ({"pool": "cls", "distilled": True, "final_norm": "pooled"}, "needs .* final_norm='tokens'"),
        ({"scan": True, "attention_by_layer": (("0", A),)}, "scan=True needs the same attention"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_fields_out_of_range_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**fields)
