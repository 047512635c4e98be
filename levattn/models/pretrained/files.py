"""A checkpoint on disk as named arrays: a file in any format that models are published in, or the folder around it."""

import json
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from levattn.models.pretrained.archive import read_npz
from levattn.models.pretrained.layout import Content
from levattn.models.pretrained.safetensors_file import read_safetensors
from levattn.models.pretrained.torch_file import read_training

_SUFFIXES = (".npz", ".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".onnx")
# What a folder is read from, the first that is there. Hugging Face, open_clip and timm name their files so.
_IN_FOLDERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
_BESIDE = {
    "config": "config.json",
    "preprocessor": "preprocessor_config.json",
    "open_clip": "open_clip_config.json",
}
_REPOSITORY = re.compile(r"(?:hf-hub:|hf_hub:|hf:)?([\w.-]+)/([\w.-]+)")
_MAX_JSON_BYTES = 2**26
# First bytes of what turns up under a checkpoint's name, and what to do about it.
_NOT_WEIGHTS = {
    b"version https://git-lfs": "a pointer of Git LFS to the file, not the file: run `git lfs pull` in its repository",
    b"<!doctype html": "a web page: download the file itself, by the link that says resolve or raw and not blob",
    b"<html": "a web page: download the file itself, by the link that says resolve or raw and not blob",
    b"<?xml": "an error message of a file server: open it in an editor to see what it says, and download again",
    b"\x80\x02\x8a\nl\xfc\x9cf\xf9": "a file of torch.save from before PyTorch 1.6, which only PyTorch reads: where "
    "that is installed, convert it once by `torch.save(torch.load(path, weights_only=True), path)`",
    b"\x80": "a bare pickle, which could run any code and is not read: look for the same weights as .safetensors",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"\x93numpy": "one array of NumPy, and no archive of named ones",
    b"\x89hdf": "an HDF5 file of Keras: look for the same weights as .npz, .safetensors or .pth",
}


def read_content(path: str | Path) -> Content:
    """Reads all arrays of a checkpoint, and the JSON that lies in it and beside it.

    The format is told by what is in the file, not by its name: NumPy archives (big_vision, AugReg), safetensors, those
    of `torch.save`, and ONNX. Nothing that a file brings along is run.

    Args:
      path: A file; the `.index.json` of a set of files; a folder with one checkpoint, such as one downloaded from
        Hugging Face; or the `owner/name` of a repository that is in the download cache of Hugging Face.

    Returns:
      Its arrays as they are stored, half precision included.

    Raises:
      FileNotFoundError: No such file, or a folder without a checkpoint.
      ValueError: Not a checkpoint, a damaged one, one that would allocate much more than it has bytes, or several in
        one folder, with the next step.
    """
    path = find_checkpoint(path)
    if path.is_dir():
        path = _checkpoint_in(path)
    if path.suffix == ".json":
        arrays, metadata = _read_shards(path)
    else:
        arrays, metadata = _read_file(path)
    beside = _read_beside(path)
    # The config in a file is of that file; what an ONNX graph tells is a part of the config beside it.
    return Content(path, arrays, metadata | beside if path.suffix == ".onnx" else beside | metadata)


def find_checkpoint(path: str | os.PathLike) -> Path:
    """Where a checkpoint lies: the path, if there is something; for `owner/name` the copy of that repository which the
    download cache of Hugging Face has on this machine (its "main", else its newest).

    Raises:
      FileNotFoundError: Neither; with the command that downloads it.
    """
    path = Path(path).expanduser()
    if path.exists():
        return path
    repository = _REPOSITORY.fullmatch(path.as_posix())
    if not repository:
        raise FileNotFoundError(
            f"checkpoint {str(path)!r} does not exist: name a run's workdir, a file or a folder on this machine, or a "
            "repository of Hugging Face (owner/name) that was downloaded; nothing is downloaded here"
        )
    owner, name = repository.groups()
    cache = _hub_cache()
    folder = cache / f"models--{owner}--{name}"
    main = folder / "refs" / "main"
    snapshots = [folder / "snapshots" / main.read_text().strip()] if main.is_file() else []
    snapshots += sorted(folder.glob("snapshots/*/"), key=lambda found: found.stat().st_mtime, reverse=True)
    for snapshot in snapshots:
        if snapshot.is_dir() and any(file.suffix in (*_SUFFIXES, ".json") for file in snapshot.iterdir()):
            return snapshot
    raise FileNotFoundError(
        f"checkpoint {str(path)!r} does not exist, as a file or in the cache of Hugging Face, {str(cache)!r}: nothing "
        f"is downloaded here, so run `hf download {owner}/{name}` once (of the package huggingface_hub)"
    )


def _hub_cache() -> Path:
    """As the library of Hugging Face finds it."""
    told = os.environ
    home = told.get("HF_HOME") or Path(told.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return Path(told.get("HF_HUB_CACHE") or told.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub").expanduser()


def _checkpoint_in(folder: Path) -> Path:
    """The file of a folder that holds one checkpoint."""
    for name in _IN_FOLDERS:
        if (folder / name).exists():
            return folder / name
    snapshots = list(folder.glob("snapshots/*/"))
    if len(snapshots) == 1:  # a repository in the download cache of Hugging Face
        return _checkpoint_in(snapshots[0])
    files = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{str(folder)!r} holds several checkpoints, give the path of one of them: {names}")
    raise FileNotFoundError(
        f"{str(folder)!r} holds no checkpoint: none of {', '.join(_IN_FOLDERS)} and no file that ends in "
        f"{', '.join(_SUFFIXES)}"
    )


def _read_beside(path: Path) -> dict[str, Any]:
    folder = path.absolute().parent
    folder = folder.parent if folder.name == "onnx" else folder  # so Hugging Face has it
    files = {key: folder / name for key, name in _BESIDE.items()}
    return {key: _read_json(file) for key, file in files.items() if file.is_file()}


def _read_shards(index: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    where = _read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
        raise ValueError(f"{str(index)!r} is not the index of a set of files: it has no weight_map")
    shards = sorted(set(where.values()))
    if outside := [name for name in shards if name != Path(name).name or name in ("", ".", "..")]:
        raise ValueError(f"{str(index)!r} names {outside[0]!r}: only files beside it are read")
    missing = [name for name in shards if not index.with_name(name).is_file()]
    if missing:
        raise FileNotFoundError(f"{str(index)!r} names files that are not there, download them too: {missing}")
    arrays, metadata = {}, {}
    for name in shards:
        more, metadata = _read_file(index.with_name(name))
        if twice := sorted(arrays.keys() & more.keys()):
            raise ValueError(f"{str(index)!r}: {twice[0]!r} is in {name!r} and in a file before it")
        arrays |= more
    lost = sorted(where.keys() - arrays.keys())
    if lost:
        raise ValueError(f"{str(index)!r} names {len(lost)} tensors that its files do not hold, such as {lost[0]!r}")
    return arrays, metadata


def _read_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    if not path.is_file():  # a pipe or a device could be read for ever
        raise ValueError(f"{str(path)!r} is no regular file")
    with path.open("rb") as file:
        start = file.read(512)
    if not start:
        raise ValueError(f"{str(path)!r} cannot be read, it is empty: download it again")
    for magic, what in _NOT_WEIGHTS.items():
        if start.lstrip().lower().startswith(magic) and not _is_safetensors(path, start):
            raise ValueError(f"{str(path)!r} cannot be read, it is {what}")
    kind = "a checkpoint"
    try:
        kind, reader = _reader_of(path, start)
        return reader(path)
    except (ImportError, _UnknownFormatError):
        raise
    except Exception as error:  # what parses damaged files fails in any way: zlib.error, RecursionError, struct.error
        size = path.stat().st_size
        raise ValueError(
            f"{str(path)!r} ({size:,} bytes) cannot be read as {kind}: {error}. If its size is not that of the "
            "original, the download broke off: download it again"
        ) from error


class _UnknownFormatError(ValueError):
    """Says all there is to say."""


def _is_safetensors(path: Path, start: bytes) -> bool:
    """Eight bytes, any, that tell how long the record of JSON is that follows them."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= path.stat().st_size


def _reader_of(path: Path, start: bytes) -> tuple[str, Callable]:
    """By what is in the file; a file too damaged to tell goes by its name."""
    numpy, torch = ("a NumPy archive", _read_npz), ("a file of torch.save", _read_torch)
    tensors = ("safetensors", _read_safetensors)
    if path.suffix == ".onnx":
        return "ONNX", _read_onnx
    if _is_safetensors(path, start):
        return tensors
    if start.startswith(b"PK") and zipfile.is_zipfile(path):  # both are zip archives
        with zipfile.ZipFile(path) as archive:
            return numpy if any(name.endswith(".npy") for name in archive.namelist()) else torch
    by_name = {".npz": numpy, ".safetensors": tensors} | dict.fromkeys((".pth", ".pt", ".bin", ".ckpt", ".tar"), torch)
    if path.suffix not in by_name:
        raise _UnknownFormatError(
            f"{str(path)!r} is in no known format: known are .npz, .safetensors, .onnx "
            "and the .pth, .pt and .bin of torch.save"
        )
    return by_name[path.suffix]


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays, metadata = {}, {}
    for name, array in read_npz(path).items():
        if array.dtype.kind == "U":  # the config that this project's exports hold
            metadata[name.strip("_")] = _parse_json(str(array), name)
        elif array.dtype == np.dtype("V2"):  # NumPy knows no bfloat16 and stores its bytes
            arrays[name] = array.view(jnp.bfloat16)
        else:
            arrays[name] = array
    return arrays, metadata


def _read_torch(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays, told = read_training(path)
    return arrays, {"training": told} if told else {}


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays, metadata = read_safetensors(path)
    return arrays, {key: _parse_json(text, key) for key, text in metadata.items() if text.startswith("{")}


def _read_onnx(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    from levattn.models.pretrained.onnx_file import read_onnx  # needs a package that is not always installed

    return read_onnx(path)


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise ValueError(f"{str(path)!r} is larger than {_MAX_JSON_BYTES:,} bytes, and should hold a little JSON")
    return _parse_json(path.read_bytes(), str(path))


def _parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where!r} is not valid JSON: {error}") from error
    return parsed if isinstance(parsed, dict) else {}
