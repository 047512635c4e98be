"""Evaluation under any attention counts every example once and says what a plain loop over the data would say."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import retrofit
from levattn.attention import METHODS, AttentionSpec
from levattn.data import normalize, open_source
from levattn.models import ViT, unrolled_to_scan
from levattn.training.attentions import describe, expand, with_attention
from levattn.training.checkpoint import Checkpointer
from levattn.training.config import MeshConfig, TrainConfig, from_config_dict, to_dict
from levattn.training.evaluate import evaluate_attention, load_trained
from levattn.training.export import export_params
from levattn.training.finetune import CHECKPOINT_FOLDER, EXPORT_FILE
from levattn.training.loaded import on_source
from levattn.training.loop import train
from levattn.training.passes import timed_passes
from levattn.training.sharding import make_mesh

CONFIG = from_config_dict(
    TrainConfig,
    {
        "data": {"source": "digits"},
        "model": {
            "variant": "mu/2",
            "depth": 2,
            "num_classes": 10,
            "pool": "cls",
            "attention": {"method": "leverage", "k": 8},
        },
        "optimizer": {"learning_rate": 1e-2},
        "batch_size": 64,
        "total_steps": 60,
        "ema_decay": 0.9,
        "checkpoint": {"every_steps": 30, "keep_last": 2},
    },
)
TOKENS = 17


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    train(CONFIG, workdir)
    return workdir


def test_rows_equal_a_plain_loop_whatever_the_batch_size(workdir):
    config, params = load_trained(workdir)
    assert config == CONFIG
    source = open_source(config.data, "test")
    images = np.stack([source[i]["image"] for i in range(len(source))])
    labels = np.array([source[i]["label"] for i in range(len(source))])
    specs = [AttentionSpec("dense"), AttentionSpec("leverage", k=5), AttentionSpec("kmeans", k=5, keep_prefix=1)]
    for batch_size in (360, 53):  # 360 = 6 x 52 + 48: the last batch is partial
        rows = evaluate_attention(config, params, specs, batch_size=batch_size)
        for row, spec in zip(rows, specs, strict=True):
            model = ViT(dataclasses.replace(config.model, attention=spec))
            logits = np.asarray(jax.jit(model.apply)({"params": params}, normalize(jnp.asarray(images), config.data)))
            # Blank patches have equal keys, so which of them is kept hangs on the last bit: two images may differ.
            exact = spec.method == "dense"
            tolerance = {"abs": 1e-9 if exact else 2 / 360}
            assert row["accuracy"] == pytest.approx(float(np.mean(np.argmax(logits, -1) == labels)), **tolerance)
            in_top5 = np.argsort(-logits, axis=-1)[:, :5] == labels[:, None]
            assert row["top5"] == pytest.approx(float(np.mean(in_top5.any(-1))), **tolerance)
            loss = -np.asarray(jax.nn.log_softmax(logits))[np.arange(len(labels)), labels].mean()
            assert row["loss"] == pytest.approx(float(loss), rel=1e-4 if exact else 1e-2)
            assert row["examples"] == 360
            assert row["seconds"] > 0
            assert (row["attention"], row["k"]) == (spec.method, TOKENS if spec.method == "dense" else spec.k)
            assert (row["dataset"], row["tokens"], row["trained_with"]) == ("digits", TOKENS, "leverage k=8")


def test_without_specs_the_model_is_evaluated_as_it_was_trained(workdir):
    config, params = load_trained(workdir)
    (row,) = evaluate_attention(config, params)
    (same,) = evaluate_attention(config, params, [config.model.attention])
    assert row["accuracy"] == same["accuracy"]
    assert (row["attention"], row["k"]) == ("leverage", 8)


def test_every_method_that_keeps_every_key_agrees_with_dense(workdir):
    """In the first layer of the model, so that each method compiles for one."""
    config, params = load_trained(workdir)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, depth=1))
    del params["Transformer"]["encoderblock_1"]
    rows = evaluate_attention(config, params, list(expand(AttentionSpec(), list(METHODS), [TOKENS])))
    assert {row["attention"] for row in rows} == set(METHODS)
    assert len({row["accuracy"] for row in rows}) == 1


def test_a_run_that_is_not_finished_is_read_from_its_checkpoint(workdir, tmp_path):
    """Without the export, the average of the best checkpoint is what counts; it equals the export of a finished run."""
    unfinished = tmp_path / "unfinished"
    (unfinished / CHECKPOINT_FOLDER).parent.mkdir()
    (unfinished / CHECKPOINT_FOLDER).symlink_to(workdir / CHECKPOINT_FOLDER)
    (unfinished / "config.json").write_text((workdir / "config.json").read_text())
    with Checkpointer(workdir / CHECKPOINT_FOLDER, read_only=True) as checkpointer:
        assert checkpointer.best_step() == 60
    config, params = load_trained(unfinished)
    assert config == CONFIG
    jax.tree.map(np.testing.assert_array_equal, params, load_trained(workdir / EXPORT_FILE)[1])


@pytest.mark.parametrize("metric, values", [("top1", (0.9, 0.5)), ("loss", (0.5, 0.9))])
def test_of_several_checkpoints_the_best_is_read(metric, values, workdir, tmp_path):
    config, params = load_trained(workdir)
    config = dataclasses.replace(config, checkpoint=dataclasses.replace(config.checkpoint, metric=metric))
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    mode = config.checkpoint.best_mode
    with Checkpointer(tmp_path / CHECKPOINT_FOLDER, best_metric=metric, best_mode=mode) as checkpointer:
        for step, value in enumerate(values, 1):
            state = {"ema_params": jax.tree.map(lambda x, step=step: jnp.asarray(x * step), params)}
            checkpointer.save(step, state, {metric: value}, extra={})
    jax.tree.map(np.testing.assert_array_equal, load_trained(tmp_path)[1], params)


def test_what_is_no_run_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_trained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_trained(tmp_path)
    export_params(tmp_path / "bare.npz", {"head": {"bias": np.zeros(3)}}, {})
    with pytest.raises(ValueError, match="no config"):
        load_trained(tmp_path / "bare.npz")


def test_classes_and_k_that_do_not_fit_are_refused(workdir):
    config, params = load_trained(workdir)
    other = open_source(dataclasses.replace(config.data, source="fake:num_classes=7,size=8,examples=16"), "test")
    with pytest.raises(ValueError, match=r"7 classes.*10"):
        evaluate_attention(config, params, source=other)
    with pytest.raises(ValueError, match=r"k=18 must be in \[1, 17\]"):
        evaluate_attention(config, params, [AttentionSpec("leverage", k=18)])


def test_channels_and_learned_positions_that_do_not_fit_are_refused(workdir):
    config, params = load_trained(workdir)
    colour = open_source(dataclasses.replace(config.data, source="fake:num_classes=10,size=8,examples=16"), "test")
    with pytest.raises(ValueError, match=r"3 channels.*trained on 1"):
        evaluate_attention(config, params, source=colour)
    larger = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=16))
    with pytest.raises(ValueError, match=r"digits at 16x16 has 64 patches.*positions for 16"):
        evaluate_attention(larger, params)


def test_another_source_is_read_at_the_size_the_run_was_trained_on(workdir):
    """Fashion-MNIST's 28 pixels a side, or a folder's of any size, become the 8 of the digits; a given size stays."""
    config, _ = load_trained(workdir)
    other = on_source(config, "fake:num_classes=10,size=28")
    assert (other.data.source, other.data.image_size) == ("fake:num_classes=10,size=28", 8)
    assert dataclasses.replace(other, data=config.data) == config
    sized = dataclasses.replace(config, data=dataclasses.replace(config.data, image_size=16))
    assert on_source(sized, "fashion_mnist").data.image_size == 16


@pytest.mark.parametrize("scan", [False, True])
def test_an_attention_for_each_layer_is_evaluated_as_the_config_that_names_it(workdir, scan):
    """Also in a model whose layers are scanned, which could not name it."""
    config, params = load_trained(workdir)
    by_layer = (AttentionSpec("leverage", k=4), AttentionSpec("kmeans", k=12))
    (expected,) = evaluate_attention(dataclasses.replace(config, model=with_attention(config.model, by_layer)), params)
    if scan:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, scan=True))
        params = unrolled_to_scan(params)
    rows = evaluate_attention(config, params, [AttentionSpec("leverage", k=4), by_layer])
    assert [(row["attention"], row["k"], row["trained_with"]) for row in rows] == [
        ("leverage", 4, "leverage k=8"),
        ("by layer", 8, "leverage k=8"),
    ]
    assert (rows[1]["accuracy"], rows[1]["loss"]) == (expected["accuracy"], pytest.approx(expected["loss"], rel=1e-3))
    assert rows[1]["loss"] != pytest.approx(rows[0]["loss"], rel=1e-2)
    assert (expected["attention"], expected["trained_with"]) == ("by layer", "by layer")


def test_with_a_threshold_alone_k_counts_the_keys_it_can_keep(workdir):
    config, params = load_trained(workdir)
    specs = list(expand(AttentionSpec(k=None, eps=1.0), ["dense", "leverage"], [None, 4]))
    rows = evaluate_attention(config, params, specs)
    assert config.model.dims.width // config.model.dims.num_heads == 16  # scores sum to it: at most 16 / eps keys
    assert [row["k"] for row in rows] == [TOKENS, 16, 4]
    assert all(isinstance(row["k"], int) for row in rows)


def test_combinations_are_every_method_with_every_k_and_dense_once():
    base = AttentionSpec(keep_prefix=1)
    specs = list(expand(base, ["dense", "leverage", "random"], [8, 16]))
    named = [describe(spec) for spec in specs]
    assert named == ["dense", "leverage k=8", "leverage k=16", "random k=8", "random k=16"]
    assert all(spec.keep_prefix == 1 for spec in specs)
    with pytest.raises(ValueError, match="did you mean 'leverage'"):
        list(expand(base, ["levrage"], [8]))


def test_the_retrofit_config_goes_on_from_a_run_with_other_attention(workdir, tmp_path):
    config = from_config_dict(TrainConfig, retrofit.get_config(f"init_from={workdir},attention=kmeans,k=4,epochs=0.1"))
    trained, params = load_trained(workdir)
    assert config.model == dataclasses.replace(trained.model, attention=AttentionSpec("kmeans", k=4))
    assert config.data == trained.data
    train(config, tmp_path)
    adapted = load_trained(tmp_path)[1]
    moved = jax.tree.map(lambda new, old: float(np.abs(new - old).max()), adapted, params)
    assert 0 < max(jax.tree.leaves(moved)) < 0.1  # it started there, and went on


def test_a_retrofit_leaves_the_long_warm_up_of_its_base_behind(workdir, tmp_path):
    config, params = load_trained(workdir)
    optimizer = dataclasses.replace(config.optimizer, schedule="rsqrt", warmup_steps=40, cooldown_steps=10)
    export_params(tmp_path / "base.npz", params, to_dict(dataclasses.replace(config, optimizer=optimizer)))
    adapting = from_config_dict(TrainConfig, retrofit.get_config(f"init_from={tmp_path / 'base.npz'},k=4,epochs=0.1"))
    train(adapting, tmp_path / "run")  # of two steps
    assert adapting.optimizer.warmup_fraction == 0.1


def test_the_config_of_a_run_survives_the_round_trip(workdir):
    config, _ = load_trained(workdir)
    assert from_config_dict(TrainConfig, to_dict(config)) == config


@pytest.mark.parametrize(("batch_size", "sizes"), [(128, [64]), (50, [32, 32]), (31, [24, 24, 24])])
def test_batches_are_no_larger_than_fills_them(workdir, batch_size, sizes):
    config, params = load_trained(workdir)
    source = open_source(config.data, "test[:64]")  # on eight devices
    passes = timed_passes(
        [lambda _, batch: batch["mask"]], params, source, config.data, make_mesh(MeshConfig()), batch_size
    )
    masks = [results[0][0] for results in passes]
    assert [len(mask) for mask in masks] == sizes
    assert sum(mask.sum() for mask in masks) == 64
