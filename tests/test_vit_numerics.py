"""The forward pass against plain float64 numpy, written from the parameter names of big_vision's ViT."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import softmax

from levattn.attention import AttentionSpec
from levattn.models import ModelConfig, ViT

ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "gelu_exact": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
}


def layer_norm(p, x, eps):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]


def attention(p, q_in, kv_in):
    def project(name, x):
        return np.einsum("bsc,chd->bshd", x, p[name]["kernel"]) + p[name].get("bias", 0)

    q, k, v = project("query", q_in), project("key", kv_in), project("value", kv_in)
    probs = softmax(np.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1]))
    out = np.einsum("bhts,bshd->bthd", probs, v)
    return np.einsum("bthd,hdc->btc", out, p["out"]["kernel"]) + p["out"].get("bias", 0)


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def mlp(p, x, activation):
    return dense(p["Dense_1"], ACTIVATIONS[activation](dense(p["Dense_0"], x)))


def sincos2d(height, width, features):
    out = np.zeros((height * width, features))
    quarter = features // 4
    for y in range(height):
        for x in range(width):
            for i in range(quarter):
                frequency = 10_000 ** (-i / (quarter - 1))
                waves = np.sin(x * frequency), np.cos(x * frequency), np.sin(y * frequency), np.cos(y * frequency)
                out[y * width + x, i::quarter] = waves
    return out


def forward(params, images, config):
    """Logits in float64."""
    patch, eps = config.dims.patch, config.layer_norm_eps
    batch, height, width, _ = images.shape
    rows, columns = height // patch, width // patch
    patches = [
        images[:, patch * y : patch * (y + 1), patch * x : patch * (x + 1)] for y in range(rows) for x in range(columns)
    ]
    x = np.einsum("sbhwc,hwcf->bsf", np.stack(patches), params["embedding"]["kernel"]) + params["embedding"]["bias"]
    x = x + (params["pos_embedding"] if "pos_embedding" in params else sincos2d(rows, columns, x.shape[-1]))
    if config.pool == "cls":
        x = np.concatenate([np.repeat(params["cls"], batch, 0), x], 1)
    if "pre_norm" in params:
        x = layer_norm(params["pre_norm"], x, eps)
    encoder = params["Transformer"]
    for layer in range(config.dims.depth):
        p = encoder[f"encoderblock_{layer}"]
        scales = [p[f"LayerScale_{i}"]["scale"] if "LayerScale_0" in p else 1 for i in range(2)]
        y = layer_norm(p["LayerNorm_0"], x, eps)
        x = x + scales[0] * attention(p["MultiHeadDotProductAttention_0"], y, y)
        y = layer_norm(p["LayerNorm_1"], x, eps)
        x = x + scales[1] * mlp(p["MlpBlock_0"], y, config.activation)
    x = layer_norm(encoder["encoder_norm"], x, eps)
    if config.pool == "gap":
        x = x.mean(1)
    elif config.pool == "cls":
        x = x[:, 0]
    else:
        p = params["MAPHead_0"]
        x = attention(p["MultiHeadDotProductAttention_0"], np.repeat(p["probe"], batch, 0), x)
        x = (x + mlp(p["MlpBlock_0"], layer_norm(p["LayerNorm_0"], x, eps), config.activation))[:, 0]
    if config.rep_size:
        x = np.tanh(dense(params["pre_logits"], x))
    return dense(params["head"], x) if config.num_classes else x


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
    ],
    ids=lambda options: "-".join(options),
)
def test_options_of_pretrained_families_match_numpy(options):
    check(ModelConfig(**{"variant": "mu/4", "depth": 2, "num_classes": 5, **options}))


def test_leverage_attention_that_keeps_all_keys_is_the_dense_model():
    """With k = S nothing is left out, whatever the order of the selected keys."""
    check(ModelConfig("mu/4", depth=2, num_classes=5, pool="cls", attention=AttentionSpec("leverage", k=7)))
