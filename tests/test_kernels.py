"""The kernels against plain JAX and float64: interpreted here, compiled where there is a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from levattn.attention import AttentionSpec, attend, lev_attention
from levattn.attention.coreset import gather
from levattn.attention.fused import why_not
from levattn.core.leverage import diagonal_shift, gram_matrix, scores_from_gram, whitening
from levattn.kernels.attend import attend_selected
from levattn.kernels.gram import gram_parts
from levattn.kernels.leverage import top_leverage
from levattn.kernels.select import scores, top
from levattn.kernels.whiten import whitening_of_head
from levattn.models import ModelConfig, ViT

INTERPRET = jax.default_backend() != "gpu"


def _keys(shape=(2, 70, 2, 32), seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.bfloat16)


def _awkward_keys(num_keys=70, head_dim=32):
    """Heads of one batch element: plain, rank deficient, equal, with a zero column, ill-conditioned, all zero."""
    rng = np.random.default_rng(1)
    plain = rng.normal(size=(num_keys, head_dim))
    thin = rng.integers(-5, 6, (num_keys, 3)) @ rng.integers(-2, 3, (3, head_dim))  # of rank 3 as bfloat16, too
    equal = np.repeat(rng.normal(size=(1, head_dim)), num_keys, axis=0)
    hole = plain * (np.arange(head_dim) != 5)
    falling = plain * np.logspace(0, -2, head_dim)
    heads = [plain, thin, equal, hole, falling, np.zeros_like(plain)]
    return jnp.asarray(np.stack(heads, axis=1)[None], jnp.bfloat16)


@pytest.mark.parametrize("rows", [32, 1024])
def test_gram_parts_sum_to_the_gram_matrix(rows):
    keys = _keys()
    parts = gram_parts(keys, rows=rows, block=32, interpret=INTERPRET)
    assert parts.shape[2] == -(-70 // rows)
    exact = np.einsum("bshd,bshe->bhde", *[np.asarray(keys, np.float64)] * 2)
    np.testing.assert_allclose(parts.sum(2), exact, atol=1e-4)


@pytest.mark.parametrize("head_dim", [16, 64])
def test_whitening_is_that_of_plain_jax_and_inverts_the_gram_matrix(head_dim):
    keys = _awkward_keys(head_dim=head_dim)
    gram = gram_matrix(keys)
    shift = diagonal_shift(head_dim)
    found = jax.jit(functools.partial(whitening_of_head, shift=shift, interpret=INTERPRET))(gram)
    plain, _ = jax.jit(whitening)(gram)
    assert not np.any(np.triu(found, 1))
    # In directions that keys have no part in, W is rounding noise; the norms of whitened keys do not see it.
    norms = [np.square(np.einsum("bshd,bhed->bhse", np.asarray(keys, np.float32), w)).sum(-1) for w in (found, plain)]
    np.testing.assert_allclose(*norms, atol=1e-3)
    well = [0, 3]  # heads far from singular but for a zero column, whose part of W is zero
    np.testing.assert_allclose(found[0, well[0]], plain[0, well[0]], atol=1e-5)
    diagonal = np.diagonal(gram, axis1=-2, axis2=-1)
    shifted = np.asarray(gram + shift * diagonal[..., None] * np.eye(head_dim), np.float64)[0, well]
    seen = np.asarray(found, np.float64)[0, well]
    identity = np.einsum("hab,hbc,hdc->had", seen, shifted, seen)
    for product, is_there in zip(identity, diagonal[0, well] > 0, strict=True):
        np.testing.assert_allclose(product, np.diag(1.0 * is_there), atol=1e-5)


def test_scores_are_those_of_plain_jax():
    keys = _awkward_keys()
    gram = gram_matrix(keys)
    plain, _ = jax.jit(scores_from_gram)(keys, gram)
    found = scores(keys, jax.jit(whitening)(gram)[0], rows=64, block=32, interpret=INTERPRET)
    np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("num", "k", "rows"), [(70, 16, 1024), (70, 20, 32), (300, 8, 16), (5, 5, 1024)])
def test_top_is_lax_top_k_ties_included(num, k, rows):
    values = jnp.asarray(np.random.default_rng(0).integers(0, 9, size=(2, 2, num)) / 8, jnp.float32)
    found = top(values, k, rows=rows, interpret=INTERPRET)
    np.testing.assert_array_equal(found, jax.lax.top_k(values, k)[1])
    assert found.shape == (2, 2, k)


def test_leading_keys_come_first():
    values = jnp.asarray(np.random.default_rng(0).random((1, 2, 40)), jnp.float32)
    found = top(values, 6, keep_prefix=2, rows=32, interpret=INTERPRET)
    np.testing.assert_array_equal(found[..., :2], [[[0, 1]] * 2])
    np.testing.assert_array_equal(found[..., 2:], 2 + jax.lax.top_k(values[..., 2:], 4)[1])


@pytest.mark.parametrize(("num_queries", "k"), [(70, 16), (33, 5)])
def test_attending_and_its_gradients_are_those_of_plain_jax(num_queries, k):
    rng = np.random.default_rng(0)
    query, cotangent = (_keys((2, num_queries, 2, 32), seed) for seed in (1, 2))
    key, value = _keys(seed=3), _keys(seed=4)
    indices = jnp.asarray(np.argsort(rng.random((2, 2, 70)), axis=-1)[..., :k], jnp.int32)

    def plain(query, key, value):
        return attend(query, gather(key, value, indices, jnp.ones(indices.shape, bool)))

    def kernels(query, key, value):
        return attend_selected(query, key, value, indices, INTERPRET)

    @functools.partial(jax.jit, static_argnums=0)
    def with_gradients(function, *inputs):
        out, pull = jax.vjp(function, *inputs)
        return out, *pull(cotangent)

    by_kernels, by_plain = (with_gradients(f, query, key, value) for f in (kernels, plain))
    for found, wanted in zip(by_kernels, by_plain, strict=True):
        _assert_near(found, wanted)
    moved = np.abs(np.asarray(by_kernels[2], np.float32)).sum(-1) > 0  # B S H
    assert all(set(np.flatnonzero(moved[b, :, h])) == set(np.asarray(indices[b, h])) for b in (0, 1) for h in (0, 1))


def _assert_near(found, wanted):
    """Equal but for the rounding of bfloat16."""
    found, wanted = (np.asarray(x, np.float32) for x in (found, wanted))
    assert np.linalg.norm(found - wanted) < 8e-3 * np.linalg.norm(wanted)


@pytest.mark.parametrize("method", ["leverage", "row_norm"])
def test_the_route_through_kernels_gives_what_plain_jax_gives(method):
    query, key, value = (_keys((2, 40, 2, 16), seed) for seed in range(3))

    @functools.partial(jax.jit, static_argnames="spec")
    def run(query, key, value, spec):
        attended = functools.partial(lev_attention, spec=spec)
        out, pull = jax.vjp(attended, query, key, value)
        return (out, *pull(jnp.ones_like(out)))

    spec = AttentionSpec(method, k=8, keep_prefix=1)
    by_route = [run(query, key, value, dataclasses.replace(spec, implementation=x)) for x in ("pallas", "xla")]
    for found, wanted in zip(*by_route, strict=True):
        _assert_near(found, wanted)


def test_chosen_keys_are_those_of_float64():
    keys = _keys((1, 197, 2, 64))
    columns = np.asarray(keys, np.float64)[0].transpose(1, 0, 2)
    exact = np.stack([np.square(np.linalg.svd(x, full_matrices=False)[0]).sum(-1) for x in columns])
    found = np.asarray(top_leverage(keys, 32, interpret=INTERPRET))[0]
    np.testing.assert_array_equal(np.sort(found), np.sort(np.argsort(-exact, axis=-1)[:, :32]))


@pytest.mark.parametrize(
    ("options", "dtype", "mask", "said"),
    [
        ({"method": "groups"}, "bfloat16", None, "method 'groups'"),
        ({"eps": 0.1}, "bfloat16", None, "eps=0.1"),
        ({"local_window": 3}, "bfloat16", None, "local_window=3"),
        ({}, "float32", None, "float32"),
        ({}, "bfloat16", jnp.ones((1, 20), bool), "mask"),
        ({"k": 200}, "bfloat16", None, "k=200"),
    ],
)
def test_what_kernels_do_not_take_is_said_and_refused(options, dtype, mask, said):
    query = key = value = jnp.ones((1, 20, 1, 16), dtype)
    spec = AttentionSpec(**({"method": "leverage", "k": 4, "implementation": "pallas"} | options))
    assert said in why_not(query, key, value, spec, mask)
    with pytest.raises(ValueError, match="implementation='pallas'"):
        lev_attention(query, key, value, spec, mask=mask)
    if spec.k <= 20:
        jax.jit(functools.partial(lev_attention, spec=dataclasses.replace(spec, implementation="auto")))(
            query, key, value, mask=mask
        )


def test_scanned_layers_trace_with_kernels():
    attention = AttentionSpec("leverage", k=2, implementation="pallas")
    model = ViT(ModelConfig("mu/16", num_classes=3, depth=2, scan=True, dtype="bfloat16", attention=attention))
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert jax.eval_shape(model.apply, variables, images).shape == (1, 3)
