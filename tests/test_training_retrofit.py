"""A retrofit that keeps every key changes nothing; what others change is measured as a plain loop measures it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from levattn.attention import METHODS, AttentionSpec, lev_attention
from levattn.data import normalize, open_source
from levattn.models import ViT, unrolled_to_scan
from levattn.training.agreement import cosine_similarity, first_images, layer_errors
from levattn.training.attentions import expand, with_attention
from levattn.training.config import ProbeConfig
from levattn.training.retrofit import evaluate_retrofit
from tests import retrofits
from tests.retrofits import TOKENS

# Heads of 8: of 17 tokens in 16 dimensions nearly all have a leverage of 1, and rounding would choose among them.
MODEL = dataclasses.replace(retrofits.MODEL, num_heads=4)
FAST = ProbeConfig(folds=2, seeds=1, error_images=20)
SPECS = [AttentionSpec("leverage", k=4), AttentionSpec("kmeans", k=6, keep_prefix=1)]


def images_of(config):
    source = open_source(config.data, config.data.eval_split)
    return normalize(jnp.stack([source[i]["image"] for i in range(len(source))]), config.data)


@pytest.fixture(scope="module")
def compared():
    trained = retrofits.tiny_model(MODEL)
    return trained, *evaluate_retrofit(trained, SPECS, config=FAST)


def test_every_method_that_keeps_every_key_is_dense_attention():
    trained = retrofits.tiny_model(dataclasses.replace(MODEL, depth=1))
    rows, errors = evaluate_retrofit(trained, list(expand(AttentionSpec(), list(METHODS), [TOKENS])), config=FAST)
    assert [row["attention"] for row in rows] == list(METHODS)  # dense comes first, and once
    for row in rows:
        assert row["agreement"] == 1
        assert row["cosine"] == pytest.approx(1, abs=1e-4)
        assert (row["probe"], row["knn"]) == (rows[0]["probe"], rows[0]["knn"])
        assert row["error"] == pytest.approx(0, abs=1e-3)
    assert max(max(error) for error in errors.values()) < 1e-3


def test_similarity_and_agreement_are_those_of_a_plain_loop(compared):
    trained, rows, _ = compared
    images = images_of(trained.config)

    def run(spec):
        model = ViT(with_attention(MODEL, spec))
        logits, features = jax.jit(lambda x: model.apply({"params": trained.params}, x, return_features=True))(images)
        return np.asarray(logits), np.asarray(features.pre_logits)

    dense_logits, dense = run(AttentionSpec("dense"))
    for row, spec in zip(rows[1:], SPECS, strict=True):
        logits, features = run(spec)
        cosine = np.sum(dense * features, 1) / np.linalg.norm(dense, axis=1) / np.linalg.norm(features, axis=1)
        assert row["cosine"] == pytest.approx(cosine.mean(), abs=1e-3)  # which of equal keys is kept is open
        assert row["cosine"] < 0.999
        assert row["agreement"] == pytest.approx(np.mean(logits.argmax(1) == dense_logits.argmax(1)), abs=2 / 80)
        assert (row["examples"], row["k"], row["model"], row["trained_with"]) == (80, spec.k, "tiny", "dense")
        assert row["ms_per_image"] == pytest.approx(1000 * row["seconds"] / 80)


@pytest.mark.parametrize("scan", [False, True])
def test_the_error_of_a_layer_is_its_own_on_the_inputs_it_has_in_the_dense_model(scan):
    """By hand: block by block through the dense model, with other attention beside it in numpy."""
    trained = retrofits.tiny_model(MODEL)
    images = images_of(trained.config)[:20]
    params = trained.params
    errors, grid = [], (4, 4)
    _, state = ViT(MODEL).apply({"params": params}, images, capture=True, mutable=["intermediates"])
    for layer in range(3):
        name = f"encoderblock_{layer}"
        sown = state["intermediates"]["Transformer"][name]["MultiHeadDotProductAttention_0"]
        query, key, value = (sown[part][0] for part in ("queries", "keys", "values"))
        kernel = np.float64(params["Transformer"][name]["MultiHeadDotProductAttention_0"]["out"]["kernel"])
        logits = np.einsum("bthd,bshd->bhts", *np.float64([query, key])) / np.sqrt(query.shape[-1])
        weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        exact = np.einsum("bhts,bshd,hdc->btc", weights, np.float64(value), kernel)
        other = np.float64(lev_attention(query, key, value, SPECS[0], grid=grid))
        other = np.einsum("bthd,hdc->btc", other, kernel)
        errors.append(np.mean(((other - exact) ** 2).sum((1, 2)) / (exact**2).sum((1, 2))))
    model = dataclasses.replace(MODEL, scan=scan)
    batches = [images[:8], images[8:]]
    found = layer_errors(model, unrolled_to_scan(params) if scan else params, batches, [SPECS[0]])
    np.testing.assert_allclose(found[0], errors, rtol=1e-3)
    assert min(errors) > 1e-3


def test_an_attention_for_each_layer_has_the_errors_of_its_layers():
    trained = retrofits.tiny_model(MODEL)
    batches = first_images(open_source(trained.config.data, "test"), trained.config.data, 8)
    by_layer = (SPECS[0], SPECS[1], AttentionSpec("dense"))
    first, second, mixed = layer_errors(MODEL, trained.params, batches, [*SPECS, by_layer])
    np.testing.assert_array_equal(mixed, [first[0], second[1], 0])


def test_images_without_labels_are_compared_and_not_probed(tmp_path):
    """A folder with one subfolder, and a model without a head."""
    from PIL import Image

    (tmp_path / "all").mkdir()
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, size=(9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "all" / f"{i}.png")
    model = dataclasses.replace(MODEL, num_classes=0, pool="gap")
    params = jax.jit(ViT(model).init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    trained = retrofits.tiny_model(MODEL)
    data = dataclasses.replace(trained.config.data, source=f"folder:{tmp_path}", image_size=8, eval_split="train")
    config = dataclasses.replace(trained.config, data=data, model=model)
    trained = dataclasses.replace(trained, config=config, params=params, head=None)
    rows, _ = evaluate_retrofit(trained, [AttentionSpec("random", k=3)], config=ProbeConfig(error_images=64))
    assert [row["examples"] for row in rows] == [5, 5]
    assert not {"probe", "knn", "agreement"} & set(rows[1])
    assert 0 < rows[1]["cosine"] < 1
    assert rows[1]["error"] > 0


def test_the_first_images_are_those_of_the_source_however_they_are_batched():
    trained = retrofits.tiny_model(MODEL)
    source, images = open_source(trained.config.data, "test[:80]"), images_of(trained.config)
    for number, batch_size in [(20, 8), (16, 8), (3, 8), (100, 32)]:
        found = first_images(source, trained.config.data, number, batch_size)
        np.testing.assert_allclose(np.concatenate(found), images[:number], atol=1e-6)


def test_similarity_to_nothing_is_zero():
    a = np.float32([[1, 0], [0, 2], [0, 0]])
    np.testing.assert_allclose(cosine_similarity(a, np.float32([[3, 0], [1, 1], [1, 0]])), [1, np.sqrt(0.5), 0])


def test_too_few_images_for_the_folds_cost_the_probe_and_nothing_else():
    with pytest.warns(UserWarning, match="no probe: folds=500 needs as many images"):
        rows, _ = evaluate_retrofit(retrofits.tiny_model(MODEL), SPECS[:1], config=dataclasses.replace(FAST, folds=500))
    assert all("probe" not in row and row["cosine"] > 0 for row in rows)
