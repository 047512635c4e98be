"""Local tokens join the coreset in one softmax, and a key in both counts once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from levattn.attention import AttentionSpec, get_method, lev_attention
from levattn.attention.local import window_neighbours
from tests import reference

GRID, HEADS, WIDTH = (4, 5), 2, 8


def _inputs(tokens, seed=0):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(2, tokens, HEADS, WIDTH)), jnp.float32) for _ in range(3))


def _window(token, window, prefix, tokens):
    """The window of one token, found by looking at every other token."""
    if isinstance(window, int):
        return {t for t in range(tokens) if abs(t - token) <= window // 2}
    if token < prefix:
        return set()
    row, column = divmod(token - prefix, GRID[1])
    return {
        t
        for t in range(prefix, tokens)
        if abs((t - prefix) // GRID[1] - row) <= window[0] // 2
        and abs((t - prefix) % GRID[1] - column) <= window[1] // 2
    }


@pytest.mark.parametrize("window", [1, 3, 7, (1, 1), (3, 3), (3, 5), (7, 7)])
@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("method", ["leverage", "kmeans", "random"])
def test_output_is_softmax_over_the_union_of_coreset_and_window(window, prefix, method):
    tokens = GRID[0] * GRID[1] + prefix
    query, key, value = _inputs(tokens)
    mask = jnp.ones((2, tokens), bool).at[1, -6:].set(False)
    spec = AttentionSpec(method, k=5, keep_prefix=prefix, local_window=window)
    run = jax.jit(functools.partial(lev_attention, spec=spec, grid=GRID))
    padded = [jnp.where(mask[:, :, None, None], x, jnp.nan) for x in (key, value)]
    out = run(query, *padded, mask=mask)
    coreset = get_method(method)(query, key, value, spec=spec, mask=mask)
    for b in range(2):
        for h in range(HEADS):
            heavy = set(np.asarray(coreset.indices[b, h])[np.asarray(coreset.valid[b, h])].tolist())
            exists = set(np.flatnonzero(mask[b]).tolist())
            kept = [sorted((heavy | _window(t, window, prefix, tokens)) & exists) for t in range(tokens)]
            expected = reference.attention_over(query[b, :, h], key[b, :, h], value[b, :, h], kept)
            np.testing.assert_allclose(out[b, :, h], expected, atol=1e-5)


def test_gradients_equal_those_of_masked_dense_attention():
    tokens = GRID[0] * GRID[1] + 1
    query, key, value = _inputs(tokens)
    spec = AttentionSpec("leverage", k=5, keep_prefix=1, local_window=(3, 3))
    coreset = get_method("leverage")(query, key, value, spec=spec)
    allowed = np.zeros((2, HEADS, tokens, tokens), bool)
    for t in range(tokens):
        allowed[:, :, t, sorted(_window(t, (3, 3), 1, tokens))] = True
    for b in range(2):
        for h in range(HEADS):
            allowed[b, h, :, coreset.indices[b, h]] = True

    def by_window(*qkv):
        return jnp.sum(jnp.sin(lev_attention(*qkv, spec, grid=GRID)))

    def by_mask(*qkv):
        return jnp.sum(jnp.sin(jax.nn.dot_product_attention(*qkv, mask=jnp.asarray(allowed))))

    for ours, theirs in zip(
        jax.jit(jax.grad(by_window, (0, 1, 2)))(query, key, value),
        jax.jit(jax.grad(by_mask, (0, 1, 2)))(query, key, value),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_window_over_everything_is_dense_attention():
    query, key, value = _inputs(20)
    spec = AttentionSpec("leverage", k=3, local_window=(7, 9))
    out = lev_attention(query, key, value, spec, grid=GRID)
    np.testing.assert_allclose(out, lev_attention(query, key, value, AttentionSpec()), atol=1e-5)


@pytest.mark.parametrize("grid", [None, (3, 3)])
def test_a_grid_that_does_not_fit_is_refused(grid):
    with pytest.raises(ValueError, match="keep_prefix"):
        window_neighbours(21, (3, 3), 0, grid)


def test_cross_attention_has_no_window():
    query, key, value = _inputs(20)
    with pytest.raises(ValueError, match="one key per query"):
        lev_attention(query[:, :4], key, value, AttentionSpec("leverage", k=3, local_window=3))
