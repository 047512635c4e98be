import io
import math

import jax
import jax.numpy as jnp
import optax
import pytest

from levattn.models import ModelConfig, ViT
from levattn.models.cost import activation_bytes, count_params, forward_flops
from levattn.training.estimate import Estimate, estimate

MODEL = ModelConfig(variant="mu/4", depth=1, num_classes=10)
SHAPE = (16, 16, 3)


def tree_bytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("tx", [optax.adamw(1e-3, mu_dtype=jnp.bfloat16), optax.adafactor(1e-3), optax.sgd(1e-3, 0.9)])
def test_memory_of_parameters_and_optimizer_is_what_the_real_arrays_take(tx):
    shapes = jax.eval_shape(ViT(MODEL).init, jax.random.key(0), jnp.zeros((1, *SHAPE)))
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    cost = estimate(MODEL, SHAPE, tx, batch_size=8)
    assert cost.params_bytes == cost.gradients_bytes == tree_bytes(params)
    assert cost.optimizer_bytes == tree_bytes(tx.init(params))
    assert cost.num_params == count_params(MODEL, SHAPE)


def test_each_setting_scales_the_part_of_the_memory_it_should():
    """Doubled batch: activations; more devices: activations; shards: parameters, gradients, optimizer; and so on."""
    tx = optax.adamw(1e-3)
    base = estimate(MODEL, SHAPE, tx, batch_size=64)
    assert base.activations_bytes == 64 * activation_bytes(MODEL, SHAPE)
    assert base.step_flops == 3 * 64 * forward_flops(MODEL, SHAPE)
    eight = estimate(MODEL, SHAPE, tx, batch_size=64, num_devices=8, num_shards=4, accumulate_steps=2, ema=True)
    assert eight.activations_bytes == base.activations_bytes // 16
    assert eight.params_bytes == 2 * base.params_bytes // 4
    assert eight.gradients_bytes == 2 * base.gradients_bytes // 4
    assert eight.optimizer_bytes == base.optimizer_bytes // 4
    assert eight.step_flops == base.step_flops
    assert eight.total_bytes == math.fsum(
        [eight.params_bytes, eight.optimizer_bytes, eight.gradients_bytes, eight.activations_bytes]
    )


def test_recomputation_costs_a_forward_pass_more():
    remat = ModelConfig(variant="mu/4", depth=1, num_classes=10, remat="full")
    tx = optax.sgd(1e-3)
    plain, recomputed = (estimate(model, SHAPE, tx, batch_size=4).step_flops for model in (MODEL, remat))
    assert recomputed * 3 == plain * 4


def test_the_table_names_every_number_and_says_what_to_do_when_memory_is_short():
    cost = Estimate(
        num_params=22_050_664,
        forward_flops=9_210_000_000,
        step_flops=28_300_000_000_000,
        params_bytes=88_200_000,
        optimizer_bytes=176_400_000,
        gradients_bytes=88_200_000,
        activations_bytes=64_000_000_000,
        device_bytes=16_000_000_000,
    )
    stream = io.StringIO()
    cost.show(stream)
    text = stream.getvalue()
    for cell in ("22.1 M", "9.21 GFLOP", "28.3 TFLOP", "88.2 MB", "176 MB", "64 GB", "64.4 GB", "more than the 16 GB"):
        assert cell in text
    assert "accumulate_steps" in text
    stream = io.StringIO()
    estimate(MODEL, SHAPE, optax.sgd(1e-3), batch_size=4).show(stream)
    assert "more than" not in stream.getvalue()
