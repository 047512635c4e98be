"""Jobs are run once, in an order that their needs allow, and survive whatever ends a process."""

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from levattn.training.jobs import Job, is_done, run_jobs, state, with_needs
from levattn.training.signals import EXIT_STOPPED, Stopped

ROOT = Path(__file__).parents[1]

# What a training does when it is told to stop: it saves, which takes until the file `go` is there, and exits with 75.
SAVES = f"""
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def save(*_):
    while not (folder / "go").exists():
        time.sleep(0.02)
    (folder / "saved").write_text("x")
    sys.exit({EXIT_STOPPED})
if not (folder / "saved").exists():
    signal.signal(signal.SIGTERM, save)
    (folder / "begun").write_text("x")
    while True:
        time.sleep(0.02)
"""
# Is killed the first time, and ends well the second.
DIES_ONCE = """
import os, pathlib, signal, sys
path = pathlib.Path(sys.argv[1]) / "died"
if not path.exists():
    path.write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def code(name, text, *, needs=()):
    return Job(name, ("-c", text, "{workdir}"), needs)


def note(name, *, needs=()):
    """A job that notes its name."""
    return code(name, f"open(__import__('sys').argv[1] + '/notes', 'a').write('{name} ')", needs=needs)


def run(jobs, folder, **options):
    return [job.name for job in run_jobs(jobs, folder, root=ROOT, **options)]


def wait_for(holds, seconds=30):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_job_waits_for_what_it_needs_and_is_run_once(tmp_path):
    jobs = [note("last", needs=("a/first",)), note("a/first"), note("other")]
    after = []
    assert [state(job, jobs, tmp_path) for job in jobs] == ["waiting", "ready", "ready"]
    assert run(jobs, tmp_path, after_job=lambda job: after.append(job.name)) == []
    assert after == ["a/first", "last", "other"]
    assert run(jobs, tmp_path) == []
    assert (tmp_path / "notes").read_text().split() == after
    assert {state(job, jobs, tmp_path) for job in jobs} == {"done"}


def test_another_command_of_the_same_name_is_run(tmp_path):
    run([note("a")], tmp_path)
    changed = code("a", "open(__import__('sys').argv[1] + '/changed', 'w')")
    assert not is_done(changed, tmp_path)
    run([changed], tmp_path)
    assert (tmp_path / "changed").exists()


def test_a_folder_that_was_moved_is_gone_on_with(tmp_path):
    jobs = [note("a"), note("b", needs=("a",))]
    run(jobs[:1], tmp_path / "here")
    (tmp_path / "here").rename(tmp_path / "there")
    run(jobs, tmp_path / "there")
    assert (tmp_path / "there/notes").read_text() == "a b "


def test_a_process_that_is_killed_is_run_again_so_many_times(tmp_path):
    job = code("dies", DIES_ONCE)
    assert run([job], tmp_path, retries=0) == ["dies"]
    (tmp_path / "died").unlink()
    assert run([job], tmp_path, retries=1) == []
    assert json.loads((tmp_path / "dies.done.json").read_text())["attempts"] == 2


def test_a_job_that_fails_stops_those_that_need_it_alone(tmp_path, capfd):
    jobs = [code("fails", "print('why'); raise SystemExit(2)"), note("needs it", needs=("fails",)), note("other")]
    assert run(jobs, tmp_path) == ["fails", "needs it"]
    assert (tmp_path / "notes").read_text() == "other "
    written = capfd.readouterr().out
    assert "exit code 2" in written
    assert "    why" in written
    assert state(jobs[0], jobs, tmp_path) == "begun"


@pytest.mark.parametrize("way", ["SIGTERM", "SIGINT", "minutes"])
def test_what_is_told_to_stop_tells_its_process_waits_for_it_and_goes_on_later(tmp_path, way):
    (tmp_path / "go").write_text("x")
    job, options = code("saves", SAVES), {}
    if way == "minutes":
        options["minutes"] = 1 / 60
        wait = threading.Thread(target=lambda: None)
    else:

        def send():
            wait_for((tmp_path / "begun").exists)
            os.kill(os.getpid(), signal.Signals[way])

        wait = threading.Thread(target=send)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    wait.start()
    with pytest.raises(Stopped):
        run([job, note("next")], tmp_path, **options)
    wait.join()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert (tmp_path / "saved").exists() or not (tmp_path / "begun").exists()
    assert not (tmp_path / "notes").exists()
    assert run([job, note("next")], tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a process outlives the one that started it")
def test_killed_outright_it_leaves_a_process_that_saves_for_which_the_next_call_waits(tmp_path):
    job = code("saves", SAVES)
    caller = f"from levattn.training.jobs import *; run_jobs([{job!r}], {str(tmp_path)!r}, root='.')"
    with subprocess.Popen([sys.executable, "-c", caller], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        wait_for((tmp_path / "begun").exists)
        process.kill()
    time.sleep(0.1)
    assert state(job, [job], tmp_path) == "running"
    threading.Timer(0.3, lambda: (tmp_path / "go").write_text("x")).start()
    assert run([job], tmp_path) == []
    assert (tmp_path / "saved").exists()


def test_a_job_that_another_caller_has_is_left_to_it(tmp_path):
    jobs = [note("taken"), note("needs it", needs=("taken",)), note("free")]
    with (tmp_path / "taken.lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert state(jobs[0], jobs, tmp_path) == "running"
        with pytest.raises(Stopped):
            run(jobs, tmp_path, minutes=1 / 60)
        assert (tmp_path / "notes").read_text() == "free "
    assert run(jobs, tmp_path) == []
    assert (tmp_path / "notes").read_text() == "free taken needs it "


def test_jobs_that_cannot_be_ordered_are_refused(tmp_path):
    a, b = note("a", needs=("b",)), note("b", needs=("a",))
    for jobs, message in (([a, b], "need each other: "), ([a], "needs .'b'., which is not"), ([a, a], "unique")):
        with pytest.raises(ValueError, match=message):
            run(jobs, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_choice_brings_what_it_needs():
    jobs = [note("a"), note("b"), note("c", needs=("a",)), note("d", needs=("c",))]
    assert [job.name for job in with_needs(jobs, lambda job: job.name == "d")] == ["a", "c", "d"]


def test_a_torn_record_is_none(tmp_path):
    job = note("a")
    run([job], tmp_path)
    record = tmp_path / "a.done.json"
    for text in (record.read_text()[:-9], "[]", ""):
        record.write_text(text)
        assert not is_done(job, tmp_path)
    with contextlib.suppress(FileNotFoundError):
        record.unlink()
    assert not is_done(job, tmp_path)
