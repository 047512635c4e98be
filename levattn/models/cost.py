"""What a model costs before anything is compiled: parameters, operations and an estimate of memory."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from levattn.attention.budgets import heads_by_budget
from levattn.attention.local import window_size
from levattn.attention.matched import num_landmarks
from levattn.attention.select import num_kept
from levattn.attention.spec import AttentionSpec
from levattn.models.config import ModelConfig, attention_specs, patch_grid
from levattn.models.vit import ViT


def count_params(config: ModelConfig, image_shape: tuple[int, int, int]) -> int:
    """Number of parameters; nothing is allocated.

    Args:
      config: Of the model.
      image_shape: Height, width and channels.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    params = jax.eval_shape(ViT(config).init, jax.random.key(0), images)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def num_tokens(config: ModelConfig, image_shape: tuple[int, int, int]) -> int:
    """Tokens of an image, those before the patches included."""
    return math.prod(patch_grid(config, image_shape)) + config.num_prefix_tokens


def num_keys(spec: AttentionSpec, tokens: int, head_dim: int) -> int:
    """Keys that each query attends to under `spec`, of one k for all heads, local ones included, at most all."""
    if spec.method == "dense":
        return tokens
    # "matched" counts local keys in its k.
    num_local = 0 if spec.local_window is None or spec.method == "matched" else window_size(spec.local_window)
    return min(tokens, num_kept(spec, tokens, head_dim) + num_local)


def selection_flops(spec: AttentionSpec, tokens: int, num_heads: int, head_dim: int) -> int:
    """Operations a layer spends on an image to choose its keys.

    leverage, by the Gram route: Gram matrix (2 S D^2), its Cholesky factor (D^3 / 3), the inverse of that
    (2 D^3 / 3), the keys times the inverse (2 S D^2) and squared norms (2 S D), per head. Methods that merge work on
    points of 2 D coordinates; "matched" is taken with all of its k in groups. Methods this does not know count as 0:
    their part is then a lower bound.
    """
    if spec.method == "dense":
        return 0
    s, d, k = tokens, head_dim, num_kept(spec, tokens, head_dim)
    leverage = 4 * s * d**2 + 2 * d**3 // 3 + d**3 // 3 + 2 * s * d
    points = 4 * s * d**2 + d**3 // 3  # second moment of the queries, its Cholesky factor, keys in its coordinates
    means = 4 * s * k * d
    seeds, distances = 6 * s * k * d, 4 * s * k * d
    grouping = seeds + (spec.num_iters + 1) * distances + spec.num_iters * means + 2 * s * k * d + means
    m = min(s, num_landmarks(spec, k))
    landmarks = 4 * m * s * d + 2 * m * k * d + 2 * m * s * k  # dense, logits of the groups, mass of the groups
    fit = 2 * m * k**2 + k**3 + 4 * m * k * d + 4 * k**2 * d
    per_head = {
        "leverage": leverage,
        "leverage_merged": leverage + points + distances + means,
        "leverage_groups": leverage + points + grouping,
        "groups": points + grouping,
        "matched": points + grouping + landmarks + fit,
        "pivoted": 2 * s * k * (3 * d + 2 * k) + k**3,  # kernel twice, factor, solve, values
        "row_norm": 2 * s * d,
        "kmeans": (spec.num_iters + 1) * 4 * s * k * d,  # distances to k centres and sums of their members
        "oracle": 2 * s**2 * d,
    }
    return num_heads * per_head.get(spec.method, 0)


def forward_flops(config: ModelConfig, image_shape: tuple[int, int, int]) -> int:
    """Operations of the forward pass for one image; a multiply and an add count as two.

    Matrix products exactly; LayerNorms, activations and softmax by a few operations an entry. A train step costs about
    three times as much, a fourth with remat="full".

    Args:
      config: Of the model.
      image_shape: Height, width and channels.
    """
    dims, tokens = config.dims, num_tokens(config, image_shape)
    s, c, m, h = tokens, dims.width, dims.mlp_dim, dims.num_heads
    patches = tokens - config.num_prefix_tokens
    mlp_layers = 3 if config.activation == "swiglu" else 2
    flops = 2 * patches * dims.patch**2 * image_shape[2] * c
    for spec in attention_specs(config):
        projections, mlp = 8 * s * c**2, 2 * mlp_layers * s * c * m
        elementwise = 20 * s * c + 10 * s * m
        flops += projections + mlp + elementwise
        for of_group, heads in heads_by_budget(spec, h):
            keys = num_keys(of_group, s, c // h)
            attention = len(heads) * (4 * s * keys * (c // h) + 6 * s * keys)
            flops += attention + selection_flops(of_group, s, len(heads), c // h)
    if config.pool == "map":
        flops += 4 * (patches + 1) * c**2 + 4 * patches * c + 2 * mlp_layers * c * m
    pooled = 2 * c if config.pool == "cls_gap" else c
    rep_size = c if config.rep_size is True else int(config.rep_size)
    heads = 1 + config.distilled
    return flops + 2 * pooled * rep_size + 2 * (rep_size or pooled) * config.num_classes * heads


def activation_bytes(config: ModelConfig, image_shape: tuple[int, int, int]) -> int:
    """Estimate of what the backward pass needs of one image.

    Counts the arrays that `jax.vjp` keeps, by shape alone and for whatever attention and remat are set, and with remat
    one block's worth on top, recomputed as the backward pass passes it. XLA then fuses and reuses buffers as it likes:
    expect the truth within a factor of two.

    Args:
      config: Of the model.
      image_shape: Height, width and channels.
    """
    # A scanned model keeps the same arrays and traces a single block; layers that differ enter by their mean.
    uniform = dataclasses.replace(config, attention_by_layer=(), scan=True)
    specs = attention_specs(config)
    models = {spec: dataclasses.replace(uniform, attention=spec) for spec in set(specs)}
    kept = {spec: _kept_bytes(model, image_shape) for spec, model in models.items()}
    total = sum(kept[spec] for spec in specs) // len(specs)
    if config.remat != "none":
        everything = [_kept_bytes(dataclasses.replace(model, remat="none"), image_shape) for model in models.values()]
        total += max(everything) // len(specs)
    return total


def _kept_bytes(config: ModelConfig, image_shape: tuple[int, int, int]) -> int:
    model = ViT(config)

    def backward_fn(key: jax.Array, images: jax.Array):
        params = model.init(key, images)["params"]
        apply_fn = functools.partial(model.apply, train=True, rngs={"dropout": key})
        return jax.vjp(lambda params: apply_fn({"params": params}, images), params)[1]

    def num_bytes(batch_size: int) -> int:
        images = jax.ShapeDtypeStruct((batch_size, *image_shape), jnp.float32)
        residuals = jax.tree.leaves(jax.eval_shape(backward_fn, jax.random.key(0), images))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in residuals)

    return num_bytes(2) - num_bytes(1)  # the parameters are among what is kept, and drop out
