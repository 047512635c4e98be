"""The tensors of a checkpoint, taken one by one, so that everything that does not fit is told in one error."""

import fnmatch
from collections.abc import Mapping

import numpy as np


class Tensors:
    """Hands out tensors by name and remembers what was missing, misshapen or never asked for.

    Args:
      arrays: Names to arrays, as the file has them.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = arrays
        self._seen: set[str] = set()
        self._problems: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that must be there, without taking it."""
        if name not in self._arrays:
            raise ValueError(f"the checkpoint lacks {name!r}")
        return self._arrays[name].shape

    def names(self, pattern: str = "*") -> list[str]:
        """The names that match a shell pattern, in the order of the file."""
        return fnmatch.filter(self._arrays, pattern)

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor in float32; zeros of that shape if it is missing or misshapen, which `finish` then tells."""
        self._seen.add(name)
        if name not in self._arrays:
            self._problems.append(f"{name} {shape} is missing")
        elif self._arrays[name].shape != shape:
            self._problems.append(f"{name} is {self._arrays[name].shape}, not {shape}")
        else:
            return np.asarray(self._arrays[name], np.float32)
        return np.zeros(shape, np.float32)

    def ignore(self, *patterns: str) -> None:
        """Counts the names that match as asked for: buffers, heads of other tasks, optimizer state."""
        for pattern in patterns:
            self._seen.update(self.names(pattern))

    def finish(self, layout: str) -> None:
        """Ends a conversion.

        Raises:
          ValueError: Listing every tensor that is missing, misshapen or left over.
        """
        problems = self._problems + [f"{name} is not known here" for name in self._arrays if name not in self._seen]
        if problems:
            raise ValueError("\n  ".join([f"recognised as {layout}, but these tensors do not fit:", *problems]))
