"""Fashion-MNIST (Xiao et al., 2017): 60,000 + 10,000 grey 28x28 images, in the idx files it is published in."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np

from levattn.data.errors import unknown_name
from levattn.data.sources.base import ArraySource, Source
from levattn.data.sources.local import data_folders
from levattn.data.sources.records import open_tfds
from levattn.data.splits import Split

_PREFIXES = {"train": "train", "test": "t10k"}
_CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_MAX_IDX_BYTES = 2**29
_DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")


def open_fashion_mnist(argument: str, split: Split) -> Source:
    """Opens the idx files in $LEVATTN_DATA, its fashion-mnist/ or Debian's folder, else a set prepared by TFDS."""
    if split.name not in _PREFIXES:
        raise unknown_name("split", split.name, _PREFIXES)
    prefix = _PREFIXES[split.name]
    folders = data_folders("fashion-mnist", _DEBIAN_FOLDER)
    for folder in folders:
        images, labels = _find(folder, f"{prefix}-images-idx3-ubyte"), _find(folder, f"{prefix}-labels-idx1-ubyte")
        if images and labels:
            pixels = read_idx(images)
            classes = read_idx(labels)
            if pixels.shape != (len(classes), 28, 28):
                raise ValueError(f"{images} has shape {pixels.shape} and {labels} {classes.shape}; fetch both again")
            return ArraySource.of("fashion_mnist", split, pixels[..., None], classes, _CLASS_NAMES)
    try:
        return open_tfds("fashion_mnist", split)
    except FileNotFoundError as error:
        looked = ", ".join(str(folder) for folder in folders)
        raise FileNotFoundError(
            f"source='fashion_mnist': no {prefix}-images-idx3-ubyte(.gz) with labels in {looked}, and none prepared "
            "by TFDS. Run `apt-get install dataset-fashion-mnist`, or put the four idx files into a folder "
            "named by LEVATTN_DATA"
        ) from error


def read_idx(path: Path) -> np.ndarray:
    """Reads an idx file of unsigned bytes, gzipped or not; no more of it than its header speaks of.

    Raises:
      ValueError: naming the file, when it is damaged, of another type, or larger than 512 MiB.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            zeros, dtype, num_axes = struct.unpack(">HBB", file.read(4))
            if (zeros, dtype) != (0, 8):
                raise ValueError("not an idx file of unsigned bytes")
            shape = struct.unpack(f">{num_axes}I", file.read(4 * num_axes))
            size = math.prod(shape)
            if size > _MAX_IDX_BYTES:
                raise ValueError(f"{shape} is more than {_MAX_IDX_BYTES:,} bytes")
            data = file.read(size + 1)
        if len(data) != size:
            raise ValueError(f"{shape} needs {size:,} bytes, and it has {'more' if len(data) > size else len(data)}")
        return np.frombuffer(data, np.uint8).reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}); fetch it again") from error


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)
