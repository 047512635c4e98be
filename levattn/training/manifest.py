"""The SHA-256 of every file in a folder, in a file written last: what tells a whole, unchanged folder from any other.

The file is in the format of coreutils: `cd runs/a/checkpoints/1000 && sha256sum --check SHA256SUMS`.
"""

import concurrent.futures
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from levattn.data.sources.files import open_regular
from levattn.training.workdir import atomic_path, sync_folder

MANIFEST_FILE = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_MAX_THREADS = 8  # hashing leaves the interpreter lock; past this the disk is the limit


def write_manifest(folder: str | os.PathLike) -> None:
    """Hashes every file below a folder and writes the manifest, atomically, when all of them are on disk.

    It records what the files hold now: a bit that flipped in memory before they were written stays unseen.
    Cost: one read of the files (from the page cache, just after they were written) and an fsync of each.

    Args:
      folder: Holds files and folders, none of which changes meanwhile.

    Raises:
      OSError: A file cannot be read, or the manifest not written.
    """
    folder = Path(folder)
    names = _names(folder)
    lines = [f"{digest}  {name}\n" for name, digest in zip(names, _digests(folder, names, sync=True), strict=True)]
    for below in {(folder / name).parent for name in names} - {folder}:
        sync_folder(below)
    with atomic_path(folder / MANIFEST_FILE) as temporary:
        temporary.write_text("".join(lines))


def has_manifest(folder: str | os.PathLike) -> bool:
    """Whether a folder has a manifest; whether it holds is for `verify_manifest` to say."""
    return (Path(folder) / MANIFEST_FILE).is_file()


def verify_manifest(folder: str | os.PathLike) -> list[str]:
    """Compares every file below a folder with its manifest.

    Any change of a file is found, whatever its cause. It is no signature: who can write the files can write the
    manifest. Cost: one read of the files and their hashing, on up to 8 threads.

    Args:
      folder: With a manifest or not.

    Returns:
      A line for each file that is damaged, missing or not in the manifest. Empty: all is as it was written.
    """
    folder = Path(folder)
    try:
        with open_regular(folder / MANIFEST_FILE) as file:
            *lines, rest = file.read().decode().split("\n")  # other ends of lines would be a change
    except (OSError, UnicodeDecodeError) as error:
        return [f"{MANIFEST_FILE}: cannot be read ({error})"]
    matches = [_LINE.fullmatch(line) for line in lines]
    if not lines or rest or None in matches:
        return [f"{MANIFEST_FILE}: is empty or damaged"]
    wanted = {match[2]: match[1] for match in matches}
    if len(wanted) != len(lines):
        return [f"{MANIFEST_FILE}: is damaged, it names a file twice"]
    there = set(_names(folder))
    problems = [f"{name}: is missing" for name in wanted if name not in there]
    problems += [f"{name}: was not there when the checkpoint was written" for name in sorted(there - wanted.keys())]
    present = [name for name in wanted if name in there]
    for name, digest in zip(present, _digests(folder, present), strict=True):
        if digest != wanted[name]:
            problems.append(f"{name}: {digest or 'cannot be read, its SHA-256'} is not {wanted[name]} as written")
    return problems


def has_only_regular_files(folder: str | os.PathLike) -> bool:
    """Whether all that lies below a folder is files and folders, and not a pipe that a reader would wait for."""
    return all(path.is_file() or path.is_dir() for path in Path(folder).rglob("*"))


def _names(folder: Path) -> list[str]:
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return sorted(path.relative_to(folder).as_posix() for path in files if path != folder / MANIFEST_FILE)


def _digests(folder: Path, names: Iterable[str], *, sync: bool = False) -> list[str | None]:
    """SHA-256 of each file, several at a time; None of one that cannot be read, which is an error if `sync`."""

    def digest(name: str) -> str | None:
        try:
            with open_regular(folder / name, buffering=0) as file:
                if sync:
                    os.fsync(file.fileno())
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            if sync:
                raise
            return None

    with concurrent.futures.ThreadPoolExecutor(_MAX_THREADS) as pool:
        return list(pool.map(digest, names))
