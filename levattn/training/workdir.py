"""The folder of a run: that it can be written is shown at once, and what ran in it is on record."""

import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

CONFIG_FILE = "config.json"
VERSIONS_FILE = "versions.json"
LOCK_FILE = ".lock"
_PACKAGES = ("levattn", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


class WorkdirInUseError(OSError):
    """Another run is writing to the same workdir."""


def prepare_workdir(path: str | os.PathLike, flag: str = "workdir", *, dry_run: bool = False) -> Path:
    """Makes the folder of a run and proves that this process can write there. What is in it stays as it is.

    Args:
      path: The folder; its parents are made too.
      flag: What the user calls it.
      dry_run: Make nothing; try the nearest folder that is there instead.

    Returns:
      The absolute path.

    Raises:
      OSError: It cannot be made or written; the message names it and what to do.
    """
    path = Path(path).absolute()
    try:
        if not dry_run:
            path.mkdir(parents=True, exist_ok=True)
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(b"levattn")
            probe.flush()
    except OSError as error:
        raise type(error)(
            f"{flag} {str(path)!r} cannot be written ({error.strerror or error}): "
            f"give --{flag} a folder that you own, on a disk with free space"
        ) from error
    return path


@contextlib.contextmanager
def locked_workdir(workdir: str | os.PathLike) -> Iterator[Callable[[], None]]:
    """Keeps other runs out of a workdir. Of the processes of one run, process 0 holds the lock for all.

    The lock is the kernel's (flock): it ends with the process that holds it, however that ends, and nothing is left to
    clean up. Other hosts see it where the file system passes locks on, as NFS and Lustre commonly do.

    Args:
      workdir: From `prepare_workdir`.

    Yields:
      A function that raises `WorkdirInUseError` if the lock keeps nobody out any more, as its file was removed or
      replaced. To be called before something is written that another run may have written, too.

    Raises:
      WorkdirInUseError: Another run holds the lock; says which process, since when, and on what host.
    """
    if jax.process_index() != 0:
        yield lambda: None
        return
    path = Path(workdir) / LOCK_FILE
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "that does not say who it is"
            raise WorkdirInUseError(
                f"workdir {str(workdir)!r} is in use by another run ({holder}): wait for it or stop it, or give "
                "--workdir another folder"
            ) from error
        except OSError as error:
            warnings.warn(
                f"the file system of {str(workdir)!r} has no locks ({error}): make sure that no other run writes there",
                RuntimeWarning,
                stacklevel=3,
            )
        started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()} since {started}\n")
        file.flush()

        def check() -> None:
            if not (path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno()))):
                raise WorkdirInUseError(
                    f"the lock {str(path)!r} of this run was removed: another run may have begun there. If there is "
                    "none, the same command goes on from the last checkpoint"
                )

        try:
            yield check
        finally:
            file.truncate(0)  # the file stays: a lock on a file that is removed keeps nobody out


def record_run(workdir: Path, config: Mapping[str, Any]) -> None:
    """Writes the config and `provenance` into a prepared workdir, in place of those of an earlier run.

    To be called once it is certain that the run goes ahead, as the old records belong to the old checkpoints. Every
    process of a run may call this; process 0 writes.

    Args:
      workdir: From `prepare_workdir`.
      config: The resolved config, JSON serialisable.
    """
    if jax.process_index() == 0:
        write_json(workdir / CONFIG_FILE, config)
        write_json(workdir / VERSIONS_FILE, provenance())


def read_config(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """The config that `record_run` wrote, or None where it has not been called.

    Raises:
      ValueError: The file is there but is not JSON.
    """
    path = Path(workdir) / CONFIG_FILE
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON ({error}): restore it or start in a new workdir") from error


def provenance() -> dict[str, Any]:
    """What is needed to run the same thing again: command, time, commit, hardware and versions, JSON serialisable.

    `commit` and `dirty` (uncommitted changes) are None where the package does not run from a git checkout. Starts
    the JAX backend: call it after `jax.distributed.initialize`.
    """
    commit, dirty = _git_state()
    device = jax.devices()[0]
    return {
        "command": shlex.join(sys.orig_argv),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "dirty": dirty,
        "hardware": {
            "platform": device.platform,
            "device_kind": device.device_kind,
            "num_devices": jax.device_count(),
            "num_processes": jax.process_count(),
            "num_cpus": os.cpu_count(),
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
    }


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary name in the same folder; on success it takes the place of `path`, on an error it is removed.

    A reader sees the old file or the whole new one, also after a crash: the data reach the disk before the rename.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())  # some writers make files that only their owner can read
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)  # the new name, too
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(path: str | os.PathLike) -> None:
    """Returns when the names in a folder are on disk, where the file system can say so."""
    folder = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no fsync of folders
            os.fsync(folder)
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0)  # there is no way to read it but to set it
    os.umask(mask)
    return mask


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes indented JSON, atomically.

    Raises:
      ValueError: NaN or infinity, which JSON does not have.
      TypeError: Something else that is not JSON.
    """
    text = json.dumps(value, indent=2, allow_nan=False)
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> tuple[str | None, bool | None]:
    """Commit and whether anything is uncommitted, of the checkout that this very file is part of."""
    # An installed copy may lie inside the checkout of some other project: ask whether git tracks this file.
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None, None
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    return commit, None if changes is None else changes != ""


def _git(*args: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *args]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or no answer
        return None
