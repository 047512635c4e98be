"""The layer drops into Flax's multi-head attention without touching a parameter."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from levattn.attention import METHODS, AttentionSpec, LevAttention, LevSelfAttention
from levattn.attention.dense import attend_dense


def _x(batch=2, tokens=12, width=16, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(batch, tokens, width)), jnp.float32)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_of_flax_attention_load_unchanged_and_all_keys_give_its_output(method):
    x = _x()
    flax_attention = nn.MultiHeadDotProductAttention(num_heads=4)
    variables = flax_attention.init(jax.random.key(0), x)
    spec = AttentionSpec(method, k=x.shape[1])
    ours = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=LevAttention(spec))
    theirs_shapes = jax.eval_shape(flax_attention.init, jax.random.key(0), x)
    assert jax.eval_shape(ours.init, jax.random.key(0), x) == theirs_shapes
    np.testing.assert_allclose(ours.apply(variables, x), flax_attention.apply(variables, x), atol=1e-5)


def test_the_module_holds_the_same_parameters_and_agrees():
    x = _x()
    module = LevSelfAttention(num_heads=4, spec=AttentionSpec("leverage", k=5))
    variables = module.init(jax.random.key(0), x)
    inner = {"params": variables["params"]["MultiHeadDotProductAttention_0"]}
    plain = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=LevAttention(AttentionSpec("leverage", k=5)))
    np.testing.assert_allclose(module.apply(variables, x), plain.apply(inner, x), atol=1e-6)


def test_a_mask_over_keys_is_honoured_and_any_other_refused():
    x = _x()
    attention = nn.MultiHeadDotProductAttention(num_heads=4, attention_fn=LevAttention(AttentionSpec("leverage", k=5)))
    variables = attention.init(jax.random.key(0), x)
    mask = (jnp.arange(12) < 8)[None, None, None]
    out = attention.apply(variables, x, mask=jnp.tile(mask, (2, 1, 1, 1)))
    np.testing.assert_allclose(out[:, :8], attention.apply(variables, x[:, :8]), atol=1e-5)
    with pytest.raises(ValueError, match="token mask"):
        attention.apply(variables, x, mask=nn.make_causal_mask(x[..., 0]))


def test_random_selection_follows_the_rng_stream_when_there_is_one():
    x = _x()
    module = LevSelfAttention(num_heads=4, spec=AttentionSpec("random", k=3))
    variables = module.init(jax.random.key(0), x)
    seeded = module.apply(variables, x)
    np.testing.assert_array_equal(seeded, module.apply(variables, x))
    drawn = [module.apply(variables, x, rngs={"selection": jax.random.key(i)}) for i in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.allclose(drawn[0], drawn[2])


def test_sown_intermediates_say_what_was_kept_and_how_much_attention_it_holds():
    x = _x()
    module = LevSelfAttention(num_heads=4, spec=AttentionSpec("oracle", k=4))
    variables = module.init(jax.random.key(0), x)
    plain = module.apply(variables, x)
    out, state = module.apply(variables, x, sow_weights=True, mutable="intermediates")
    np.testing.assert_allclose(out, plain, atol=1e-6)
    (sown,) = state["intermediates"].values()
    query, key, mass, indices = (sown[name][0] for name in ("queries", "keys", "attention_mass", "indices"))
    assert mass.shape == (2, 4)
    for b in range(2):
        for h in range(4):
            logits = np.asarray(query[b, :, h] @ key[b, :, h].T, np.float64) / 2  # sqrt of the head width 4
            probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            np.testing.assert_allclose(mass[b, h], probs[:, indices[b, h]].sum(-1).mean(), atol=1e-5)
            # The oracle keeps the columns of largest mass: no other four hold more.
            np.testing.assert_allclose(mass[b, h], np.sort(probs.mean(0))[-4:].sum(), atol=1e-5)


def test_compute_type_is_the_layer_s_and_parameters_stay_float32():
    x = _x()
    module = LevSelfAttention(num_heads=4, spec=AttentionSpec("leverage", k=12), dtype=jnp.bfloat16)
    variables = module.init(jax.random.key(0), x)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
    out = module.apply(variables, x)
    assert out.dtype == jnp.bfloat16
    in_float32 = LevSelfAttention(num_heads=4, spec=AttentionSpec("leverage", k=12)).apply(variables, x)
    np.testing.assert_allclose(out.astype(jnp.float32), in_float32, atol=0.05)


def test_attention_dropout_is_refused_rather_than_ignored():
    x = _x()
    layer = nn.MultiHeadDotProductAttention(
        num_heads=4, dropout_rate=0.5, attention_fn=LevAttention(AttentionSpec("leverage", k=5))
    )
    variables = layer.init(jax.random.key(0), x, deterministic=True)
    layer.apply(variables, x, deterministic=True)
    with pytest.raises(ValueError, match=r"dropout_rate=0\.5"):
        layer.apply(variables, x, deterministic=False, rngs={"dropout": jax.random.key(0)})


def test_a_typo_in_the_method_is_refused_when_the_layer_is_made():
    with pytest.raises(ValueError, match="leverage"):
        LevAttention(AttentionSpec("leverge"))


def test_dense_attention_with_an_empty_mask_gives_zeros():
    q = jnp.ones((2, 3, 1, 4))
    out = attend_dense(q, q, q, jnp.array([[True] * 3, [False] * 3]))
    np.testing.assert_array_equal(out[1], 0)
    np.testing.assert_allclose(out[0], 1)
