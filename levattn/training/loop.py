"""A training run from config to exported parameters. Whatever can be wrong is found before anything compiles."""

import collections
import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh

from levattn.data import Source, open_source, output_shape, train_batches
from levattn.models import ViT
from levattn.training.checkpoint import Checkpointer, has_checkpoint
from levattn.training.config import TrainConfig, to_dict
from levattn.training.distill import Teacher, load_teacher
from levattn.training.estimate import estimate
from levattn.training.export import export_params
from levattn.training.finetune import CHECKPOINT_FOLDER, EXPORT_FILE, read_fitting, with_params_of
from levattn.training.metrics import MetricWriter, Progress
from levattn.training.nonfinite import diagnose, stop
from levattn.training.optim import make_optimizer
from levattn.training.resume import check_allowed, check_continues, resume_record
from levattn.training.sharding import check_batch_size, make_mesh, put_batch
from levattn.training.signals import Stopped, StopSignal
from levattn.training.state import TrainState, create_state, init_state, plan_state
from levattn.training.step import evaluate, make_eval_step, make_train_step
from levattn.training.watchdog import Watchdog
from levattn.training.workdir import locked_workdir, prepare_workdir, record_run

PROFILE_FOLDER = "profile"

_STEPS_IN_FLIGHT = 2
_STEPS_BEFORE_PROFILE, _STEPS_PROFILED = 3, 3


def train(
    config: TrainConfig,
    workdir: str | os.PathLike,
    *,
    dry_run: bool = False,
    profile: bool = False,
    allow_changed: Sequence[str] = (),
) -> dict[str, float]:
    """Trains, evaluates and exports; goes on from the newest sound checkpoint in `workdir` if there is one.

    A run that was stopped and resumed gives the same parameters, bit for bit, as one that was not: randomness
    depends on the seed and the step alone, and the step is also the position in the data.

    A run that hangs ends the whole process, by `EXIT_HUNG`, after `config.hang_timeout` seconds; so does one of several
    processes, at once, whose connection to another breaks.

    Args:
      config: The run.
      workdir: Gets `config.json`, `versions.json`, `metrics.jsonl`, TensorBoard files, checkpoints and, at the end,
        `params.safetensors`. One run at a time.
      dry_run: Stop after opening the data and printing the estimate; nothing is written.
      profile: Write a trace of a few steps to `workdir/profile`.
      allow_changed: Fields in which the config may differ from that of the checkpoint, see
        `levattn.training.resume.check_continues`.

    Returns:
      The last metrics: `train/...` (absent if no step was left to take) and `eval/...`. Empty after a dry run.

    Raises:
      ValueError: Naming what does not fit: batch and devices, classes of data and model, patches and images, the
        checkpoint to go on from and the config; or all checkpoints are damaged. What was in the workdir stays as it
        was.
      OSError: Data or parameters to start from that are missing, a workdir that cannot be written or is in use, a
        checkpoint that could not be written.
      NonFiniteError: A loss or a gradient is not finite, or more often than `config.max_skipped`.
      Stopped: After SIGTERM, once the step under way has been saved.
    """
    check_allowed(config, allow_changed)
    run = _prepare(config, Path(workdir))
    workdir = prepare_workdir(workdir, dry_run=dry_run)
    if dry_run:
        return {}

    with contextlib.ExitStack() as stack:
        watchdog = stack.enter_context(Watchdog(config.hang_timeout))
        check_lock = stack.enter_context(locked_workdir(workdir))
        teacher = None
        if config.distill is not None:
            teacher = load_teacher(config.model, run.plan.params, config.init_from, config.init_arch)
        train_step = make_train_step(config, run.model, run.tx, run.schedule_fn, run.plan, teacher)
        train_step = watchdog.resting_at_first(train_step, "computing")
        eval_step = make_eval_step(config, run.model, run.mesh, teacher)
        eval_step = watchdog.resting_at_first(eval_step, "evaluating")
        kept = config.checkpoint
        checkpointer = stack.enter_context(
            Checkpointer(workdir / CHECKPOINT_FOLDER, kept.keep_last, kept.keep_best, kept.metric, kept.best_mode)
        )
        stack.push(watchdog.end_if_lost)
        if jax.process_count() == 1:  # a run that ends with an error waits for its save; one of several might for ever
            stack.callback(watchdog.rest)
        state, start_step, num_skipped, message = _start(config, run, checkpointer, teacher, allow_changed)
        record_run(workdir, to_dict(config))
        writer = stack.enter_context(contextlib.closing(MetricWriter(workdir, start_step)))
        progress = stack.enter_context(Progress(run.total_steps, config.batch_size, start_step))
        if message:
            progress.log(message)
        batches = _train_batches(config, run.train_source, start_step)
        stack.callback(batches.close)
        profiler = stack.enter_context(_Profiler(workdir / PROFILE_FOLDER, start_step, enabled=profile))
        is_told_to_stop = stack.enter_context(StopSignal())
        in_flight = collections.deque()

        def evaluate_now(step: int) -> dict[str, float]:
            watchdog.beat("waiting for a batch to evaluate", step)
            with progress.paused():
                step_fn = functools.partial(eval_step, step)
                metrics = evaluate(step_fn, state.eval_params, run.eval_source, config, run.mesh)
            if step > start_step:  # else nothing was trained, and the line is there from before
                writer.write(step, _prefixed("eval", metrics))
            progress.log("  ".join([f"eval {step}/{run.total_steps}", *(f"{k} {v:.4g}" for k, v in metrics.items())]))
            return metrics

        def save(step: int, metrics: dict[str, float] | None) -> None:
            checksum = teacher.checksum if teacher else None
            record = resume_record(config, step, run.train_source.fingerprint, checksum, num_skipped)
            watchdog.rest()
            check_lock()
            checkpointer.save(step, state, metrics, extra=record)

        def settle(num_left: int = 0) -> None:
            """Waits until no more than some steps are under way, and looks whether those that ended were finite."""
            nonlocal num_skipped
            while len(in_flight) > num_left:
                step, metrics, batch = in_flight.popleft()
                if not metrics["nonfinite"]:  # waits for the step
                    continue
                num_skipped += 1
                is_skipped = config.nonfinite == "skip" and num_skipped <= config.max_skipped
                if is_skipped:
                    progress.log(
                        f"step {step}: loss {metrics['loss']:.4g}, gradient norm {metrics['grad_norm']:.4g}; update "
                        f"left out, {num_skipped} of at most {config.max_skipped}"
                    )
                    continue
                watchdog.rest()
                found = diagnose(config, run.mesh, state.params, step, put_batch(batch, run.mesh), teacher)
                why = f"It is one more than max_skipped={config.max_skipped}." if config.nonfinite == "skip" else ""
                raise stop(workdir, step, metrics, batch["index"], run.train_source.name, found, why)

        shown = {}
        for step in range(start_step + 1, run.total_steps + 1):
            profiler.before(step)
            # Steps are dispatched ahead, so that the next batch is read and sent while the devices compute. How far
            # ahead is bounded, and with it the memory of waiting batches.
            watchdog.beat("waiting for a batch", step)
            batch = next(batches)
            state, metrics = train_step(step, state, put_batch(batch, run.mesh))
            metrics["nonfinite"].copy_to_host_async()
            in_flight.append((step, metrics, batch))
            settle(_STEPS_IN_FLIGHT)
            checkpointer.check()
            is_last = step == run.total_steps
            if is_last or step % config.log_every_steps == 0:
                settle()
                shown = {name: value for name, value in jax.device_get(metrics).items() if name != "nonfinite"}
                rate = progress.update(step, shown)
                counts = {"num_skipped": num_skipped, "num_damaged": len(batches.damaged)}
                writer.write(step, _prefixed("train", shown | {"images_per_second": rate} | counts))
            if is_last:
                break  # evaluated and saved below, as is a run that has no step left to take
            wants_eval, wants_save = _is_due(step, config.eval_every_steps), _is_due(step, kept.every_steps)
            stops = is_told_to_stop(step)
            if wants_eval or wants_save or stops:
                settle()  # what is evaluated and saved is known to be finite
            evaluated = evaluate_now(step) if wants_eval else None
            if wants_save or stops or (evaluated and kept.keep_best):
                save(step, evaluated)
            if stops:
                watchdog.rest()
                checkpointer.wait()
                raise Stopped(f"stopped by SIGTERM after step {step} of {run.total_steps}, which is saved")

        evaluated = evaluate_now(run.total_steps)
        watchdog.rest()
        if checkpointer.latest_step() != run.total_steps:
            save(run.total_steps, evaluated)
        watchdog.beat("exporting", run.total_steps)
        export_params(workdir / EXPORT_FILE, state.eval_params, to_dict(config))
        watchdog.rest()
        checkpointer.wait()
        watchdog.beat("closing", run.total_steps)
    return {name: float(value) for name, value in (_prefixed("train", shown) | _prefixed("eval", evaluated)).items()}


@dataclasses.dataclass(frozen=True)
class _Run:
    """What a config comes to on this machine."""

    mesh: Mesh
    train_source: Source
    eval_source: Source
    model: nn.Module
    tx: optax.GradientTransformation
    schedule_fn: optax.Schedule
    total_steps: int
    init_fn: Callable[[jax.Array], TrainState]
    plan: TrainState


def _prepare(config: TrainConfig, workdir: Path) -> _Run:
    """Opens and checks everything, and prints what the run will cost."""
    mesh = make_mesh(config.mesh)
    check_batch_size(config.batch_size, mesh, config.accumulate_steps)
    sources = [open_source(config.data, split) for split in (config.data.train_split, config.data.eval_split)]
    for source in sources:
        if config.is_classifier and config.model.num_classes != (expected := source.num_classes):
            raise ValueError(
                f"model.num_classes={config.model.num_classes} must be {expected}, the classes of {source.name}"
            )
    image_shape = output_shape(sources[0], config.data)
    _check_memory(config.batch_size, image_shape)
    total_steps = config.num_steps(len(sources[0]))
    tx, schedule_fn = make_optimizer(config.optimizer, total_steps)
    model, ema = ViT(config.model), config.ema_decay is not None
    cost = estimate(
        config.model,
        image_shape,
        tx,
        batch_size=config.batch_size,
        num_devices=mesh.size,
        num_shards=config.mesh.fsdp,
        accumulate_steps=config.accumulate_steps,
        ema=ema,
        teacher=config.distill is not None,
    )
    if jax.process_index() == 0:
        cost.show()
    init_fn = functools.partial(init_state, model=model, image_shape=image_shape, tx=tx, ema=ema)
    plan = plan_state(init_fn, mesh, config.mesh.fsdp_min_size)
    if config.distill is not None or (config.init_from is not None and not has_checkpoint(workdir / CHECKPOINT_FOLDER)):
        # Read again when there is a state to put it into.
        read_fitting(plan.params, config.init_from, config.model, config.init_arch)
    return _Run(mesh, *sources, model, tx, schedule_fn, total_steps, init_fn, plan)


def _check_memory(batch_size: int, image_shape: tuple[int, ...]) -> None:
    """Refuses a batch whose pixels alone, a byte each, are more than this machine has memory for."""
    num_bytes = batch_size * math.prod(image_shape) // jax.process_count()
    if num_bytes > (memory := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")):
        raise ValueError(
            f"{batch_size=} of {image_shape} images takes {num_bytes:,} bytes on this machine, which has {memory:,}: "
            "take a smaller one"
        )


def _start(
    config: TrainConfig,
    run: _Run,
    checkpointer: Checkpointer,
    teacher: Teacher | None,
    allow_changed: Sequence[str],
) -> tuple[TrainState, int, int, str]:
    """The state to go on from, its step, the number of steps left out so far, and what to say of it.

    The newest sound checkpoint, a fine-tuning start, or new.
    """
    step = checkpointer.newest_sound_step()
    if step is not None:
        facts = run.total_steps, run.train_source.fingerprint, teacher.checksum if teacher else None
        changes = check_continues(config, *facts, checkpointer, step, run.plan, allow_changed)
        state, num_skipped = checkpointer.restore(run.plan, step), checkpointer.read_extra(step).get("num_skipped", 0)
        return state, step, num_skipped, f"going on from step {step} of {run.total_steps}{changes}"
    state = create_state(run.init_fn, run.plan, config.seed)
    if config.init_from is None:
        return state, 0, 0, ""
    state, kept = with_params_of(state, config.init_from, config.model, config.init_arch)
    exception = f"; {', '.join(kept)}: not there in this shape, left at initial values" if kept else ""
    return state, 0, 0, f"starting from the parameters of {config.init_from!r}{exception}"


def _train_batches(config: TrainConfig, source: Source, start_step: int):
    return train_batches(
        source,
        config.data,
        global_batch_size=config.batch_size,
        seed=config.seed,
        start_step=start_step,
        shard_index=jax.process_index(),
        num_shards=jax.process_count(),
    )


class _Profiler:
    """Traces a few steps once compilation and the first steps are over."""

    def __init__(self, folder: os.PathLike, start_step: int, enabled: bool):
        self._folder, self._running = folder, False
        self._first = start_step + _STEPS_BEFORE_PROFILE + 1 if enabled else None

    def before(self, step: int) -> None:
        if step == self._first:
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif self._running and step == self._first + _STEPS_PROFILED:
            self.stop()

    def stop(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False

    def __enter__(self) -> "_Profiler":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()


def _is_due(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def _prefixed(prefix: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{prefix}/{name}": value for name, value in metrics.items()}
