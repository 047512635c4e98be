"""Losses and MixUp against float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from levattn.training.losses import cross_entropy, mixup, smooth_targets

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(6, 5)) * 4
LABELS = RNG.integers(0, 5, size=6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_cross_entropy_matches_numpy(smoothing):
    targets = (1 - smoothing) * np.eye(5)[LABELS] + smoothing / 5
    log_probs = LOGITS - np.log(np.exp(LOGITS).sum(axis=-1, keepdims=True))
    ours = cross_entropy(jnp.float32(LOGITS), smooth_targets(jnp.int32(LABELS), 5, smoothing))
    np.testing.assert_allclose(ours, -(targets * log_probs).sum(-1), rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_sigmoid_cross_entropy_matches_numpy(smoothing):
    targets = (1 - smoothing) * np.eye(5)[LABELS] + smoothing / 5
    probs = 1 / (1 + np.exp(-LOGITS))
    expected = -(targets * np.log(probs) + (1 - targets) * np.log(1 - probs)).sum(-1)
    ours = cross_entropy(jnp.float32(LOGITS), smooth_targets(jnp.int32(LABELS), 5, smoothing), "sigmoid")
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_losses_are_float32_whatever_the_logits():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    assert cross_entropy(logits, smooth_targets(jnp.int32(LABELS), 5)).dtype == jnp.float32


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31 - 1), alpha=st.sampled_from([0.1, 0.5, 2.0]))
def test_mixup_is_one_convex_combination_of_neighbours_for_images_and_targets_alike(seed, alpha):
    images = RNG.normal(size=(6, 2, 2, 1)).astype(np.float32)
    targets = np.eye(5, dtype=np.float32)[[0, 1, 2, 3, 4, 0]]
    mixed_images, mixed_targets = mixup(jax.random.key(seed), jnp.asarray(images), jnp.asarray(targets), alpha)
    weight = float(mixed_targets[1, 1])  # example 1 is mixed with example 0, of another class
    assert 0.5 <= weight <= 1
    for ours, plain in ((mixed_images, images), (mixed_targets, targets)):
        expected = weight * plain.astype(np.float64) + (1 - weight) * np.roll(plain, 1, axis=0)
        np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_mixup_weights_follow_the_folded_beta_distribution():
    """The mean of max(w, 1 - w) for w uniform, which is Beta(1, 1), is 3/4."""
    one, eye = jnp.ones((2, 1, 1, 1)), jnp.eye(2)
    keys = jax.random.split(jax.random.key(0), 4000)
    weights = jax.vmap(lambda key: mixup(key, one, eye, 1.0)[1][0, 0])(keys)
    np.testing.assert_allclose(weights.mean(), 0.75, atol=0.01)


def test_mixup_of_alpha_zero_changes_nothing():
    images, targets = jnp.ones((2, 1, 1, 1)), jnp.eye(2)
    mixed_images, mixed_targets = mixup(jax.random.key(0), images, targets, 0.0)
    assert mixed_images is images
    assert mixed_targets is targets
