"""The README's commands as a person types them, end to end on real images, in processes of their own."""

import csv
import dataclasses
import json
import subprocess

import jax
import jax.numpy as jnp
import pytest
from PIL import Image

from configs import quickstart
from levattn.models import ViT
from levattn.training.config import TrainConfig, from_config_dict, to_dict
from levattn.training.export import export_params
from tests.forked import Forks


@pytest.fixture(scope="module")
def call(tmp_path_factory):
    """Runs a script with arguments; gives its exit code and what it wrote."""
    forks, folder = Forks(), tmp_path_factory.mktemp("written")

    def run(script, *arguments, check=True):
        out, err = folder / "out", folder / "err"
        code = forks.start(err, *arguments, script=script, out=out).wait(timeout=400)
        done = subprocess.CompletedProcess([script, *arguments], code, out.read_text(), err.read_text())
        assert not check or code == 0, done.stderr[-2000:]
        return done

    yield run
    forks.close()


# Its numbers of keys and of images as they are, one layer instead of four.
SMALLER_QUICKSTART = """
import runpy
from configs import quickstart

full = quickstart.get_config

def get_config(arg):
    config = full(arg)
    config.model.depth = 1
    return config

quickstart.get_config = get_config
runpy.run_module("scripts.quickstart", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_quickstart_leaves_the_table_the_report_and_the_plots(call, tmp_path):
    script = tmp_path / "smaller.py"
    script.write_text(SMALLER_QUICKSTART)
    done = call(script, tmp_path, "--epochs", 1)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    needed = ["dataset", "model", "tokens", "attention", "k", "trained_with", "accuracy", "examples", "seconds"]
    assert set(needed) <= set(rows[0])
    found = [(row["attention"], int(row["k"]), row["trained_with"]) for row in rows]
    assert found[0] == ("dense", 65, "dense")
    retrofits = [(m, k, "dense") for m in ("leverage", "row_norm", "random", "kmeans") for k in (8, 16, 32)]
    assert sorted(found[1:]) == sorted([*retrofits, ("leverage", 16, "leverage k=16")])
    assert all(int(row["examples"]) == 360 and 0 <= float(row["accuracy"]) <= 1 for row in rows)
    report = (tmp_path / "report.md").read_text()
    for figure in ("accuracy.png", "attention.png"):
        assert f"]({figure})" in report
        assert 10_000 < (tmp_path / figure).stat().st_size < 200_000
    assert "trained with" in done.stdout


def test_a_quickstart_of_no_epochs_is_refused(call, tmp_path):
    done = call("scripts/quickstart.py", tmp_path, "--epochs", 0, check=False)
    assert done.returncode == 2
    assert "total_epochs=0" in done.stderr


@pytest.mark.slow
def test_train_resume_and_evaluate_from_the_command_line(call, tmp_path):
    training = ["train.py", "--config", "configs/quickstart.py:attention=leverage,k=16", "--workdir", tmp_path / "a"]
    small = ["--config.model.depth=1", "--config.batch_size=256", "--config.log_every_steps=2"]
    call(*training, *small, "--config.total_steps=4")
    again = call(*training, *small, "--config.total_steps=4")
    assert "step 4" in again.stderr
    evaluating = ["eval.py", "--checkpoint", tmp_path / "a", "--attention", "dense,leverage,row_norm", "--k", "8,16"]
    done = call(*evaluating, "--option", "keep_prefix=1", "--out", tmp_path / "out")
    record = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [(r["attention"], r["k"]) for r in record["rows"]] == [
        ("dense", 65),
        ("leverage", 8),
        ("leverage", 16),
        ("row_norm", 8),
        ("row_norm", 16),
    ]
    assert "eval.py" in record["provenance"]["command"]
    assert "leverage" in done.stdout
    assert (tmp_path / "out" / "results.md").read_text().count("\n|") >= 6


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train.py", "--config", "configs/quickstart.py:attention=leverage,k=99"], "k=99 must be in [1, 65]"),
        (["train.py", "--config", "configs/quickstart.py:attention=levrage"], "did you mean 'leverage'"),
        (["train.py", "--config", "configs/quickstart.py", "--config.data.source=folder:/nowhere"], "/nowhere"),
        (["train.py", "--config", "configs/quickstart.py", "--config.model.variant=mu/3"], "patch size 3"),
        (["train.py", "--config", "configs/quickstart.py", "--config.model.widht=3"], "did you mean 'model.width'"),
        (["train.py", "--config", "configs/imagenet.py"], "scripts/prepare_imagenet.py"),
        (["train.py", "--config", "configs/quickstart.py", "--config.total_epochs", "3"], "--name=value"),
        (["eval.py", "--checkpoint", "/nowhere"], "does not exist"),
    ],
)
def test_mistakes_are_one_readable_line_and_exit_code_two(call, arguments, message, tmp_path):
    workdir = ["--workdir", tmp_path / "a"] if arguments[0] == "train.py" else []
    done = call(*arguments, *workdir, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model of the digits as it is before training."""
    config = from_config_dict(TrainConfig, quickstart.get_config("attention=leverage,k=16,keep_prefix=1"))
    model = dataclasses.replace(config.model, depth=1)
    params = jax.jit(ViT(model).init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    path = tmp_path_factory.mktemp("exported") / "params.npz"
    export_params(path, params, to_dict(dataclasses.replace(config, model=model)))
    return path


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--attention", "leverage", "--k", "8,x"], "k[1]: expected int or None, not 'x'"),
        (["--attention", "leverage", "--k", "None"], "k=None needs eps"),
        (["--option", "foo=1"], "foo: there is no such field"),
        (["--option", "keepprefix=1"], "did you mean 'keep_prefix'"),
        (["--option", "local_window=abc"], "local_window: expected int or"),
        (["--option", "eps=big"], "eps: expected float or None, not 'big'"),
        (["--source", "fake:num_classes=10,size=8"], "3 channels"),
        (["--budgets", "/nowhere.json"], "/nowhere.json"),
        (["--calibrate", "8", "--attention", "leverage,kmeans"], "calibrate needs one attention"),
        (["--target_error", "0.5"], "target_error=0.5 needs calibrate"),
    ],
)
def test_mistakes_in_an_evaluation_are_one_readable_line_and_exit_code_two(call, arguments, message, exported):
    done = call("eval.py", "--checkpoint", exported, *arguments, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert "takes no argument" not in done.stderr


def test_an_evaluation_by_threshold_with_options_and_on_a_source_of_another_size(call, exported, tmp_path):
    command = ["eval.py", "--checkpoint", exported, "--split", "test[:16]", "--out", tmp_path]
    options = ["--option", "eps=1.0", "--option", "keep_prefix=1", "--option", "local_window=3x3"]
    call(*command, "--attention", "dense,leverage,kmeans", *options)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["attention"], row["k"]) for row in rows] == [("dense", 65), ("leverage", 17), ("kmeans", 17)]
    call(*command, "--k", "8,None", *options)  # of the method that it was trained with
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["attention"], row["k"]) for row in rows] == [("leverage", 8), ("leverage", 17)]
    for number in range(16):
        folder = tmp_path / "images" / f"{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + number, 30)).save(folder / f"{number}.png")
    done = call(*command[:3], "--source", f"folder:{tmp_path / 'images'}", "--split", "train", check=False)
    assert "3 channels, the checkpoint was trained on 1" in done.stderr  # and not: images of several sizes


@pytest.mark.slow
def test_a_retrofit_is_probed_calibrated_evaluated_and_adapted_from_the_command_line(call, exported, tmp_path):
    probing = ["eval.py", "--config", f"configs/retrofit.py:probe={exported},seeds=1,attention=kmeans"]
    probing += ["--split", "test[:100]", "--config.probe.folds=2"]
    done = call(*probing, "--k", "8", "--calibrate", 8, "--out", tmp_path / "budgets")
    assert "k by layer: 8 on average" in done.stdout
    budgets = tmp_path / "budgets" / "budgets.json"
    assert json.loads(budgets.read_text())["attention"][0]["k"] == 8  # there is one layer
    by_hand = {"attention": [{"method": "kmeans", "k": 65}]}
    budgets.write_text(json.dumps(by_hand))
    done = call(*probing, "--k", "8", "--budgets", budgets, "--out", tmp_path / "probe")
    assert "100 images of digits, split test[:100]" in done.stdout
    record = json.loads((tmp_path / "probe" / "results.json").read_text())
    rows = sorted(record["rows"], key=lambda row: (row["attention"] != "dense", row["k"]))
    dense, kmeans, by_layer = rows
    assert [(r["attention"], r["k"]) for r in rows] == [("dense", 65), ("kmeans", 8), ("kmeans", 65)]
    assert (dense["cosine"], by_layer["cosine"]) == (1, 1)
    assert (by_layer["probe"], by_layer["agreement"]) == (dense["probe"], 1)
    assert kmeans["cosine"] < 1
    assert kmeans["error"] > 0.1
    (errors,) = (layers for name, layers in record["error_by_layer"].items() if name.startswith("kmeans k=8"))
    assert errors == [pytest.approx(kmeans["error"], abs=1e-4)]
    assert "eval.py" in record["provenance"]["command"]
    training = ["train.py", "--config", f"configs/retrofit.py:finetune,init_from={exported},k=8,epochs=0.1"]
    training += ["--workdir", tmp_path / "adapted", "--config.batch_size=64", "--config.distill.weight_labels=0.5"]
    call(*training)
    adapted = json.loads((tmp_path / "adapted" / "config.json").read_text())
    assert (adapted["distill"]["weight_labels"], adapted["model"]["attention"]["k"]) == (0.5, 8)
    call("eval.py", "--checkpoint", tmp_path / "adapted", "--split", "test[:20]")
    (row,) = json.loads((tmp_path / "adapted" / "results.json").read_text())["rows"]
    assert (row["attention"], row["trained_with"]) == ("leverage", "leverage k=8")


def test_a_model_without_classes_is_told_to_be_probed(call, tmp_path):
    config = from_config_dict(TrainConfig, quickstart.get_config())
    model = dataclasses.replace(config.model, depth=1, num_classes=0)
    params = jax.jit(ViT(model).init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    export_params(tmp_path / "headless.npz", params, to_dict(dataclasses.replace(config, model=model)))
    done = call("eval.py", "--checkpoint", tmp_path / "headless.npz", check=False)
    assert done.returncode == 2
    assert f"configs/retrofit.py:probe={tmp_path / 'headless.npz'}" in done.stderr


def test_a_workdir_that_cannot_be_written_is_refused_before_the_first_step(call, tmp_path):
    (tmp_path / "file").write_text("")
    done = call("train.py", "--config", "configs/quickstart.py", "--workdir", tmp_path / "file" / "a", check=False)
    assert done.returncode == 2
    assert str(tmp_path / "file") in done.stderr
    assert "step " not in done.stderr
