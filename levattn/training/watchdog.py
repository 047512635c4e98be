"""A watch on a run that no longer gets on: the process says where all its threads stand, and ends.

What hangs cannot be asked to stop: a collective that waits for a process which is gone, a data worker that was stopped,
a disk that does not answer. A thread beside them looks for signs of life and ends the process when there are none. One
process that ends is enough, as the others lose their connection to it and end the same way.
"""

import faulthandler
import multiprocessing
import os
import re
import threading
import time
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn

import jax

EXIT_HUNG = os.EX_UNAVAILABLE
"""69, `EX_UNAVAILABLE` of sysexits.h: a step hung, or another process of the run was lost; the same command goes on
from the last checkpoint."""

_SHARE_WARNED = 0.1  # of the time allowed: JAX's heartbeat can end a process sooner, and the log then says where it was
_LOOKS = 40  # within the time allowed
_MAX_REPORT_S = 10.0
_STDERR = 2

# Of XLA, which raises ValueErrors, too. Not one that memory has run out, which is no fault of another process.
_XLA_STATUS = re.compile(r"(?!INVALID_ARGUMENT|RESOURCE_EXHAUSTED)[A-Z]+(_[A-Z]+)*: ")


class Watchdog:
    """Ends the process, by exit code `EXIT_HUNG`, when there has been no sign of life for too long.

    Before that it prints what the run was doing, in which step and since when, and the stacks of all threads, to
    stderr; after a tenth of the time a line says that it waits. Processes that were started to prepare data are ended,
    too. Use it as a context manager; nothing is watched before the first `beat`.

    Time in which the whole process was stopped (Ctrl-Z, a sleeping laptop) does not count. Not seen: a call that keeps
    the interpreter lock for ever, as no other thread can run then; those of XLA, NumPy and the file system give it up.

    Cost: a beat takes less than a microsecond and waits for nothing.

    Args:
      timeout_s: How long a run may go without a sign of life, in seconds; 0 turns the watch off.
    """

    def __init__(self, timeout_s: float):
        self._timeout_s = timeout_s
        self._process = f"process {jax.process_index()} of {jax.process_count()}"
        self._doing: tuple[str, int, float] | None = None
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def beat(self, doing: str, step: int) -> None:
        """A sign of life.

        Args:
          doing: What comes now, for the report.
          step: In which step, from 1.
        """
        self._doing = doing, step, time.time()  # a new object each time: how the thread tells one beat from the next

    def rest(self) -> None:
        """What comes now may take any time, as compilations and saves may. The next beat ends the rest."""
        self._doing = None

    def resting_at_first(self, function: Callable, doing: str) -> Callable:
        """A jitted function, with the step as an argument before its own, under watch but for its first call.

        That one compiles, and is waited for: other processes compile at their own pace, and it needs them all.

        Args:
          function: Jitted.
          doing: What it does, for the report.
        """
        is_first = True

        def call(step: int, *args):
            nonlocal is_first
            if not is_first:
                self.beat(doing, step)
                return function(*args)
            is_first = False
            self.rest()
            result = jax.block_until_ready(function(*args))
            self.beat(doing, step)
            return result

        return call

    def end_if_lost(
        self, error_type: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Ends the process at once if an error of XLA shows that another process of the run is gone.

        To be pushed onto an `ExitStack` after all else: an orderly end would wait for the process that is gone. In a
        run of one process it does nothing.
        """
        if error is None or jax.process_count() == 1:
            return
        if isinstance(error, jax.errors.JaxRuntimeError | ValueError) and _XLA_STATUS.match(str(error)):
            cause = "".join(traceback.format_exception(error))
            self._end(
                f"{cause}\nerror: {self._place()}: an error of XLA: another process of the run has probably died."
            )

    def __enter__(self) -> "Watchdog":
        if self._timeout_s > 0:
            self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._is_over.set()

    def _watch(self) -> None:
        interval = self._timeout_s / _LOOKS
        seen, waited, last, is_warned = None, 0.0, time.monotonic(), False
        while not self._is_over.wait(interval):
            now = time.monotonic()
            # This thread slept for longer than it asked for: so did the whole process.
            elapsed, last = min(now - last, 2 * interval), now
            doing = self._doing
            if doing is None or doing is not seen:
                seen, waited, is_warned = doing, 0.0, False
                continue
            waited += elapsed
            if waited > self._timeout_s:
                self._end(
                    f"error: {self._place()}: no sign of life for hang_timeout={self._timeout_s:g} s. Where that may "
                    "take so long, set a larger --config.hang_timeout, or 0 for no limit."
                )
            if waited > _SHARE_WARNED * self._timeout_s and not is_warned:
                is_warned = True
                # In a thread of its own, as what takes no output may be what the run is waiting for.
                self._say(f"{self._place()}: no sign of life for {waited:.3g} s of hang_timeout={self._timeout_s:g}\n")

    def _place(self) -> str:
        if (doing := self._doing) is None:
            return self._process
        what, step, since = doing
        return f"{self._process}, step {step}, {what} since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(since))}"

    def _end(self, message: str) -> NoReturn:
        how_to_go_on = "The same command goes on from the last checkpoint, with another number of processes, too."
        self._say(f"{message}\n{how_to_go_on} The stacks of all threads:\n", with_stacks=True).join(_MAX_REPORT_S)
        for child in multiprocessing.active_children():
            child.kill()  # one that was stopped would never end
        os._exit(EXIT_HUNG)

    def _say(self, message: str, with_stacks: bool = False) -> threading.Thread:
        def write() -> None:
            os.write(_STDERR, f"\n{message}".encode())
            if with_stacks:
                faulthandler.dump_traceback(_STDERR, all_threads=True)

        writer = threading.Thread(target=write, name="watchdog-report", daemon=True)
        writer.start()
        return writer
