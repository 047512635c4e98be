"""Schedules against closed forms, the decay mask by name, each optimiser against a hand-written first step."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from levattn.models import ModelConfig, ViT
from levattn.training.config import OptimizerConfig
from levattn.training.optim import decay_mask, make_optimizer, make_schedule, muon_dimension_numbers

TOTAL, WARMUP, PEAK = 100, 10, 0.3

CLOSED_FORMS = {
    "cosine": lambda t: 0.5 * (1 + math.cos(math.pi * (t - WARMUP) / (TOTAL - WARMUP))),
    "linear": lambda t: (TOTAL - t) / (TOTAL - WARMUP),
    "rsqrt": lambda t: math.sqrt(50 / (50 + t - WARMUP)),
    "constant": lambda t: 1.0,
}


@pytest.fixture(scope="module")
def params():
    config = ModelConfig(variant="Ti/4", width=32, depth=1, num_heads=2, mlp_dim=64, num_classes=10, pool="map")
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
    shapes = jax.eval_shape(ViT(config).init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


def first_update(config, params, grads):
    tx, _ = make_optimizer(config, TOTAL)
    return jax.jit(lambda params, grads: tx.update(grads, tx.init(params), params))(params, grads)


@pytest.mark.parametrize("schedule", CLOSED_FORMS)
def test_schedule_is_a_linear_warmup_and_then_its_closed_form(schedule):
    config = OptimizerConfig(learning_rate=PEAK, schedule=schedule, warmup_steps=WARMUP, rsqrt_timescale=50)
    schedule_fn = jax.jit(make_schedule(config, TOTAL))
    for step in range(TOTAL + 1):
        expected = PEAK * (step / WARMUP if step < WARMUP else CLOSED_FORMS[schedule](step))
        np.testing.assert_allclose(schedule_fn(step), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("schedule", ["constant", "rsqrt"])
def test_cooldown_multiplies_the_schedule_by_a_line_to_zero(schedule):
    plain = OptimizerConfig(schedule=schedule, rsqrt_timescale=50)
    cooled = OptimizerConfig(schedule=schedule, rsqrt_timescale=50, cooldown_steps=20)
    for step in (0, 79, 80, 90, 99, 100):
        ratio = make_schedule(cooled, TOTAL)(step) / make_schedule(plain, TOTAL)(step)
        np.testing.assert_allclose(ratio, min(1.0, (TOTAL - step) / 20), rtol=1e-6)


def test_a_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"warmup_steps=10 and cooldown_steps=0 must fit in total_steps=5"):
        make_schedule(OptimizerConfig(warmup_steps=10), 5)


def test_only_kernels_decay(params):
    decayed = {jax.tree_util.keystr(path) for path, on in jax.tree_util.tree_leaves_with_path(decay_mask(params)) if on}
    kernels = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert decayed == {name for name in kernels if name.endswith("['kernel']")}
    assert decayed
    assert decayed != kernels


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd", "muon"])
def test_with_zero_gradients_kernels_shrink_by_rate_times_decay_and_nothing_else_moves(name, params):
    config = OptimizerConfig(name=name, learning_rate=0.5, weight_decay=0.1, schedule="constant")
    updates, _ = first_update(config, params, jax.tree.map(np.zeros_like, params))
    expected = jax.tree.map(lambda x, on: -0.5 * 0.1 * x if on else np.zeros_like(x), params, decay_mask(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), updates, expected)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd", "muon"])
def test_every_optimizer_descends_and_keeps_its_momentum_in_the_dtype_asked_for(name, params):
    config = OptimizerConfig(name=name, learning_rate=0.01, weight_decay=0.0, momentum_dtype="bfloat16")
    updates, state = first_update(config, params, params)
    inner_product = sum(jax.tree.leaves(jax.tree.map(lambda u, g: np.vdot(u, g), updates, params)))
    assert inner_product < 0
    assert {leaf.dtype for leaf in jax.tree.leaves(state) if leaf.dtype == jnp.bfloat16}


def test_first_adam_step_is_the_sign_of_the_gradient(params):
    config = OptimizerConfig(learning_rate=0.5, weight_decay=0.0, schedule="constant", grad_clip_norm=None)
    updates, _ = first_update(config, params, params)
    jax.tree.map(lambda u, g: np.testing.assert_allclose(u, -0.5 * np.sign(g), rtol=2e-2), updates, params)


def test_clipping_bounds_the_global_norm(params):
    config = OptimizerConfig(
        name="sgd", learning_rate=1.0, weight_decay=0.0, schedule="constant", grad_clip_norm=0.25, b1=0.0
    )
    updates, _ = first_update(config, params, params)
    np.testing.assert_allclose(
        np.sqrt(sum(np.vdot(u, u) for u in jax.tree.leaves(updates))), 0.25, rtol=1e-2
    )  # momentum in bfloat16


def test_muon_takes_exactly_the_kernels_inside_blocks_and_makes_them_orthogonal(params):
    numbers = muon_dimension_numbers(params)
    config = OptimizerConfig(name="muon", learning_rate=1.0, weight_decay=0.0, schedule="constant", b1=0.0)
    updates, _ = first_update(config, params, params)
    block = updates["Transformer"]["encoderblock_0"]
    query = np.asarray(block["MultiHeadDotProductAttention_0"]["query"]["kernel"]).reshape(32, 32)
    singular_values = np.linalg.svd(query / (0.2 * math.sqrt(32)), compute_uv=False)
    assert singular_values.max() < 1.3
    assert np.median(singular_values) > 0.6
    assert numbers["head"]["kernel"] is None
    assert numbers["embedding"]["kernel"] is None
    assert numbers["Transformer"]["encoderblock_0"]["MlpBlock_0"]["Dense_0"]["kernel"] is not None
    assert numbers["Transformer"]["encoderblock_0"]["MlpBlock_0"]["Dense_0"]["bias"] is None


def test_a_warmup_fraction_is_that_share_of_a_run_of_any_length():
    for total_steps in (5, 100):
        by_share = make_schedule(OptimizerConfig(warmup_fraction=0.2), total_steps)
        by_steps = make_schedule(OptimizerConfig(warmup_steps=total_steps // 5), total_steps)
        assert [float(by_share(step)) for step in range(total_steps)] == [
            float(by_steps(s)) for s in range(total_steps)
        ]
    with pytest.raises(ValueError, match=r"set one of warmup_steps=3 and warmup_fraction=0\.2"):
        OptimizerConfig(warmup_steps=3, warmup_fraction=0.2)
