"""A study of attention counts what float64 counts image by image, and writes what it found."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from levattn.analysis.analyze import AnalyzeConfig, image_files, normalised_batches, run_analysis
from levattn.analysis.attention_study import QUANTILES, Model, StudyOptions, study_attention
from levattn.analysis.captured import near_keys
from levattn.attention import AttentionSpec
from levattn.data import open_source
from levattn.models import ViT
from levattn.training.checkpoint import Checkpointer
from levattn.training.config_dict import to_dict
from levattn.training.loaded import load_model
from levattn.training.pretrained import load_pretrained
from levattn.training.workdir import record_run
from tests.retrofits import CONFIG, MODEL, tiny_model

DATA = CONFIG.data
SPECS = [AttentionSpec("leverage", k=k, score_method="svd") for k in (3, 6)]
LAYERS, HEADS, TOKENS, IMAGES = 3, 4, 17, 10
EPS = (0.05, 0.2)


@pytest.fixture(scope="module")
def model():
    tiny = tiny_model(dataclasses.replace(MODEL, num_heads=HEADS))
    return Model("tiny", tiny.config.model, tiny.params)


def images_of(source, num_images=IMAGES, batch_size=4):
    return normalised_batches(source, DATA, num_images, batch_size)


@pytest.fixture(scope="module")
def source():
    return open_source(DATA, "test[:10]")


@pytest.fixture(scope="module")
def study(model, source):
    other = Model("same", model.config, model.params)
    options = StudyOptions(eps=EPS, spectra_images=5)
    return study_attention([other, model], SPECS, images_of(source), DATA.mean, DATA.std, options)


@pytest.fixture(scope="module")
def inputs(model, source):
    """Queries and keys of each image and layer, and of its mirror image, from the model itself."""
    images = jnp.concatenate([images[:count] for images, count in images_of(source)])
    apply_fn = jax.jit(
        lambda x: ViT(model.config).apply({"params": model.params}, x, capture=True, mutable="intermediates")
    )
    found = []
    for each in (images, images[:, :, ::-1]):
        blocks = apply_fn(each)[1]["intermediates"]["Transformer"]
        sown = [blocks[f"encoderblock_{layer}"]["MultiHeadDotProductAttention_0"] for layer in range(LAYERS)]
        arrays = (np.stack([np.asarray(layer[name][0], np.float64) for layer in sown]) for name in ("queries", "keys"))
        found.append([np.moveaxis(x, (1, 0, 3, 2), (0, 1, 2, 3)) for x in arrays])  # images, layers, heads, tokens
    return found


def attention(queries, keys):
    logits = queries @ np.swapaxes(keys, -1, -2) / np.sqrt(keys.shape[-1])
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def scores_of(keys):
    left, values, _ = np.linalg.svd(keys, full_matrices=False)
    return np.sum(left**2, axis=-1, where=(values > 1e-5 * values[..., :1])[..., None, :])


def best(keys, k):
    kept = np.zeros(keys.shape[:-1], bool)
    np.put_along_axis(kept, np.argsort(-scores_of(keys), axis=-1, kind="stable")[..., :k], True, axis=-1)
    return kept


def rows_of(rows, column, k=None):
    return np.reshape([row[column] for row in rows if k is None or row["k"] == k], (LAYERS, HEADS))


@pytest.mark.parametrize("k", [3, 6])
def test_mass_and_heavy_entries_on_sets_and_windows_are_those_of_each_image_in_float64(study, inputs, k):
    matrix, kept = attention(*inputs[0]), best(inputs[0][1], k)[..., None, :]
    near = near_keys(TOKENS, (3, 3), 1, (4, 4))
    for suffix, on in (("", np.broadcast_to(kept, matrix.shape)), ("_with_local", kept | near)):
        mass = np.sum(matrix * on, axis=-1).mean(axis=-1)
        np.testing.assert_allclose(rows_of(study.sets, f"mass{suffix}", k), mass.mean(axis=0), rtol=1e-3)
        np.testing.assert_allclose(rows_of(study.sets, f"mass{suffix}_std", k), mass.std(axis=0, ddof=1), rtol=2e-2)
        for eps in EPS:
            covered = np.sum((matrix >= eps) & on, axis=(0, 3, 4)) / np.sum(matrix >= eps, axis=(0, 3, 4))
            np.testing.assert_allclose(rows_of(study.sets, f"covered_{eps:g}{suffix}", k), covered, atol=5e-3)
    (summary,) = (row for row in study.summary if row["k"] == k)
    by_image = np.sum(matrix * kept, axis=-1).mean(axis=(1, 2, 3))  # heads of an image are one sample
    assert summary["mass"] == pytest.approx(by_image.mean(), rel=1e-3)
    assert summary["mass_error"] == pytest.approx(by_image.std(ddof=1) / np.sqrt(IMAGES), rel=2e-2)
    np.testing.assert_array_equal(rows_of(study.sets, "kept", k), k)


@pytest.mark.parametrize("k", [3, 6])
def test_sets_of_heads_and_mirror_images_are_as_alike_as_python_sets_say(study, inputs, k):
    def patches(keys):
        kept = best(keys, k)[..., 1:]
        return [[[set(np.flatnonzero(head).tolist()) for head in layer] for layer in image] for image in kept]

    def alike(a, b):
        return len(a & b) / len(a | b)

    ours = patches(inputs[0][1])
    heads = [
        [[np.mean([alike(a, b) for b in layer if b is not a]) for a in layer] for layer in image] for image in ours
    ]
    np.testing.assert_allclose(rows_of(study.sets, "same_heads", k), np.mean(heads, axis=0), rtol=1e-4)
    (layers,) = (row["jaccard"] for row in study.layers if row["k"] == k)
    between = np.mean([[alike(a, b) for a in image[0] for b in image[2]] for image in ours])
    assert layers[0][2] == layers[2][0] == pytest.approx(between, abs=1e-4)
    assert layers[1][1] == pytest.approx(np.mean(heads, axis=(0, 2))[1], abs=1e-4)
    mirrored = [
        [[{4 * (p // 4) + 3 - p % 4 for p in head} for head in layer] for layer in image]
        for image in patches(inputs[1][1])
    ]
    expected = [
        [[alike(a, b) for a, b in zip(*layers, strict=True)] for layers in zip(*pair, strict=True)]
        for pair in zip(ours, mirrored, strict=True)
    ]
    np.testing.assert_allclose(rows_of(study.sets, "same_flip", k), np.mean(expected, axis=0), rtol=1e-4)


def test_a_checkpoint_has_its_own_sets_and_views_come_between_those_and_chance(study):
    assert (rows_of(study.sets, "same_same", 6) == 1).all()
    for name in ("flip", "colour", "crop"):
        assert study.summary[1]["chance"] < study.summary[1][f"same_{name}"] < 1


def test_heads_are_described_as_float64_does(study, inputs):
    matrix, scores = attention(*inputs[0]), scores_of(inputs[0][1])
    effective = np.mean(1 / np.sum(matrix**2, axis=-1), axis=(0, 3))
    np.testing.assert_allclose(rows_of(study.heads, "effective_keys"), effective, rtol=1e-3)
    np.testing.assert_allclose(rows_of(study.heads, "prefix_mass"), matrix[..., 0].mean(axis=(0, 3)), rtol=1e-3)
    np.testing.assert_allclose(rows_of(study.heads, "prefix_score"), scores[..., 0].mean(axis=0), atol=1e-2)
    for q in QUANTILES:
        expected = np.quantile(scores, q, axis=-1).mean(axis=0)
        np.testing.assert_allclose(rows_of(study.heads, f"score_q{round(100 * q):02d}"), expected, atol=1e-2)
    for eps in EPS:
        heavy = np.sum(matrix >= eps, axis=(0, 3, 4)) / (IMAGES * TOKENS)
        np.testing.assert_allclose(rows_of(study.heads, f"heavy_{eps:g}"), heavy, atol=2e-3)
    values = np.linalg.svd(inputs[0][1][:5, 1:], compute_uv=False)  # the first layer's class token is no image's
    condition = np.exp(np.mean(np.log(values[..., 0] / values[..., -1]), axis=0))
    np.testing.assert_allclose(rows_of(study.heads, "condition")[1:], condition, rtol=1e-2)
    assert study.num_images == IMAGES


@pytest.mark.parametrize(
    "specs, changes, message",
    [
        ([AttentionSpec("matched", k=4)], {}, "'matched' merges keys"),
        ([AttentionSpec("dense")], {}, "dense attention keeps all"),
        ([AttentionSpec("leverage", k=18)], {}, "k=18 must be in"),
        (SPECS, {"eps": (0.0,)}, "eps="),
        (SPECS, {"views": ("blur",)}, "blur must be one of"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(model, source, specs, changes, message):
    def look():
        options = StudyOptions(**{"views": ()} | changes)
        study_attention([model], specs, images_of(source, 4), DATA.mean, DATA.std, options)

    with pytest.raises(ValueError, match=message):
        look()


def test_no_images_a_damaged_image_and_another_shape_are_refused(model, source):
    options = StudyOptions(eps=EPS, views=())
    with pytest.raises(ValueError, match="no images"):
        study_attention([model], SPECS, [], (0.5,), (0.5,), options)
    images, _ = next(images_of(source, 4))
    batches = [(images, 4), (images.at[2].set(jnp.nan), 2), (images.at[2].set(jnp.nan), 4)]
    with pytest.raises(ValueError, match="not finite in image 8"):  # padding does not count
        study_attention([model], SPECS, batches, (0.5,), (0.5,), options)
    deeper = Model("deep", dataclasses.replace(model.config, depth=4), model.params)
    with pytest.raises(ValueError, match="of one shape"):
        study_attention([deeper, model], SPECS, batches, (0.5,), (0.5,), options)


@pytest.fixture
def workdir(model, tmp_path):
    """A run that kept two checkpoints, in the first of which keys are those of another seed."""
    config = dataclasses.replace(CONFIG, model=model.config)
    record_run(tmp_path, to_dict(config))
    other = jax.tree.map(lambda leaf: leaf + 0.3 * np.random.default_rng(0).normal(size=leaf.shape), model.params)
    with Checkpointer(tmp_path / "checkpoints", keep_last=2) as checkpointer:
        for step, params in ((10, other), (20, model.params)):
            checkpointer.save(step, {"params": jax.tree.map(jnp.float32, params)}, None, {})
    return tmp_path


def test_the_command_reads_steps_and_image_files_and_writes_tables_record_and_pictures(workdir, capsys):
    (workdir / "photos" / "more").mkdir(parents=True)
    for name in ("b.png", "more/a.jpg", "c.txt"):
        pixels = np.random.default_rng(len(name)).integers(0, 256, (11, 9), np.uint8)
        Image.fromarray(pixels).save(workdir / "photos" / name, format="png")
    out = workdir / "out"
    run_analysis(
        AnalyzeConfig(
            checkpoint=tuple(str(workdir / "checkpoints" / step) for step in ("10", "20")),
            out=str(out),
            images=(str(workdir / "photos"), *2 * (str(workdir / "photos" / "b.png"),)),
            eps=EPS,
            attention=("leverage", "random"),
            k=(3,),
            option={"keep_prefix": 1},
            views=("flip",),
        )
    )
    assert "4 of 4 images" in capsys.readouterr().out
    record = json.loads((out / "analysis.json").read_text())
    assert record["provenance"]["hardware"]["platform"] == "cpu"
    assert record["images"] == 4
    with (out / "sets.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(record["sets"]) == 2 * LAYERS * HEADS
    assert {row["prefix_kept"] for row in rows} == {"1.0"}
    assert {row["options"] for row in rows} == {"keep_prefix=1"}
    assert 0 < np.mean([float(row["same_10"]) for row in rows]) < 0.9
    for name in ("captured", "heavy", "heads", "scores", "overlap"):
        with Image.open(out / f"{name}.png") as picture:
            assert np.asarray(picture.convert("L")).std() > 10
    assert (out / "heads.csv").exists()


def test_a_step_is_read_as_such_and_one_that_is_not_there_is_refused(workdir, model):
    for read in (lambda path: load_model(path).params, lambda path: load_pretrained(path).params):
        first, last = (read(workdir / "checkpoints" / step) for step in ("10", "20"))
        np.testing.assert_array_equal(last["cls"], model.params["cls"])
        assert np.abs(first["cls"] - last["cls"]).max() > 0.1
    with pytest.raises(FileNotFoundError, match="30"):
        load_model(workdir / "checkpoints" / "30")


def test_images_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        image_files([tmp_path / "none"])
    with pytest.raises(FileNotFoundError, match="no image in the folder"):
        image_files([tmp_path])
