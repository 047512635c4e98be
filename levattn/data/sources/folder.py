"""A folder of image files, one subfolder a class, with or without train/ and val/ or test/ above the classes."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from levattn.data.errors import unknown_name
from levattn.data.sources.base import Example, Source
from levattn.data.sources.files import open_regular, read_image_file
from levattn.data.splits import Split

_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
_EVAL_NAMES = ("test", "val", "validation")
_SPLIT_NAMES = ("train", *_EVAL_NAMES)
_SAMPLED_FILES, _SAMPLED_BYTES = 256, 2**16  # of the fingerprint: 16 MiB at most


@dataclass(frozen=True, repr=False, eq=False)
class FolderSource(Source):
    """Image files; only their names are held."""

    root: str
    files: tuple[str, ...]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        return {"image": read_image_file(self.describe(index)), "label": int(self.labels[index])}

    def describe(self, index: int) -> str:
        return os.path.join(self.root, self.files[index])

    def _facts(self) -> Iterator[bytes]:
        """The name (which holds the class) and size of every file, and the first 64 KiB of 256 spread evenly.

        Up to 256 images any change in these bytes is seen. Of more, what is changed in a file outside of the sample and
        keeps its size is not: to read a whole data set at each start would take too long.
        """
        for index, name in enumerate(self.files):
            try:
                size = os.path.getsize(self.describe(index))
            except OSError:
                size = None
            yield os.fsencode(f"{name} {size}")
        num_sampled = min(len(self), _SAMPLED_FILES)
        for number in range(num_sampled):
            try:
                with open_regular(self.describe(number * len(self) // num_sampled)) as file:
                    yield file.read(_SAMPLED_BYTES)
            except OSError:
                yield b""


def open_folder(argument: str, split: Split) -> FolderSource:
    """Opens `folder:PATH`.

    With a train/ folder in PATH, the splits are its train/ and test/, val/ or validation/ (each of these names finds
    the only one there is); the classes are those of train/. Without, all of PATH is "train", and slices make the rest:
    `train[:90%]` and `train[90%:]`. Classes are sorted by name. Examples are in a fixed order that mixes the classes
    (by a hash of the file name), so that a slice is a fair sample.

    Links to folders are followed. Every name of an image counts as an example, whether it can be read or not.

    Raises:
      ValueError: a link to a folder leads back into itself, or that of a class nowhere; no classes, no images.
      OSError: a folder is missing or cannot be read.
    """
    root = Path(argument).expanduser()
    if not argument or not root.is_dir():
        raise FileNotFoundError(f"source='folder:{argument}': no such folder; give the path that holds the classes")
    has_splits = (root / "train").is_dir()
    folder = root / _split_folder(root, split.name, has_splits)
    class_names = _class_names(root / "train" if has_splits else root)
    if strangers := sorted(set(_class_names(folder)) - set(class_names)):
        raise ValueError(f"source='folder:{argument}': {folder} has classes that train/ lacks: {', '.join(strangers)}")
    files_of = [_image_files(folder / name) for name in class_names]
    empty = [name for name, files in zip(class_names, files_of, strict=True) if not files]
    if len(empty) == len(class_names) or (empty and split.name == "train"):
        where = ", ".join(str(folder / name) for name in empty)
        raise ValueError(f"source='folder:{argument}': no image ({', '.join(_SUFFIXES)}) in {where}")
    examples = [(f"{class_names[label]}/{file}", label) for label, files in enumerate(files_of) for file in files]
    examples = mixed_order(examples)[split.slice(len(examples))]
    return FolderSource(
        name=f"folder:{argument}",
        split=split,
        class_names=class_names,
        image_shape=None,
        num_channels=3,
        root=str(folder),
        files=tuple(file for file, _ in examples),
        labels=np.array([label for _, label in examples], np.int32),
    )


def mixed_order(examples: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Pairs of a file name and a label, by a hash of the name: always the same, and with the classes mixed."""
    return sorted(examples, key=lambda example: hashlib.blake2b(os.fsencode(example[0])).digest())


def _split_folder(root: Path, name: str, has_splits: bool) -> str:
    present = [known for known in _SPLIT_NAMES if (root / known).is_dir()] if has_splits else ["train"]
    if name in present:
        return name if has_splits else "."
    alternatives = [known for known in present if known in _EVAL_NAMES]
    if name in _EVAL_NAMES and len(alternatives) == 1:
        return alternatives[0]
    if name in _EVAL_NAMES and not alternatives:
        raise ValueError(
            f"split={name!r}: {root} has no test/ or val/; split train by slices: train[:90%], train[90%:]"
        )
    raise unknown_name("split", name, present)


def _class_names(folder: Path) -> tuple[str, ...]:
    names = []
    with os.scandir(folder) as scan:
        entries = list(scan)
    for entry in entries:
        if entry.is_symlink() and not os.path.exists(entry):
            raise ValueError(f"source='folder:{folder}': {entry.path} is a link that leads nowhere; mend or remove it")
        if entry.is_dir() and not entry.name.startswith("."):
            names.append(entry.name)
    if not names:
        raise ValueError(
            f"source='folder:{folder}': it has no subfolders, and needs one folder of images for each class; images "
            "without classes go into one subfolder, which is enough for what needs no labels"
        )
    return tuple(sorted(names))


def _image_files(folder: Path) -> list[str]:
    """Names of the images below a folder; none where there is no such folder."""
    files, pending = [], [("", frozenset())] if folder.is_dir() else []
    while pending:
        inner, above = pending.pop()
        path = folder / inner
        status = os.stat(path)
        here = (status.st_dev, status.st_ino)
        if here in above:
            raise ValueError(f"source='folder:{folder}': {path} is a link to a folder that it lies in; remove it")
        with os.scandir(path) as entries:
            for entry in entries:
                if _is_folder(entry):
                    pending.append((f"{inner}{entry.name}/", above | {here}))
                elif entry.name.lower().endswith(_SUFFIXES) and not entry.name.startswith("."):
                    files.append(inner + entry.name)
    return files


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link to itself.
        return False
