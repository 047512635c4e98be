"""Photographs of Debian's tuxpaint-stamps-default: small, labelled by folder, and an `apt-get install` away."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from levattn.data.decode import check_size, convert_image
from levattn.data.errors import ImageError, unknown_name
from levattn.data.sources.base import Example
from levattn.data.sources.folder import FolderSource, mixed_order
from levattn.data.sources.local import data_folders
from levattn.data.splits import Split

DEFAULT_CATEGORIES = (
    "animals/mammals",
    "animals/birds",
    "animals/insects",
    "food/fruit",
    "plants/flowers",
    "food/vegetables",
    "vehicles",
)
_DEBIAN_FOLDER = Path("/usr/share/tuxpaint/stamps")


@dataclass(frozen=True, repr=False, eq=False)
class StampSource(FolderSource):
    """PNG files with transparency, each in the middle of a white square: a centre crop would cut long things off."""

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        try:
            return example | {"image": convert_image(example["image"], _on_white_square)}
        except ImageError as error:
            raise ImageError(f"{self.describe(index)}: {error}; install tuxpaint-stamps-default again") from error


def open_stamps(argument: str, split: Split) -> StampSource:
    """Opens `stamps`: the photographs of seven categories, or `stamps:CATEGORY+CATEGORY` with folders of your choice.

    A photograph is a `.png` below the category with no folder `cartoon` on its way: drawings lie in those, or are
    `.svg`. The package's version 2022.06.04 has 197 such files in the seven categories (65 mammals, 35 birds, 9
    insects, 26 fruit, 25 flowers, 18 vegetables, 19 vehicles); a few toys and drawn signs are among them. All of them
    are "train", and slices make the rest; the order mixes the classes, as that of `folder:` does. Looks in
    $LEVATTN_DATA, its stamps/, and where Debian puts them.
    """
    if split.name != "train":
        raise unknown_name("split", split.name, ("train",))
    categories = tuple(argument.split("+")) if argument else DEFAULT_CATEGORIES
    folders = data_folders("stamps", _DEBIAN_FOLDER)
    root = next((folder for folder in folders if (folder / "animals").is_dir()), None)
    if root is None:
        looked = ", ".join(str(folder) for folder in folders)
        raise FileNotFoundError(
            f"source='stamps': no folder animals/ in {looked}. Run `apt-get install tuxpaint-stamps-default`, or name "
            "the folder that holds it in LEVATTN_DATA"
        )
    examples = []
    for label, category in enumerate(categories):
        files = _photographs(root, category)
        if not files:
            known = sorted(
                {
                    folder
                    for path in root.rglob("*.png")
                    if "cartoon" not in (folder := str(path.parent.relative_to(root)))
                }
            )
            raise unknown_name("source: category of stamps", category, known)
        examples += [(file, label) for file in files]
    examples = mixed_order(examples)[split.slice(len(examples))]
    return StampSource(
        name=f"stamps:{argument}" if argument else "stamps",
        split=split,
        class_names=tuple(category.rpartition("/")[2] for category in categories),
        image_shape=None,
        num_channels=3,
        root=str(root),
        files=tuple(file for file, _ in examples),
        labels=np.array([label for _, label in examples], np.int32),
    )


def _on_white_square(stamp: Image.Image) -> np.ndarray:
    side = max(stamp.size)
    check_size(side, side)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(stamp.convert("RGBA"), ((side - stamp.width) // 2, (side - stamp.height) // 2))
    return np.asarray(square.convert("RGB"))


def _photographs(root: Path, category: str) -> list[str]:
    files = (path.relative_to(root) for path in (root / category).rglob("*.png"))
    return [file.as_posix() for file in files if "cartoon" not in file.parts]
