"""Checkpoints of a training run: the last few and the best, written in the background by Orbax.

A checkpoint holds the whole training state, the metrics that rank it, and a JSON record of whatever else the run needs
to go on (config, data position). It counts once its manifest is there, which is written last; it is read only after
every file has been compared with the manifest. `levattn.training.checkpoint_folder` says what lies where.

Checkpoints of versions of this package that wrote no manifest are read, with a warning: nothing can be said of their
files. `find . -type f -printf '%P\\n' | xargs sha256sum > SHA256SUMS` inside of one gives it a manifest.
"""

import contextlib
import functools
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental import multihost_utils
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from levattn.training.background import Background
from levattn.training.checkpoint_folder import begin_save, end_save, move_aside, remove_step, remove_unfinished
from levattn.training.checkpoint_folder import committed_steps as committed_steps
from levattn.training.checkpoint_folder import has_checkpoint as has_checkpoint
from levattn.training.manifest import (
    MANIFEST_FILE,
    has_manifest,
    has_only_regular_files,
    verify_manifest,
    write_manifest,
)


class CheckpointError(OSError):
    """A checkpoint could not be written. Those before it are as they were."""


class DamagedCheckpointError(ValueError):
    """Files of a checkpoint are not what was written."""


class Checkpointer:
    """The checkpoints in one folder, a folder a step.

    Every process of a run makes one and calls each method, with the same arguments. Use it as a context manager:
    leaving it waits for a save that is under way.

    Guarantee: a step that is read is, bit for bit, what was written, also after the process was killed at any moment,
    the disk was full, or files were damaged since. Not covered: damage in memory before the files were hashed, and
    malice.

    Args:
      directory: Where the checkpoints are. Made if it is missing, but not by `read_only`.
      keep_last: Newest checkpoints kept, at least 1.
      keep_best: Checkpoints kept beside them that rank best by `best_metric`.
      best_metric: Name in the metrics handed to `save`.
      best_mode: Whether a larger ("max") or a smaller ("min") metric is better. NaN ranks last.
      read_only: Only read, as is right beside a run that is still writing: nothing is made and no unfinished save is
        cleaned up.

    Raises:
      ValueError: `keep_last` or `keep_best` out of range.
      FileNotFoundError: `read_only` and there is no such folder.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        keep_last: int = 1,
        keep_best: int = 1,
        best_metric: str = "accuracy",
        best_mode: Literal["max", "min"] = "max",
        read_only: bool = False,
    ):
        if keep_last < 1:
            raise ValueError(f"{keep_last=} must be at least 1")
        if keep_best < 0:
            raise ValueError(f"{keep_best=} must not be negative")
        if best_mode not in ("max", "min"):
            raise ValueError(f"{best_mode=} must be 'max' or 'min'")
        self.directory = Path(directory).absolute()
        if read_only and not self.directory.is_dir():
            raise FileNotFoundError(f"no checkpoint folder {str(self.directory)!r}")
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
        self._keep_last, self._keep_best = keep_last, keep_best
        self._best_metric, self._best_mode, self._read_only = best_metric, best_mode, read_only
        self._saving: tuple[int, Background] | None = None
        self._is_clean = False
        self._sound: set[int] = set()
        self._damaged: dict[int, list[str]] = {}
        self._records: dict[int, dict[str, Any]] = {}

    def save(self, step: int, state: PyTree, metrics: Mapping[str, Any] | None, extra: Mapping[str, Any]) -> None:
        """Starts to save, and returns as soon as the arrays have been copied: their buffers may be donated then.

        The first save of a run moves aside the checkpoints that were found damaged, and removes what unfinished saves
        have left.

        Args:
          step: Steps taken so far; a step is saved once.
          state: Pytree of arrays. Typed PRNG keys are fine.
          metrics: Scalars, one of which ranks this checkpoint; None if it has not been evaluated, it is then never the
            best.
          extra: JSON serialisable; `read_extra` gives it back.

        Raises:
          ValueError: `metrics` lacks the best metric, the step is there already, or the folder was opened to read only.
          TypeError: `extra` is not JSON serialisable.
          CheckpointError: This save could not start, or the one before it failed in the background.
        """
        if self._read_only:
            raise ValueError(f"{str(self.directory)!r} was opened with read_only=True")
        if metrics is not None and self._best_metric not in metrics:
            raise ValueError(
                f"best_metric={self._best_metric!r} is not among the metrics {sorted(metrics)}: "
                "name one of them, or save metrics=None"
            )
        extra = json.loads(json.dumps(extra))  # fails here rather than in the background
        metrics = None if metrics is None else {name: float(value) for name, value in metrics.items()}
        self.wait()
        if not self._is_clean:
            self._clean()
        if step in self.all_steps():
            raise ValueError(f"step {step} has been saved to {str(self.directory)!r} already")
        record = {"manifest": MANIFEST_FILE, "metrics": metrics, "extra": extra}
        rank_of = {other: self._rank(self._record(other)["metrics"]) for other in self.all_steps()}
        rank_of[step] = self._rank(metrics)
        with self._reporting(step):
            if _is_first_process():
                begin_save(self.directory, step)
            response = ocp.save_async(self.directory / str(step), state, custom_metadata=record)
        self._records[step] = record
        commit = functools.partial(self._commit, step, response.result, rank_of)
        self._saving = step, Background(f"checkpoint-{step}", commit)

    def restore(self, template: PyTree, step: int | None = None, partial: bool = False) -> PyTree:
        """Reads a state, onto whatever devices the template names: they need not be those that saved it.

        Every file of the checkpoint is compared with its SHA-256 first, once for each `Checkpointer`.

        Args:
          template: Pytree of `jax.ShapeDtypeStruct` with shardings, of the structure saved.
          step: Which; None is the newest that is sound, as `newest_sound_step` finds it.
          partial: Let the checkpoint hold more than the template, as for `{"params": ...}` of a whole state. What
            the template leaves out is not read.

        Returns:
          The template's tree, with arrays for leaves.

        Raises:
          FileNotFoundError: No such step; lists those that exist.
          DamagedCheckpointError: Files of this step, or of every one, are damaged; names them.
          ValueError: Tree, shapes or dtypes differ from the template; lists every leaf that does.
        """
        step = self._existing(step)
        if not self._is_sound(step):
            raise DamagedCheckpointError(self._describe_damage(step) + self._offer(step))
        if problems := self.differences(template, step, partial):
            raise ValueError(
                f"checkpoint {str(self.directory / str(step))!r} does not fit the state to be restored. Use the config "
                "it was saved with, or a new workdir.\n" + "\n".join(problems)
            )
        context = ocp.Context()
        context.pytree.loading.partial_load = True  # the trees have been compared, with more to say
        with context:
            return ocp.load(self.directory / str(step), template)

    def differences(self, template: PyTree, step: int, partial: bool = False) -> list[str]:
        """A line for each leaf that is missing, extra or of another shape or dtype. Reads no arrays."""
        saved = ocp.metadata(self.directory / str(self._existing(step))).metadata
        return _differences(_signatures(saved), _signatures(template), partial)

    def newest_sound_step(self) -> int | None:
        """The newest step whose files are all as they were written; None if there is no checkpoint.

        Warns of each newer step that is damaged, naming its files. Cost: that of hashing one checkpoint, and each
        damaged one.

        Raises:
          DamagedCheckpointError: There are checkpoints, and all are damaged. Nothing has been changed.
        """
        steps = self.all_steps()
        for step in reversed(steps):
            if self._is_sound(step):
                return step
            warnings.warn(f"{self._describe_damage(step)}\nTrying the next older step.", RuntimeWarning, stacklevel=2)
        if steps:
            raise DamagedCheckpointError(
                f"every checkpoint in {str(self.directory)!r} is damaged, steps {steps}; nothing was changed.\n"
                + "\n".join(map(self._describe_damage, steps))
                + "\nPut one back from a backup, or start anew in another workdir."
            )
        return None

    def latest_step(self) -> int | None:
        """The newest committed step, or None if there is no checkpoint; what was found damaged does not count."""
        return max((step for step in self.all_steps() if step not in self._damaged), default=None)

    def best_step(self) -> int | None:
        """The step that ranks best, the newest of equals; None if no checkpoint has been evaluated."""
        steps = (step for step in self.all_steps() if step not in self._damaged)
        ranked = [(self._rank(metrics), step) for step in steps if (metrics := self._record(step)["metrics"])]
        return max(ranked)[1] if ranked else None

    def all_steps(self) -> list[int]:
        """The steps that have been committed, ascending. Waits for a save under way."""
        self.wait()
        return committed_steps(self.directory)

    def read_extra(self, step: int | None = None) -> dict[str, Any]:
        """The `extra` that was saved with a step; None is the newest that is sound.

        Raises:
          FileNotFoundError: No such step; lists those that exist.
        """
        return self._record(self._existing(step))["extra"]

    def wait(self) -> None:
        """Returns when no save is under way.

        Raises:
          CheckpointError: The save failed.
        """
        if self._saving is None:
            return
        (step, background), self._saving = self._saving, None
        error = background.join()
        failed = _from_first_process(error is not None)
        if error is None and failed:
            error = OSError("process 0 could not write its part, or the manifest")
        if error is not None:
            with self._reporting(step):
                raise error
        self._sound.add(step)

    def check(self) -> None:
        """Raises what a save under way has failed with so far; does not wait. Cheap enough for every step.

        Raises:
          CheckpointError: The save failed.
        """
        # Of several processes, all find out at the next save.
        if self._saving is not None and self._saving[1].has_failed() and jax.process_count() == 1:
            self.wait()

    def close(self) -> None:
        """Waits for a save under way."""
        self.wait()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, exc_type: type | None, *exc_info: object) -> None:
        if exc_type is not None and self._saving is not None and jax.process_count() > 1:
            self._saving[1].join()  # the others may be anywhere, and cannot be asked how it went
            return
        try:
            self.close()
        except CheckpointError as error:
            if exc_type is None:
                raise
            warnings.warn(str(error), RuntimeWarning, stacklevel=2)  # the first error is the one to report

    def _commit(self, step: int, written: Callable[[], Any], rank_of: Mapping[int, float]) -> None:
        """The end of a save, in the background: waits for Orbax, then makes the step count, then removes old ones."""
        written()
        if not _is_first_process():
            return
        write_manifest(self.directory / str(step))
        end_save(self.directory)
        steps = [other for other in committed_steps(self.directory) if other not in self._damaged]
        ranked = sorted((rank_of[other], other) for other in steps if rank_of.get(other, -math.inf) > -math.inf)
        kept = {*steps[-self._keep_last :], *(other for _, other in ranked[len(ranked) - self._keep_best :])}
        for other in set(steps) - kept:
            remove_step(self.directory, other)

    @contextlib.contextmanager
    def _reporting(self, step: int):
        """Turns what a save fails with into an error that says what is left, once its unfinished files are gone."""
        try:
            yield
        except Exception as error:
            if _is_first_process():
                remove_unfinished(self.directory, is_failed=True)
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {str(self.directory)!r}: {_brief(error)}\n"
                f"Earlier checkpoints are as they were: {committed_steps(self.directory) or 'none'}. Make room, or put "
                "right what is named above, and run the same command again: it goes on from the newest of them."
            ) from error

    def _clean(self) -> None:
        """Removes what unfinished saves left, and moves aside the steps that were found damaged."""
        if _is_first_process():
            for step in self._damaged:
                with contextlib.suppress(FileNotFoundError):
                    aside = move_aside(self.directory, step)
                    warnings.warn(
                        f"the damaged checkpoint of step {step} is now {str(aside)!r}", RuntimeWarning, stacklevel=3
                    )
            remove_unfinished(self.directory)
        _from_first_process(True)  # the others wait
        for step in self._damaged:
            self._records.pop(step, None)
        self._damaged.clear()
        self._is_clean = True

    def _is_sound(self, step: int) -> bool:
        if step not in self._sound and step not in self._damaged:
            problems = self._problems(step) if _is_first_process() else []
            if _from_first_process(bool(problems)):
                self._damaged[step] = problems
            else:
                self._sound.add(step)
        return step in self._sound

    def _problems(self, step: int) -> list[str]:
        folder = self.directory / str(step)
        if has_manifest(folder):
            return verify_manifest(folder)
        try:
            is_old = "manifest" not in (ocp.metadata(folder).custom_metadata or {})
        except Exception as error:  # Orbax has many
            return [f"{MANIFEST_FILE}: is missing, and the metadata cannot be read ({_brief(error)})"]
        if not is_old:
            return [f"{MANIFEST_FILE}: is missing"]
        warnings.warn(
            f"checkpoint {str(folder)!r} was saved by a version of this package that wrote no manifest: it is read, "
            "and damage to its files would not be seen",
            RuntimeWarning,
            stacklevel=2,
        )
        return []

    def _describe_damage(self, step: int) -> str:
        problems = self._damaged[step] or ["process 0 says which files"]
        return "\n  ".join([f"checkpoint {str(self.directory / str(step))!r} is DAMAGED:", *problems])

    def _offer(self, step: int) -> str:
        others = [other for other in self.all_steps() if other != step]
        return f"\nOther steps there: {others or 'none'}."

    def _record(self, step: int) -> dict[str, Any]:
        """Metrics and extra of a step; of one whose record cannot be read there are none."""
        if step not in self._records:
            try:
                if not has_only_regular_files(self.directory / str(step)):
                    raise OSError("a pipe or a device")
                record = ocp.metadata(self.directory / str(step)).custom_metadata or {}
                if "manifest" not in record:
                    record = {"metrics": _old_metrics(self.directory / str(step)), "extra": record}
            except Exception:  # damaged: `restore` will say so
                record = {"metrics": None, "extra": {}}
            self._records[step] = record
        return self._records[step]

    def _rank(self, metrics: Mapping[str, float] | None) -> float:
        value = math.nan if metrics is None else metrics.get(self._best_metric, math.nan)
        if math.isnan(value):
            return -math.inf
        return value if self._best_mode == "max" else -value

    def _existing(self, step: int | None) -> int:
        """`step`, or the newest sound one, once it is known to be on disk."""
        steps = self.all_steps()
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {str(self.directory)!r}")
        if step is not None and step not in steps:
            raise FileNotFoundError(f"no checkpoint of step {step} in {str(self.directory)!r}; there are {steps}")
        return self.newest_sound_step() if step is None else step


def _old_metrics(folder: Path) -> dict[str, float] | None:
    try:
        return json.loads((folder / "metrics" / "metrics").read_text())
    except (OSError, ValueError):
        return None


def _brief(error: BaseException) -> str:
    """The first lines of an error and of what caused it."""
    causes = []
    while error is not None:
        causes.append(f"{type(error).__name__}: {str(error).strip()[:400]}")
        error = error.__cause__
    return "; from ".join(dict.fromkeys(causes))


def _is_first_process() -> bool:
    return jax.process_index() == 0


def _from_first_process(value: bool) -> bool:
    """What process 0 says; waits for it."""
    return value if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(value))


def _signatures(tree: PyTree) -> dict[str, str]:
    """Path to dtype and shape of every leaf, spelled alike for a state and for what Orbax makes of it."""

    def signature(leaf: Any) -> str:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):  # stored as its data
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return f"{leaf.dtype}{list(leaf.shape)}"

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): signature(leaf) for path, leaf in leaves}


def _differences(saved: dict[str, str], wanted: dict[str, str], partial: bool) -> list[str]:
    lines = [f"  missing from the checkpoint: {name} {wanted[name]}" for name in wanted if name not in saved]
    if not partial:
        lines += [f"  only in the checkpoint: {name} {saved[name]}" for name in saved if name not in wanted]
    lines += [
        f"  differs: {name} is {saved[name]} in the checkpoint, {wanted[name]} in the state"
        for name in wanted
        if name in saved and saved[name] != wanted[name]
    ]
    return lines
