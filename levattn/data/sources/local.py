"""Where data sets that lie on this machine are looked for."""

import os
from pathlib import Path


def data_folders(name: str, debian_folder: Path) -> list[Path]:
    """Folders in the order in which they are looked at: $LEVATTN_DATA, `name` below it, and Debian's.

    Raises:
      FileNotFoundError: LEVATTN_DATA names no folder. What it should have held may lie in Debian's folder as well, but
        somebody who sets it wants his own.
    """
    own = os.environ.get("LEVATTN_DATA")
    if not own:
        return [debian_folder]
    if not Path(own).is_dir():
        raise FileNotFoundError(
            f"LEVATTN_DATA={own!r} is no folder: set it to the one that holds the data, or unset it"
        )
    return [Path(own), Path(own) / name, debian_folder]
