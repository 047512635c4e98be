"""Whether a run may go on from a checkpoint: what has changed since it was saved, and what may."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict
from jaxtyping import PyTree

from levattn.data.errors import unknown_name
from levattn.training.checkpoint import Checkpointer
from levattn.training.config import TrainConfig, to_dict

FINGERPRINT = "data.fingerprint"
"""The field of `allow_changed` that stands for the examples themselves, which no field of the config holds."""

_GUARDED = ("seed", "batch_size", "model", "data", "distill")
_FREE = ("data.num_workers", "data.max_damaged")  # neither changes the stream of batches


def check_allowed(config: TrainConfig, allow_changed: Sequence[str]) -> None:
    """Refuses names that stand for no field, so that a typing error is found in the first run and not the second.

    Args:
      config: The run.
      allow_changed: Fields of the config ("seed", "data.flip"), whole sections ("data"), or "data.fingerprint".

    Raises:
      ValueError: With the nearest name that there is.
    """
    fields = [name for name in _flat(to_dict(config)) if _is_guarded(name)]
    sections = {name.rpartition(".")[0] for name in fields} - {""}
    for name in allow_changed:
        if name not in {*fields, *sections, FINGERPRINT}:
            raise unknown_name("allow_changed", name, sorted({*fields, *sections, FINGERPRINT}))


def resume_record(
    config: TrainConfig, step: int, fingerprint: str, teacher_checksum: str | None, num_skipped: int
) -> dict[str, Any]:
    """What is saved with the state of a step, for `check_continues` to compare with."""
    record = {"examples_seen": step * config.batch_size, "config": to_dict(config), "fingerprint": fingerprint}
    record |= {"num_skipped": num_skipped}
    return record if teacher_checksum is None else record | {"teacher": teacher_checksum}


def check_continues(
    config: TrainConfig,
    total_steps: int,
    fingerprint: str,
    teacher_checksum: str | None,
    checkpointer: Checkpointer,
    step: int,
    plan: PyTree,
    allow_changed: Sequence[str] = (),
) -> str:
    """Refuses to go on from a checkpoint as another run than it was saved by.

    What the step stands for, the data seen so far, depends on the seed, the batch size and the data. They, and what
    changes the function of the model, must be as they were, or be allowed by name. The step stays the position in the
    data: after a change of batch size, batch `step` of the new size comes next, whatever has been seen, and after one
    of the seed or the data, that batch of the new order. Everything else (optimiser, length, evaluation) may change.

    Args:
      config: The run.
      total_steps: Its length.
      fingerprint: Of its training examples.
      teacher_checksum: Of its teacher, if it has one.
      checkpointer: Holds the checkpoint.
      step: Of the checkpoint.
      plan: Shapes of its state.
      allow_changed: As for `check_allowed`.

    Returns:
      The changes, to be shown; empty if there are none.

    Raises:
      ValueError: With every change that is not allowed, and the arrays whose shapes it changes.
    """
    where = f"the checkpoint of step {step} in {str(checkpointer.directory)!r}"
    if step > total_steps:
        raise ValueError(
            f"{where} is past {total_steps=}: set a larger total_steps (or total_epochs), or use another workdir"
        )
    extra = checkpointer.read_extra(step) or {}
    if teacher_checksum is not None and extra.get("teacher", teacher_checksum) != teacher_checksum:
        raise ValueError(
            f"{where} learned from another teacher than the parameters in init_from={config.init_from!r}: put the file "
            "back that the run started from, or use another workdir"
        )
    saved = extra.get("config", {})
    if saved and ("teacher" in extra) != (teacher_checksum is not None):
        raise ValueError(
            f"{where} is of a run {'with' if 'teacher' in extra else 'without'} distill: use another workdir"
        )
    old, new = (_flat(json.loads(json.dumps(fields))) for fields in (saved, to_dict(config)))
    # A field that only one of them has came or went with a version of this package: unknown, not changed.
    changed = {name: f"{name}: {old[name]} -> {new[name]}" for name in old if name in new and old[name] != new[name]}
    old_fingerprint = extra.get("fingerprint", fingerprint)
    if old_fingerprint != fingerprint:
        changed[FINGERPRINT] = f"{FINGERPRINT}: {old_fingerprint[:12]} -> {fingerprint[:12]} (the training examples)"
    refused = [name for name in changed if _is_guarded(name) and not _is_allowed(name, allow_changed)]
    if refused:
        lines = [f"{where} is of a run with another config:", *(changed[name] for name in refused)]
        shapes = checkpointer.differences(plan, step)
        if shapes:
            lines += ["so its arrays do not fit:", *map(str.strip, shapes)]
        message = "\n  ".join(lines) + "\nUse another workdir; with init_from it can start from the parameters of a "
        message += "finished run."
        if not shapes:
            message += f" To go on here all the same: --allow_changed={','.join([*allow_changed, *refused])}"
        raise ValueError(message)
    return f", with changed {', '.join(changed.values())}" if changed else ""


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    return flatten_dict(fields, sep=".")


def _is_guarded(name: str) -> bool:
    return name.partition(".")[0] in _GUARDED and name not in _FREE


def _is_allowed(name: str, allow_changed: Sequence[str]) -> bool:
    return any(name == allowed or name.startswith(f"{allowed}.") for allowed in allow_changed)
