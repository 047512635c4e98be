"""What lies in a folder of checkpoints, and which of it counts, whenever a process was killed there.

    1000/             a checkpoint, committed if it holds SHA256SUMS
    .saving           the step of a save under way; what it names and has no manifest is not committed
    1000.damaged/     moved aside by a run that went on from an older step; remove it by hand
    1000.deleted/     being removed
    *.orbax-...-tmp*/ being written by Orbax

Of several processes of a run one alone may change a folder.
"""

import os
import shutil
import time
from pathlib import Path

from levattn.training.manifest import has_manifest
from levattn.training.workdir import atomic_path

_SAVING_FILE = ".saving"
_CLEANING_S = 5.0
_DELETED, _DAMAGED = ".deleted", ".damaged"


def has_checkpoint(directory: str | os.PathLike) -> bool:
    """Whether a finished checkpoint lies in a folder, which need not exist; opens and changes nothing."""
    return bool(committed_steps(directory))


def committed_steps(directory: str | os.PathLike) -> list[int]:
    """The steps saved to a folder, which need not exist, but for one whose save was never finished; ascending."""
    directory = Path(directory)
    under_way = _step_under_way(directory)
    steps = (int(path.name) for path in directory.glob("*") if path.name.isdigit() and path.is_dir())
    return sorted(step for step in steps if step != under_way or has_manifest(directory / str(step)))


def begin_save(directory: Path, step: int) -> None:
    """From now on a folder of this step does not count until its manifest is there."""
    with atomic_path(directory / _SAVING_FILE) as temporary:
        temporary.write_text(str(step))


def end_save(directory: Path) -> None:
    """The manifest is there: the step counts."""
    (directory / _SAVING_FILE).unlink()


def remove_step(directory: Path, step: int) -> None:
    """Removes a checkpoint; killed half-way it leaves what no longer counts, and not what looks damaged."""
    deleted = directory / f"{step}{_DELETED}"
    (directory / str(step)).rename(deleted)
    shutil.rmtree(deleted, ignore_errors=True)


def move_aside(directory: Path, step: int) -> Path:
    """Renames a damaged checkpoint to a name that is free, and returns it.

    Raises:
      FileNotFoundError: There is no such step.
    """
    name = f"{step}{_DAMAGED}"
    candidates = (directory / name, *(directory / f"{name}.{i}" for i in range(2, 1000)))
    aside = next(candidate for candidate in candidates if not candidate.exists())
    return (directory / str(step)).rename(aside)


def remove_unfinished(directory: Path, is_failed: bool = False) -> None:
    """Removes what saves and removals that came to no end have left.

    Args:
      directory: Where no save is under way.
      is_failed: A save of this process has just failed: threads of it may write on for a while, and make folders anew.
    """
    step = _step_under_way(directory)
    if step is not None and not has_manifest(directory / str(step)):
        shutil.rmtree(directory / str(step), ignore_errors=True)
    (directory / _SAVING_FILE).unlink(missing_ok=True)
    for leftover in directory.glob(f"*{_DELETED}"):
        shutil.rmtree(leftover, ignore_errors=True)
    deadline, quiet = time.monotonic() + _CLEANING_S, 0
    while quiet < 3 and time.monotonic() < deadline:
        leftovers = list(directory.glob("*.orbax-checkpoint-tmp*"))
        if not leftovers and not is_failed:
            return
        for leftover in leftovers:
            shutil.rmtree(leftover, ignore_errors=True)
        quiet = 0 if leftovers else quiet + 1
        time.sleep(0.1)


def _step_under_way(directory: Path) -> int | None:
    try:
        return int((directory / _SAVING_FILE).read_text())
    except (OSError, ValueError):
        return None
