import contextlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from levattn.training import workdir as workdir_lib
from levattn.training.workdir import (
    WorkdirInUseError,
    atomic_path,
    locked_workdir,
    prepare_workdir,
    provenance,
    read_config,
    record_run,
    write_json,
)

CONFIG = {"seed": 3, "model": {"variant": "S/16", "k": [8, 16], "eps": None}}


def test_the_recorded_config_is_read_back_equal_and_versions_lie_beside_it(tmp_path):
    path = prepare_workdir(tmp_path / "runs" / "a")
    assert path == tmp_path / "runs" / "a"
    assert list(path.iterdir()) == []  # not before the run is sure to go ahead
    record_run(path, CONFIG)
    assert read_config(path) == CONFIG
    record = json.loads((path / "versions.json").read_text())
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["hardware"]["platform"] == "cpu"


def test_a_lock_whose_file_was_removed_is_found_before_a_save(tmp_path):
    with locked_workdir(tmp_path) as check:
        check()
        (tmp_path / ".lock").unlink()
        with pytest.raises(WorkdirInUseError, match=r"\.lock' of this run was removed"):
            check()
        with locked_workdir(tmp_path) as check_other:
            check_other()
            with pytest.raises(WorkdirInUseError):
                check()


def test_a_folder_without_records_has_no_config(tmp_path):
    assert read_config(tmp_path) is None


def test_a_damaged_config_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json.*not valid JSON"):
        read_config(tmp_path)


@pytest.mark.parametrize("under", ["file", "/proc"])
def test_a_workdir_that_cannot_be_written_is_refused_by_name_with_the_next_step(tmp_path, under):
    """Holds for root, too, whom file modes do not stop."""
    (tmp_path / "file").write_text("")
    path = tmp_path / under / "run"
    with pytest.raises(OSError, match=r"cannot be written .*give --workdir") as info:
        prepare_workdir(path)
    assert str(path) in str(info.value)


def test_an_existing_folder_in_which_nothing_can_be_made_is_refused():
    with pytest.raises(OSError, match="cannot be written"):
        prepare_workdir("/proc/self")
    with pytest.raises(OSError, match=r"^out '/proc/self' cannot be written .*give --out"):
        prepare_workdir("/proc/self", flag="out")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    with contextlib.suppress(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_file_has_the_permissions_that_open_gives(tmp_path):
    (tmp_path / "plain").write_text("")
    write_json(tmp_path / "a.json", {})
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_provenance_is_json_and_names_command_hardware_and_versions():
    record = provenance()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert shlex.split(record["command"]) == sys.orig_argv
    assert record["hardware"]["num_devices"] == 8
    missing = [name for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy") if not record["versions"][name]]
    assert not missing


def test_the_commit_is_that_of_the_checkout_which_tracks_the_package(tmp_path, monkeypatch):
    """An installed copy inside somebody else's checkout must not report their commit."""

    def git(*args):
        return subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path), *args],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()

    tracked, untracked = tmp_path / "tracked.py", tmp_path / "untracked.py"
    tracked.write_text("")
    git("init")
    git("add", "tracked.py")
    git("commit", "-m", "a")
    monkeypatch.setattr(workdir_lib, "__file__", str(tracked))
    assert workdir_lib._git_state() == (git("rev-parse", "HEAD"), False)
    untracked.write_text("")
    assert workdir_lib._git_state() == (git("rev-parse", "HEAD"), True)
    monkeypatch.setattr(workdir_lib, "__file__", str(untracked))
    assert workdir_lib._git_state() == (None, None)
    monkeypatch.setattr(workdir_lib, "__file__", str(Path("/nowhere/file.py")))
    assert workdir_lib._git_state() == (None, None)
