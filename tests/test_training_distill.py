"""A student learns from itself under dense attention: nothing where it already is that, on any mesh, resumably."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from levattn.attention import AttentionSpec
from levattn.data import DataConfig
from levattn.models import Features, ViT
from levattn.training.config import (
    CheckpointConfig,
    DistillConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    from_config_dict,
)
from levattn.training.distill import distill_losses, load_teacher, weighted_sum
from levattn.training.export import export_params
from levattn.training.finetune import CHECKPOINT_FOLDER, EXPORT_FILE, with_params_of
from levattn.training.loop import train
from levattn.training.optim import make_optimizer
from levattn.training.sharding import make_mesh, put_batch
from levattn.training.state import create_state, init_state, plan_state
from levattn.training.step import make_train_step
from tests import retrofits
from tests.retrofits import TOKENS, tiny_model

MODEL = dataclasses.replace(retrofits.MODEL, depth=1)  # each layer more is time for the compiler
RNG = np.random.default_rng(0)
BATCH = {
    "image": RNG.integers(0, 256, size=(32, 8, 8, 1), dtype=np.uint8),
    "label": RNG.integers(0, 10, size=32, dtype=np.int32),
}
SPECS = {method: AttentionSpec(method, k=5) for method in ("leverage", "row_norm")}
ALL = DistillConfig(weight_labels=0.5, weight_logits=1.0, weight_features=2.0, weight_tokens=3.0, temperature=2.0)
HEADLESS = DistillConfig("embedding", weight_logits=0.0, weight_features=1.0)


@pytest.fixture(scope="module")
def start_from(tmp_path_factory):
    """Exports to start from: of a classifier, and of a model without a head."""
    folder = tmp_path_factory.mktemp("teachers")
    for name, model in (("classifier", MODEL), ("headless", dataclasses.replace(MODEL, num_classes=0))):
        export_params(folder / f"{name}.npz", tiny_model(model).params, {})
    return folder


def make_config(folder, distill=ALL, spec=SPECS["leverage"], **changes):
    name = "classifier" if distill is None or distill.head == "classifier" else "headless"
    fields = {
        "data": DataConfig(source="digits", train_split="train[:256]", eval_split="test[:64]"),
        "model": dataclasses.replace(MODEL, attention=spec, num_classes=10 if name == "classifier" else 0),
        "optimizer": OptimizerConfig(
            name="sgd", learning_rate=0.05, weight_decay=0.0, schedule="constant", momentum_dtype="float32"
        ),
        "batch_size": 32,
        "total_steps": 4,
        "log_every_steps": 1,
        "mesh": MeshConfig(fsdp_min_size=100),
        "init_from": str(folder / f"{name}.npz"),
        "distill": distill,
    }
    return TrainConfig(**fields | changes)


def take_steps(config, num_steps=1, num_devices=8):
    mesh = make_mesh(config.mesh, jax.devices()[:num_devices])
    tx, schedule_fn = make_optimizer(config.optimizer, config.total_steps)
    init_fn = functools.partial(init_state, model=ViT(config.model), image_shape=(8, 8, 1), tx=tx, ema=False)
    plan = plan_state(init_fn, mesh, config.mesh.fsdp_min_size)
    state, _ = with_params_of(create_state(init_fn, plan, 0), config.init_from, config.model)
    teacher = load_teacher(config.model, plan.params, config.init_from)
    step_fn = make_train_step(config, ViT(config.model), tx, schedule_fn, plan, teacher)
    before, history = jax.device_get(state.params), []
    for _ in range(num_steps):
        state, metrics = step_fn(state, put_batch(BATCH, mesh))
        history.append(metrics)
    return before, *jax.device_get((state.params, history))


def assert_close(ours, reference, rtol=2e-5, atol=2e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), ours, reference)


@functools.cache
def on_one_device(folder, method):
    return take_steps(make_config(folder, spec=SPECS[method]), num_devices=1)[1:]


def random_outputs(seed):
    rng = np.random.default_rng(seed)
    shapes = {"logits": (4, 5), "tokens": (4, 7, 6), "pooled": (4, 6), "pre_logits": (4, 6)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_the_parts_of_the_loss_are_those_of_numpy():
    student, teacher = random_outputs(0), random_outputs(1)

    def outputs(x):
        x = {name: jnp.asarray(array) for name, array in x.items()}
        return x["logits"], Features(x["tokens"], x["pooled"], x["pre_logits"])

    parts = distill_losses(ALL, outputs(student), outputs(teacher))
    student, teacher = ({name: np.float64(array) for name, array in x.items()} for x in (student, teacher))
    p, q = (np.exp(x["logits"] / 2) / np.exp(x["logits"] / 2).sum(-1, keepdims=True) for x in (teacher, student))
    np.testing.assert_allclose(parts["logits"], 4 * (p * np.log(p / q)).sum(-1), rtol=1e-5)
    a, b = student["pre_logits"], teacher["pre_logits"]
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    np.testing.assert_allclose(parts["features"], 1 - cosine, rtol=1e-5)
    a, b = student["tokens"], teacher["tokens"]
    np.testing.assert_allclose(parts["tokens"], ((a - b) ** 2).sum((1, 2)) / (b**2).sum((1, 2)), rtol=1e-5)
    assert weighted_sum(ALL, {"logits": 1.0, "features": 10.0, "tokens": 100.0, "labels": 1000.0}) == 821.0
    assert set(distill_losses(DistillConfig(weight_tokens=0.0), outputs(student), outputs(teacher))) == {"logits"}


@pytest.mark.parametrize("method", ["leverage", "kmeans"])
def test_a_student_that_keeps_every_key_has_nothing_to_learn(start_from, method):
    """The loss is 0 and so is its gradient, but for rounding: it is nothing beside that of a student with few keys."""
    (of_few,) = on_one_device(start_from, "row_norm")[1]
    config = make_config(start_from, dataclasses.replace(ALL, weight_labels=0.0), AttentionSpec(method, k=TOKENS))
    before, after, (metrics,) = take_steps(config, num_devices=1)
    assert abs(metrics["loss"]) < 1e-4
    assert metrics["grad_norm"] < 0.01 * of_few["grad_norm"]
    assert_close(after, before, rtol=0, atol=5e-3)


def test_a_student_that_does_not_learns_towards_the_teacher_alone(start_from):
    """With labels at weight 0 the loss falls, and labels do not change a step; with them they do."""
    config = make_config(start_from, dataclasses.replace(ALL, weight_labels=0.0))
    first, *_, last = take_steps(config, num_steps=20, num_devices=1)[2]
    assert last["loss"] < 0.8 * first["loss"]
    assert set(first) >= {"loss_logits", "loss_features", "loss_tokens", "accuracy"}
    (with_labels,) = take_steps(make_config(start_from), num_devices=1)[2]
    parts = {name: with_labels[f"loss_{name}"] for name in ("logits", "features", "tokens", "labels")}
    assert with_labels["loss"] == pytest.approx(weighted_sum(ALL, parts), rel=1e-5)
    assert parts["labels"] > 0
    assert parts["tokens"] == pytest.approx(first["loss_tokens"], rel=1e-5)


@pytest.mark.parametrize("fsdp", [1, 4])
def test_a_step_on_eight_devices_is_a_step_on_one(start_from, fsdp):
    config = make_config(start_from, spec=SPECS["row_norm"], mesh=MeshConfig(fsdp=fsdp, fsdp_min_size=100))
    assert_close(take_steps(config)[1:], on_one_device(start_from, "row_norm"), rtol=1e-4, atol=1e-5)


def test_microbatches_give_the_step_of_the_whole_batch(start_from):
    config = make_config(start_from, spec=SPECS["row_norm"], accumulate_steps=4)
    assert_close(take_steps(config)[1:], on_one_device(start_from, "row_norm"), rtol=1e-4, atol=1e-5)


def metric_lines(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: x for name, x in line.items() if name not in ("time", "train/images_per_second")} for line in lines]


@pytest.fixture(scope="module")
def runs(start_from, tmp_path_factory):
    """A run, the config of it, and a workdir as it was left at half time."""
    folder = tmp_path_factory.mktemp("runs")
    config = make_config(start_from, checkpoint=CheckpointConfig(every_steps=2, keep_last=2))
    train(config, folder / "whole")
    shutil.copytree(folder / "whole" / CHECKPOINT_FOLDER / "2", folder / "half" / CHECKPOINT_FOLDER / "2")
    return config, folder


def test_a_resumed_distillation_equals_one_never_stopped_bit_for_bit(runs, tmp_path):
    config, folder = runs
    shutil.copytree(folder / "half", tmp_path, dirs_exist_ok=True)
    train(config, tmp_path)
    assert (tmp_path / EXPORT_FILE).read_bytes() == (folder / "whole" / EXPORT_FILE).read_bytes()
    assert metric_lines(tmp_path) == [line for line in metric_lines(folder / "whole") if line["step"] > 2]


def test_going_on_with_another_teacher_or_another_loss_is_refused(runs, start_from, tmp_path):
    """Where the teacher lies does not matter, what is in it does."""
    config, folder = runs
    shutil.copytree(folder / "half", tmp_path / "run")
    shutil.copy(start_from / "classifier.npz", tmp_path / "moved.npz")
    params = jax.tree.map(lambda x: x, tiny_model(MODEL).params)
    params["cls"] = params["cls"] + 1e-3
    export_params(tmp_path / "other.npz", params, {})
    for changes, message in [
        ({"init_from": str(tmp_path / "other.npz")}, "learned from another teacher"),
        ({"distill": None}, "of a run with distill"),
        ({"distill": dataclasses.replace(ALL, temperature=1.0)}, r"distill.temperature: 2.0 -> 1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            train(dataclasses.replace(config, **changes), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="gone"):
        train(dataclasses.replace(config, init_from=str(tmp_path / "gone.npz")), tmp_path / "run")
    assert not (tmp_path / "run" / EXPORT_FILE).exists()
    train(dataclasses.replace(config, init_from=str(tmp_path / "moved.npz")), tmp_path / "run")
    assert (tmp_path / "run" / EXPORT_FILE).read_bytes() != b""


def test_a_model_without_classes_learns_from_its_embedding_on_any_data(start_from, tmp_path):
    """The data have ten classes and the model none; evaluation measures the distance to the teacher, which falls."""
    by_loss = CheckpointConfig(metric="loss")
    metrics = train(make_config(start_from, HEADLESS, total_steps=16, checkpoint=by_loss, eval_every_steps=4), tmp_path)
    assert set(metrics) >= {"eval/loss", "eval/count", "train/loss_features", "train/loss_tokens"}
    assert "eval/top1" not in metrics
    assert metrics["eval/count"] == 64
    losses = [line["eval/loss"] for line in metric_lines(tmp_path) if "eval/loss" in line]
    assert losses[-1] < 0.9 * losses[0]


def test_a_teacher_needs_the_whole_model(start_from):
    plan = jax.eval_shape(ViT(MODEL).init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    with pytest.raises(ValueError, match="cannot be a teacher: head/bias, head/kernel"):
        load_teacher(MODEL, plan, start_from / "headless.npz")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"init_from": None}, "distill needs init_from"),
        ({"distill": {"head": "embedding", "weight_logits": 0.0}}, "checkpoint.metric must be 'loss'"),
        ({"distill": {"head": "embedding"}}, "weight_logits=1.0 must be 0 with head='embedding'"),
        ({"distill": {"weight_logits": -1.0}}, "weight_logits=-1.0 must be at least 0"),
        ({"distill": {"weight_logits": 0.0, "weight_tokens": 0.0}}, "nothing to learn"),
        ({"distill": {"temperature": 0.0}}, "temperature=0.0 must be positive"),
        ({"distill": {"wieght_tokens": 1.0}}, "did you mean 'distill.weight_tokens'"),
    ],
)
def test_a_distillation_that_cannot_be_is_refused_by_its_field(changes, message):
    fields = {"data": {}, "model": {}, "total_steps": 1, "init_from": "a", "distill": {}}
    with pytest.raises(ValueError, match=message):
        from_config_dict(TrainConfig, fields | changes)
