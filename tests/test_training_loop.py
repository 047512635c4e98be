"""Whole runs on digits: they learn, resume bit for bit, and run the same in several processes."""

import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import socket
import time

import jax
import numpy as np
import pytest

from levattn.models import ViT
from levattn.training.checkpoint import Checkpointer, committed_steps, has_checkpoint
from levattn.training.config import TrainConfig, from_config_dict, to_dict
from levattn.training.export import export_params, load_params
from levattn.training.finetune import CHECKPOINT_FOLDER, EXPORT_FILE
from levattn.training.loop import train
from levattn.training.optim import make_optimizer
from levattn.training.sharding import make_mesh
from levattn.training.signals import EXIT_STOPPED
from levattn.training.state import init_state, plan_state
from levattn.training.watchdog import EXIT_HUNG
from tests.forked import Forks


def make_config(**changes) -> TrainConfig:
    fields = {
        "data": {"source": "digits"},
        "model": {"variant": "Ti/2", "width": 32, "depth": 1, "num_heads": 2, "mlp_dim": 64, "num_classes": 10},
        "optimizer": {"learning_rate": 3e-3},
        "batch_size": 64,
        "total_steps": 8,
        "log_every_steps": 1,
    }
    for name, value in changes.items():
        fields[name] = fields.get(name, {}) | value if isinstance(value, dict) else value
    return from_config_dict(TrainConfig, fields)


def metric_lines(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    timing = ("time", "train/images_per_second")
    return [{name: value for name, value in line.items() if name not in timing} for line in lines]


def saved_state(config, workdir, step):
    tx, _ = make_optimizer(config.optimizer, config.total_steps)
    ema = config.ema_decay is not None
    init_fn = functools.partial(init_state, model=ViT(config.model), image_shape=(8, 8, 1), tx=tx, ema=ema)
    plan = plan_state(init_fn, make_mesh(config.mesh), config.mesh.fsdp_min_size)
    with Checkpointer(workdir / CHECKPOINT_FOLDER, read_only=True) as checkpointer:
        return jax.device_get(checkpointer.restore(plan, step))


def test_a_resumed_run_equals_one_never_stopped_bit_for_bit(tmp_path):
    """Parameters, optimiser state, average, metrics and export, with everything random turned on."""
    config = make_config(
        data={"crop": "pad", "flip": True},
        model={"dropout": 0.1, "stochastic_depth": 0.1},
        loss={"mixup_alpha": 0.2},
        ema_decay=0.9,
        checkpoint={"every_steps": 4, "keep_last": 2},
    )
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    final = train(config, whole)
    # What a run killed after its checkpoint at step 4 leaves behind.
    shutil.copytree(whole / CHECKPOINT_FOLDER / "4", resumed / CHECKPOINT_FOLDER / "4")
    assert train(config, resumed) | {"train/images_per_second": 0} == final | {"train/images_per_second": 0}
    states = [jax.tree.leaves_with_path(saved_state(config, workdir, 8)) for workdir in (whole, resumed)]
    assert len(states[0]) == len(states[1]) > 30
    for (path, ours), (_, reference) in zip(*states, strict=True):
        assert np.array_equal(ours, reference), jax.tree_util.keystr(path)
    assert metric_lines(resumed) == [line for line in metric_lines(whole) if line["step"] > 4]
    assert (resumed / EXPORT_FILE).read_bytes() == (whole / EXPORT_FILE).read_bytes()


def test_a_short_run_learns_and_leaves_everything_behind(tmp_path, capsys):
    config = make_config(total_steps=120, optimizer={"learning_rate": 1e-2}, log_every_steps=20, eval_every_steps=60)
    metrics = train(config, tmp_path, profile=True)
    lines = metric_lines(tmp_path)
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    assert metrics["eval/count"] == 360
    assert metrics["eval/top1"] > 0.7
    assert [line["step"] for line in lines if "eval/top1" in line] == [60, 120]
    assert {"config.json", "versions.json", EXPORT_FILE} <= {path.name for path in tmp_path.iterdir()}
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    _, exported_config = load_params(tmp_path / EXPORT_FILE)
    assert from_config_dict(TrainConfig, exported_config) == config

    # A finished run has no step left; a new one can start from its parameters, with another head.
    again = train(config, tmp_path)
    assert again["eval/top1"] == metrics["eval/top1"]
    assert metric_lines(tmp_path) == lines
    tuned = make_config(init_from=str(tmp_path), total_steps=1, optimizer={"learning_rate": 1e-9})
    assert train(tuned, tmp_path / "tuned")["eval/top1"] == pytest.approx(metrics["eval/top1"], abs=0.01)
    assert f"starting from the parameters of {str(tmp_path)!r}\n" in capsys.readouterr().err
    other_head = make_config(
        init_from=str(tmp_path), data={"source": "fake:num_classes=3,size=8,examples=64"}, model={"num_classes": 3}
    )
    for dry_run in (True, False):
        with pytest.raises(ValueError, match="embedding/kernel is"):  # three channels against one
            train(other_head, tmp_path / "other", dry_run=dry_run)
    assert not (tmp_path / "other").exists()


def test_a_dry_run_prints_the_estimate_and_writes_nothing(tmp_path, capsys):
    assert train(make_config(), tmp_path / "run", dry_run=True) == {}
    assert "parameters" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_written_is_refused_by_a_dry_run_too(tmp_path):
    (tmp_path / "file").write_text("no folder")
    for dry_run in (True, False):
        with pytest.raises(OSError, match="give --workdir a folder that you own"):
            train(make_config(), tmp_path / "file" / "run", dry_run=dry_run)


def test_what_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"model.num_classes=7 must be 10, the classes of digits"):
        train(make_config(model={"num_classes": 7}), tmp_path / "run")
    with pytest.raises(ValueError, match=r"batch_size=12 must be divisible by 8"):
        train(make_config(batch_size=12), tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(make_config(data={"source": f"folder:{tmp_path}/nowhere"}), tmp_path / "run")
    for dry_run in (True, False):
        with pytest.raises(FileNotFoundError, match=r"init_from=.*/nowhere"):
            train(make_config(init_from=f"{tmp_path}/nowhere"), tmp_path / "run", dry_run=dry_run)
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    """A config and the workdir of a run of 4 steps by it; tests leave both as they are."""
    workdir = tmp_path_factory.mktemp("stopped")
    config = make_config(total_steps=4, checkpoint={"metric": "loss"})
    train(config, workdir)
    return config, workdir


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def test_a_checkpoint_says_which_run_saved_it_and_how_far_it_had_come(stopped_run):
    config, workdir = stopped_run
    with Checkpointer(workdir / CHECKPOINT_FOLDER, read_only=True) as checkpointer:
        record = checkpointer.read_extra(4)
    assert record["examples_seen"] == 4 * 64
    assert from_config_dict(TrainConfig, record["config"]) == config


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"total_steps": 3}, ["step 4", "past total_steps=3: set a larger total_steps", "use another workdir"]),
        ({"total_steps": None, "total_epochs": 0.05}, ["past total_steps=1"]),
        (
            {"seed": 1, "batch_size": 32},
            ["seed: 0 -> 1", "batch_size: 64 -> 32", "another workdir", "init_from", "--allow_changed=seed,batch_size"],
        ),
        ({"data": {"flip": True, "num_workers": 1}, "log_every_steps": 2}, ["data.flip: False -> True"]),
        (
            {"model": {"width": 64}},
            ["model.width: 32 -> 64", "head/kernel is float32[32, 10] in the checkpoint, float32[64, 10] in the state"],
        ),
        ({"model": {"attention": {"method": "leverage", "k": 8}}}, ["model.attention.method: dense -> leverage"]),
        ({"optimizer": {"name": "sgd"}}, ["does not fit the state to be restored"]),
    ],
)
def test_going_on_as_another_run_is_refused_and_leaves_the_workdir_as_it_was(stopped_run, changes, named):
    """Checkpoints, records and metrics; a field that may change is not among those that are complained about."""
    _, workdir = stopped_run
    before = contents(workdir)
    with pytest.raises(ValueError) as error:
        train(make_config(checkpoint={"metric": "loss"}, **({"total_steps": 4} | changes)), workdir)
    assert [text for text in named if text not in str(error.value)] == []
    assert "num_workers" not in str(error.value)
    assert "log_every_steps" not in str(error.value)
    assert contents(workdir) == before


def test_no_permission_lets_a_run_go_on_with_arrays_of_other_shapes(stopped_run):
    _, workdir = stopped_run
    before = contents(workdir)
    config = make_config(total_steps=4, checkpoint={"metric": "loss"}, model={"width": 64})
    with pytest.raises(ValueError, match=r"does not fit(?s:.*)embedding/kernel is float32\[2, 2, 1, 32\]"):
        train(config, workdir, allow_changed=("model",))
    assert contents(workdir) == before


@pytest.mark.parametrize("allowed", [("seed", "batch_size", "data"), ("seed", "batch_size", "data.flip")])
def test_what_is_allowed_by_name_may_change_and_is_shown(stopped_run, tmp_path, capsys, allowed):
    _, workdir = stopped_run
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    changes = {"seed": 1, "batch_size": 32, "data": {"flip": True}}
    changed = make_config(total_steps=4, checkpoint={"metric": "loss"}, **changes)
    with pytest.raises(ValueError, match=r"--allow_changed=seed,data\.flip,batch_size$"):
        train(changed, tmp_path, allow_changed=("seed",))
    train(changed, tmp_path, allow_changed=allowed)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "going on" in line)
    assert all(text in line for text in ("seed: 0 -> 1", "batch_size: 64 -> 32", "data.flip: False -> True"))


def test_a_permission_for_a_field_that_does_not_exist_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"allow_changed='batchsize' must be .* did you mean 'batch_size'"):
        train(make_config(), tmp_path / "run", allow_changed=("batchsize",))
    assert not (tmp_path / "run").exists()


def test_what_may_change_is_shown_and_recorded_and_the_run_goes_on(stopped_run, tmp_path, capsys):
    _, workdir = stopped_run
    shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
    longer = make_config(total_steps=5, optimizer={"learning_rate": 1e-3}, checkpoint={"metric": "loss"})
    # The run whose parameters the first one started from may be gone by now.
    longer = dataclasses.replace(longer, init_from=str(tmp_path / "gone"))
    train(longer, tmp_path)
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "going on" in line)
    assert line.startswith("going on from step 4 of 5, with changed ")
    assert "total_steps: 4 -> 5" in line
    assert "optimizer.learning_rate: 0.003 -> 0.001" in line
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(to_dict(longer)))


def test_a_checkpoint_without_a_record_of_its_config_is_gone_on_from(stopped_run, tmp_path):
    config, workdir = stopped_run
    state = saved_state(config, workdir, 4)
    with Checkpointer(tmp_path / CHECKPOINT_FOLDER) as checkpointer:
        checkpointer.save(4, state, None, {})
    assert "train/loss" not in train(config, tmp_path)
    assert (tmp_path / EXPORT_FILE).exists()


def test_a_run_says_which_parameters_it_does_not_take_from_where_it_starts(stopped_run, tmp_path, capsys):
    params, config = load_params(stopped_run[1] / EXPORT_FILE)
    export_params(tmp_path / "body.npz", {name: params[name] for name in params if name != "head"}, config)
    train(make_config(total_steps=1, init_from=str(tmp_path / "body.npz")), tmp_path / "run")
    assert "body.npz'; head/bias, head/kernel: not there in this shape" in capsys.readouterr().err


def test_the_smallest_loss_is_the_checkpoint_that_is_kept(tmp_path):
    """The second half of the run makes the loss worse: by far too large a learning rate."""
    config = make_config(
        total_steps=8,
        eval_every_steps=2,
        optimizer={"learning_rate": 3.0, "schedule": "constant", "warmup_steps": 8},
        checkpoint={"metric": "loss"},
    )
    train(config, tmp_path)
    losses = {line["step"]: line["eval/loss"] for line in metric_lines(tmp_path) if "eval/loss" in line}
    best = min(losses, key=losses.get)
    assert best != 8
    with Checkpointer(tmp_path / CHECKPOINT_FOLDER, read_only=True) as checkpointer:
        assert checkpointer.all_steps() == [best, 8]


# Processes of their own.

CONFIG_FILE = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({
        "data": {"source": "digits"},
        "model": {
            "variant": "Ti/4", "width": 32, "depth": 1, "num_heads": 2, "mlp_dim": 64, "num_classes": 10, "dropout": 0.1
        },
        "optimizer": {"learning_rate": 3e-3, "schedule": "constant"},  # one program, whatever the length
        "checkpoint": {"every_steps": 40},
        "batch_size": 64,
        "total_steps": 120,
        "log_every_steps": 1,
    })
"""


@pytest.fixture(scope="module")
def launch():
    """Starts `train.py` on the config above."""
    forks = Forks()

    def start(workdir, *flags, num_devices=1, name="log"):
        workdir.mkdir(exist_ok=True)
        config_file = workdir.with_suffix(".py")
        config_file.write_text(CONFIG_FILE)
        log = workdir.with_suffix(f".{name}")
        return forks.start(log, f"--config={config_file}", f"--workdir={workdir}", *flags, num_devices=num_devices)

    yield start
    forks.close()


@pytest.fixture(scope="module")
def launch_two(launch):
    """Starts two processes of one device each, as one run."""

    def start(workdir, *flags):
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            address = f"localhost:{probe.getsockname()[1]}"
        flags = (*flags, f"--coordinator_address={address}", "--num_processes=2")
        return [launch(workdir, *flags, f"--process_id={i}", name=f"log{i}") for i in range(2)]

    return start


@pytest.fixture(scope="module")
def left_alone(launch, tmp_path_factory):
    """The workdir of a run of one process on two devices."""
    workdir = tmp_path_factory.mktemp("left_alone") / "run"
    run = launch(workdir, num_devices=2)
    assert run.wait() == 0, run.output()
    return workdir


def assert_same_export(workdir, other):
    assert (workdir / EXPORT_FILE).read_bytes() == (other / EXPORT_FILE).read_bytes()


@pytest.mark.slow
def test_two_processes_train_as_one_does(launch_two, left_alone, tmp_path):
    """Two processes of one device against one of two, bit for bit: a sum of two numbers has no order."""
    runs = launch_two(tmp_path / "two")
    assert [run.wait() for run in runs] == [0, 0], runs[0].output() + runs[1].output()
    assert "eval 120/120" in runs[0].output()
    assert "eval" not in runs[1].output()  # only process 0 speaks
    assert_same_export(tmp_path / "two", left_alone)
    two, one = metric_lines(tmp_path / "two"), metric_lines(left_alone)
    assert two[:-1] == one[:-1]
    assert two[-1] == pytest.approx(one[-1], rel=1e-6)  # of the evaluation: sums of many numbers
    assert two[-1]["eval/count"] == 360


@pytest.mark.slow
def test_a_sigterm_to_one_of_two_processes_stops_both_after_the_same_step_which_is_saved(launch_two, tmp_path):
    flags = ["--config.total_steps=100000", "--config.checkpoint.every_steps=100000"]
    other, told = launch_two(tmp_path / "run", *flags)
    other.wait_for(lambda: "\nstep 2/" in other.output())
    os.kill(told.pid, signal.SIGTERM)
    assert [told.wait(), other.wait()] == [EXIT_STOPPED] * 2, told.output()[-2000:] + other.output()
    (step,) = committed_steps(tmp_path / "run" / CHECKPOINT_FOLDER)
    for run in (told, other):
        assert f"stopped by SIGTERM after step {step} of 100000, which is saved" in run.output()


@pytest.mark.slow
def test_where_one_of_two_processes_is_killed_the_other_ends_and_one_goes_on_to_the_same_parameters(
    launch, launch_two, left_alone, tmp_path
):
    """Killed without notice, at whatever it is doing some time after the first checkpoint of the run."""
    workdir = tmp_path / "run"
    survivor, victim = launch_two(workdir)
    survivor.wait_for(lambda: has_checkpoint(workdir / CHECKPOINT_FOLDER))
    os.kill(victim.pid, signal.SIGKILL)
    begin = time.monotonic()
    assert victim.wait() == -signal.SIGKILL
    assert survivor.wait(timeout=30) == EXIT_HUNG == 69, survivor.output()
    assert time.monotonic() - begin < 20
    place = r"process 0 of 2, step \d+, (computing|waiting for a batch) since 20[-\d]+ [:\d]+: an error of XLA"
    assert re.search(place, survivor.output())
    assert 'loop.py", line' in survivor.output().rpartition("The stacks of all threads:")[2]
    steps = committed_steps(workdir / CHECKPOINT_FOLDER)
    assert not (workdir / EXPORT_FILE).exists()
    resumed = launch(workdir, num_devices=2)
    assert resumed.wait() == 0, resumed.output()
    assert f"going on from step {steps[-1]} of 120" in resumed.output()
    assert_same_export(workdir, left_alone)


@pytest.mark.slow
def test_where_one_of_two_processes_is_stopped_the_other_ends_in_time_with_the_stacks_of_its_threads(
    launch_two, tmp_path
):
    """A collective that never returns: the process at its other end is there and does nothing."""
    seconds = 6
    stopped, waiting = launch_two(tmp_path / "run", f"--config.hang_timeout={seconds}")
    stopped.wait_for(lambda: "\nstep 2/" in stopped.output())
    os.kill(stopped.pid, signal.SIGSTOP)
    begin = time.monotonic()
    assert waiting.wait(timeout=60) == EXIT_HUNG, waiting.output()
    assert seconds - 1 < time.monotonic() - begin < 3 * seconds
    report = waiting.output().rpartition("\nerror: ")[2]
    assert re.match(
        r"process 1 of 2, step \d+, computing since 20[-\d]+ [:\d]+: no sign of life for hang_timeout=6 s", report
    )
    assert re.search(r'loop\.py", line \d+ in settle', report)  # the thread that waits
    os.kill(stopped.pid, signal.SIGCONT)
    assert stopped.wait(timeout=60) not in (0, EXIT_STOPPED)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flag, message",
    [
        ("--num_processes=2", "need --coordinator_address=HOST:PORT"),
        ("--process_id=0", "need --coordinator_address=HOST:PORT"),
        ("--config.model.num_class=10", "model.num_class: there is no such field; did you mean 'model.num_classes'?"),
        ("--config.data.source=folder:/nowhere", "/nowhere"),
        ("--config.optimizr.name=sgd", "did you mean 'optimizer.name'?"),
        ("--config.model.variant=Ti/3", "image size 8x8 must be a multiple of the patch size 3"),
    ],
)
def test_a_mistake_of_the_user_is_one_message_and_exit_code_2(launch, tmp_path, flag, message):
    run = launch(tmp_path / "run", flag)
    assert run.wait() == 2, run.output()
    assert run.output().startswith("error: ")
    assert message in run.output()
    assert "Traceback" not in run.output()
