"""Numbers of a run: to files (one JSON object a line in `metrics.jsonl`, and TensorBoard) and to the terminal."""

import contextlib
import io
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress

from levattn.training.workdir import atomic_path

METRICS_FILE = "metrics.jsonl"

_FLUSH_S = 30


class MetricWriter:
    """Writes metrics from process 0; on the others it does nothing.

    A run that goes on from a checkpoint repeats the steps after it: their old lines are dropped, so that the file has
    each step once. A sink that fails (disk full, no TensorBoard) warns once, and training goes on; TensorBoard is not
    tried again then, `metrics.jsonl` is with every line.

    Args:
      workdir: Folder of the run, which exists.
      start_step: The step the run goes on from; 0 starts the file anew.
      tensorboard: Whether to write event files, too, under `workdir/tensorboard`.
    """

    def __init__(self, workdir: str | os.PathLike, start_step: int = 0, tensorboard: bool = True):
        self._sinks: dict[str, Callable[[int, dict[str, float]], None]] = {}
        self._failed: set[str] = set()
        self._tensorboard = None
        if jax.process_index() != 0:
            return
        self._path = Path(workdir) / METRICS_FILE
        with self._guard(METRICS_FILE):
            _drop_after(self._path, start_step)
        self._sinks[METRICS_FILE] = self._write_line
        if tensorboard:
            with self._guard("TensorBoard"):
                self._tensorboard = _EventFile(Path(workdir) / "tensorboard", purge_step=start_step + 1)
                self._sinks["TensorBoard"] = self._tensorboard.write

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records numbers of a step. What is not finite is null in the file, as JSON has no NaN.

        Args:
          step: Steps taken so far.
          metrics: Names to scalars: Python, NumPy or JAX.
        """
        if not self._sinks:
            return
        values = {name: np.asarray(value).item() for name, value in metrics.items()}
        for name, sink in list(self._sinks.items()):
            with self._guard(name):
                sink(step, values)
        if "TensorBoard" in self._failed:  # a torn event is the last that its readers see
            self._sinks.pop("TensorBoard", None)

    def close(self) -> None:
        """Flushes and closes TensorBoard's file."""
        if "TensorBoard" in self._sinks:
            with self._guard("TensorBoard"):
                self._tensorboard.close()

    def _write_line(self, step: int, values: dict[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        line = json.dumps({"step": step, "time": round(time.time(), 3), **finite}, allow_nan=False)
        with self._path.open("a") as file:  # opened anew each time: survives a disk that comes and goes
            file.write(line + "\n")

    @contextlib.contextmanager
    def _guard(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                warnings.warn(
                    f"metrics could not be written to {name} ({error!r:.300}); training goes on, and this is said once",
                    RuntimeWarning,
                    stacklevel=4,
                )


class _EventFile:
    """TensorBoard's file, written here and now: tensorboardX's own `SummaryWriter` queues events for a thread, and
    waits for ever once a full disk has ended that thread."""

    def __init__(self, folder: Path, purge_step: int):
        from tensorboardX import summary  # half a second to import
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._summary, self._event, self._last_flush = summary, Event, time.monotonic()
        self._writer = EventsWriter(str(folder / "events"))
        # Readers drop what an earlier file says of steps from here on.
        start = Event(wall_time=time.time(), step=purge_step, session_log=SessionLog(status=SessionLog.START))
        self._writer.write_event(start)
        self._writer.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            scalar = self._summary.scalar(name, value)
            self._writer.write_event(self._event(wall_time=time.time(), step=step, summary=scalar))
        if time.monotonic() - self._last_flush > _FLUSH_S:
            self._last_flush = time.monotonic()
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def _drop_after(path: Path, start_step: int) -> None:
    """Leaves the lines up to a step, and none at step 0. What cannot be read goes, too, which is said of all but a last
    line torn by a crash."""
    if not path.exists():
        return
    *lines, torn = path.read_bytes().split(b"\n") if start_step > 0 else [b""]
    kept, num_damaged = [], -1 if torn else 0
    for line in [*lines, torn] if torn else lines:
        try:
            if json.loads(line.decode())["step"] <= start_step:
                kept.append(line + b"\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            num_damaged += 1
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"".join(kept))
    if num_damaged > 0:
        warnings.warn(
            f"{num_damaged} damaged lines of {str(path)!r} were dropped; training goes on",
            RuntimeWarning,
            stacklevel=4,
        )


class Progress:
    """How far a run is: a bar on a terminal, elsewhere plain lines such as

        step 100/1000  loss 1.234  acc 0.91  1234 images/s  ETA 1:23

    Both go to stderr, so that results on stdout can be piped. Process 0 alone shows anything. Use it as a context
    manager.

    Args:
      total_steps: Length of the run.
      batch_size: Images a step, over all devices.
      start_step: Where the run goes on from.
      stream: In place of stderr.
    """

    def __init__(self, total_steps: int, batch_size: int, start_step: int = 0, stream: io.TextIOBase | None = None):
        self._total_steps, self._batch_size, self._last_step = total_steps, batch_size, start_step
        self._stream = sys.stderr if stream is None else stream
        self._shown = jax.process_index() == 0
        self._last_time = time.perf_counter()
        self._bar = None
        if self._shown and self._stream.isatty():
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("step"),
                rich.progress.MofNCompleteColumn(),
                rich.progress.BarColumn(bar_width=None),
                rich.progress.TextColumn("{task.fields[status]}"),
                console=rich.console.Console(file=self._stream),
                refresh_per_second=4,
                expand=True,
            )
            self._task = self._bar.add_task("train", total=total_steps, completed=start_step, status="compiling")

    def update(self, step: int, metrics: Mapping[str, Any]) -> float:
        """Shows the loss, the accuracy and the speed since the last update.

        Args:
          step: Steps taken so far.
          metrics: Of which "loss" and "accuracy" are shown where present.

        Returns:
          Images a second since the last update. The first includes compilation.
        """
        now = time.perf_counter()
        steps_per_second = (step - self._last_step) / max(now - self._last_time, 1e-9)
        self._last_step, self._last_time = step, now
        rate = steps_per_second * self._batch_size
        parts = [f"{label} {float(metrics[name]):.4g}" for name, label in _SHOWN.items() if name in metrics]
        parts.append(f"{rate:.0f} images/s" if rate >= 100 else f"{rate:.3g} images/s")
        if steps_per_second > 0:
            parts.append(f"ETA {_clock((self._total_steps - step) / steps_per_second)}")
        status = "  ".join(parts)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, status=status)
        else:
            self.log(f"step {step}/{self._total_steps}  {status}")
        return rate

    def log(self, message: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)
        elif self._shown:
            print(message, file=self._stream, flush=True)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time spent inside, on an evaluation say, out of images a second."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._last_time += time.perf_counter() - start

    def __enter__(self) -> "Progress":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar.stop()


_SHOWN = {"loss": "loss", "accuracy": "acc"}


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
