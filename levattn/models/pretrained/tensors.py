"""The tensors of a checkpoint, taken one by one, so that everything that does not fit is told in one error."""

import fnmatch
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict


class Tensors:
    """Hands out tensors by name and remembers what was missing, misshapen, not finite or never asked for.

    Args:
      arrays: Names to arrays, as the file has them.

    Attributes:
      guessed: What `guess` was told, in order.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray]):
        self._arrays = arrays
        self._seen: set[str] = set()
        self._problems: list[str] = []
        self._num_elements = sum(array.size for array in arrays.values())
        self.guessed: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor that must be there, without taking it."""
        if name not in self._arrays:
            raise ValueError(f"the checkpoint lacks {name!r}")
        shape = self._arrays[name].shape
        if 0 in shape:  # its other sides are no more than numbers in a header
            raise ValueError(f"{name!r} {shape} is empty")
        return shape

    def names(self, pattern: str = "*") -> list[str]:
        """The names that match a shell pattern, in the order of the file."""
        return fnmatch.filter(self._arrays, pattern)

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor in float32; zeros of that shape if it is missing or misshapen, which `finish` then tells.

        Raises:
          ValueError: The whole file has fewer numbers than this one tensor is to have.
        """
        self._seen.add(name)
        if math.prod(shape) > self._num_elements:
            raise ValueError(f"{name} is to be {shape}, more than the {self._num_elements:,} numbers in the file")
        if name not in self._arrays:
            self._problems.append(f"{name} {shape} is missing")
        elif self._arrays[name].shape != shape:
            self._problems.append(f"{name} is {self._arrays[name].shape}, not {shape}")
        else:
            if problem := find_nonfinite(self._arrays[name]):
                self._problems.append(f"{name} {problem}")
            return to_float32(self._arrays[name])
        return np.zeros(shape, np.float32)

    def ignore(self, *patterns: str) -> None:
        """Counts the names that match as asked for: buffers, heads of other tasks, optimizer state."""
        for pattern in patterns:
            self._seen.update(self.names(pattern))

    def guess(self, *what: str) -> None:
        """Remembers what neither a tensor, nor a config, nor the name of a published model tells."""
        self.guessed += what

    def finish(self, layout: str) -> None:
        """Ends a conversion.

        Raises:
          ValueError: Listing every tensor that is missing, misshapen, not finite or left over.
        """
        problems = self._problems + [f"{name} is not known here" for name in self._arrays if name not in self._seen]
        if problems:
            raise ValueError("\n  ".join([f"recognised as {layout}, but these tensors do not fit:", *problems]))


def to_float32(array: np.ndarray) -> np.ndarray:
    """The same numbers; infinite where they are past float32."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(array, np.float32)


def find_nonfinite(array: np.ndarray) -> str:
    """What to say of an array with numbers that are NaN or infinite in float32; "" of any other. Costs one pass."""
    if array.dtype.kind in "biu":
        return ""
    num = array.size - np.count_nonzero(np.isfinite(to_float32(array)))
    return f"{array.shape} is NaN or infinite in {num:,} places" if num else ""


def refuse_nonfinite(arrays: Mapping[str, np.ndarray], what: str) -> None:
    """Raises a ValueError that begins with `what` and names every array with numbers that are not finite."""
    problems = [f"{name} {problem}" for name, array in arrays.items() if (problem := find_nonfinite(array))]
    if problems:
        raise ValueError("\n  ".join([f"{what} holds numbers that no training ends in:", *problems]))


def nest(arrays: Mapping[str, np.ndarray], what: str) -> dict[str, Any]:
    """Nested dicts of arrays whose names are paths joined by "/".

    Raises:
      ValueError: It begins with `what`: one name is the beginning of another.
    """
    for name in arrays:
        parts = name.split("/")
        for i in range(1, len(parts)):
            if (start := "/".join(parts[:i])) in arrays:
                raise ValueError(f"{what} has {start!r} and {name!r}: a tensor cannot be a folder, too")
    return unflatten_dict(arrays, sep="/")
