"""The forward pass against plain float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference_vit import forward

from levattn.attention import AttentionSpec
from levattn.models import ModelConfig, ViT


def random_params(config, images):
    """Parameters of the model, every one moved off its initial value so that none can be left out unseen."""
    shapes = jax.eval_shape(ViT(config).init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.3, leaf.dtype), shapes)


def check(config):
    images = jax.random.normal(jax.random.key(1), (2, 12, 8, 3))
    params = random_params(config, images)
    got = jax.jit(ViT(config).apply)({"params": params}, images)
    params64, images64 = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, images))
    expected = forward(params64, images64, config)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, atol=2e-5 * np.abs(expected).max(), rtol=2e-5)


@pytest.mark.parametrize("posemb", ["learned", "sincos2d"])
@pytest.mark.parametrize("pool", ["cls", "gap", "map"])
def test_every_pooling_and_position_embedding_matches_numpy(pool, posemb):
    check(ModelConfig("mu/4", depth=2, num_classes=5, pool=pool, posemb=posemb))


@pytest.mark.parametrize(
    "options",
    [
        {"rep_size": True},
        {"rep_size": 24, "num_classes": 0},
        {"activation": "gelu_exact", "layer_norm_eps": 1e-2},
        {"activation": "quick_gelu", "pre_norm": True, "pool": "cls"},
        {"qkv_bias": False, "layer_scale": 0.1},
        {"num_registers": 3, "pool": "cls_gap"},
        {"num_registers": 3, "class_token": True, "pool": "map"},
        {"num_registers": 2, "final_norm": "pooled"},
        {"distilled": True, "num_registers": 2, "pool": "cls"},
        {"activation": "swiglu", "head_bias": False},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_pretrained_families_match_numpy(options):
    check(ModelConfig(**{"variant": "mu/4", "depth": 2, "num_classes": 5, **options}))


def test_leverage_attention_that_keeps_all_keys_is_the_dense_model():
    """With k = S nothing is left out, whatever the order of the selected keys."""
    check(ModelConfig("mu/4", depth=2, num_classes=5, pool="cls", attention=AttentionSpec("leverage", k=7)))
