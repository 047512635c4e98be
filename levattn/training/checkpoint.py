"""Checkpoints of a training run: the last few and the best, written in the background by Orbax.

A checkpoint holds the whole training state, the metrics that rank it, and a JSON record of whatever else the run needs
to go on (config, data position).
"""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

_policies = ocp.training.preservation_policies


class Checkpointer:
    """The checkpoints in one folder, a folder a step.

    Every process of a run makes one and calls each method, with the same arguments. Use it as a context manager:
    leaving it waits for a save that is under way.

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
        self._best_metric, self._best_mode, self._read_only = best_metric, best_mode, read_only
        context = ocp.Context()
        context.pytree.loading.partial_load = True  # `restore` compares the trees itself, and says more
        self._orbax = ocp.training.Checkpointer(
            self.directory,
            context=context,
            preservation_policy=_policies.AnyPreservationPolicy(
                [
                    _policies.LatestN(keep_last),
                    _policies.BestN(get_metric_fn=self._rank, n=keep_best, keep_checkpoints_without_metrics=False),
                ]
            ),
            cleanup_tmp_directories=not read_only,
        )
        self._saving: ocp.AsyncResponse | None = None

    def save(self, step: int, state: PyTree, metrics: Mapping[str, Any] | None, extra: Mapping[str, Any]) -> None:
        """Starts to save, and returns as soon as the arrays have been copied: their buffers may be donated then.

        Args:
          step: Steps taken so far; a step is saved once.
          state: Pytree of arrays. Typed PRNG keys are fine.
          metrics: Scalars, one of which ranks this checkpoint; None if it has not been evaluated, it is then never the
            best.
          extra: JSON serialisable; `read_extra` gives it back.

        Raises:
          ValueError: `metrics` lacks the best metric, or the folder was opened to read only.
          TypeError: `extra` is not JSON serialisable.
          Exception: What the save before this one failed with, in the background.
        """
        if self._read_only:
            raise ValueError(f"{str(self.directory)!r} was opened with read_only=True")
        if metrics is not None and self._best_metric not in metrics:
            raise ValueError(
                f"best_metric={self._best_metric!r} is not among the metrics {sorted(metrics)}: "
                "name one of them, or save metrics=None"
            )
        extra = json.loads(json.dumps(extra))  # fails here rather than in the background
        self.wait()
        self._saving = self._orbax.save_async(
            step,
            state,
            force=True,
            metrics=None if metrics is None else {name: float(value) for name, value in metrics.items()},
            custom_metadata=extra,
        )

    def restore(self, template: PyTree, step: int | None = None, partial: bool = False) -> PyTree:
        """Reads a state, onto whatever devices the template names: they need not be those that saved it.

        Args:
          template: Pytree of `jax.ShapeDtypeStruct` with shardings, of the structure saved.
          step: Which; None is the latest.
          partial: Let the checkpoint hold more than the template, as for `{"params": ...}` of a whole state. What
            the template leaves out is not read.

        Returns:
          The template's tree, with arrays for leaves.

        Raises:
          FileNotFoundError: No such step; lists those that exist.
          ValueError: Tree, shapes or dtypes differ from the template; lists every leaf that does.
        """
        step = self._existing(step)
        saved = self._orbax.metadata(step).metadata
        problems = _differences(_signatures(saved), _signatures(template), partial)
        if problems:
            raise ValueError(
                f"checkpoint {str(self.directory / str(step))!r} does not fit the state to be restored. Use the config "
                "it was saved with, or a new workdir.\n" + "\n".join(problems)
            )
        return self._orbax.load(step, template)

    def latest_step(self) -> int | None:
        """The newest step, or None if there is no checkpoint."""
        return max(self.all_steps(), default=None)

    def best_step(self) -> int | None:
        """The step that ranks best, the newest of equals; None if no checkpoint has been evaluated."""
        ranked = [(self._rank(info.metrics), info.step) for info in self._orbax.checkpoints if info.metrics]
        return max(ranked)[1] if ranked else None

    def all_steps(self) -> list[int]:
        """The steps that can be restored, ascending."""
        return [info.step for info in self._orbax.checkpoints]

    def read_extra(self, step: int | None = None) -> dict[str, Any]:
        """The `extra` that was saved with a step; None is the latest.

        Raises:
          FileNotFoundError: No such step; lists those that exist.
        """
        return self._orbax.metadata(self._existing(step)).custom_metadata

    def wait(self) -> None:
        """Returns when no save is under way.

        Raises:
          Exception: What the save failed with.
        """
        saving, self._saving = self._saving, None
        try:
            self._orbax.wait()
        except Exception:
            self._orbax.reload()  # it has already crossed off what the failed save was to replace
            raise
        finally:
            if saving is not None:
                with contextlib.suppress(Exception):  # the one that `wait` has raised
                    saving.result()  # ends its thread

    def close(self) -> None:
        """Waits, then lets go of threads and files."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _rank(self, metrics: Mapping[str, float]) -> float:
        value = metrics.get(self._best_metric, math.nan)
        if math.isnan(value):
            return -math.inf
        return value if self._best_mode == "max" else -value

    def _existing(self, step: int | None) -> int:
        """`step`, or the latest, once it is known to be on disk."""
        self.wait()
        steps = self.all_steps()
        if not steps:
            raise FileNotFoundError(f"no checkpoint in {str(self.directory)!r}")
        if step is not None and step not in steps:
            raise FileNotFoundError(f"no checkpoint of step {step} in {str(self.directory)!r}; there are {steps}")
        return steps[-1] if step is None else step


def has_checkpoint(directory: str | os.PathLike) -> bool:
    """Whether a finished checkpoint lies in a folder, which need not exist; opens and changes nothing."""
    return any(path.name.isdigit() for path in Path(directory).glob("*"))


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
