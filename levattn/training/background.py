"""A call in a thread of its own, whose error is kept for those who ask."""

import threading
from collections.abc import Callable


class Background:
    """Calls a function in a thread, from now on.

    Args:
      name: Of the thread, as it stands in stack dumps.
      call: What to call; an `Exception` that it raises is kept.
    """

    def __init__(self, name: str, call: Callable[[], None]):
        self._call, self._error = call, None
        self._thread = threading.Thread(target=self._run, name=name)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._call()
        except Exception as error:
            self._error = error

    def has_failed(self) -> bool:
        """Whether the call has raised so far; does not wait."""
        return self._error is not None

    def join(self) -> Exception | None:
        """Waits for the end of the call, and returns what it raised."""
        self._thread.join()
        return self._error
