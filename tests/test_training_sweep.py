"""A sweep knows what it will train before anything runs, and what that costs from what was measured."""

import argparse
import dataclasses
import json

import pytest

from configs import ablations, quickstart
from levattn.models import attention_specs
from levattn.models.cost import forward_flops
from levattn.training.config import TrainConfig, from_config_dict, to_dict
from levattn.training.run_time import estimate_run_time, measured_runs, read_rate
from levattn.training.sweep import Run, add_arguments, check, parse_seeds, price, run_sweep

DIGITS = "configs/quickstart.py:source=digits"
SHAPE = (8, 8, 1)


def config_of(arg=""):
    return from_config_dict(TrainConfig, quickstart.get_config(f"source=digits{arg}"))


def write_run(folder, config, rates, num_devices=1, device="some device"):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    (folder / "versions.json").write_text(json.dumps({"hardware": {"num_devices": num_devices, "device_kind": device}}))
    lines = [json.dumps({"step": i, "train/images_per_second": rate}) for i, rate in enumerate(rates, start=1)]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 9, "eval/top1": 0.5}', '{"step": 10, "tr']))


def test_a_measured_speed_is_the_median_without_the_interval_that_compiles(tmp_path):
    write_run(tmp_path / "a", config_of(), [10.0, 300.0, 100.0, 200.0], num_devices=2)
    write_run(tmp_path / "b", config_of(), [10.0])
    assert read_rate(tmp_path / "a") == 200.0
    assert read_rate(tmp_path / "b") is None
    assert read_rate(tmp_path) is None
    [run] = measured_runs([tmp_path])
    assert (run.images_per_second, run.image_shape, run.device) == (100.0, SHAPE, "some device")


def test_a_run_time_is_as_measured_or_scaled_by_operations(tmp_path):
    dense, leverage = config_of(), config_of(",attention=leverage,k=8")
    write_run(tmp_path / "dense", dense, [1.0, 50.0])
    write_run(tmp_path / "leverage", leverage, [1.0, 70.0])
    runs = measured_runs([tmp_path])
    for config, rate in ((dense, 50.0), (leverage, 70.0)):
        found = estimate_run_time(dataclasses.replace(config, seed=3), SHAPE, 1000, runs)
        assert (found.seconds, found.is_measured) == (1000 / rate, True)
    deeper = dataclasses.replace(dense, model=dataclasses.replace(dense.model, depth=9))
    found = estimate_run_time(deeper, SHAPE, 1000, runs)
    scale = forward_flops(deeper.model, SHAPE) / forward_flops(dense.model, SHAPE)
    assert found.seconds == pytest.approx(1000 / 50 * scale)
    assert not found.is_measured
    of_more_keys = dataclasses.replace(leverage.model.attention, k=16)
    more_keys = dataclasses.replace(leverage, model=dataclasses.replace(leverage.model, attention=of_more_keys))
    scale = forward_flops(more_keys.model, SHAPE) / forward_flops(leverage.model, SHAPE)
    assert estimate_run_time(more_keys, SHAPE, 1000, runs).seconds == pytest.approx(1000 / 70 * scale)
    assert estimate_run_time(dense, SHAPE, 1000, []) is None


def test_a_run_builds_what_its_command_trains():
    settings = ("model.depth=2", "total_epochs=3.0", "data.flip=False", "seed=7", "model.attention.local_window=3x3")
    run = Run("a/seed7", f"{DIGITS},attention=leverage,k=8", settings)
    config = run.build()
    assert (config.model.depth, config.total_epochs, config.data.flip, config.seed) == (2, 3.0, False, 7)
    assert config.model.attention.local_window == (3, 3)
    training, evaluation = run.jobs
    assert training.command[:2] == ("train.py", f"--config={run.config}")
    assert "--config.seed=7" in training.command
    assert training.command[-1] == "--workdir={workdir}/a/seed7"
    assert evaluation.needs == (training.name,)


@pytest.mark.parametrize(
    "config, setting, message",
    [
        (f"{DIGITS},attention=leverage,k=66", "seed=0", "a/seed0: k=66 must be in .1, 65."),
        (DIGITS, "model.dept=2", "did you mean 'model.depth'"),
        (DIGITS, "modell.depth=2", "cannot be set"),
        (f"{DIGITS},k=many", "seed=0", "model.attention.k"),
        (DIGITS, "optimizer.cooldown_steps=100000", "must fit in total_steps"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_runs(config, setting, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        price([Run("a/seed0", config, (setting,))], tmp_path, needs_data=True)


def test_imagenet_has_a_price_where_it_is_not(tmp_path):
    run = Run("a", "configs/imagenet.py:variant=L/8,attention=leverage,k=32")
    config, shape, num_train, num_eval = check(run, needs_data=False)
    assert (shape, num_train, num_eval) == ((224, 224, 3), 1_281_167, 50_000)
    found = price([run], tmp_path, needs_data=False)["a"]
    assert found.tokens == 785
    assert found.seconds[0] > config.num_steps(num_train) * config.batch_size / found.time.images_per_second
    with pytest.raises(FileNotFoundError, match="prepare_imagenet"):
        price([run], tmp_path, needs_data=True)


def test_what_is_listed_or_priced_is_not_run(tmp_path, capsys):
    runs = [Run(f"dense/seed{seed}", DIGITS, (f"seed={seed}",)) for seed in (0, 1)]
    parser = argparse.ArgumentParser()
    add_arguments(parser, "runs/a", seeds="0")

    def call(*flags):
        args = parser.parse_args([f"--workdir={tmp_path / 'new'}", *flags])
        return run_sweep(args, runs, lambda: pytest.fail("nothing is to be written")), capsys.readouterr().out

    code, text = call("--list", "--only", "seed1/eval")
    assert code == 0
    assert "dense/seed1/train" in text
    assert "dense/seed1/eval" in text  # and what it needs
    assert "seed0" not in text
    code, text = call("--dry_run")
    assert code == 0
    assert "4 of 4 jobs left" in text
    assert "device hours" in text
    assert not (tmp_path / "new").exists()
    with pytest.raises(ValueError, match="fits none of the 4 jobs"):
        call("--only", "lev")


def test_seeds_are_different_whole_numbers():
    assert parse_seeds("0,1,2") == [0, 1, 2]
    for text in ("", "0,0", "a", "-1", "1.5"):
        with pytest.raises(ValueError, match="seeds="):
            parse_seeds(text)


def test_every_ablation_can_be_trained_on_197_tokens_and_differs_from_all_others():
    found = {}
    for name in ablations.ABLATIONS:
        config, *_ = check(Run(name, f"configs/ablations.py:name={name}"), needs_data=False)
        found[name] = attention_specs(config.model)
    assert len(set(found.values())) == len(found)
    for name in ("k_falling", "k_rising"):
        assert sum(spec.k for spec in found[name]) / 12 == 32
    assert [spec.method for spec in found["last_2_dense"]] == ["leverage"] * 10 + ["dense"] * 2
    with pytest.raises(ValueError, match="name='k_5' must be one of dense, leverage"):
        ablations.get_config("name=k_5")
