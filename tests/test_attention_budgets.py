"""A k for each head: what a head gets is what it would get alone, whatever the others have, and at its own cost."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from levattn.analysis.evaluation import chosen_attentions
from levattn.attention import AttentionSpec, LevSelfAttention, attend, lev_attention
from levattn.attention.budgets import heads_by_budget
from levattn.attention.layer import choose_coreset
from levattn.models import ModelConfig, ViT
from levattn.models.cost import forward_flops
from levattn.training.attentions import describe, mean_kept
from levattn.training.config import EvalConfig, TrainConfig, from_config_dict, sections, to_dict
from tests.retrofits import tiny_model

BATCH, GRID, HEADS, WIDTH = 2, (4, 5), 4, 8
TOKENS = GRID[0] * GRID[1] + 1
BUDGETS = (14, 9, 14, 14)

choose = jax.jit(choose_coreset, static_argnames=("spec", "grid"))


def _inputs(seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(BATCH, TOKENS, HEADS, WIDTH)), jnp.float32) for _ in range(3))


def _mixed_and_alone(run, spec):
    """What `run` gives when heads have BUDGETS, and what each head gives when all have its k, heads last but one."""
    of_all = {k: run(dataclasses.replace(spec, k=k)) for k in set(BUDGETS)}
    alone = [jax.tree.map(lambda x, head=head: x[:, :, head], of_all[k]) for head, k in enumerate(BUDGETS)]
    return run(dataclasses.replace(spec, k_per_head=BUDGETS)), jax.tree.map(lambda *x: jnp.stack(x, 2), *alone)


@functools.partial(jax.jit, static_argnames=("spec", "grid"))
def _outputs(inputs, spec, mask=None, grid=None):
    """In one program, which compiles what all have in common once."""
    return _mixed_and_alone(lambda spec: lev_attention(*inputs, spec, mask=mask, grid=grid), spec)


@pytest.mark.parametrize("method", ["leverage", "kmeans", "oracle", "leverage_merged", "matched"])
def test_every_head_gets_what_it_would_get_if_all_had_its_k(method):
    inputs = _inputs()
    mask = jnp.arange(TOKENS) < jnp.array([TOKENS, TOKENS - 5])[:, None]
    mixed, alone = _outputs(inputs, AttentionSpec(method, keep_prefix=1, seed=3), mask)
    np.testing.assert_allclose(mixed, alone, atol=2e-5)


@pytest.mark.parametrize("method, window", [("leverage", 3), ("matched", "cross")])
def test_windows_and_thresholds_hold_for_each_budget(method, window):
    inputs = _inputs(1)
    eps = 0.45 if method == "leverage" else None
    spec = AttentionSpec(method, keep_prefix=1, local_window=window, eps=eps)
    mixed, alone = _outputs(inputs, spec, grid=GRID)
    np.testing.assert_allclose(mixed, alone, atol=2e-5)


@pytest.mark.parametrize("method", ["leverage", "groups"])
def test_gradients_are_those_of_the_heads_by_themselves(method):
    @jax.jit
    def gradients(inputs):
        def of(spec):
            return jax.grad(lambda inputs: jnp.sum(jnp.sin(lev_attention(*inputs, spec))))(inputs)

        return _mixed_and_alone(of, AttentionSpec(method))

    for mixed, alone in zip(*gradients(_inputs(2)), strict=True):
        np.testing.assert_allclose(mixed, alone, atol=2e-5)


def test_equal_budgets_are_one_group_and_draw_for_each_head():
    inputs = _inputs()
    spec = AttentionSpec("random", k_per_head=(5,) * HEADS)
    assert len(heads_by_budget(spec, HEADS)) == 1
    coreset = choose(*inputs, spec)
    assert len({tuple(x) for x in np.sort(coreset.indices, axis=-1).reshape(-1, 5).tolist()}) == BATCH * HEADS


def test_heads_of_different_budgets_draw_anew():
    """Keys of one group's first head are not the first of the other's."""
    coreset = choose(*_inputs(), AttentionSpec("random", k_per_head=(10, 10, 11, 11)))
    kept = [set(np.asarray(coreset.indices[0, head, :10]).tolist()) for head in (0, 2)]
    assert kept[0] != kept[1]


@pytest.mark.parametrize("method", ["leverage", "groups"])
def test_the_joined_coreset_gives_the_same_output_and_marks_its_padding(method):
    inputs = _inputs()
    spec = AttentionSpec(method, k_per_head=BUDGETS, keep_prefix=1)

    @jax.jit
    def both_ways(query, key, value):
        coreset = choose_coreset(query, key, value, spec)
        return coreset, attend(query, coreset), lev_attention(query, key, value, spec)

    coreset, attended, expected = both_ways(*inputs)
    np.testing.assert_allclose(attended, expected, atol=2e-5)
    for head, k in enumerate(BUDGETS):
        assert np.all(coreset.indices[:, head, k:] == -1)
        assert not np.any(coreset.valid[:, head, k:])
        assert np.all(coreset.valid[:, head, :k].sum(-1) > 0)
    assert np.all(coreset.valid.sum(-1) == np.array(BUDGETS)) or method == "groups"


def test_what_a_module_sows_is_shaped_by_the_largest_budget():
    module = LevSelfAttention(HEADS, AttentionSpec("leverage", k_per_head=BUDGETS))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(BATCH, TOKENS, HEADS * WIDTH)), jnp.float32)
    params = jax.jit(module.init)(jax.random.key(0), x)
    _, state = jax.jit(lambda x: module.apply(params, x, sow_weights=True, mutable=["intermediates"]))(x)
    (sown,) = state["intermediates"].values()
    assert sown["indices"][0].shape == (BATCH, HEADS, max(BUDGETS))
    np.testing.assert_array_equal(sown["valid"][0].sum(-1), [BUDGETS] * BATCH)
    assert np.all(sown["attention_mass"][0] <= 1 + 1e-5)


def test_compute_follows_the_sum_of_the_budgets():
    """By the compiler's own count, and by the estimate that is printed before a run."""
    shape = jax.ShapeDtypeStruct((1, 256, 4, 8), jnp.float32)

    def flops(spec):
        run = jax.jit(functools.partial(lev_attention, spec=spec))
        return run.lower(shape, shape, shape).compile().cost_analysis()["flops"]

    mixed, small, large = (
        flops(AttentionSpec("row_norm", **k)) for k in ({"k_per_head": (8, 8, 8, 128)}, {"k": 8}, {"k": 128})
    )
    assert mixed < small + 0.35 * (large - small)

    def estimate(**k):
        spec = AttentionSpec("leverage", **k)
        return forward_flops(ModelConfig("mu/2", width=32, num_heads=4, attention=spec), (16, 16, 1))

    assert estimate(k_per_head=(16,) * 4) == estimate(k=16)
    assert estimate(k_per_head=(8, 8, 24, 24)) == estimate(k=16)


def test_a_model_runs_scanned_and_by_layer_and_its_config_comes_back():
    spec = AttentionSpec("leverage", k_per_head=(4, 6))
    image = jnp.ones((1, 8, 8, 1))
    model = ModelConfig("mu/2", width=32, depth=2, num_heads=2, num_classes=3, scan=True, attention=spec)
    params = jax.jit(ViT(model).init)(jax.random.key(0), image)
    assert jax.jit(ViT(model).apply)(params, image).shape == (1, 3)
    config = sections(TrainConfig)
    config.data = ConfigDict({"source": "digits"})
    config.total_steps = 1
    config.model.update({"variant": "mu/2", "num_heads": 2, "scan": True})
    config.model.attention.update({"method": "leverage", "k_per_head": [4, 6]})
    built = from_config_dict(TrainConfig, config)
    assert built.model.attention == spec
    assert from_config_dict(TrainConfig, to_dict(built)) == built


def test_names_and_means_say_that_k_differs():
    spec = AttentionSpec("leverage", k_per_head=(4, 9))
    assert describe(spec) == "leverage k=6.5 by head"
    assert mean_kept(spec, 20, 8) == round(6.5)
    assert mean_kept((spec, AttentionSpec("dense")), 20, 8) == round((6.5 + 20) / 2)


@pytest.mark.parametrize("k_per_head, options", [((), {}), ((3, 0), {}), ((1, 4), {"keep_prefix": 2})])
def test_budgets_out_of_range_are_named(k_per_head, options):
    with pytest.raises(ValueError, match="k_per_head="):
        AttentionSpec("leverage", k_per_head=k_per_head, **options)


def test_budgets_of_another_number_of_heads_or_beyond_the_tokens_are_refused():
    spec = AttentionSpec("leverage", k_per_head=(3, 4))
    with pytest.raises(ValueError, match=r"k_per_head=\(3, 4\) must be one k for each of the 4 heads"):
        lev_attention(*_inputs(), spec)
    with pytest.raises(ValueError, match=r"k_per_head=\(3, 4\).*each of the 3 heads"):
        ModelConfig("mu/2", width=48, num_heads=3, attention=spec)
    with pytest.raises(ValueError, match=rf"k_per_head=.* must be in \[1, {TOKENS}\]"):
        lev_attention(*_inputs(), AttentionSpec("leverage", k_per_head=(3, 4, 5, 99)))


def test_the_command_line_takes_budgets_in_place_of_k():
    trained = tiny_model()

    def chosen(**config):
        return chosen_attentions(EvalConfig("run", attention=("leverage", "dense"), **config), trained)

    (by_head, dense) = chosen(option={"k_per_head": (4, 8), "keep_prefix": 1})
    assert by_head == AttentionSpec("leverage", k=None, k_per_head=(4, 8), keep_prefix=1)
    assert dense.method == "dense"
    with pytest.raises(ValueError, match="k and option k_per_head must not both be given"):
        chosen(k=(4,), option={"k_per_head": (4, 8)})
