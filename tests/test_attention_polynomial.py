"""Attention with weights |<q, k>|^p is what it says, and what a threshold drops is below it for any query."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from levattn import attention
from levattn.attention import AttentionSpec, LevAttention, get_method
from levattn.attention.polynomial import log_totals, polynomial_probabilities, universal_spec
from levattn.models import ModelConfig, ViT

lev_attention = jax.jit(attention.lev_attention, static_argnames="spec")
_totals = jax.jit(log_totals, static_argnames="power")

BATCH, TOKENS, HEADS, WIDTH, KEPT = 2, 21, 2, 6, 7
KEEPING = ["leverage", "row_norm", "random", "kmeans", "oracle"]
POWERS = [1, 1.5, 2, 3, 4]


def _inputs(seed=0, dtype=jnp.float32, tokens=TOKENS):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(BATCH, tokens, HEADS, WIDTH)), dtype) for _ in range(3))


def _matrix(query, key, power) -> np.ndarray:
    """A of every batch element and head, in float64; rows without weight are zero."""
    products = np.einsum("bthd,bshd->bhts", np.asarray(query, np.float64), np.asarray(key, np.float64))
    weights = np.abs(products) ** power
    totals = weights.sum(-1, keepdims=True)
    return weights / np.where(totals > 0, totals, 1)


def _output(matrix, value, kept=True) -> np.ndarray:
    return np.einsum("bhts,bshd->bthd", np.where(kept, matrix, 0), np.asarray(value, np.float64))


@functools.partial(jax.jit, static_argnames="spec")
def _kept(query, key, value, spec):
    """Whether each key of a head is kept, as lev_attention chooses."""
    coreset = get_method(spec.method)(query, key, value, spec=universal_spec(spec, key.shape[1]))
    return attention.select.is_selected(coreset.indices, coreset.valid, key.shape[1])


@functools.partial(jax.jit, static_argnames="spec")
def _output_and_kept(query, key, value, spec):
    """In one program, which compiles what both have in common once."""
    return attention.lev_attention(query, key, value, spec), _kept(query, key, value, spec)


@pytest.mark.parametrize("power", POWERS)
def test_dense_is_the_definition(power):
    query, key, value = _inputs()
    matrix = _matrix(query, key, power)
    np.testing.assert_allclose(polynomial_probabilities(query, key, power), matrix, atol=1e-5)
    out = lev_attention(query, key, value, AttentionSpec("dense", power=power))
    np.testing.assert_allclose(out, _output(matrix, value), atol=1e-5)


@pytest.mark.parametrize("method", KEEPING)
def test_output_is_the_kept_part_of_the_dense_matrix_with_the_totals_of_all_keys(method):
    query, key, value = _inputs()
    # What follows the choice knows no method: one goes through all powers, the others through both kinds of totals.
    for power in POWERS if method == "leverage" else (2, 3):
        out, kept = _output_and_kept(query, key, value, AttentionSpec(method, k=KEPT, power=power))
        expected = _output(_matrix(query, key, power), value, np.asarray(kept)[:, :, None])
        np.testing.assert_allclose(out, expected, atol=2e-5)


@pytest.mark.parametrize("method", KEEPING)
def test_keeping_every_key_is_dense(method):
    query, key, value = _inputs()
    expected = lev_attention(query, key, value, AttentionSpec("dense", power=2))
    out = lev_attention(query, key, value, AttentionSpec(method, k=TOKENS, power=2))
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_keeping_every_key_needs_no_total_of_the_others():
    """Queries along the weakest directions of ill-conditioned keys, where a quadratic form in float32 cancels."""
    rng = np.random.default_rng(3)
    rotation = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]
    keys = (rng.normal(size=(BATCH, TOKENS, HEADS, WIDTH)) * np.logspace(0, -4, WIDTH) @ rotation).astype(np.float32)
    queries = np.stack([[np.linalg.pinv(k).T for k in np.swapaxes(batch, 0, 1)] for batch in keys.astype(np.float64)])
    queries = np.swapaxes(queries / np.abs(queries).max(), 1, 2).astype(np.float32)
    value = _inputs()[2]
    out = lev_attention(jnp.asarray(queries), jnp.asarray(keys), value, AttentionSpec("leverage", k=TOKENS, power=2))
    np.testing.assert_allclose(out, _output(_matrix(queries, keys, 2), value), atol=2e-3)


@pytest.mark.parametrize("power, tokens", [(2, 21), (4, 300), (3, 600), (1, 256), (1.5, 40)])
def test_row_totals_agree_by_every_route(power, tokens):
    query, key, _ = _inputs(1, tokens=tokens)
    products = np.einsum("bthd,bshd->bhts", np.asarray(query, np.float64), np.asarray(key, np.float64))
    np.testing.assert_allclose(
        _totals(query, key, power), np.log((np.abs(products) ** power).sum(-1)), rtol=1e-5, atol=1e-5
    )


def _awkward(num_cases, tokens=60):
    """Keys of every awkward kind, `B S 1 D`, and queries that put the most they can on each key."""
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(num_cases, tokens, WIDTH))
    keys[1::6] *= rng.lognormal(sigma=2, size=(num_cases, tokens, 1))[1::6]
    keys[2::6] = np.einsum("csr,crd->csd", keys[2::6, :, :2], keys[2::6, :2])
    keys[3::6] = keys[3::6, rng.integers(0, 9, tokens)]
    keys[4::6] *= rng.random((num_cases, tokens, 1))[4::6] < 0.5
    keys[5::6, 7] *= 1e3
    keys = keys.astype(np.float32)
    wide = keys.astype(np.float64)
    best = wide @ np.linalg.pinv(np.swapaxes(wide, 1, 2) @ wide, rcond=1e-10, hermitian=True)
    return keys[:, :, None], np.concatenate([best, wide], axis=1).astype(np.float32)[:, :, None]


@pytest.mark.parametrize(
    "power, eps", [(1, 0.05), (2, 0.05), (3, 0.05), (4, 0.05), (1, 0.3), (3, 0.3), (2, 1.0), (4, 1.0)]
)
def test_no_entry_of_eps_is_dropped_and_the_output_is_off_by_the_dropped_mass_at_most(power, eps):
    keys, queries = _awkward(60)
    values = np.random.default_rng(1).normal(size=keys.shape).astype(np.float32)
    spec = AttentionSpec("leverage", k=None, eps=eps, power=power)
    out, kept = _output_and_kept(*map(jnp.asarray, (queries, keys, values)), spec)
    matrix = _matrix(queries, keys, power)
    dropped = np.where(np.asarray(kept)[:, :, None], 0, matrix)
    assert dropped.max() < eps * (1 + 1e-6)
    error = np.linalg.norm(np.asarray(out) - _output(matrix, values), axis=-1)[:, :, 0]
    longest = np.linalg.norm(values[:, :, 0], axis=-1).max(axis=1)[:, None]
    # Queries made to be nearly orthogonal to one huge key make float32 products inexact: the slack.
    exact = np.arange(60) % 6 != 5
    assert np.all((error <= dropped.sum(-1)[:, 0] * longest + 1e-3)[exact])


@pytest.mark.parametrize("method, power", [("dense", 1.5), ("leverage", 1.5), ("leverage", 2), ("leverage", 4)])
def test_gradients_agree_with_finite_differences(method, power):
    inputs = _inputs()
    spec = AttentionSpec(method, k=KEPT, power=power)

    @jax.jit
    def loss_and_gradients(*inputs):
        return jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(attention.lev_attention(*x, spec))), (0, 1, 2))(*inputs)

    def loss(*inputs):
        return loss_and_gradients(*inputs)[0]

    gradients = loss_and_gradients(*inputs)[1]
    for at, gradient in enumerate(gradients):
        step = jax.random.normal(jax.random.key(at), gradient.shape)
        moved = [[x + sign * 1e-3 * step if i == at else x for i, x in enumerate(inputs)] for sign in (1, -1)]
        numeric = (loss(*moved[0]) - loss(*moved[1])) / 2e-3
        np.testing.assert_allclose(jnp.sum(gradient * step), numeric, rtol=2e-2, atol=3e-2)


@pytest.mark.parametrize("method, power", [("dense", 1), ("leverage", 1), ("leverage", 2), ("leverage", 3)])
def test_queries_without_weight_give_zeros_and_finite_gradients(method, power):
    query, key, value = _inputs()
    query = query.at[0, 3].set(0).at[1].set(jnp.eye(WIDTH)[0])
    key = key.at[1, ..., 0].set(0)  # every query of this element is orthogonal to all keys

    def loss(query, key, value):
        out = attention.lev_attention(query, key, value, AttentionSpec(method, k=KEPT, power=power))
        return jnp.sum(jnp.sin(out)), out

    gradients, out = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(query, key, value)
    np.testing.assert_array_equal(out[0, 3], 0)
    np.testing.assert_array_equal(out[1], 0)
    for gradient in gradients:
        assert np.all(np.isfinite(gradient))


def test_masked_tokens_are_as_if_absent():
    query, key, value = _inputs()
    mask = jnp.arange(TOKENS) < jnp.array([14, 0])[:, None]
    padded_key, padded_value = (jnp.where(mask[:, :, None, None], x, jnp.nan) for x in (key, value))
    for spec in (AttentionSpec("dense", power=2), AttentionSpec("leverage", k=KEPT, power=2)):
        out = lev_attention(query, padded_key, padded_value, spec, mask=mask)
        expected = lev_attention(query, key[:, :14], value[:, :14], spec)
        np.testing.assert_allclose(out[0], expected[0], atol=1e-5)
        np.testing.assert_array_equal(out[1], 0)


def test_the_lengths_of_queries_and_of_all_keys_do_not_matter():
    query, key, value = _inputs()
    for power in (1, 2, 4):
        spec = AttentionSpec("leverage", k=KEPT, power=power)
        out = lev_attention(1e4 * query, 1e-6 * key, value, spec)
        np.testing.assert_allclose(out, lev_attention(query, key, value, spec), atol=1e-4)


def test_bfloat16_stays_close_to_float32():
    inputs = _inputs(dtype=jnp.bfloat16)
    spec = AttentionSpec("leverage", k=KEPT, power=2)
    out = lev_attention(*inputs, spec)
    assert out.dtype == jnp.bfloat16
    expected = lev_attention(*(x.astype(jnp.float32) for x in inputs), spec)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.05)


def test_no_buffer_of_queries_times_keys_is_made():
    shape = jax.ShapeDtypeStruct((1, 4096, 1, 16), jnp.float32)
    for power in (2, 3):
        compiled = lev_attention.lower(shape, shape, shape, AttentionSpec("leverage", k=16, power=power)).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 4096 * 4 / 4


def test_a_vit_learns_with_it():
    config = ModelConfig(
        "S/16", num_classes=2, width=16, depth=1, mlp_dim=32, num_heads=2, head_zero_init=False, pool="cls",
        attention=AttentionSpec("leverage", k=8, keep_prefix=1, power=2),
    )  # fmt: skip
    images = jax.random.normal(jax.random.key(0), (8, 64, 64, 3))
    labels = jnp.arange(8) % 2
    model, optimizer = ViT(config), optax.adam(3e-3)
    params = jax.jit(model.init)(jax.random.key(1), images)["params"]

    @jax.jit
    def step(params, state):
        def loss_fn(params):
            return optax.softmax_cross_entropy_with_integer_labels(
                model.apply({"params": params}, images), labels
            ).mean()

        loss, gradients = jax.value_and_grad(loss_fn)(params)
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state, loss

    state, losses = optimizer.init(params), []
    for _ in range(25):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_sown_mass_is_that_of_the_polynomial_matrix():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, TOKENS, 12)), jnp.float32)
    spec = AttentionSpec("leverage", k=KEPT, power=2)
    layer = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=LevAttention(spec))
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    _, state = jax.jit(lambda v, x: layer.apply(v, x, sow_weights=True, mutable="intermediates"))(variables, x)
    sown = {name: value[0] for name, value in state["intermediates"].items()}
    kept = np.asarray(_kept(sown["queries"], sown["keys"], sown["values"], spec))[:, :, None]
    expected = np.where(kept, _matrix(sown["queries"], sown["keys"], 2), 0).sum(-1).mean(-1)
    np.testing.assert_allclose(sown["attention_mass"], expected, atol=1e-5)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"power": 0.5}, r"power=0\.5"),
        ({"power": 2, "method": "leverage", "eps": 0.1}, "k=32 must be None"),
        ({"power": 2, "method": "leverage", "eps": 0.1, "k": None, "ridge": 1.0}, r"ridge=1\.0 0 with power"),
        ({"power": float("inf")}, "power=inf"),
        ({"power": 2, "method": "matched"}, "method='matched'"),
        ({"power": 2, "local_window": 3}, "local_window=3"),
        ({"power": 2, "centre": True}, "centre=True"),
    ],
)
def test_options_of_softmax_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        AttentionSpec(**({"method": "leverage"} | options))
