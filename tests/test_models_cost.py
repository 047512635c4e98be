"""Costs told before compiling, against what the compiler and the transformed program say."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from levattn.attention import AttentionSpec, get_method
from levattn.attention.select import num_kept
from levattn.core.leverage import leverage_scores
from levattn.models import ModelConfig, ViT, activation_bytes, forward_flops
from levattn.models.cost import num_keys, selection_flops

MODEL = ModelConfig("Ti/4", depth=2, num_classes=10)
SHAPE = (28, 28, 1)


@pytest.mark.parametrize(
    "config",
    [
        MODEL,
        dataclasses.replace(MODEL, pool="cls", rep_size=True, posemb="sincos2d"),
        dataclasses.replace(MODEL, pool="map", width=96, mlp_dim=256),
        dataclasses.replace(MODEL, pool="cls_gap", num_registers=4, num_classes=1000),
        dataclasses.replace(MODEL, pool="cls", distilled=True, num_classes=1000),
        dataclasses.replace(MODEL, pool="map", num_registers=8, activation="swiglu"),
        dataclasses.replace(MODEL, variant="Ti/2"),
        dataclasses.replace(MODEL, variant="Ti/2", attention=AttentionSpec("row_norm", k=16)),
    ],
    ids=["gap", "cls", "map", "registers", "distilled", "swiglu", "196 tokens", "row_norm"],
)
def test_flops_are_within_a_tenth_of_the_compilers(config):
    images = jnp.zeros((4, *SHAPE))
    params = jax.eval_shape(ViT(config).init, jax.random.key(0), images)
    compiled = jax.jit(ViT(config).apply).lower(params, images).compile()
    assert forward_flops(config, SHAPE) == pytest.approx(compiled.cost_analysis()["flops"] / 4, rel=0.1)


def test_sparse_attention_costs_less_than_dense_by_what_it_leaves_out():
    """Per layer: 4 S (S - K) C products and 6 H S (S - K) softmax operations saved, the choice of keys paid."""
    config = ModelConfig("S/16", depth=1)
    sparse = dataclasses.replace(config, attention=AttentionSpec("leverage", k=32))
    s, k, c, h, d = 196, 32, 384, 6, 64
    gram, cholesky, inverse, whitening, norms = 2 * s * d * d, d**3 // 3, 2 * d**3 // 3, 2 * s * d * d, 2 * s * d
    saved = 4 * s * (s - k) * c + 6 * h * s * (s - k) - h * (gram + cholesky + inverse + whitening + norms)
    assert forward_flops(config, (224, 224, 3)) - forward_flops(sparse, (224, 224, 3)) == saved


@pytest.mark.parametrize("tokens, head_dim", [(197, 64), (50, 16)])
def test_leverage_scores_cost_what_the_compiler_counts(tokens, head_dim):
    """Of the matrix products: the compiler counts a factorisation, a call to LAPACK, as 0."""
    keys = jnp.zeros((1, tokens, 4, head_dim))
    compiled = jax.jit(lambda keys: leverage_scores(keys, method="gram")).lower(keys).compile()
    factorisation = 4 * (head_dim**3 // 3)
    products = selection_flops(AttentionSpec("leverage"), tokens, 4, head_dim) - factorisation
    assert products == pytest.approx(compiled.cost_analysis()["flops"], rel=0.1)


@pytest.mark.parametrize("method", ["leverage_merged", "leverage_groups", "groups", "matched"])
def test_merging_costs_about_what_the_compiler_counts(method):
    """The compiler counts the body of a loop once and a factorisation as 0: one step of k-means, and no seeds."""
    spec = AttentionSpec(method, k=24, num_iters=1)
    shape = jax.ShapeDtypeStruct((1, 197, 4, 64), jnp.float32)
    compiled = jax.jit(lambda *qkv: get_method(method)(*qkv, spec=spec)).lower(shape, shape, shape).compile()
    grouped = 12 if method == "leverage_groups" else 24
    seeds = 0 if method == "leverage_merged" else 4 * 6 * 197 * (grouped - 1) * 64
    counted = compiled.cost_analysis()["flops"] + seeds
    assert selection_flops(spec, 197, 4, 64) == pytest.approx(counted, rel=0.35)


@pytest.mark.parametrize(
    "spec, expected",
    [
        (AttentionSpec("leverage", k=32, local_window="cross"), 37),
        (AttentionSpec("matched", k=32, local_window="cross"), 32),
        (AttentionSpec(), 100),
        (AttentionSpec("leverage", k=32), 32),
        (AttentionSpec("leverage", k=32, local_window=(3, 5)), 47),
        (AttentionSpec("leverage", k=32, local_window=7), 39),
        (AttentionSpec("leverage", k=98, local_window=7), 100),
        (AttentionSpec("leverage", k=None, eps=0.3), 53),
        (AttentionSpec("leverage", k=None, eps=0.3, keep_prefix=1), 54),
    ],
)
def test_keys_that_a_query_sees(spec, expected):
    assert num_keys(spec, tokens=100, head_dim=16) == expected
    if spec.method != "dense" and spec.local_window is None:
        assert num_kept(spec, 100, 16) == expected


def test_activations_are_near_what_the_compiler_sets_aside_for_a_train_step():
    images = jnp.zeros((16, *SHAPE))
    params = jax.eval_shape(ViT(MODEL).init, jax.random.key(0), images)
    grad_fn = jax.grad(lambda params, images: ViT(MODEL).apply(params, images).sum())
    compiled = jax.jit(grad_fn).lower(params, images).compile()
    ratio = 16 * activation_bytes(MODEL, SHAPE) / compiled.memory_analysis().temp_size_in_bytes
    assert 0.5 < ratio < 2


def test_remat_bfloat16_and_sparse_attention_each_need_less_memory():
    base = dataclasses.replace(MODEL, variant="Ti/2", depth=8)
    sizes = {
        remat: activation_bytes(dataclasses.replace(base, remat=remat), SHAPE) for remat in ("none", "dots", "full")
    }
    assert sizes["full"] < sizes["dots"] < sizes["none"]
    assert activation_bytes(dataclasses.replace(base, dtype="bfloat16"), SHAPE) < sizes["none"]
    leverage = AttentionSpec("leverage", k=16)
    sparse = activation_bytes(dataclasses.replace(base, attention=leverage), SHAPE)
    assert sparse < sizes["none"]
    half = dataclasses.replace(base, attention_by_layer=(("even", leverage),))
    assert activation_bytes(half, SHAPE) == pytest.approx((sparse + sizes["none"]) / 2, rel=1e-3)
    assert activation_bytes(dataclasses.replace(base, scan=True), SHAPE) == sizes["none"]
