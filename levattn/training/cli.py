"""The edge between a person at a terminal and the library: what they got wrong is one message, not a traceback."""

import ast
import inspect
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging

_PACKAGE = Path(__file__).parents[1]


def run(main: Callable[..., None]) -> NoReturn:
    """Parses flags and runs `main` with what is left of the command line; exits with 2 and a message if the user's
    input is at fault.

    At fault are flags and config files that cannot be read, files that are missing, and whatever this package itself
    refuses by a ValueError. An error from within another library keeps its traceback.
    """

    def guarded(argv: Sequence[str]) -> None:
        try:
            inspect.signature(main).bind(*argv[1:])
        except TypeError:
            _refuse(f"these arguments cannot be used: {' '.join(argv[1:])}; write flags as --name=value")
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # libraries talk a lot at INFO
        try:
            main(*argv[1:])
        except (OSError, ValueError) as error:
            if isinstance(error, ValueError) and not _raised_by_this_package(error):
                raise
            _refuse(str(error))

    app.run(guarded, flags_parser=_parse_flags)


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
        _refuse(cause)
    except (AttributeError, KeyError) as error:
        _refuse(f"the config file has no such section: {error.args[0]}")


def _raised_by_this_package(error: ValueError) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return Path(frames[-1].filename).is_relative_to(_PACKAGE)


def _refuse(message: str) -> NoReturn:
    print(f"error: {message.strip()}", file=sys.stderr)
    sys.exit(2)
