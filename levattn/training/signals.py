"""A polite end: a run that is told to stop saves first, and says by its exit code that it can go on."""

import os
import signal
from collections.abc import Callable
from types import FrameType

import jax
from jax.experimental import multihost_utils

EXIT_STOPPED = os.EX_TEMPFAIL
"""75, `EX_TEMPFAIL` of sysexits.h ("try again later"): stopped by SIGTERM after a save; the same command goes on.

Not 143 (128 + SIGTERM), which is what a process shows that SIGTERM has killed, with nothing saved: a scheduler can
tell the two apart, as with `RestartForceExitStatus=75` of systemd.
"""


class Stopped(Exception):
    """A run ended early because it was told to, with everything saved."""


class StopSignal:
    """Notes a SIGTERM, to be asked after each step. A second one ends the process at once, as it does anywhere else.

    In a run of several processes those who ask agree on a step, though the signal reaches them at different times or
    one of them only. To be used as a context manager, in the main thread; elsewhere it hears nothing.
    """

    def __init__(self) -> None:
        self._received = False
        self._previous: Callable | int | None = None

    def __call__(self, step: int) -> bool:
        """Whether to stop after this step, which every process asks for every step."""
        if jax.process_count() > 1:
            # JAX's own handler is installed by `jax.distributed.initialize`; this agrees on a step some way ahead.
            self._received = self._received or multihost_utils.reached_preemption_sync_point(step)
            if self._received:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
        return self._received

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._received = True
        # The system's own handling, as Python's would wait for a compilation or a save to come to an end.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def __enter__(self) -> "StopSignal":
        if jax.process_count() == 1:
            try:
                self._previous = signal.signal(signal.SIGTERM, self._note)
            except ValueError:  # not the main thread
                self._previous = None
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
