"""What a Vision Transformer's switches may and may not change."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError

from levattn.attention import AttentionSpec
from levattn.models import ModelConfig, ViT, scan_to_unrolled, unrolled_to_scan
from levattn.models.layers import StochasticDepth

TINY = ModelConfig("mu/4", depth=2, num_classes=5)
LEVERAGE = AttentionSpec("leverage", k=3)
IMAGES = jax.random.normal(jax.random.key(1), (2, 12, 8, 3))


def random_params(config, images=IMAGES):
    """Parameters without compiling `init`, every one off its initial value."""
    shapes = jax.eval_shape(ViT(config).init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) * 0.2, leaf.dtype), shapes)


@functools.partial(jax.jit, static_argnames=("config", "train", "capture", "mutable", "return_features"))
def apply(config, params, images=IMAGES, **kwargs):
    return ViT(config).apply({"params": params}, images, **kwargs)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grad(config, params):
    def loss_fn(params):
        return jnp.sum(ViT(config).apply({"params": params}, IMAGES) ** 2)

    return jax.value_and_grad(loss_fn)(params)


def assert_trees_close(got, expected, tolerance=1e-4):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(expected), strict=True):
        atol = tolerance * max(1e-2, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=atol, err_msg=jax.tree_util.keystr(path))


def test_scan_and_remat_change_neither_outputs_nor_gradients():
    plain = dataclasses.replace(TINY, attention=LEVERAGE)
    params = random_params(plain)
    expected = loss_and_grad(plain, params)
    assert_trees_close(loss_and_grad(dataclasses.replace(plain, remat="full"), params), expected)
    scanned = dataclasses.replace(plain, remat="dots", scan=True)
    loss, grad = loss_and_grad(scanned, unrolled_to_scan(params))
    assert_trees_close((loss, scan_to_unrolled(grad)), expected)


def test_converters_undo_each_other_exactly():
    unrolled = random_params(TINY)
    scanned = random_params(dataclasses.replace(TINY, scan=True))
    for tree, there, back in [
        (unrolled, unrolled_to_scan, scan_to_unrolled),
        (scanned, scan_to_unrolled, unrolled_to_scan),
    ]:
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), back(there(tree)), tree))
    assert jax.tree.map(jnp.shape, unrolled_to_scan(unrolled)) == jax.tree.map(jnp.shape, scanned)
    with pytest.raises(ValueError, match="encoderblock_0"):
        unrolled_to_scan(scanned)
    with pytest.raises(ValueError, match="stacked"):
        scan_to_unrolled(unrolled)


def test_scanned_layers_are_initialised_independently():
    model = ViT(dataclasses.replace(TINY, scan=True))
    params = jax.jit(model.init)(jax.random.key(0), IMAGES)["params"]
    kernel = params["Transformer"]["encoderblock"]["MlpBlock_0"]["Dense_0"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])


def test_bfloat16_compute_keeps_float32_parameters_and_logits():
    config = dataclasses.replace(TINY, pool="map", dtype="bfloat16", layer_scale=0.5, pre_norm=True)
    params = random_params(config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    logits = apply(config, params)
    assert logits.dtype == jnp.float32
    expected = apply(dataclasses.replace(config, dtype="float32"), params)
    assert 0 < jnp.abs(logits - expected).max() < 0.05 * jnp.abs(expected).max()


def test_bfloat16_blocks_multiply_in_bfloat16():
    """No dense layer or attention product of the encoder falls back to float32, which would cost speed unseen."""
    config = dataclasses.replace(TINY, dtype="bfloat16", stochastic_depth=0.1, dropout=0.1)
    rngs = {"dropout": jax.random.key(0)}
    text = apply.lower(config, random_params(config), train=True, rngs=rngs).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    float32 = [line for line in products if "bf16" not in line.split(":")[-1]]
    assert len(products) > 8 * config.depth
    assert len(float32) <= 1, float32  # the head


@pytest.mark.parametrize(
    "pool, spec, num_registers",
    [
        ("cls", LEVERAGE, 0),
        ("gap", AttentionSpec(), 0),
        ("gap", LEVERAGE, 2),
        ("map", LEVERAGE, 2),
        ("cls_gap", LEVERAGE, 2),
    ],
)
def test_masked_tokens_are_as_good_as_absent(pool, spec, num_registers):
    """The last row of patches masked, whatever stands in it, gives what the shorter image gives."""
    config = dataclasses.replace(TINY, pool=pool, attention=spec, num_registers=num_registers)
    params = random_params(config)
    prefix = config.num_prefix_tokens
    mask = jnp.arange(6 + prefix)[None] < jnp.array([4 + prefix, 6 + prefix])[:, None]
    logits, features = apply(config, params, mask=mask, return_features=True)
    short = {**params, "pos_embedding": params["pos_embedding"][:, :4]}
    expected, short_features = apply(config, short, IMAGES[:, :8], return_features=True)
    np.testing.assert_allclose(logits[0], expected[0], atol=1e-5)
    np.testing.assert_allclose(features.tokens[0, : 4 + prefix], short_features.tokens[0], atol=1e-5)
    np.testing.assert_allclose(logits[1], apply(config, params)[1], atol=1e-5)


def test_features_are_what_the_head_reads():
    config = dataclasses.replace(TINY, pool="cls", rep_size=24)
    params = random_params(config)
    logits, features = apply(config, params, return_features=True)
    np.testing.assert_array_equal(features.pooled, features.tokens[:, 0])
    assert features.tokens.shape == (2, 7, 32)
    head = params["head"]
    np.testing.assert_allclose(features.pre_logits @ head["kernel"] + head["bias"], logits, atol=1e-5)
    headless = apply(dataclasses.replace(config, num_classes=0), params)
    np.testing.assert_allclose(headless, features.pre_logits, atol=1e-6)


@pytest.mark.parametrize("scan", [False, True])
def test_capture_reaches_every_layer_and_leaves_the_output_alone(scan):
    config = dataclasses.replace(TINY, attention=LEVERAGE, scan=scan, remat="dots")
    params = random_params(config)
    logits, state = apply(config, params, capture=True, mutable="intermediates")
    np.testing.assert_allclose(logits, apply(config, params), atol=1e-5)
    blocks = state["intermediates"]["Transformer"]
    layers = ["encoderblock"] if scan else [f"encoderblock_{layer}" for layer in range(2)]
    assert sorted(blocks) == layers
    for layer in layers:
        captured = blocks[layer]["MultiHeadDotProductAttention_0"]
        expected = {"queries": (2, 6, 2, 16), "keys": (2, 6, 2, 16), "indices": (2, 2, 3), "attention_mass": (2, 2)}
        assert {name: captured[name][0].shape[scan:] for name in expected} == expected
        assert (captured["attention_mass"][0] > 0).all()


@pytest.mark.parametrize("scan", [False, True])
def test_the_selection_stream_drives_random_selection_apart_in_each_layer(scan):
    """Same key, same choice; another key or layer, another; no key: the seed of the spec."""
    config = dataclasses.replace(TINY, pool="cls", attention=AttentionSpec("random", k=3), scan=scan)
    params = random_params(config)

    def chosen(seed):
        rngs = {} if seed is None else {"selection": jax.random.key(seed)}
        _, state = apply(config, params, capture=True, mutable="intermediates", rngs=rngs)
        blocks = state["intermediates"]["Transformer"]
        indices = [block["MultiHeadDotProductAttention_0"]["indices"][0] for block in blocks.values()]
        return np.sort(np.concatenate(indices) if scan else np.stack(indices), axis=-1)

    np.testing.assert_array_equal(chosen(1), chosen(1))
    np.testing.assert_array_equal(chosen(None), chosen(None))
    assert (chosen(1) != chosen(2)).any()
    assert (chosen(1)[0] != chosen(1)[1]).any()


@pytest.mark.parametrize("rates", [{"dropout": 0.3}, {"stochastic_depth": 0.3}], ids=lambda rates: next(iter(rates)))
def test_dropout_and_stochastic_depth_act_in_training_only(rates):
    plain = dataclasses.replace(TINY, scan=True)
    config = dataclasses.replace(plain, **rates)
    params = random_params(plain)
    np.testing.assert_array_equal(apply(config, params), apply(plain, params))
    with pytest.raises(InvalidRngError, match="dropout"):
        apply(config, params, train=True)
    many = jnp.tile(IMAGES, (16, 1, 1, 1))
    one, two = (apply(config, params, many, train=True, rngs={"dropout": jax.random.key(seed)}) for seed in (1, 2))
    assert (one != two).any()


def test_stochastic_depth_keeps_the_mean_and_drops_whole_images():
    x = jnp.ones((4000, 2, 3))
    y = StochasticDepth(train=True).apply({}, x, 0.25, rngs={"dropout": jax.random.key(0)})
    assert (y == y[:, :1, :1]).all()
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.75], rtol=1e-6)
    np.testing.assert_allclose(y.mean(), 1, atol=0.03)


def test_stochastic_depth_spares_the_first_block_and_grows_to_the_last():
    """In training at a rate near 1 all branches but the first block's vanish: what is left is that block alone."""
    config = dataclasses.replace(TINY, stochastic_depth=1 - 1e-6)
    params = random_params(config)
    logits = apply(config, params, train=True, rngs={"dropout": jax.random.key(0)})
    np.testing.assert_allclose(logits, apply(dataclasses.replace(TINY, depth=1), params), atol=1e-5)


def test_attention_by_layer_is_what_each_layer_does():
    """A rule that makes only the last layer sparse equals the dense model up to that layer."""
    config = dataclasses.replace(TINY, attention_by_layer=(("-1", AttentionSpec("leverage", k=2)),))
    params = random_params(config)
    captured = {}
    for name, model in {"dense": TINY, "mixed": config}.items():
        _, state = apply(model, params, capture=True, mutable="intermediates")
        captured[name] = state["intermediates"]["Transformer"]
    for layer, num_kept in enumerate([6, 2]):
        dense, mixed = (
            captured[m][f"encoderblock_{layer}"]["MultiHeadDotProductAttention_0"] for m in ("dense", "mixed")
        )
        np.testing.assert_allclose(mixed["queries"][0], dense["queries"][0], atol=1e-5)
        assert mixed["indices"][0].shape[-1] == num_kept
    assert not np.allclose(apply(config, params), apply(TINY, params), atol=1e-4)


def test_registers_are_read_by_attention_alone():
    """They change what the patches become, but once no query sees them nothing of them is left."""
    config = dataclasses.replace(TINY, num_registers=2, depth=1)
    params = random_params(config)
    plain = {name: value for name, value in params.items() if name != "registers"}
    expected = apply(dataclasses.replace(TINY, depth=1), plain)
    assert not np.allclose(apply(config, params), expected, atol=1e-3)
    mask = jnp.tile(jnp.arange(8) >= 2, (2, 1))
    np.testing.assert_allclose(apply(config, params, mask=mask), expected, atol=1e-5)


def test_windows_on_the_grid_skip_every_token_before_the_patches():
    """Four kept keys, all before the patches, and a window over the whole grid: patches see all, the others do not."""
    dense = dataclasses.replace(TINY, depth=1, pool="cls", distilled=True, num_registers=2)
    prefix = dense.num_prefix_tokens
    spec = AttentionSpec("row_norm", k=prefix, keep_prefix=prefix, local_window=(5, 3))
    params = random_params(dense)
    _, features = apply(dataclasses.replace(dense, attention=spec), params, return_features=True)
    _, expected = apply(dense, params, return_features=True)
    np.testing.assert_allclose(features.tokens[:, prefix:], expected.tokens[:, prefix:], atol=1e-5)
    assert not np.allclose(features.tokens[:, :prefix], expected.tokens[:, :prefix], atol=1e-3)


def test_tokens_before_the_patches_start_apart():
    """Two that began alike would get the same gradients for ever."""
    config = dataclasses.replace(TINY, pool="cls", distilled=True, num_registers=2)
    params = jax.jit(ViT(config).init)(jax.random.key(0), IMAGES)["params"]
    tokens = np.concatenate([params["cls"], params["dist"], params["registers"]], axis=1)[0]
    assert len(np.unique(tokens, axis=0)) == 4


def test_wrong_image_sides_and_masks_are_refused_by_name():
    with pytest.raises(ValueError, match=r"image size 10x8 .* patch size 4"):
        random_params(TINY, IMAGES[:, :10])
    with pytest.raises(ValueError, match=r"mask of shape \(2, 5\) must be \(2, 6\)"):
        apply(TINY, random_params(TINY), mask=jnp.ones((2, 5), bool))
