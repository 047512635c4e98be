"""The edge between a person at a terminal and the library: what they got wrong is one message, not a traceback."""

import ast
import contextlib
import inspect
import logging as pylogging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging

from levattn.training.config import EvalConfig, TrainConfig, no_such_field
from levattn.training.nonfinite import NonFiniteError
from levattn.training.signals import EXIT_STOPPED, Stopped

_PACKAGE = Path(__file__).parents[1]
_PARTING_S = 30.0

EXIT_INTERRUPTED = 128 + signal.SIGINT
"""130, as shells have it."""


def run(main: Callable[..., None]) -> NoReturn:
    """Parses flags and runs `main` with what is left of the command line. Exits with

    0: done.
    1: a run that cannot go on, with a message (`NonFiniteError`), or an error within a library, with its traceback.
    2: a message, as the user's input is at fault: flags and config files that cannot be read, files that are missing,
       whatever this package itself refuses by a ValueError; or the disk is (full, read-only, a checkpoint damaged).
    69: a step hung, or another process of the run was lost (`levattn.training.watchdog.EXIT_HUNG`).
    75: stopped by SIGTERM after a save (`EXIT_STOPPED`); the same command goes on.
    130: ended by Ctrl-C, with nothing saved beyond the last checkpoint (`EXIT_INTERRUPTED`).
    134: ended by SIGABRT, with the stacks of all threads: JAX has not heard of another process for 100 s.

    Of several processes one that ends with an error waits for the others to end, too, but no more than 30 s.
    """

    def guarded(argv: Sequence[str]) -> None:
        try:
            inspect.signature(main).bind(*argv[1:])
        except TypeError:
            _refuse(f"these arguments cannot be used: {' '.join(argv[1:])}; write flags as --name=value")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # libraries talk a lot at INFO
        logging.get_absl_logger().addFilter(_is_news)
        warnings.showwarning = _show_warning
        with _waiting_for_others_no_longer_than(_PARTING_S):
            try:
                main(*argv[1:])
            except Stopped as stopped:
                print(f"{stopped}; the same command goes on from there", file=sys.stderr)
                sys.exit(EXIT_STOPPED)
            except KeyboardInterrupt:
                print(
                    "interrupted; the same command begins again, a training run at its last checkpoint", file=sys.stderr
                )
                sys.exit(EXIT_INTERRUPTED)
            except NonFiniteError as error:
                print(f"error: {error}", file=sys.stderr)
                sys.exit(1)
            except (OSError, ValueError) as error:
                if isinstance(error, ValueError) and not _raised_by_this_package(error):
                    raise
                _refuse(str(error))

    app.run(guarded, flags_parser=_parse_flags)


@contextlib.contextmanager
def _waiting_for_others_no_longer_than(seconds: float) -> Iterator[None]:
    """Lets an error end one of several processes though the others, who may wait for it, do not end."""
    try:
        yield
    except BaseException as error:
        if jax.distributed.is_initialized():
            code = error.code if isinstance(error, SystemExit) else 1
            timer = threading.Timer(seconds, os._exit, [code])
            timer.daemon = True
            timer.start()
        raise


def read_literal(text: str) -> Any:
    """The value of a Python literal, and any other text as it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _parse_flags(argv: Sequence[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except (flags.Error, OSError, ValueError) as error:
        # The parser of config files hands on the traceback of the file as text; its last part says what is wrong.
        _, _, cause = str(error).rpartition("\nValueError: ")
        _refuse(cause if isinstance(error, OSError) else _unknown_override(argv) or cause)
    except (AttributeError, KeyError, TypeError) as error:  # of an override of what is not there
        _refuse(_unknown_override(argv) or _describe_unset(error, _overrides(argv)))
    except SyntaxError as error:
        _refuse(f"the config file is no Python: {error}")


def _overrides(argv: Sequence[str]) -> list[str]:
    """The names of fields that are set on the command line."""
    return [match[1] for text in argv if (match := re.match(r"--?config\.([^=]*)", text))]


def _unknown_override(argv: Sequence[str]) -> str | None:
    """What to say of the first of them that neither training nor evaluation knows."""
    found = (no_such_field(name, (TrainConfig, EvalConfig)) for name in _overrides(argv))
    return next(filter(None, found), None)


def _describe_unset(error: Exception, names: list[str]) -> str:
    """What to say of fields that are there and could not be set."""
    section = str(error).strip("\"'")
    below = [name for name in names if section in name.split(".")[:-1]]
    if below:
        return (
            f"{', '.join(below)}: no flag can set that, as the config file has no section {section!r}: write "
            f"{section}={{}} there"
        )
    return f"{', '.join(names)}: no flag can set that ({error})"


def _is_news(record: pylogging.LogRecord) -> bool:
    # Orbax logs what a thread of it fails with, once for each layer, and raises it, too.
    return "_SignalingThread.run() raised an exception" not in record.getMessage()


def _show_warning(message: Warning | str, category: type[Warning], *place: object) -> None:
    print(f"warning: {message}" if category is RuntimeWarning else f"{category.__name__}: {message}", file=sys.stderr)


def _raised_by_this_package(error: ValueError) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).is_relative_to(_PACKAGE)


def _refuse(message: str) -> NoReturn:
    print(f"error: {message.strip()}", file=sys.stderr)
    sys.exit(2)
