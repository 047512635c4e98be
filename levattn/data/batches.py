"""A stream of batches that says what it could not read, and that its workers died."""

import math
from collections.abc import Iterator

import grain
import numpy as np
from absl import logging

from levattn.data.config import DataConfig
from levattn.data.decode import decode_image
from levattn.data.errors import ImageError
from levattn.data.sources import Source

_NAMED = 5  # Damaged images in the message that ends a run.


class Batches(Iterator[dict[str, np.ndarray]]):
    """Hands on batches; logs each damaged image once, by its path, and ends the stream when there are too many.

    Attributes:
      damaged: position in the source to what is wrong with it, path included, of all damaged images so far. What this
        process has read counts, and only once: later epochs meet the same images again.
    """

    def __init__(self, batches: grain.DatasetIterator, source: Source, config: DataConfig):
        self.damaged: dict[int, str] = {}
        self._batches, self._source, self._config = batches, source, config

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            batch = next(self._batches)
        except RuntimeError as error:
            if "Worker process was terminated" not in str(error):
                raise
            raise ChildProcessError(
                f"a data worker died: {error} Exit code -9 commonly means that memory ran out: try fewer "
                f"workers than data.num_workers={self._config.num_workers}, or 0. The same command goes on from the "
                "last checkpoint"
            ) from error
        if "mask" in batch:
            for index in batch["index"][batch["mask"] == 0].tolist():
                if index >= 0 and index not in self.damaged:  # The padding of evaluation has index -1.
                    self._add(index)
        return batch

    def close(self) -> None:
        """Ends threads and processes."""
        self._batches.close()

    def _add(self, index: int) -> None:
        self.damaged[index] = problem = _what_is_wrong(self._source, index)
        share, total = self._config.max_damaged, len(self._source)
        count, allowed = len(self.damaged), math.floor(share * total)
        if count > allowed:
            named = "\n  ".join([*self.damaged.values()][-_NAMED:])
            raise ImageError(
                f"{count} of the {total:,} images of {self._source.name} are damaged so far, more than the {allowed} "
                f"of data.max_damaged={share:g}: replace or remove them, or allow a larger share. The last:\n  {named}"
            )
        logging.warning("skipped damaged image %d (%d allowed of %s): %s", count, allowed, f"{total:,}", problem)


def load_example(source: Source, index: int) -> tuple[np.ndarray, int]:
    """The pixels and the label of one example.

    Raises:
      ImageError: naming where it comes from, when it cannot be read or decoded.
    """
    example = source[index]
    image = example["image"]
    if isinstance(image, bytes):
        try:
            image = decode_image(image, source.num_channels)
        except ImageError as error:
            raise ImageError(f"{source.describe(index)}: {error}; replace or remove it") from error
    return image, example["label"]


def _what_is_wrong(source: Source, index: int) -> str:
    # Tried again here, as the message would have to travel from worker processes otherwise.
    try:
        image, _ = load_example(source, index)
    except ImageError as error:
        return str(error)
    height, width = image.shape[:2]
    return f"{source.describe(index)}: could not be read or cut before, and can be now ({width} x {height} pixels)"
