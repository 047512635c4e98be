"""A config is refused as a whole, with every fault named, or turned into what it says."""

import dataclasses
import json

import pytest
from ml_collections import ConfigDict

from levattn.attention import AttentionSpec
from levattn.training.config import (
    CheckpointConfig,
    MeshConfig,
    OptimizerConfig,
    TrainConfig,
    from_config_dict,
    sections,
    to_dict,
)

MINIMAL = {"data": {"source": "digits"}, "model": {"variant": "Ti/1", "num_classes": 10}, "total_steps": 10}


def refusal(mapping) -> str:
    with pytest.raises(ValueError) as error:
        from_config_dict(TrainConfig, mapping)
    return str(error.value)


def test_a_sparse_config_dict_becomes_the_full_record():
    mapping = ConfigDict(MINIMAL | {"model": {"num_classes": 10, "attention": {"method": "leverage", "k": 8}}})
    config = from_config_dict(TrainConfig, mapping)
    assert config.model.attention == AttentionSpec(method="leverage", k=8)
    assert config.optimizer == OptimizerConfig()
    assert config.batch_size == 128


def test_json_gives_the_same_config_back():
    rules = [["even", {"method": "leverage", "k": 4}]]
    config = from_config_dict(TrainConfig, ConfigDict(MINIMAL | {"model": {"attention_by_layer": rules}}))
    assert config.model.attention_by_layer == (("even", AttentionSpec(method="leverage", k=4)),)
    assert from_config_dict(TrainConfig, json.loads(json.dumps(to_dict(config)))) == config
    hash(config)  # static under jit


def test_all_faults_are_listed_at_once():
    message = refusal(
        {
            "model": {"num_classes": "ten", "attention": {"methd": "leverage"}},
            "data": {"source": "digits"},
            "optimizer": {"lr": 0.1, "name": "adam", "b1": 2.0},
            "mesh": {"fsdp": 0},
            "batch_size": 12.5,
            "learning_rate": 0.1,
            "total_steps": True,
        }
    )
    lines = {line.split(":")[0].strip(): line for line in message.splitlines()[1:]}
    assert "expected int, not 'ten' (str)" in lines["model.num_classes"]
    assert "did you mean 'model.attention.method'?" in lines["model.attention.methd"]
    assert "did you mean 'optimizer.learning_rate'?" in lines["optimizer.lr"]
    assert "expected 'adamw' or 'adafactor' or 'sgd' or 'muon'" in lines["optimizer.name"]
    assert "did you mean 'adamw'?" in lines["optimizer.name"]
    assert "expected int, not 12.5 (float)" in lines["batch_size"]
    assert "did you mean 'optimizer.learning_rate'?" in lines["learning_rate"]
    assert "expected int or None, not True (bool)" in lines["total_steps"]
    assert "mesh.fsdp=0 must be positive" in message


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"batch_size": 10, "accumulate_steps": 4}, "batch_size=10 must be divisible by accumulate_steps=4"),
        ({"total_steps": None}, "total_steps=None and total_epochs=None: set one of them"),
        ({"ema_decay": 1.0}, "ema_decay=1.0 must be in (0, 1) or None"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"optimizer": {"b2": 1.0}}, "optimizer.b2=1.0 must be in [0, 1)"),
        ({"loss": {"label_smoothing": 1.0}}, "loss.label_smoothing=1.0 must be in [0, 1)"),
        ({"checkpoint": {"keep_last": 0}}, "checkpoint.keep_last=0 must be positive"),
        ({"checkpoint": {"metric": "accuracy"}}, "expected 'top1' or 'top5' or 'loss', not 'accuracy'"),
        ({"checkpoint": {"metric": "top_1"}}, "did you mean 'top1'?"),
        ({"model": {"attention": None}}, "model.attention: expected AttentionSpec, not None (NoneType)"),
        ({"data": {"mean": [0.5, "x"]}}, "data.mean[1]: expected float, not 'x' (str)"),
    ],
)
def test_values_out_of_range_are_named(fields, expected):
    assert expected in refusal(MINIMAL | fields)


def test_a_missing_field_is_named():
    message = refusal({"total_steps": 1, "model": {}})
    assert "data: is missing, expected DataConfig" in message


def test_whole_numbers_serve_as_floats_and_stay_floats():
    rate = from_config_dict(OptimizerConfig, {"learning_rate": 1}).learning_rate
    assert rate == 1.0
    assert isinstance(rate, float)


def test_epochs_become_whole_steps():
    config = from_config_dict(TrainConfig, MINIMAL | {"total_steps": None, "total_epochs": 3, "batch_size": 128})
    assert config.num_steps(1437) == round(3 * 1437 / 128)
    assert dataclasses.replace(config, total_epochs=0.001).num_steps(1437) == 1


def test_a_small_loss_is_the_best_and_a_large_accuracy():
    modes = {metric: CheckpointConfig(metric=metric).best_mode for metric in ("top1", "top5", "loss")}
    assert modes == {"top1": "max", "top5": "max", "loss": "min"}


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MeshConfig().fsdp = 2


def test_sections_left_as_they_are_give_the_defaults():
    config = sections(TrainConfig)
    assert isinstance(config.model.attention, ConfigDict)
    config.total_steps = 1
    assert from_config_dict(TrainConfig, config) == from_config_dict(
        TrainConfig, {"data": {}, "model": {}, "total_steps": 1}
    )
