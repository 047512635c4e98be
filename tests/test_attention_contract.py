"""What every registered method promises, whatever it selects by. A new method adds nothing here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

from levattn import attention
from levattn.attention import METHODS, AttentionSpec, attend, get_method
from tests import reference

lev_attention = jax.jit(attention.lev_attention, static_argnames=("spec", "grid"))

BATCH, TOKENS, HEADS, WIDTH, KEPT = 2, 21, 3, 8, 6
SELECTING = [name for name in METHODS if name != "dense"]
# Their slots: tests/test_attention_merge.py and tests/test_attention_pivoted.py.
MERGING = ["leverage_merged", "leverage_groups", "groups", "matched", "pivoted"]
KEEPING = [name for name in METHODS if name not in MERGING]


def _inputs(seed=0, dtype=jnp.float32, tokens=TOKENS):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(BATCH, tokens, HEADS, WIDTH)), dtype) for _ in range(3))


@pytest.fixture(params=METHODS)
def method(request):
    return request.param


@functools.partial(jax.jit, static_argnames="spec")
def _coreset(query, key, value, spec, mask=None):
    return get_method(spec.method)(query, key, value, spec=spec, mask=mask)


def test_shapes_and_types(method):
    spec = AttentionSpec(method, k=KEPT)
    coreset = _coreset(*_inputs(), spec)
    kept = TOKENS if method == "dense" else KEPT
    assert coreset.keys.shape == coreset.values.shape == (BATCH, kept, HEADS, WIDTH)
    assert coreset.indices.shape == coreset.valid.shape == coreset.log_weights.shape == (BATCH, HEADS, kept)
    assert coreset.valid.dtype == jnp.bool_
    assert jnp.issubdtype(coreset.indices.dtype, jnp.integer)


@pytest.mark.parametrize("method", KEEPING)
def test_kept_keys_are_the_keys_at_their_indices_and_no_index_comes_twice(method):
    query, key, value = _inputs()
    coreset = _coreset(query, key, value, AttentionSpec(method, k=KEPT))
    for b in range(BATCH):
        for h in range(HEADS):
            indices = np.asarray(coreset.indices[b, h])[np.asarray(coreset.valid[b, h])]
            assert len(set(indices)) == len(indices)
            rows = np.asarray(coreset.valid[b, h])
            np.testing.assert_array_equal(coreset.keys[b, rows, h], key[b, indices, h])
            np.testing.assert_array_equal(coreset.values[b, rows, h], value[b, indices, h])


@pytest.mark.parametrize("method", KEEPING)
def test_output_is_softmax_attention_over_the_kept_keys(method):
    query, key, value = _inputs()
    spec = AttentionSpec(method, k=KEPT)
    coreset = _coreset(query, key, value, spec)
    out = lev_attention(query, key, value, spec)
    for b in range(BATCH):
        for h in range(HEADS):
            kept = np.asarray(coreset.indices[b, h])[np.asarray(coreset.valid[b, h])]
            expected = reference.attention_over(query[b, :, h], key[b, :, h], value[b, :, h], [kept] * TOKENS)
            np.testing.assert_allclose(out[b, :, h], expected, atol=1e-5)


def test_keeping_every_key_is_dense_attention(method):
    query, key, value = _inputs()
    out = lev_attention(query, key, value, AttentionSpec(method, k=TOKENS))
    np.testing.assert_allclose(out, lev_attention(query, key, value, AttentionSpec("dense")), atol=1e-5)


def test_a_token_mask_equals_leaving_the_tokens_out(method):
    query, key, value = _inputs()
    mask = np.ones((BATCH, TOKENS), bool)
    mask[:, -7:] = False
    spec = AttentionSpec(method, k=KEPT)
    # NaN in the padding shows if it is looked at, or only multiplied by a weight of zero.
    padded_key, padded_value = (x.at[:, -7:].set(jnp.nan) for x in (key, value))
    out = lev_attention(query, padded_key, padded_value, spec, mask=jnp.asarray(mask))
    if method in (
        "random",
        "matched",
    ):  # draw or place landmarks by shape: only that nothing masked is seen can be asked
        assert np.all(np.isfinite(out))
        return
    expected = lev_attention(query[:, :-7], key[:, :-7], value[:, :-7], spec)
    np.testing.assert_allclose(out[:, : expected.shape[1]], expected, atol=1e-5)


def test_fewer_tokens_than_k_are_all_kept_and_none_besides(method):
    query, key, value = _inputs()
    mask = jnp.arange(TOKENS)[None] < jnp.array([3, 0])[:, None]
    key, value = (jnp.where(mask[:, :, None, None], x, jnp.nan) for x in (key, value))
    coreset = _coreset(query, key, value, AttentionSpec(method, k=KEPT), mask)
    np.testing.assert_array_equal(jnp.sum(coreset.valid, axis=-1), [[3] * HEADS, [0] * HEADS])
    out = attend(query, coreset)
    assert np.all(np.isfinite(out))
    np.testing.assert_array_equal(out[1], 0)  # nothing to attend to: zeros, not NaN
    np.testing.assert_array_equal(lev_attention(query, key, value, AttentionSpec(method, k=KEPT), mask=mask)[1], 0)


@pytest.mark.parametrize("method", SELECTING)
def test_leading_tokens_are_always_kept_when_asked(method):
    query, key, value = _inputs()
    key = key.at[:, :2].set(0)  # as a class token is at initialisation: nothing but the option would keep it
    coreset = _coreset(query, key, value, AttentionSpec(method, k=KEPT, keep_prefix=2))
    kept = np.where(coreset.valid, coreset.indices, -1)
    assert np.all(np.any(kept == 0, axis=-1))
    assert np.all(np.any(kept == 1, axis=-1))
    assert kept.shape[-1] == KEPT


def test_more_leading_tokens_than_there_are_is_refused(method):
    if method == "dense":
        pytest.skip("dense keeps every key, whatever keep_prefix")
    with pytest.raises(ValueError, match="keep_prefix=30"):
        lev_attention(*_inputs(), AttentionSpec(method, k=None, eps=0.1, keep_prefix=30))


@pytest.mark.parametrize("method", SELECTING)
def test_a_threshold_bounds_the_number_kept_by_width_over_eps(method):
    query, key, value = _inputs()
    for eps in (0.2, 0.5, 1.0):
        spec = AttentionSpec(method, k=None, eps=eps)
        bounded = functools.partial(_coreset, query, key, value, spec)
        assert jax.eval_shape(lambda run=bounded: run().indices).shape[-1] == min(TOKENS, int(WIDTH / eps))
        # The slots that the bound leaves out hold nothing above the threshold (grouping chooses anew for each K).
        if method != "kmeans" and method not in MERGING:
            coreset, wide = bounded(), _coreset(query, key, value, AttentionSpec(method, k=TOKENS, eps=eps))
            np.testing.assert_array_equal(jnp.sum(coreset.valid, -1), jnp.sum(wide.valid, -1))


@pytest.mark.parametrize("method", KEEPING)
def test_gradients_reach_queries_keys_and_values_of_kept_keys_only(method):
    query, key, value = _inputs()
    spec = AttentionSpec(method, k=KEPT)

    @jax.jit
    def loss(query, key, value):
        return jnp.sum(jnp.sin(lev_attention(query, key, value, spec)))

    by_query, by_key, by_value = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(query, key, value)
    coreset = _coreset(query, key, value, spec)
    for b in range(BATCH):
        for h in range(HEADS):
            kept = set(np.asarray(coreset.indices[b, h])[np.asarray(coreset.valid[b, h])].tolist())
            for gradient in (by_key, by_value):
                moved = set(np.flatnonzero(np.abs(gradient[b, :, h]).sum(-1)).tolist())
                assert moved == kept
    # Against finite differences of the whole function, along one direction each.
    for at, gradient in enumerate((by_query, by_key, by_value)):
        step = jax.random.normal(jax.random.key(at), query.shape)
        moved = [
            [x + sign * 1e-3 * step if i == at else x for i, x in enumerate((query, key, value))] for sign in (1, -1)
        ]
        numeric = (loss(*moved[0]) - loss(*moved[1])) / 2e-3
        np.testing.assert_allclose(jnp.sum(gradient * step), numeric, rtol=2e-2, atol=2e-2)


def test_gradients_stay_finite_where_attention_is_all_but_one_key(method):
    query, key, value = _inputs()
    spec = AttentionSpec(method, k=KEPT, keep_prefix=1)

    @jax.jit
    def gradients(query, key, value):
        attend = functools.partial(attention.lev_attention, spec=spec, grid=(4, 5))
        return jax.grad(lambda *inputs: jnp.sum(attend(*inputs) ** 2), argnums=(0, 1, 2))(query, key, value)

    for scale in (10.0, 40.0):
        assert all(bool(jnp.isfinite(x).all()) for x in gradients(scale * query, scale * key, value))


def test_the_same_under_jit_vmap_remat_and_scan(method):
    query, key, value = _inputs()
    apply = functools.partial(attention.lev_attention, spec=AttentionSpec(method, k=KEPT))
    expected = apply(query, key, value)
    np.testing.assert_allclose(jax.jit(apply)(query, key, value), expected, atol=1e-5)
    stacked = jax.jit(jax.vmap(apply))(query[None], key[None], value[None])
    np.testing.assert_allclose(stacked[0], expected, atol=1e-5)
    _, scanned = jax.lax.scan(lambda _, x: (None, apply(*x)), None, (query[None], key[None], value[None]))
    np.testing.assert_allclose(scanned[0], expected, atol=1e-5)
    grads = [
        jax.jit(jax.grad(lambda k, f=f: jnp.sum(f(query, k, value) ** 2)))(key) for f in (apply, jax.checkpoint(apply))
    ]
    np.testing.assert_allclose(*grads, atol=1e-5)


def test_bfloat16_stays_close_to_float32(method):
    query, key, value = _inputs()
    spec = AttentionSpec(method, k=TOKENS)
    out = lev_attention(*(x.astype(jnp.bfloat16) for x in (query, key, value)), spec)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), lev_attention(query, key, value, spec), atol=0.05)


def test_more_keys_than_tokens_are_refused(method):
    if method == "dense":
        pytest.skip("dense keeps every key, whatever k")
    with pytest.raises(ValueError, match=rf"k=99 must be in \[1, {TOKENS}\]"):
        lev_attention(*_inputs(), AttentionSpec(method, k=99))


def test_no_buffer_of_queries_times_keys_is_made_by_selecting_methods():
    """Memory grows with T K, never T S: the largest temporary stays far below the dense matrix."""
    tokens = 4096
    shape = jax.ShapeDtypeStruct((1, tokens, 1, 16), jnp.float32)
    for method in set(SELECTING) - {"oracle"}:
        run = jax.jit(functools.partial(attention.lev_attention, spec=AttentionSpec(method, k=16)))
        temporary = run.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes
        assert temporary < tokens * tokens * 4 / 8, method


def test_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'leverage'"):
        lev_attention(*_inputs(), AttentionSpec("levarage"))


@pytest.mark.parametrize(
    "options, named",
    [
        ({"k": 0}, "k=0"),
        ({"k": None}, "eps"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"eps": 1.5}, "eps=1.5"),
        ({"keep_prefix": -1}, "keep_prefix=-1"),
        ({"k": 2, "keep_prefix": 3}, "keep_prefix=3"),
        ({"local_window": 4}, "local_window"),
        ({"local_window": (3, 2)}, "local_window"),
        ({"ridge": -0.1}, "ridge"),
        ({"num_iters": -1}, "num_iters"),
    ],
)
def test_options_out_of_range_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        AttentionSpec("leverage", **options)


def test_the_spec_is_hashable_and_replaceable():
    spec = AttentionSpec("leverage", local_window=(3, 3))
    assert hash(spec) == hash(dataclasses.replace(spec))


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_a_key_that_is_not_a_number_is_refused_and_under_jit_never_hidden(method, number):
    query, key, value = _inputs()
    bad = key.at[0, 13, 1, 2].set(number)
    spec = AttentionSpec(method, k=KEPT)
    with pytest.raises(ValueError, match=r"keys must be finite: found (nan|inf) at \(0, 13, 1, 2\)"):
        attention.lev_attention(query, bad, value, spec)
    out = np.asarray(lev_attention(query, bad, value, spec))
    others = np.ones(out.shape, bool)
    others[0, :, 1] = False
    np.testing.assert_array_equal(out[others], np.asarray(lev_attention(query, key, value, spec))[others])
    if method == "dense":  # infinity has a place in softmax: for queries of the other sign the key does not count
        assert np.isnan(out[0, :, 1]).any()
    elif method != "random":  # which looks at no key, and here keeps others
        assert np.isnan(out[0, :, 1]).any(axis=-1).all()


def test_checkify_reports_a_key_that_is_not_a_number_under_jit():
    query, key, value = _inputs()
    attend = jax.jit(functools.partial(attention.lev_attention, spec=AttentionSpec("leverage", k=KEPT)))
    for bad, said in ((key, None), (key.at[0, 0, 0, 0].set(jnp.nan), "keys must be finite")):
        error, _ = checkify.checkify(attend)(query, bad, value)
        assert (said is None) == (error.get() is None)
        assert said is None or said in error.get()
