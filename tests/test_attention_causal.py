"""Causal attention: what a row gives depends on its past alone, and it sees the keys that its rule says."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from levattn import attention
from levattn.attention import AttentionSpec, LevAttention
from levattn.attention.causal import attend_causal, seen_keys, select_causal
from tests import reference

BATCH, TOKENS, HEADS, WIDTH, KEPT, CHUNK = 2, 45, 2, 6, 5, 8
SPECS = {
    "running top-k": AttentionSpec("leverage", k=KEPT, causal=True),
    "with a window": AttentionSpec("leverage", k=KEPT, causal=True, local_window=21),
    "with leading tokens": AttentionSpec("leverage", k=KEPT, causal=True, keep_prefix=2),
    "threshold": AttentionSpec("leverage", k=None, eps=0.4, causal=True),
    "threshold, capped": AttentionSpec("leverage", k=3, eps=0.2, causal=True, local_window=3),
}


def _inputs(seed=0, batch=BATCH, dtype=jnp.float32, tokens=TOKENS):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(batch, tokens, HEADS, WIDTH)), dtype) for _ in range(3))


@pytest.fixture(params=SPECS)
def spec(request):
    return SPECS[request.param]


_attend = jax.jit(functools.partial(attend_causal, chunk=CHUNK), static_argnames="spec")


@functools.partial(jax.jit, static_argnames="spec")
def _output_and_seen(query, key, value, spec):
    """In one program, which compiles the choice of keys once."""
    return attend_causal(query, key, value, spec, chunk=CHUNK), _seen(key, spec)


@functools.partial(jax.jit, static_argnames="spec")
def _seen(key, spec):
    return seen_keys(select_causal(key, spec, chunk=CHUNK), spec, key.shape[1])


def _rule(keys: np.ndarray, spec: AttentionSpec) -> np.ndarray:
    """What each row of one head sees, by the words of `attend_causal`, in float64 and one key at a time."""
    num_tokens, width = keys.shape
    capacity = int(width / spec.eps) + spec.keep_prefix if spec.k is None else spec.k
    on_arrival = reference.online_leverage_scores(keys)
    seen, held = np.zeros((num_tokens, num_tokens), bool), {}

    def ranked(scores):
        # As the code has it: slack below eps, and ties among keys that are alone in their direction.
        scores = {j: 1 if s > 1 - 1e-4 else s for j, s in scores.items()}
        least = 0 if spec.eps is None else spec.eps * (1 - 1e-3)
        passing = {j: s for j, s in scores.items() if s >= least or j < spec.keep_prefix}
        return sorted(passing, key=lambda j: (j >= spec.keep_prefix, -passing[j], j))

    for start in range(0, num_tokens, CHUNK):
        stop = min(start + CHUNK, num_tokens)
        for i in range(start, stop):
            known = held | {j: on_arrival[j] for j in range(start, i + 1)}
            seen[i, ranked(known)[: capacity if spec.eps is None else None]] = True
            seen[i, max(0, i - (spec.local_window or 1) // 2) : i + 1] = True
        inverse = np.linalg.pinv(keys[:stop].T @ keys[:stop], rcond=1e-12, hermitian=True)
        rescored = {j: keys[j] @ inverse @ keys[j] for j in [*held, *range(start, stop)]}
        held = {j: rescored[j] for j in ranked(rescored)[:capacity]}
    return seen


def test_a_row_sees_what_the_rule_says(spec):
    query, key, value = _inputs()
    seen = np.asarray(_output_and_seen(query, key, value, spec)[1])
    for b in range(BATCH):
        for h in range(HEADS):
            np.testing.assert_array_equal(seen[b, h], _rule(np.asarray(key[b, :, h], np.float64), spec))


def test_output_is_softmax_attention_over_the_seen_keys(spec):
    query, key, value = _inputs()
    out, seen = (np.asarray(x) for x in _output_and_seen(query, key, value, spec))
    for b in range(BATCH):
        for h in range(HEADS):
            kept = [np.flatnonzero(row) for row in seen[b, h]]
            expected = reference.attention_over(query[b, :, h], key[b, :, h], value[b, :, h], kept)
            np.testing.assert_allclose(out[b, :, h], expected, atol=1e-5)


@pytest.mark.parametrize("later", ["noise", "zeros", "huge", "copies of the past"])
def test_changing_later_tokens_changes_no_earlier_row(spec, later):
    inputs = _inputs(1, batch=1)
    expected = np.asarray(_output_and_seen(*(jnp.tile(x, (BATCH, 1, 1, 1)) for x in inputs), spec)[0])[0]
    # Case b keeps tokens up to b, and has others after it.
    keeps = np.arange(TOKENS) <= np.arange(TOKENS)[:, None]
    rng = np.random.default_rng(2)
    others = {
        "noise": rng.normal(size=(3, TOKENS, TOKENS, HEADS, WIDTH)),
        "zeros": np.zeros((3, 1, 1, 1, 1)),
        "huge": 1e4 * rng.normal(size=(3, TOKENS, TOKENS, HEADS, WIDTH)),
        "copies of the past": np.stack([np.asarray(x)[:, rng.integers(0, 9, TOKENS)] for x in inputs]),
    }[later].astype(np.float32)
    changed = [np.where(keeps[..., None, None], x, other) for x, other in zip(inputs, others, strict=True)]
    for first in (*range(0, TOKENS - BATCH, BATCH), TOKENS - BATCH):  # batches of the one shape that is compiled
        out, _ = _output_and_seen(*(x[first : first + BATCH] for x in changed), spec)
        for case, kept in zip(np.asarray(out), keeps[first : first + BATCH], strict=True):
            np.testing.assert_allclose(case[kept], expected[kept], atol=2e-6)


@pytest.mark.parametrize("number", [1e20, np.inf, np.nan])
def test_no_row_sees_a_later_number_that_is_huge_or_none(spec, number):
    inputs = [x.at[:, :9].set(0) if i == 1 else x for i, x in enumerate(_inputs(1))]
    expected, place = np.asarray(_output_and_seen(*inputs, spec)[0]), 13
    for which in (1, 2):
        changed = [x.at[:, place:].multiply(number) if i == which else x for i, x in enumerate(inputs)]
        out = np.asarray(_output_and_seen(*changed, spec)[0])
        np.testing.assert_allclose(out[:, :place], expected[:, :place], atol=2e-6)
        assert np.isfinite(number) or np.all(np.isnan(out[:, place:]))


@pytest.mark.parametrize("name", ["with a window", "threshold"])
def test_no_derivative_reaches_back_from_a_row_to_a_later_token(name):
    spec = SPECS[name]
    tokens = 20
    inputs = tuple(x[:1] for x in _inputs(3, tokens=tokens))
    jacobians = jax.jit(jax.jacrev(lambda *x: attend_causal(*x, spec, chunk=CHUNK)[0].sum((1, 2)), argnums=(0, 1, 2)))(
        *inputs
    )
    for jacobian in jacobians:
        by_token = np.abs(np.asarray(jacobian)[:, 0]).sum((-2, -1))  # rows by tokens
        np.testing.assert_array_equal(np.triu(by_token, 1), 0)
    for jacobian in jacobians[1:]:  # a row always sees its own token
        assert np.all(np.diag(np.abs(np.asarray(jacobian)[:, 0]).sum((-2, -1)))[1:] > 0)


@pytest.mark.parametrize("name", ["with a window", "threshold"])
def test_gradients_agree_with_finite_differences(name):
    spec = SPECS[name]
    inputs = _inputs()

    @jax.jit
    def loss_and_gradients(*inputs):
        return jax.value_and_grad(lambda *x: jnp.sum(jnp.sin(attend_causal(*x, spec, chunk=CHUNK))), (0, 1, 2))(*inputs)

    def loss(*inputs):
        return loss_and_gradients(*inputs)[0]

    gradients = loss_and_gradients(*inputs)[1]
    for at, gradient in enumerate(gradients):
        step = jax.random.normal(jax.random.key(at), gradient.shape)
        moved = [[x + sign * 1e-3 * step if i == at else x for i, x in enumerate(inputs)] for sign in (1, -1)]
        seen = [_output_and_seen(*x, spec)[1] for x in moved]
        if not np.array_equal(*seen):
            continue  # the choice itself moved: between two choices there is no derivative
        np.testing.assert_allclose(
            jnp.sum(gradient * step), (loss(*moved[0]) - loss(*moved[1])) / 2e-3, rtol=2e-2, atol=3e-2
        )


def test_as_many_slots_as_tokens_are_dense_causal_attention():
    query, key, value = _inputs()
    dense = _attend(query, key, value, AttentionSpec("dense", causal=True))
    seen = [np.arange(i + 1) for i in range(TOKENS)]
    for b in range(BATCH):
        for h in range(HEADS):
            expected = reference.attention_over(query[b, :, h], key[b, :, h], value[b, :, h], seen)
            np.testing.assert_allclose(dense[b, :, h], expected, atol=1e-5)
    out = _attend(query, key, value, AttentionSpec("leverage", k=TOKENS, causal=True))
    np.testing.assert_allclose(out, dense, atol=1e-5)


@pytest.mark.parametrize("name", ["running top-k", "threshold", "dense"])
def test_masked_tokens_at_the_end_are_as_if_absent(name):
    spec = AttentionSpec("dense", causal=True) if name == "dense" else SPECS[name]
    query, key, value = _inputs()
    mask = np.arange(TOKENS) < np.array([30, 0])[:, None]
    padded_key, padded_value = (jnp.where(mask[:, :, None, None], x, jnp.nan) for x in (key, value))
    out = _attend(query, padded_key, padded_value, spec, mask=jnp.asarray(mask))
    expected = _attend(query[:1, :30], key[:1, :30], value[:1, :30], spec)
    np.testing.assert_allclose(out[:1, :30], expected, atol=1e-5)
    np.testing.assert_array_equal(out[1], 0)  # nothing to attend to: zeros, not NaN


def _awkward(rng, kind, tokens):
    keys = rng.normal(size=(tokens, WIDTH))
    match kind:
        case 1:
            keys *= rng.lognormal(sigma=2, size=(tokens, 1))
        case 2:
            keys = rng.normal(size=(tokens, 2)) @ rng.normal(size=(2, WIDTH))
        case 3:
            keys = keys[rng.integers(0, 9, tokens)]
        case 4:
            keys[rng.random(tokens) < 0.6] = 0
        case 5:
            keys *= np.geomspace(1, 1e3, tokens)[:, None]
        case 6:
            keys *= np.geomspace(1e3, 1, tokens)[:, None]
    return keys


@pytest.mark.parametrize("eps", [0.15, 0.4, 1.0])
def test_a_threshold_shows_every_row_all_its_heavy_keys_for_any_query(eps):
    rng = np.random.default_rng(0)
    num_cases = 56
    keys = np.stack([_awkward(rng, case % 7, TOKENS) for case in range(num_cases)])
    keys = np.stack([keys, np.flip(keys, axis=1)], axis=2).astype(np.float32)
    seen = np.asarray(_seen(jnp.asarray(keys), AttentionSpec("leverage", k=None, eps=eps, causal=True)))
    for case in range(num_cases):
        for head in range(2):
            wide = keys[case, :, head].astype(np.float64)
            for i in range(0, TOKENS, 4):
                past = wide[: i + 1]
                # The largest entry that any query can put on key j is its leverage score among the keys up to i.
                left, singular, _ = np.linalg.svd(past, full_matrices=False)
                scores = np.sum(left[:, singular > 1e-5 * max(singular[0], 1e-300)] ** 2, axis=1)
                heavy = np.flatnonzero(scores >= eps * (1 + 1e-6))
                assert np.all(seen[case, head, i, heavy]), (case, head, i, heavy[~seen[case, head, i, heavy]])


def test_memory_is_linear_in_the_number_of_tokens():
    spec = AttentionSpec("leverage", k=16, causal=True, local_window=33)

    def temporary(tokens):
        shape = jax.ShapeDtypeStruct((1, tokens, 1, 16), jnp.float32)
        backward = jax.jit(jax.grad(lambda q, k, v: jnp.sum(attend_causal(q, k, v, spec)), argnums=(0, 1, 2)))
        return backward.lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8192) < 2.5 * temporary(4096) < 8192 * 8192 * 4 / 4


def test_bfloat16_stays_close_to_float32():
    inputs = _inputs(dtype=jnp.bfloat16)
    spec = SPECS["with a window"]
    out = _attend(*inputs, spec)
    assert out.dtype == jnp.bfloat16
    expected = _attend(*(x.astype(jnp.float32) for x in inputs), spec)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.05)


def test_the_layer_is_causal_in_flax_attention():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 20, 8)), jnp.float32)
    full = nn.MultiHeadDotProductAttention(num_heads=2)
    variables = jax.jit(full.init)(jax.random.key(0), x)
    expected = jax.jit(full.apply)(variables, x, mask=nn.make_causal_mask(x[..., 0]))
    for spec in (AttentionSpec("dense", causal=True), AttentionSpec("leverage", k=20, causal=True)):
        layer = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=LevAttention(spec))
        np.testing.assert_allclose(jax.jit(layer.apply)(variables, x), expected, atol=1e-5)
    with pytest.raises(ValueError, match="sow_weights"):
        layer.apply(variables, x, sow_weights=True, mutable="intermediates")
    with pytest.raises(ValueError, match="causal=True"):
        layer.apply(variables, x, mask=nn.make_causal_mask(x[..., 0]))


def test_what_causal_attention_cannot_do_is_refused():
    query, key, value = _inputs()
    with pytest.raises(ValueError, match="one key per query"):
        attend_causal(query[:, :5], key, value, SPECS["threshold"])
    with pytest.raises(ValueError, match=r"k=99 must be in \[1, 45\]"):
        attention.lev_attention(query, key, value, AttentionSpec("leverage", k=99, causal=True))
    with pytest.raises(ValueError, match="chunk=0"):
        attend_causal(query, key, value, SPECS["threshold"], chunk=0)


@pytest.mark.parametrize(
    "options, named",
    [
        ({"method": "matched"}, "method='matched'"),
        ({"local_window": (3, 3)}, "local_window"),
        ({"local_window": "cross"}, "local_window"),
        ({"centre": True}, "centre"),
        ({"ridge": 0.1}, "ridge"),
        ({"power": 2}, "power"),
    ],
)
def test_options_that_see_the_future_are_named(options, named):
    with pytest.raises(ValueError, match=named):
        AttentionSpec(**({"method": "leverage", "causal": True} | options))
