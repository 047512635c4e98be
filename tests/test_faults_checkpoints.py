"""Faults of disks, processes and numbers, injected for real: what docs/faults.md promises of them."""

import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from levattn.data import DataConfig, open_source
from levattn.training.checkpoint import Checkpointer, DamagedCheckpointError, committed_steps, has_checkpoint
from levattn.training.config import TrainConfig, from_config_dict, to_dict
from levattn.training.export import export_params, load_params
from levattn.training.finetune import CHECKPOINT_FOLDER, EXPORT_FILE
from levattn.training.loop import train
from levattn.training.manifest import MANIFEST_FILE, verify_manifest, write_manifest
from levattn.training.metrics import MetricWriter
from levattn.training.nonfinite import NonFiniteError
from levattn.training.signals import EXIT_STOPPED
from levattn.training.trained import load_trained
from levattn.training.workdir import WorkdirInUseError, locked_workdir

ROOT = Path(__file__).parents[1]
MODEL = {"variant": "Ti/2", "width": 32, "depth": 1, "num_heads": 2, "mlp_dim": 64}
DIGITS = {
    "data": {"source": "digits"},
    "model": MODEL | {"num_classes": 10, "dropout": 0.1},
    "checkpoint": {"every_steps": 2, "keep_last": 2, "keep_best": 0},
    "batch_size": 64,
    "total_steps": 6,
    "log_every_steps": 1,
}
CONFIG_FILE = """
from ml_collections import ConfigDict

def get_config():
    return ConfigDict({fields})
"""
# A mount of one's own needs no rights where the system lets users have namespaces, and touches nothing outside.
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]


def can_mount(tmp):
    command = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", str(tmp)]
    return shutil.which("unshare") is not None and subprocess.run(command, capture_output=True).returncode == 0


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def environment():
    return os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(script, *args, **kwargs):
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(), **kwargs)


def train_command(folder, workdir, *flags, **changes):
    config_file = folder / "config.py"
    config_file.write_text(CONFIG_FILE.replace("{fields}", repr(DIGITS | changes)))
    return [sys.executable, str(ROOT / "train.py"), f"--config={config_file}", f"--workdir={workdir}", *flags]


# Checkpoints: one array tree, no training.


def make_state(step):
    rng = np.random.default_rng(step)
    return {
        "w": jnp.asarray(rng.normal(size=(64, 64)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=3), jnp.bfloat16),
    }


def template():
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), make_state(0))


def is_state_of(state, step):
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(make_state(step)), strict=True)
    return all(np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in pairs)


@pytest.fixture(scope="module")
def three_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    with Checkpointer(folder, keep_last=3) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, make_state(step), None, {"step": step})
    return folder


def files_of(step_folder):
    return sorted(path.relative_to(step_folder) for path in step_folder.rglob("*") if path.is_file())


def flip_bit(path, rng):
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path, rng):
    os.truncate(path, rng.randrange(path.stat().st_size))


def empty(path, rng):
    os.truncate(path, 0)


def delete(path, rng):
    path.unlink()


@pytest.mark.parametrize("damage", [flip_bit, truncate, empty, delete])
def test_damage_to_any_file_is_found_named_and_fallen_back_from(three_checkpoints, tmp_path, damage):
    """Every file of the newest checkpoint in turn, the manifest itself too."""
    rng = random.Random(0)
    names = files_of(three_checkpoints / "3")
    assert Path(MANIFEST_FILE) in names
    for i, name in enumerate(names):
        path = three_checkpoints / "3" / name
        if damage is not delete and path.stat().st_size == 0:
            continue
        folder = tmp_path / str(i)
        shutil.copytree(three_checkpoints, folder)
        damage(folder / "3" / name, rng)
        with Checkpointer(folder, keep_last=3) as checkpointer:
            with pytest.warns(RuntimeWarning, match=r"3' is DAMAGED:(?s:.*)next older") as warned:
                assert checkpointer.newest_sound_step() == 2
            if name != Path(MANIFEST_FILE):  # of which a part can be gone so that other files seem to be too many
                assert f"\n  {name}: " in str(warned[0].message)
            assert is_state_of(checkpointer.restore(template(), 2), 2)
            with pytest.raises(DamagedCheckpointError, match=r"(?s)DAMAGED.*Other steps there: \[1, 2\]"):
                checkpointer.restore(template(), 3)


def test_any_of_five_hundred_flipped_bits_is_found(three_checkpoints, tmp_path):
    folder = tmp_path / "3"
    shutil.copytree(three_checkpoints / "3", folder)
    rng, paths = random.Random(1), [folder / name for name in files_of(folder)]
    paths = [path for path in paths if path.stat().st_size]
    for _ in range(500):
        path = rng.choice(paths)
        before = path.read_bytes()
        flip_bit(path, rng)
        assert verify_manifest(folder)
        path.write_bytes(before)
    assert verify_manifest(folder) == []


def test_a_damaged_step_is_moved_aside_and_can_be_saved_again(three_checkpoints, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(three_checkpoints, folder)
    for attempt in ("3.damaged", "3.damaged.2"):
        flip_bit(max((folder / "3").rglob("*"), key=lambda path: path.stat().st_size), random.Random(2))
        before = contents(folder / "3")
        with Checkpointer(folder, keep_last=3) as checkpointer:
            with pytest.warns(RuntimeWarning, match="DAMAGED"):
                assert checkpointer.newest_sound_step() == 2
            assert contents(folder / "3") == before  # nothing moves before the run goes ahead
            with pytest.warns(RuntimeWarning, match=rf"is now '.*{attempt}'"):
                checkpointer.save(3, make_state(3), None, {})
            assert checkpointer.all_steps() == [1, 2, 3]
        assert sorted(contents(folder / attempt).values(), key=str) == sorted(before.values(), key=str)
    with Checkpointer(folder, read_only=True) as checkpointer:
        assert is_state_of(checkpointer.restore(template()), 3)


def test_where_every_checkpoint_is_damaged_nothing_is_restored_or_changed(three_checkpoints, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(three_checkpoints, folder)
    for step in (1, 2, 3):
        flip_bit(folder / str(step) / "state" / "manifest.ocdbt", random.Random(step))
    before = contents(folder)
    with Checkpointer(folder) as checkpointer:
        for read in (checkpointer.newest_sound_step, lambda: checkpointer.restore(template())):
            with (
                pytest.warns(RuntimeWarning, match="DAMAGED"),
                pytest.raises(DamagedCheckpointError, match=r"(?s)every checkpoint in .*from a backup") as error,
            ):
                read()
            assert "steps [1, 2, 3]" in str(error.value)
            assert str(error.value).count("state/manifest.ocdbt: ") == 3
    assert contents(folder) == before


def test_a_pipe_in_place_of_any_file_holds_nobody_up(three_checkpoints, tmp_path):
    folder = tmp_path / "checkpoints"
    shutil.copytree(three_checkpoints, folder)
    for path in [path for path in (folder / "3").rglob("*") if path.is_file() and path.name != MANIFEST_FILE]:
        path.unlink()
        os.mkfifo(path)
    with Checkpointer(folder, read_only=True) as checkpointer:
        checkpointer.best_step()
        with pytest.warns(RuntimeWarning, match="DAMAGED"):
            assert checkpointer.newest_sound_step() == 2


def test_a_config_whose_parameters_the_files_cannot_fill_is_refused_before_they_are_allocated(
    three_checkpoints, tmp_path
):
    shutil.copytree(three_checkpoints, tmp_path / CHECKPOINT_FOLDER)
    model = MODEL | {"num_classes": 10, "mlp_dim": 2**20}
    config = from_config_dict(TrainConfig, DIGITS | {"model": model})
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    with pytest.raises(ValueError, match=r"are to unpack to 2.* of parameters: those are no weights"):
        load_trained(tmp_path)


@pytest.mark.parametrize(
    "change", [lambda text: text.replace("\n", "\r\n"), lambda text: text[:-1], lambda text: text * 2]
)
def test_a_manifest_is_taken_to_the_letter(tmp_path, change):
    (tmp_path / "a").write_text("a")
    write_manifest(tmp_path)
    assert not verify_manifest(tmp_path)
    path = tmp_path / MANIFEST_FILE
    path.write_bytes(change(path.read_text()).encode())
    assert verify_manifest(tmp_path)


def test_the_manifest_is_read_by_coreutils(three_checkpoints):
    subprocess.run(["sha256sum", "--check", "--quiet", MANIFEST_FILE], cwd=three_checkpoints / "2", check=True)


def test_a_checkpoint_of_a_version_without_manifests_is_read_with_a_warning(tmp_path):
    """As that version wrote them: Orbax's training checkpointer, metrics in a file of their own."""
    with ocp.training.Checkpointer(tmp_path) as old:
        old.save(5, make_state(5), metrics={"accuracy": 0.5}, custom_metadata={"examples_seen": 7})
    with Checkpointer(tmp_path, keep_last=2) as checkpointer:
        assert (checkpointer.best_step(), checkpointer.read_extra(5)) == (5, {"examples_seen": 7})
        with pytest.warns(RuntimeWarning, match="wrote no manifest"):
            assert checkpointer.newest_sound_step() == 5
        assert is_state_of(checkpointer.restore(template(), 5), 5)
        checkpointer.save(6, make_state(6), None, {})
    write_manifest(tmp_path / "5")  # what a user does by hand
    with Checkpointer(tmp_path, read_only=True) as checkpointer:
        assert is_state_of(checkpointer.restore(template(), 5), 5)


SAVES = """
    import os, signal, sys, time
    import numpy as np, jax, jax.numpy as jnp
    from orbax.checkpoint import v1
    from levattn.training import checkpoint

    def state_of(step):
        return {"w": jnp.full((256, 1024), step, jnp.float32)}

    def save_until_killed(folder):
        with checkpoint.Checkpointer(folder, keep_last=1) as checkpointer:
            step = checkpointer.newest_sound_step() or 0
            if step:
                sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
                wanted = {"w": jax.ShapeDtypeStruct((256, 1024), jnp.float32, sharding=sharding)}
                assert np.unique(checkpointer.restore(wanted, step)["w"]) == [step]
            print("from", step, flush=True)
            while True:
                step += 1
                checkpointer.save(step, state_of(step), None, {})
                checkpointer.wait()
                print("saved", step, flush=True)
"""


def test_twenty_kills_at_random_moments_of_saves_lose_nothing_that_was_committed(tmp_path):
    """A fresh process each, from a parent that has imported everything; with one checkpoint kept, the harshest case."""
    script = textwrap.dedent(SAVES) + textwrap.dedent("""
        for delay in map(float, sys.argv[2:]):
            read, write = os.pipe()
            child = os.fork()
            if child == 0:
                os.dup2(write, 1)
                try:
                    save_until_killed(sys.argv[1])
                finally:
                    os._exit(1)
            os.close(write)
            words = os.fdopen(read)
            lines = [words.readline(), words.readline()]
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
            lines += words.read().splitlines()
            status = os.waitpid(child, 0)[1]
            print(os.WTERMSIG(status), lines[0].split()[1], lines[-1].split()[1], flush=True)
    """)
    rng = random.Random(0)
    delays = [rng.uniform(0, 0.08) for _ in range(20)]
    output, _ = start(script, tmp_path / "run", *delays, stderr=subprocess.DEVNULL).communicate(timeout=120)
    kills = [tuple(map(int, line.split())) for line in output.splitlines()]
    assert [signum for signum, _, _ in kills] == [signal.SIGKILL] * 20
    assert kills[0][1] == 0
    for (_, _, saved), (_, resumed, _) in itertools.pairwise(kills):
        assert resumed in (saved, saved + 1)  # the second: committed, and killed before it could say so
    assert len(committed_steps(tmp_path / "run")) in (1, 2)


def test_a_kill_between_commit_and_manifest_leaves_the_step_uncommitted(tmp_path):
    """Orbax has made its folder; the manifest has not been written. The step can be saved again."""
    script = textwrap.dedent(SAVES) + textwrap.dedent("""
        number = int(sys.argv[2])
        write = checkpoint.write_manifest
        def write_or_die(folder):
            if folder.name == str(number):
                os.kill(os.getpid(), signal.SIGKILL)
            write(folder)
        checkpoint.write_manifest = write_or_die
        save_until_killed(sys.argv[1])
    """)
    for number, expected in ((1, []), (3, [2])):
        process = start(script, tmp_path, number)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert (tmp_path / str(number) / "commit_success.txt").exists()
        assert committed_steps(tmp_path) == expected
        assert has_checkpoint(tmp_path) == bool(expected)
    with Checkpointer(tmp_path, keep_last=2) as checkpointer:
        assert checkpointer.newest_sound_step() == 2
        checkpointer.save(3, make_state(3), None, {})
        assert is_state_of(checkpointer.restore(template()), 3)


def test_a_kill_in_the_middle_of_the_removal_of_a_step_leaves_nothing_that_looks_damaged(three_checkpoints, tmp_path):
    script = """
        import os, shutil, signal, sys
        from pathlib import Path
        from levattn.training import checkpoint_folder
        def remove_some(folder, **kwargs):
            max(Path(folder).rglob("*"), key=lambda path: path.is_file()).unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        shutil.rmtree = remove_some
        checkpoint_folder.remove_step(Path(sys.argv[1]), 1)
    """
    folder = tmp_path / "run"
    shutil.copytree(three_checkpoints, folder)
    process = start(script, folder)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert (folder / "1.deleted").is_dir()  # it was in the middle
    assert committed_steps(folder) == [2, 3]
    with Checkpointer(folder, keep_last=3) as checkpointer:
        assert checkpointer.newest_sound_step() == 3
        checkpointer.save(4, make_state(4), None, {})
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3", "4"]


# Whole runs.


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    train(from_config_dict(TrainConfig, DIGITS), workdir)
    return workdir


def test_a_run_goes_on_from_the_older_checkpoint_to_the_same_parameters_bit_for_bit(finished_run, tmp_path, capsys):
    config, workdir = from_config_dict(TrainConfig, DIGITS), tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    (workdir / EXPORT_FILE).unlink()
    newest = workdir / CHECKPOINT_FOLDER / "6"
    flip_bit(max(newest.rglob("*"), key=lambda path: path.stat().st_size), random.Random(3))
    with pytest.warns(RuntimeWarning, match=r"6' is DAMAGED|is now"):
        train(config, workdir)
    assert "going on from step 4 of 6" in capsys.readouterr().err
    assert (workdir / EXPORT_FILE).read_bytes() == (finished_run / EXPORT_FILE).read_bytes()
    assert verify_manifest(newest) == []
    assert verify_manifest(workdir / CHECKPOINT_FOLDER / "6.damaged")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(finished_run, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished_run, workdir)
    for step in (4, 6):
        flip_bit(workdir / CHECKPOINT_FOLDER / str(step) / "state" / "_METADATA", random.Random(step))
    before = contents(workdir)
    with (
        pytest.warns(RuntimeWarning, match="DAMAGED"),
        pytest.raises(DamagedCheckpointError, match=r"every checkpoint in .* is damaged, steps \[4, 6\]"),
    ):
        train(from_config_dict(TrainConfig, DIGITS), workdir)
    assert contents(workdir) == before


def test_a_second_run_in_a_workdir_is_refused_until_the_first_has_died(tmp_path):
    script = """
        import sys, time
        from levattn.training.workdir import locked_workdir
        with locked_workdir(sys.argv[1]):
            print("locked", flush=True)
            time.sleep(60)
    """
    first = start(script, tmp_path)
    assert first.stdout.readline() == "locked\n"
    with pytest.raises(WorkdirInUseError, match=rf"in use by another run \(process {first.pid} on .*another folder"):
        train(from_config_dict(TrainConfig, DIGITS), tmp_path)
    first.kill()
    first.wait()
    first.stdout.close()
    with (
        locked_workdir(tmp_path),
        pytest.raises(WorkdirInUseError, match=f"process {os.getpid()} on"),
        locked_workdir(tmp_path),
    ):
        pass
    with locked_workdir(tmp_path):
        pass


@pytest.mark.slow
def test_sigterm_saves_the_step_under_way_and_exits_with_its_code(tmp_path):
    """Between saves, which are 1000 steps apart here."""
    workdir = tmp_path / "run"
    flags = ["--config.total_steps=100000", "--config.checkpoint.every_steps=1000"]
    with (tmp_path / "log").open("w+") as log:
        run = subprocess.Popen(train_command(tmp_path, workdir, *flags), stderr=log, stdout=log, env=environment())
        while "\nstep 5/" not in (tmp_path / "log").read_text() and run.poll() is None:
            time.sleep(0.01)
        run.terminate()
        code = run.wait(timeout=60)
    words = (tmp_path / "log").read_text()
    assert code == EXIT_STOPPED == 75, words
    step = int(words.rpartition("stopped by SIGTERM after step ")[2].split()[0])
    assert 5 <= step < 1000
    assert committed_steps(workdir / CHECKPOINT_FOLDER) == [step]
    assert verify_manifest(workdir / CHECKPOINT_FOLDER / str(step)) == []
    assert json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])["step"] == step


def test_a_second_sigterm_ends_the_process_at_once_whatever_it_is_doing(tmp_path):
    """Here it waits in a call that no Python handler can interrupt."""
    script = """
        import ctypes, time
        from levattn.training.signals import StopSignal
        with StopSignal() as is_told_to_stop:
            print("ready", flush=True)
            while not is_told_to_stop(1):
                time.sleep(0.01)
            print("noted", flush=True)
            ctypes.CDLL(None).pause()
            while True:
                ctypes.CDLL(None).pause()
    """
    run = start(script)
    assert run.stdout.readline() == "ready\n"
    run.terminate()
    assert run.stdout.readline() == "noted\n"
    time.sleep(0.2)
    assert run.poll() is None
    begin = time.monotonic()
    run.terminate()
    assert run.wait(timeout=30) == -signal.SIGTERM
    assert time.monotonic() - begin < 2
    run.stdout.close()


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_older_checkpoints_intact_and_a_read_only_one_before_its_first_step(tmp_path):
    """On a file system of 1.5 MB. When there is room again, the same command goes on."""
    mount = tmp_path / "mount"
    mount.mkdir()
    if not can_mount(mount):
        pytest.skip("needs user namespaces, to mount a small file system; the test with a limit on file sizes runs")
    flags = ["--config.checkpoint.keep_last=1000", "--config.checkpoint.every_steps=1", "--config.total_steps=16"]
    command = train_command(tmp_path, mount / "run", *flags)
    script = """
        import json, pathlib, subprocess, sys
        from levattn.training.checkpoint import committed_steps
        from levattn.training.manifest import verify_manifest
        mount, command = sys.argv[1], sys.argv[2:]
        folder = pathlib.Path(mount, "run", "checkpoints")
        def run():
            done = subprocess.run(command, capture_output=True, text=True)
            return {"code": done.returncode, "stderr": done.stderr}
        def limit(options):
            subprocess.run(["mount", "-o", "remount," + options, mount], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", mount], check=True)
        limit("ro,size=1500k")
        results = {"read_only": run()}
        limit("rw,size=1500k")
        results["full"] = run() | {
            "steps": committed_steps(folder),
            "sound": [verify_manifest(folder / str(step)) == [] for step in committed_steps(folder)],
            "names": sorted(path.name for path in folder.iterdir()),
            "left": [str(path) for path in pathlib.Path(mount, "run").glob(".*-*")],
        }
        limit("rw,size=40m")
        results["room"] = run() | {"steps": committed_steps(folder)}
        print(json.dumps(results))
    """
    script = [sys.executable, "-c", textwrap.dedent(script), str(mount), *command]
    done = subprocess.run([*NAMESPACE, *script], stdout=subprocess.PIPE, text=True, env=environment(), timeout=200)
    results = json.loads(done.stdout)
    read_only, full, room = (results[name] for name in ("read_only", "full", "room"))
    assert read_only["code"] == 2
    assert "cannot be written (Read-only file system): give --workdir a folder" in read_only["stderr"]
    assert "step 1/" not in read_only["stderr"]
    assert full["code"] == 2, full["stderr"]
    message = full["stderr"].rpartition("error: ")[2]
    assert f"could not be written to '{mount}/run/checkpoints'" in message
    assert "No space left on device" in message
    assert f"Earlier checkpoints are as they were: {full['steps']}" in message
    # Nothing of ours is shown line by line. (Orbax's own threads may be, where its event loop ends before they do.)
    assert not re.search(r'File ".*(levattn|train\.py)', full["stderr"])
    assert len(full["steps"]) > 1
    assert all(full["sound"])
    assert full["names"] == sorted(map(str, full["steps"]))
    assert full["left"] == []
    assert room["code"] == 0, room["stderr"]
    assert f"going on from step {full['steps'][-1]} of 16" in room["stderr"]
    assert room["steps"][-1] == 16


def test_a_write_that_fails_leaves_no_file_and_the_older_checkpoint(tmp_path):
    """Past a limit on the size of files, the fault of a quota; Orbax's threads are told by the system itself."""
    script = """
        import json, os, resource, sys
        import numpy as np, jax.numpy as jnp
        from absl import logging
        from levattn.training.checkpoint import Checkpointer, CheckpointError
        logging.set_verbosity(logging.FATAL)
        noise = np.random.default_rng(0).normal(size=1 << 20).astype("float32")
        with Checkpointer(sys.argv[1]) as checkpointer:
            checkpointer.save(1, {"w": jnp.asarray(noise)}, None, {})
            checkpointer.wait()
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
            checkpointer.save(2, {"w": jnp.asarray(noise)}, None, {})
            try:
                checkpointer.wait()
            except CheckpointError as error:
                print(json.dumps([str(error), checkpointer.all_steps(), sorted(os.listdir(sys.argv[1]))]))
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            checkpointer.save(2, {"w": jnp.asarray(noise)}, None, {})
            checkpointer.wait()
            print(json.dumps(checkpointer.all_steps()))
    """
    output, _ = start(script, tmp_path, stderr=subprocess.DEVNULL).communicate(timeout=60)
    failure, steps = map(json.loads, output.splitlines())
    assert "the checkpoint of step 2 could not be written" in failure[0]
    assert "File too large" in failure[0]
    assert failure[1:] == [[1], ["1"]]
    assert steps == [2]


def test_metrics_that_cannot_be_written_do_not_stop_a_run(tmp_path):
    """The TensorBoard folder is a file, and metrics.jsonl a folder; a logger that raises is caught as they are."""
    (tmp_path / "tensorboard").write_text("")
    (tmp_path / "metrics.jsonl").mkdir()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        writer = MetricWriter(tmp_path)
        for step in range(100):
            writer.write(step, {"loss": 1.0})
        writer.close()
    said = sorted(str(warning.message) for warning in warned if "training goes on" in str(warning.message))
    assert [text.split(" (")[0] for text in said] == [
        f"metrics could not be written to {name}" for name in ("TensorBoard", "metrics.jsonl")
    ]


def test_metrics_on_a_full_disk_do_not_hold_a_run_up(tmp_path):
    """More events than any queue has room for, once the disk is full."""
    if not can_mount(tmp_path):
        pytest.skip("needs user namespaces, to mount a small file system")
    script = """
        import pathlib, subprocess, sys, time, warnings
        from levattn.training.metrics import MetricWriter
        folder = sys.argv[1]
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", folder], check=True)
        warnings.simplefilter("ignore")
        writer = MetricWriter(folder)
        writer.write(0, {"loss": 1.0})
        try:
            with open(folder + "/other", "wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        except OSError as error:
            print(error)
        for step in range(2000):
            writer.write(step, {"loss": 1.0, "accuracy": 0.5})
        writer.close()
        print("went on")
    """
    command = [*NAMESPACE, sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert "No space left on device" in done.stdout, done.stderr
    assert done.stdout.endswith("went on\n")


# Numbers that are not finite. The fault: a lit pixel in one of 64 black images, where pixels are divided by 1.5e-38.


@pytest.fixture(scope="module")
def one_bad_record(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for split in ("train", "val"):
        for number in range(64 if split == "train" else 8):
            image = np.zeros((8, 8, 3), np.uint8)
            image[:, :, number % 3] = number == 37
            path = folder / split / f"class{number % 2}" / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(path), image)
    return from_config_dict(
        TrainConfig,
        {
            "data": {
                "source": f"folder:{folder}",
                "eval_split": "val",
                "image_size": 8,
                "mean": (0.0,),
                "std": (1.5e-38,),
            },
            "model": MODEL | {"num_classes": 2},
            "checkpoint": {"every_steps": 1, "keep_last": 100, "metric": "loss"},
            "batch_size": 8,
            "total_steps": 16,  # two epochs: two bad steps
            "log_every_steps": 1,
        },
    )


def saved_arrays_are_finite(workdir):
    folder = workdir / CHECKPOINT_FOLDER
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a template Orbax asks for shardings
        state = ocp.load(folder / str(committed_steps(folder)[-1]))
    return all(np.isfinite(np.asarray(leaf, np.float64)).all() for leaf in jax.tree.leaves(state))


def test_a_step_that_is_not_finite_stops_the_run_before_its_update_and_is_explained(one_bad_record, tmp_path):
    with pytest.raises(NonFiniteError) as error:
        train(one_bad_record, tmp_path)
    report = json.loads((tmp_path / "nonfinite.json").read_text())
    step, message = report["step"], str(error.value)
    assert message.startswith(f"step {step}: loss nan")
    assert "output of Transformer/encoderblock_0/LayerNorm_0" in message
    assert "--config.nonfinite=skip" in message
    assert len(report["records"]) == 8
    assert step <= 8
    source = open_source(one_bad_record.data, "train")
    (bad,) = (index for index in range(64) if "037.png" in source.describe(index))
    assert bad in report["records"]
    assert committed_steps(tmp_path / CHECKPOINT_FOLDER) == list(range(1, step))
    assert saved_arrays_are_finite(tmp_path)
    with pytest.raises(NonFiniteError, match=f"step {step}: "):  # it is no accident
        train(one_bad_record, tmp_path)


def test_bad_steps_are_skipped_and_counted_up_to_a_cap_that_restarts_share(one_bad_record, tmp_path):
    skipping = dataclasses.replace(one_bad_record, nonfinite="skip", max_skipped=1)
    with pytest.raises(NonFiniteError, match="one more than max_skipped=1"):  # the second epoch has it again
        train(skipping, tmp_path)
    bad_step = json.loads((tmp_path / "nonfinite.json").read_text())["step"]
    assert 8 < bad_step <= 16
    assert saved_arrays_are_finite(tmp_path)
    with pytest.raises(NonFiniteError, match="one more than max_skipped=1"):  # not counted from 0 again
        train(skipping, tmp_path)
    train(dataclasses.replace(skipping, max_skipped=2), tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    counts = {line["step"]: line["train/num_skipped"] for line in lines if "train/loss" in line}
    assert max(counts.values()) == 2
    assert saved_arrays_are_finite(tmp_path)


def test_examples_that_have_changed_under_the_same_name_are_refused_unless_allowed(one_bad_record, tmp_path):
    images, workdir = tmp_path / "images", tmp_path / "run"
    shutil.copytree(one_bad_record.data.source.removeprefix("folder:"), images)
    data = dataclasses.replace(one_bad_record.data, source=f"folder:{images}", std=(0.5,))
    config = dataclasses.replace(one_bad_record, data=data, total_steps=1)
    train(config, workdir)
    (images / "train" / "class0" / "000.png").unlink()
    with pytest.raises(
        ValueError, match=r"data\.fingerprint: .* \(the training examples\)(?s:.*)--allow_changed=data.fing"
    ):
        train(config, workdir)
    train(config, workdir, allow_changed=("data.fingerprint",))


def test_pixels_and_labels_exchanged_between_files_of_one_size_change_the_fingerprint(tmp_path):
    """A folder where names and sizes stay; 40 of 300 files change, of which more than one in two are read."""
    for number in range(300):
        path = tmp_path / f"class{number % 2}" / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(f"{number:03}".encode())
    data = DataConfig(source=f"folder:{tmp_path}")
    before = open_source(data, "train").fingerprint
    assert open_source(data, "train").fingerprint == before
    for number in range(0, 40, 2):
        (tmp_path / "class0" / f"{number:03}.png").write_bytes(f"{number + 1:03}".encode())
        (tmp_path / "class1" / f"{number + 1:03}.png").write_bytes(f"{number:03}".encode())
    assert open_source(data, "train").fingerprint != before


def test_the_layer_that_overflows_first_is_named(finished_run, tmp_path):
    params, config = load_params(finished_run / EXPORT_FILE)
    layer = params["Transformer"]["encoderblock_0"]["MlpBlock_0"]["Dense_1"]
    layer["kernel"] = np.sign(layer["kernel"]) * np.float32(3e38)
    export_params(tmp_path / "huge.npz", params, config)
    config = from_config_dict(TrainConfig, DIGITS | {"init_from": str(tmp_path / "huge.npz")})
    with pytest.raises(
        NonFiniteError, match=r"step 1: (?s:.*)output of Transformer/encod.*/(MlpBlock_0/Dense_1|LayerN.*)"
    ):
        train(config, tmp_path / "run")
    assert not has_checkpoint(tmp_path / "run" / CHECKPOINT_FOLDER)


@pytest.mark.slow
def test_a_minute_of_kills_and_damage_ends_in_the_parameters_of_an_undisturbed_run(tmp_path):
    """One of each that no other test does to a whole run; `scripts/soak.py` by hand for longer."""
    wanted = ["SIGKILL", "data worker stopped"]
    flags = ["--minutes=0", "--steps=400", "--delay=0.4", "--damage_share=1", "--kinds", *wanted]
    command = [sys.executable, ROOT / "scripts" / "soak.py", "--out", tmp_path / "a.json", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "a.json").read_text())
    assert figures["trainings"] == 1
    assert {*wanted} < figures["faults"].keys()  # and damage
    assert figures["recoveries"]["found that it hung, and ended"] >= 1
