"""Commands that depend on each other, each run in a process of its own until it is done, whatever stops it meanwhile.

A job is done once its record `NAME.done.json` lies in the folder, written after its process ended without an error. So
the same call again goes on with what is left. Each job that runs holds a lock that its process holds, too: several
callers, one a device, may work through the same jobs in the same folder.
"""

import contextlib
import dataclasses
import datetime
import fcntl
import graphlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TextIO

from levattn.training.signals import EXIT_STOPPED, Stopped
from levattn.training.watchdog import EXIT_HUNG
from levattn.training.workdir import write_json

WORKDIR = "{workdir}"
"""Stands in a command for the folder of the jobs, so that the folder may be moved while not all of them are done."""

State = Literal["done", "failed", "running", "begun", "ready", "waiting"]

_POLL_S = 0.5
_TAIL_LINES = 15

# Starts the command as a process that is told to stop when its parent dies. Not `preexec_fn`: JAX warns of its forks.
_START = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))  # PR_SET_PDEATHSIG, kept by exec
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@dataclasses.dataclass(frozen=True)
class Job:
    """A Python command.

    Attributes:
      name: Of the job, and of its record, log and lock below the folder: "S-2/dense/seed0/train".
      command: Arguments of the interpreter, such as ("train.py", "--workdir={workdir}/a"). One that was interrupted is
        run again as it is, and should go on from where it was.
      needs: Names of the jobs that must be done before.
    """

    name: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()


def run_jobs(
    jobs: Sequence[Job],
    workdir: str | os.PathLike,
    *,
    root: str | os.PathLike,
    retries: int = 2,
    minutes: float | None = None,
    environment: Mapping[str, str] | None = None,
    after_job: Callable[[Job], None] | None = None,
) -> list[Job]:
    """Runs the jobs that are not done, one after the other, in their order as far as they need each other.

    A process that is killed or hangs is run again; one that ends with any other error fails its job, and those that
    need it are left out. SIGTERM or Ctrl-C tells the process that runs to stop (a training then saves), and so does the
    end of this process, where Linux runs it.

    Args:
      jobs: In order of preference.
      workdir: Folder of records, logs and locks.
      root: Where the commands are run.
      retries: How often a job whose process was killed or hung is run again.
      minutes: Stop after so long, as if told to.
      environment: Variables beside those of this process.
      after_job: Called after each job that was done here.

    Returns:
      The jobs that failed here or need one that did.

    Raises:
      ValueError: Names that are not unique, jobs that need what is not there or each other.
      OSError: The folder cannot be written.
      Stopped: By a signal, or after `minutes`; the same call goes on.
    """
    by_name = _checked(jobs)
    workdir = Path(workdir).absolute()
    runner = _Runner(workdir, Path(root), retries, minutes, environment or {})
    failed: set[str] = set()
    with runner.hearing_signals():
        while True:
            left = [job for job in jobs if job.name not in failed and not is_done(job, workdir)]
            ready = [job for job in left if all(is_done(by_name[need], workdir) for need in job.needs)]
            if not ready:
                return [job for job in jobs if not is_done(job, workdir)]
            for job in ready:
                with _lock(job, workdir) as lock:
                    if lock is None or is_done(job, workdir):
                        continue  # another process has it, or had it a moment ago
                    is_fine = runner.run(job, lock, f"{len(jobs) - len(left) + 1}/{len(jobs)}")
                if not is_fine:
                    failed.add(job.name)
                elif after_job is not None:
                    after_job(job)
                break  # what needs it may come first now
            else:
                runner.check()
                time.sleep(_POLL_S)


def is_done(job: Job, workdir: str | os.PathLike) -> bool:
    """Whether this very command has been run to its end."""
    try:
        return json.loads(_path(job, workdir, ".done.json").read_text())["command"] == [*job.command]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def state(job: Job, jobs: Sequence[Job], workdir: str | os.PathLike) -> State:
    """How far a job is: "done", "running", "begun" (interrupted or failed), "ready", or "waiting" for another.

    Args:
      job: One of `jobs`.
      jobs: All of them.
      workdir: Their folder; nothing is written.
    """
    if is_done(job, workdir):
        return "done"
    if _is_locked(_path(job, workdir, ".lock")):
        return "running"
    if _path(job, workdir, ".log").exists():
        return "begun"
    by_name = {other.name: other for other in jobs}
    return "ready" if all(is_done(by_name[need], workdir) for need in job.needs) else "waiting"


def with_needs(jobs: Sequence[Job], wanted: Callable[[Job], bool]) -> list[Job]:
    """The jobs that are wanted and all that they need, in the order of `jobs`."""
    by_name = _checked(jobs)
    names, left = set(), [job.name for job in jobs if wanted(job)]
    while left:
        names.add(name := left.pop())
        left += [need for need in by_name[name].needs if need not in names]
    return [job for job in jobs if job.name in names]


class _Runner:
    """Runs one job at a time, and hears what tells it to stop."""

    def __init__(self, workdir: Path, root: Path, retries: int, minutes: float | None, environment: Mapping[str, str]):
        self._workdir, self._root, self._retries = workdir, root, retries
        self._deadline = None if minutes is None else time.monotonic() + 60 * minutes
        self._environment = {**os.environ, **environment}
        self._process: subprocess.Popen | None = None
        self._is_stopping = False

    def run(self, job: Job, lock: TextIO, number: str) -> bool:
        """Runs a job until it is done (True) or has failed."""
        start = time.monotonic()
        for attempt in range(1, self._retries + 2):
            self.check()
            print(f"[{number}] {job.name}{f', attempt {attempt}' if attempt > 1 else ''}", flush=True)
            code = self._call(job, lock)
            if code == 0:
                seconds = round(time.monotonic() - start, 1)
                time_now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
                record = {"command": [*job.command], "seconds": seconds, "attempts": attempt, "time": time_now}
                write_json(_path(job, self._workdir, ".done.json"), record)
                print(f"[{number}] {job.name}: done in {seconds:.0f} s", flush=True)
                return True
            if self._is_stopping or code == EXIT_STOPPED:
                raise Stopped(f"stopped while {job.name} ran")
            if code != EXIT_HUNG and code > 0:
                break
            print(f"[{number}] {job.name}: {'hung' if code > 0 else f'ended by signal {-code}'}", flush=True)
        log = _path(job, self._workdir, ".log")
        tail = "\n".join(f"    {line}" for line in log.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
        print(f"[{number}] {job.name}: failed with exit code {code}; the end of {log}:\n{tail}", flush=True)
        return False

    def check(self) -> None:
        """Raises `Stopped` once it is time."""
        if self._is_stopping or (self._deadline is not None and time.monotonic() > self._deadline):
            raise Stopped("stopped between jobs")

    def _call(self, job: Job, lock: TextIO) -> int:
        command = [argument.replace(WORKDIR, str(self._workdir)) for argument in job.command]
        with _path(job, self._workdir, ".log").open("a") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(os.getpid()), *command],
                cwd=self._root,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[lock.fileno()],  # the job stays locked for as long as any process works on it
                start_new_session=True,  # Ctrl-C comes to this process alone, which tells that one in its own way
            )
        try:
            if self._is_stopping:  # the signal came while it was started
                self._stop()
            if self._deadline is not None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return self._process.wait(timeout=max(0.0, self._deadline - time.monotonic()))
                self._stop()
            return self._process.wait()
        finally:
            self._process = None

    def _stop(self, *_: object) -> None:
        self._is_stopping = True
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)

    @contextlib.contextmanager
    def hearing_signals(self) -> Iterator[None]:
        previous = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _checked(jobs: Sequence[Job]) -> dict[str, Job]:
    by_name = {job.name: job for job in jobs}
    if len(by_name) < len(jobs):
        raise ValueError("names of jobs must be unique: each has a record of its own")
    for job in jobs:
        if missing := set(job.needs) - set(by_name):
            raise ValueError(f"job {job.name!r} needs {sorted(missing)}, which is not among the jobs")
    try:
        graphlib.TopologicalSorter({job.name: job.needs for job in jobs}).prepare()
    except graphlib.CycleError as error:
        raise ValueError(f"jobs must not need each other: {' needs '.join(reversed(error.args[1]))}") from error
    return by_name


def _path(job: Job, workdir: str | os.PathLike, suffix: str) -> Path:
    return Path(workdir) / f"{job.name}{suffix}"


@contextlib.contextmanager
def _lock(job: Job, workdir: Path) -> Iterator[TextIO | None]:
    """Yields the locked file, or None where a process of another caller, or one left over from it, has the job."""
    path = _path(job, workdir, ".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
