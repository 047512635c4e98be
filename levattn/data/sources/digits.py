"""scikit-learn's 1,797 handwritten digits, 8x8: the set that is always there."""

import numpy as np

from levattn.data.errors import unknown_name
from levattn.data.sources.base import ArraySource
from levattn.data.splits import Split


def open_digits(argument: str, split: Split) -> ArraySource:
    """Opens the digits; pixel values 0 to 16 are scaled to 0 to 255.

    The package has no split of its own. Sorted by class (and by position within a class), every fifth example is
    "test", the other four are "train": 360 and 1,437, stratified. Within a split the package's order is kept.
    """
    from sklearn.datasets import load_digits  # Slow to import, and only needed here.

    if split.name not in ("train", "test"):
        raise unknown_name("split", split.name, ("train", "test"))
    digits = load_digits()
    is_test = np.zeros(len(digits.target), bool)
    is_test[np.argsort(digits.target, kind="stable")[::5]] = True
    chosen = is_test == (split.name == "test")
    images = np.rint(digits.images[chosen] * (255 / 16)).astype(np.uint8)[..., None]
    return ArraySource.of("digits", split, images, digits.target[chosen], tuple("0123456789"))
