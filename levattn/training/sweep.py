"""Many trainings, each with an evaluation, as jobs that a script lists, prices and runs."""

import argparse
import dataclasses
import fnmatch
import functools
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import rich.box
import rich.console
import rich.table

from levattn.attention.select import num_kept
from levattn.data import DataConfig, open_source, output_shape
from levattn.models import attention_specs
from levattn.models.cost import num_tokens
from levattn.training.cli import read_literal
from levattn.training.config import TrainConfig, from_config_dict
from levattn.training.jobs import WORKDIR, Job, is_done, run_jobs, state, with_needs
from levattn.training.optim import make_optimizer
from levattn.training.run_time import RunTime, estimate_run_time, measured_runs
from levattn.training.signals import EXIT_STOPPED, Stopped
from levattn.training.workdir import prepare_workdir

ROOT = Path(__file__).parents[2]

# Where the data are not on this machine: images to train on and to evaluate on.
_KNOWN_SIZES = {"tfds:imagenet2012": ((224, 224, 3), 1_281_167, 50_000)}
# Of a process until it computes, and of the program of one attention: a minute and ten seconds on the host of an H100.
_START_S, _COMPILE_S = 60, 10
# A forward pass is a third of the work of a train step.
_FORWARD_SPEEDUP = 3


@dataclasses.dataclass(frozen=True)
class Run:
    """A training and the evaluation of what it made.

    Attributes:
      name: Its folder: "S-2/leverage_32/seed0".
      config: As for `train.py --config`, from the repository's root: "configs/fashion_mnist.py:attention=leverage".
      settings: Fields to set on top: "total_epochs=2.0" stands for `--config.total_epochs=2.0`.
      evaluation: Arguments of `eval.py`; none for the attention that the model was trained with.
    """

    name: str
    config: str
    settings: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ()

    @property
    def jobs(self) -> tuple[Job, Job]:
        """The training, and the evaluation that needs it."""
        settings = (f"--config.{setting}" for setting in self.settings)
        folder = f"{WORKDIR}/{self.name}"
        training = Job(f"{self.name}/train", ("train.py", f"--config={self.config}", *settings, f"--workdir={folder}"))
        command = ("eval.py", f"--checkpoint={folder}", *self.evaluation)
        return training, Job(f"{self.name}/eval", command, needs=(training.name,))

    @property
    def num_attentions(self) -> int:
        """How many attentions the evaluation runs."""
        lists = [text.partition("=")[2].split(",") for text in self.evaluation if text.startswith("--attention=")]
        return sum(map(len, lists)) or 1

    def build(self) -> TrainConfig:
        """The config as `train.py` will read it.

        Raises:
          ValueError: It is not one that can be trained; the message names the field.
        """
        path, _, argument = self.config.partition(":")
        config = load_config_file(path).get_config(argument or None)
        for setting in self.settings:
            name, _, text = setting.partition("=")
            *sections, field = name.split(".")
            section = config
            try:
                for part in sections:
                    section = section[part]
                section[field] = read_literal(text)
            except (AttributeError, KeyError, TypeError) as error:
                raise ValueError(f"--set {setting} cannot be set: {error}") from error
        return from_config_dict(TrainConfig, config)


@dataclasses.dataclass(frozen=True)
class Price:
    """What a run works on, and how long it is expected to take.

    Attributes:
      tokens: Of an image.
      seconds: Of its two jobs, on one device. None: nothing was ever measured.
      time: Of the training.
    """

    tokens: int
    seconds: tuple[float, float] | None
    time: RunTime | None


@functools.cache
def load_config_file(path: str) -> types.ModuleType:
    """A config file as a module.

    Args:
      path: From the repository's root, such as "configs/ablations.py".
    """
    if str(ROOT) not in sys.path:  # config files import each other from there
        sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def add_arguments(parser: argparse.ArgumentParser, workdir: str, seeds: str) -> None:
    """The flags that `run_sweep` reads."""
    parser.add_argument("--workdir", type=Path, default=Path(workdir), help=f"folder of the runs; default: {workdir}")
    parser.add_argument("--seeds", default=seeds, help=f"default: {seeds}")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        dest="settings",
        help="a field of every training's config, such as batch_size=512; may be repeated",
    )
    parser.add_argument(
        "--only", default="*", help="patterns of job names, such as 'S-2/*' or 'seed0'; comma-separated"
    )
    parser.add_argument("--list", action="store_true", help="show the jobs and how far they are, and stop")
    parser.add_argument("--dry_run", action="store_true", help="show what is left and its device hours, and stop")
    parser.add_argument("--minutes", type=float, help="save and stop after so long; the same command goes on")
    parser.add_argument("--retries", type=int, default=2, help="of a job whose process is killed or hangs; default: 2")


def parse_seeds(text: str) -> list[int]:
    """Seeds such as "0,1,2".

    Raises:
      ValueError: For anything else, or a seed that is there twice.
    """
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts) or len({*map(int, parts)}) < len(parts):
        raise ValueError(f"seeds={text!r} must be different whole numbers, such as 0,1,2")
    return [*map(int, parts)]


def run_sweep(args: argparse.Namespace, runs: Sequence[Run], write: Callable[[], None]) -> int:
    """Lists, prices or runs the jobs of some runs, as the flags of `add_arguments` say.

    Args:
      args: With those flags.
      runs: All of the sweep.
      write: Called before the first job and after each: writes what there is so far.

    Returns:
      An exit code: 0, 1 (a job failed), or that of `Stopped`: the same command goes on.

    Raises:
      ValueError: A run that cannot be trained, a pattern that fits no job.
      OSError: Data that are missing (unless only the price is asked for), a folder that cannot be written.
    """
    jax.config.update("jax_platforms", "cpu")  # of this process alone: the devices belong to the jobs
    jobs = [job for run in runs for job in run.jobs]
    patterns = [f"*{pattern.strip()}*" for pattern in args.only.split(",")]
    wanted = with_needs(jobs, lambda job: any(fnmatch.fnmatchcase(job.name, pattern) for pattern in patterns))
    if not wanted:
        raise ValueError(f"only={args.only!r} fits none of the {len(jobs)} jobs: --list shows their names")
    workdir = prepare_workdir(args.workdir, dry_run=args.list or args.dry_run)
    prices = price(runs, workdir, needs_data=not (args.list or args.dry_run))
    seconds = {}
    for run in runs:
        for position, job in enumerate(run.jobs):
            found = prices[run.name].seconds
            seconds[job.name] = None if found is None else found[position]
    if args.list:
        _show_jobs(wanted, jobs, workdir, seconds)
        return 0
    if not all(is_done(job, workdir) for job in wanted):
        _show_price(runs, wanted, workdir, prices, seconds)
    if args.dry_run:
        return 0
    write()
    # Each process compiles what an earlier one has: they differ in the seed alone.
    cache = {} if "JAX_COMPILATION_CACHE_DIR" in os.environ else {"JAX_COMPILATION_CACHE_DIR": str(workdir / ".jax")}
    options = {"retries": args.retries, "minutes": args.minutes, "environment": cache}
    try:
        failed = run_jobs(wanted, workdir, root=ROOT, after_job=lambda job: write(), **options)
    except Stopped as stopped:
        print(f"{stopped}; the same command goes on from there", file=sys.stderr)
        return EXIT_STOPPED
    for job in failed:
        print(f"not done: {job.name}", file=sys.stderr)
    return 1 if failed else 0


def price(runs: Sequence[Run], workdir: Path, *, needs_data: bool) -> dict[str, Price]:
    """What each run will cost, from the runs measured in its own folder, or else those committed to `results`.

    Args:
      runs: All of them.
      workdir: Of the sweep.
      needs_data: As for `check`.

    Raises:
      ValueError: See `check`.
      OSError: Likewise.
    """
    measured = measured_runs([workdir]) or measured_runs([ROOT / "results"])
    found = {}
    for run in runs:
        config, shape, num_train, num_eval = check(run, needs_data=needs_data)
        time = estimate_run_time(config, shape, config.num_steps(num_train) * config.batch_size, measured)
        seconds = None
        if time is not None:
            forward = num_eval / (_FORWARD_SPEEDUP * time.images_per_second) + _COMPILE_S
            seconds = time.seconds + _START_S, _START_S + run.num_attentions * forward
        found[run.name] = Price(num_tokens(config.model, shape), seconds, time)
    return found


@functools.cache
def check(run: Run, *, needs_data: bool) -> tuple[TrainConfig, tuple[int, int, int], int, int]:
    """Builds the config of a run and holds it against the data, so that it does not fail hours later.

    Args:
      run: The run.
      needs_data: Refuse to go on without the data; otherwise their number is taken from what is known of ImageNet.

    Returns:
      The config, the shape of an image, and the number of images to train on and to evaluate on.

    Raises:
      ValueError: A run that cannot be trained.
      OSError: Data that are missing.
    """
    try:
        config = run.build()
        shape, num_train, num_eval = _data_of(config.data, needs_data)
        make_optimizer(config.optimizer, config.num_steps(num_train))
        tokens, dims = num_tokens(config.model, shape), config.model.dims
        for spec in attention_specs(config.model):
            if spec.method != "dense":
                num_kept(spec, tokens, dims.width // dims.num_heads)
    except ValueError as error:
        raise ValueError(f"{run.name}: {error}") from error
    return config, shape, num_train, num_eval


@functools.cache
def _data_of(data: DataConfig, needs_data: bool) -> tuple[tuple[int, int, int], int, int]:
    try:
        sources = [open_source(data, split) for split in (data.train_split, data.eval_split)]
    except OSError:
        if needs_data or data.source not in _KNOWN_SIZES:
            raise
        return _KNOWN_SIZES[data.source]
    return tuple(output_shape(sources[0], data)), *map(len, sources)


def _table(title: str) -> rich.table.Table:
    return rich.table.Table(title=title, title_justify="left", title_style="dim", box=rich.box.SIMPLE_HEAD)


def _print(table: rich.table.Table) -> None:
    console = rich.console.Console(highlight=False)
    (console if console.is_terminal else rich.console.Console(highlight=False, width=160)).print(table)


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def _show_jobs(wanted, jobs, workdir, seconds) -> None:
    table = _table(str(workdir))
    for heading in ("job", "state"):
        table.add_column(heading)
    table.add_column("device time, about", justify="right")
    for job in wanted:
        table.add_row(job.name, state(job, jobs, workdir), _clock(seconds[job.name]))
    _print(table)


def _show_price(runs, wanted, workdir, prices, seconds) -> None:
    """What is left, a line for the runs that differ by their last part, the seed, alone."""
    names = {job.name for job in wanted if not is_done(job, workdir)}
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if any(job.name in names for job in run.jobs):
            groups.setdefault(run.name.rpartition("/")[0], []).append(run)
    table = _table("left to do")
    for heading in ("runs", "tokens", "seeds", "images/s", "device time"):
        table.add_column(heading, justify="left" if heading == "runs" else "right")
    total, is_scaled, devices = 0.0, False, set()
    for name, group in groups.items():
        left = [seconds[job.name] for run in group for job in run.jobs if job.name in names]
        found = prices[group[0].name]
        of_group = None if None in left else sum(left)
        total += of_group or 0
        rate = "?"
        if found.time is not None:
            rate = f"{found.time.images_per_second:,.0f}{'' if found.time.is_measured else ' *'}"
            is_scaled |= not found.time.is_measured
            devices.add(found.time.device)
        table.add_row(name, str(found.tokens), str(len(group)), rate, _clock(of_group))
    _print(table)
    on = f" of {' or '.join(sorted(devices))}" if devices else ""
    print(f"{len(names)} of {len(wanted)} jobs left, about {total / 3600:.1f} device hours{on}")
    if is_scaled:
        print("* not measured: scaled by operations from the run that is most like it; off by a factor of two, often")
    sys.stdout.flush()
