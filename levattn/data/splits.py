"""Split names with slices, in the syntax of TFDS: `train`, `train[:90%]`, `test[-500:]`, `train[100:200]`."""

import re
from dataclasses import dataclass

_SPLIT = re.compile(r"(?P<name>\w+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?")


@dataclass(frozen=True)
class Split:
    """One named split and the part of it that is used."""

    name: str
    start: str | None = None
    stop: str | None = None

    def slice(self, num_examples: int) -> slice:
        """The part as positions among `num_examples`; percents are rounded to the nearest example."""
        start = 0 if self.start is None else _boundary(self.start, num_examples)
        stop = num_examples if self.stop is None else _boundary(self.stop, num_examples)
        if start >= stop:
            raise ValueError(f"split {self} of {num_examples} examples is empty; widen the slice")
        return slice(start, stop)

    def __str__(self) -> str:
        whole = self.start is None and self.stop is None
        return self.name if whole else f"{self.name}[{self.start or ''}:{self.stop or ''}]"


def parse_split(text: str, *, field: str = "split") -> Split:
    """Reads a split name with an optional slice.

    Raises:
      ValueError: naming `field`, when `text` is not of that form.
    """
    match = _SPLIT.fullmatch(text)
    if not match:
        raise ValueError(f"{field}={text!r} must be a name, or a name and one slice such as 'train[:90%]'")
    return Split(match["name"], match["start"], match["stop"])


def _boundary(text: str, num_examples: int) -> int:
    if text.endswith("%"):
        position = round(int(text[:-1]) * num_examples / 100)
    else:
        position = int(text)
    if position < 0:
        position += num_examples
    return min(max(position, 0), num_examples)
