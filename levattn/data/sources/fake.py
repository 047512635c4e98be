"""Made-up images for smoke runs: a coarse colour pattern for each class under noise, so that a model can learn them."""

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from levattn.data.errors import unknown_name
from levattn.data.sources.base import Example, Source
from levattn.data.splits import Split

_DEFAULTS = {"num_classes": 10, "size": 32, "examples": 256, "channels": 3}
_CELLS = 8  # Patterns are 8x8 cells.


@dataclass(frozen=True, repr=False, eq=False)
class FakeSource(Source):
    """Images computed when they are asked for, from the position alone."""

    positions: range
    patterns: np.ndarray
    size: int

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Example:
        position = self.positions[index]
        label = position % self.num_classes
        rng = np.random.default_rng((self.split.name == "test", position))
        noise = rng.integers(-64, 65, size=self.patterns.shape[1:])
        cells = np.clip(self.patterns[label] + noise, 0, 255).astype(np.uint8)
        image = cv2.resize(cells, (self.size, self.size), interpolation=cv2.INTER_NEAREST)
        return {"image": image.reshape(self.image_shape), "label": label}

    def describe(self, index: int) -> str:
        return f"{self.name} {self.split} example {index}"

    def _facts(self) -> Iterator[bytes]:
        yield repr((self.name, self.split.name, self.positions)).encode()

    @property
    def in_memory(self) -> bool:
        return True


def open_fake(argument: str, split: Split) -> FakeSource:
    """Opens `fake:num_classes=10,size=32,examples=256,channels=3`; each option may be left out.

    The splits "train" and "test" have `examples` images each, of the same classes under other noise.
    """
    if split.name not in ("train", "test"):
        raise unknown_name("split", split.name, ("train", "test"))
    options = _DEFAULTS | {}
    for assignment in filter(None, argument.split(",")):
        key, _, value = assignment.partition("=")
        if key not in options:
            raise unknown_name("source: fake option", key, options)
        if not value.isdecimal() or int(value) < 1:
            raise ValueError(f"source: fake option {key}={value!r} must be a positive whole number")
        options[key] = int(value)
    num_classes, size, examples, channels = options.values()
    if channels not in (1, 3):
        raise ValueError(f"source: fake option {channels=} must be 1 or 3")
    patterns = np.random.default_rng(0).integers(0, 256, size=(num_classes, _CELLS, _CELLS, channels))
    return FakeSource(
        name="fake:" + ",".join(f"{key}={value}" for key, value in options.items()),
        split=split,
        class_names=tuple(f"class_{label}" for label in range(num_classes)),
        image_shape=(size, size, channels),
        num_channels=channels,
        positions=range(examples)[split.slice(examples)],
        patterns=patterns,
        size=size,
    )
