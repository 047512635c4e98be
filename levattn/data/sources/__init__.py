"""Labelled image sets behind one interface. A new kind is one small file and one line here."""

from levattn.data.config import DataConfig
from levattn.data.sources.base import ArraySource, Source
from levattn.data.sources.digits import open_digits
from levattn.data.sources.fake import open_fake
from levattn.data.sources.fashion_mnist import open_fashion_mnist
from levattn.data.sources.folder import open_folder
from levattn.data.sources.records import open_tfds
from levattn.data.sources.stamps import open_stamps
from levattn.data.splits import parse_split

__all__ = ["ArraySource", "Source", "open_source"]

_OPENERS = {
    "digits": open_digits,
    "fashion_mnist": open_fashion_mnist,
    "stamps": open_stamps,
    "folder": open_folder,
    "tfds": open_tfds,
    "fake": open_fake,
}


def open_source(config: DataConfig, split: str) -> Source:
    """Opens one split of the configured image set.

    Args:
      config: its `source` says which set.
      split: a split name with an optional slice, such as "train", "train[:90%]" or "test[-500:]".

    Returns:
      The source. Opening reads no image of sets that live on disk.

    Raises:
      ValueError: when the split is unknown or empty, or the set is malformed.
      FileNotFoundError: when the set is not on this machine; the message says how to get it.
    """
    kind, _, argument = config.source.partition(":")
    return _OPENERS[kind](argument, parse_split(split))
