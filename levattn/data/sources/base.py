"""The interface of every image set, and the one that lives in memory."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

import numpy as np

from levattn.data.splits import Split


class Example(TypedDict):
    """One example: the bytes of an image file or its uint8 pixels `h w c`, and the class."""

    image: bytes | np.ndarray
    label: int


@dataclass(frozen=True, repr=False, eq=False)
class Source(ABC):
    """A labelled image set with random access.

    Attributes:
      name: the kind of set and its argument, as in `DataConfig.source`.
      split: the split, with its slice.
      class_names: the name of each label.
      image_shape: `(height, width, channels)` when all images share it, else None.
      num_channels: channels of the decoded images.
    """

    name: str
    split: Split
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int] | None
    num_channels: int

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Example:
        """One example; raises an ImageError that names it when it cannot be read."""

    @abstractmethod
    def describe(self, index: int) -> str:
        """Where an example comes from, for error messages."""

    @abstractmethod
    def _facts(self) -> Iterator[bytes]:
        """What identifies the content, cheaply: the pixels, or the names and sizes of files and a sample."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def in_memory(self) -> bool:
        """Whether examples are pixels already."""
        return False

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 that changes with the examples, their order, their labels and the class names.

        Of sets that lie on disk it sees the examples as far as `_facts` of their kind reads them.
        """
        digest = hashlib.sha256()
        for fact in (repr((len(self), self.class_names)).encode(), *self._facts()):
            digest.update(len(fact).to_bytes(8, "big"))
            digest.update(fact)
        return digest.hexdigest()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {str(self.split)!r}, num_examples={len(self)})"


@dataclass(frozen=True, repr=False, eq=False)
class ArraySource(Source):
    """Images held in memory."""

    images: np.ndarray
    labels: np.ndarray

    @classmethod
    def of(
        cls, name: str, split: Split, images: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...]
    ) -> "ArraySource":
        """The part of `images` (`n h w c`, uint8) and `labels` (`n`) that `split` keeps."""
        part = split.slice(len(images))
        shape = tuple(int(side) for side in images.shape[1:])
        return cls(name, split, class_names, shape, shape[-1], images[part], labels[part].astype(np.int32))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def describe(self, index: int) -> str:
        return f"{self.name} {self.split} example {index}"

    @property
    def in_memory(self) -> bool:
        return True

    def _facts(self) -> Iterator[bytes]:
        yield np.ascontiguousarray(self.images).data.cast("B")
        yield self.labels.tobytes()
