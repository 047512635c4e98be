"""The forward pass of a Vision Transformer in plain float64 numpy, written from the parameter names of big_vision."""

import math

import numpy as np
from reference import softmax

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
    return x @ p["kernel"] + p.get("bias", 0)


def mlp(p, x, activation):
    hidden = dense(p["Dense_0"], x)
    if activation == "swiglu":
        gate, value = hidden[..., : hidden.shape[-1] // 2], hidden[..., hidden.shape[-1] // 2 :]
        return dense(p["Dense_1"], gate / (1 + np.exp(-gate)) * value)
    return dense(p["Dense_1"], ACTIVATIONS[activation](hidden))


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
    prefix = [np.repeat(params[name], batch, 0) for name in ("cls", "dist", "registers") if name in params]
    x = np.concatenate([*prefix, x], 1)
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
    if config.final_norm == "tokens":
        x = layer_norm(encoder["encoder_norm"], x, eps)
    cls, dist, patches = x[:, 0], x[:, 1], x[:, -rows * columns :]
    if config.pool == "gap":
        x = patches.mean(1)
    elif config.pool == "cls":
        x = cls
    elif config.pool == "cls_gap":
        x = np.concatenate([cls, patches.mean(1)], 1)
    else:
        p = params["MAPHead_0"]
        x = attention(p["MultiHeadDotProductAttention_0"], np.repeat(p["probe"], batch, 0), patches)
        x = (x + mlp(p["MlpBlock_0"], layer_norm(p["LayerNorm_0"], x, eps), config.activation))[:, 0]
    if config.final_norm == "pooled":
        x = layer_norm(params["fc_norm"], x, eps)
    if config.rep_size:
        x = np.tanh(dense(params["pre_logits"], x))
    if config.distilled:
        return (dense(params["head"], x) + dense(params["head_dist"], dist)) / 2
    return dense(params["head"], x) if config.num_classes else x


def golden_arrays(shapes):
    """The weights of the golden cases: large enough that nothing of the model is too small to be seen."""
    rng = np.random.default_rng(0)
    return {name: rng.normal(0.0, 0.2, shapes[name]).astype(np.float32) for name in sorted(shapes)}


def golden_images(size):
    return np.random.default_rng(size).uniform(-1, 1, (2, size, size, 3))
