"""A checkpoint on disk as named arrays: a file in any format that models are published in, or the folder around it."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors

from levattn.models.pretrained.layout import Content
from levattn.models.pretrained.torch_file import read_torch

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
_SAFETENSORS_DTYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
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
    b"\x89hdf": "an HDF5 file of Keras: look for the same weights as .npz, .safetensors or .pth",
}


def read_content(path: str | Path) -> Content:
    """Reads all arrays of a checkpoint, and the JSON that lies in it and beside it.

    The format is told by what is in the file, not by its name: NumPy archives (big_vision, AugReg), safetensors, those
    of `torch.save`, and ONNX. Nothing that a file brings along is run.

    Args:
      path: A file; the `.index.json` of a set of files; or a folder with one checkpoint, such as one downloaded from
        Hugging Face.

    Returns:
      Its arrays as they are stored, half precision included.

    Raises:
      FileNotFoundError: No such file, or a folder without a checkpoint.
      ValueError: Not a checkpoint, a damaged one, or several in one folder, with the next step.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"checkpoint {str(path)!r} does not exist: give the path of a file or a folder on this machine; nothing is "
            "downloaded here"
        )
    if path.is_dir():
        path = _checkpoint_in(path)
    if path.suffix == ".json":
        arrays, metadata = _read_shards(path)
    else:
        arrays, metadata = _read_file(path)
    beside = _read_beside(path)
    # The config in a file is of that file; what an ONNX graph tells is a part of the config beside it.
    return Content(path, arrays, metadata | beside if path.suffix == ".onnx" else beside | metadata)


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
    return {key: _parse_json(file.read_text(), str(file)) for key, file in files.items() if file.is_file()}


def _read_shards(index: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    where = _parse_json(index.read_text(), str(index)).get("weight_map")
    if not isinstance(where, dict):
        raise ValueError(f"{str(index)!r} is not the index of a set of files: it has no weight_map")
    shards = sorted({Path(name).name for name in where.values()})  # beside the index, wherever their names point
    missing = [name for name in shards if not index.with_name(name).is_file()]
    if missing:
        raise FileNotFoundError(f"{str(index)!r} names files that are not there, download them too: {missing}")
    arrays, metadata = {}, {}
    for name in shards:
        more, metadata = _read_file(index.with_name(name))
        arrays |= more
    lost = sorted(where.keys() - arrays.keys())
    if lost:
        raise ValueError(f"{str(index)!r} names {len(lost)} tensors that its files do not hold, such as {lost[0]!r}")
    return arrays, metadata


def _read_file(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with path.open("rb") as file:
        start = file.read(512)
    for magic, what in _NOT_WEIGHTS.items():
        if start.lstrip().lower().startswith(magic):
            raise ValueError(f"{str(path)!r} cannot be read, it is {what}")
    kind, reader = _reader_of(path, start)
    try:
        return reader(path)
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, safetensors.SafetensorError) as error:
        size = path.stat().st_size
        raise ValueError(
            f"{str(path)!r} ({size:,} bytes) cannot be read as {kind}: {error}. If its size is not that of the "
            "original, the download broke off: download it again"
        ) from error


def _reader_of(path: Path, start: bytes) -> tuple[str, Callable]:
    """By what is in the file; a file too damaged to tell goes by its name."""
    numpy, torch = ("a NumPy archive", _read_npz), ("a file of torch.save", lambda file: (read_torch(file), {}))
    tensors = ("safetensors", _read_safetensors)
    if path.suffix == ".onnx":
        return "ONNX", _read_onnx
    if start[8:9] == b"{":
        return tensors
    if start.startswith(b"PK") and zipfile.is_zipfile(path):  # both are zip archives
        with zipfile.ZipFile(path) as archive:
            return numpy if any(name.endswith(".npy") for name in archive.namelist()) else torch
    by_name = {".npz": numpy, ".safetensors": tensors} | dict.fromkeys((".pth", ".pt", ".bin", ".ckpt", ".tar"), torch)
    if path.suffix not in by_name:
        raise ValueError(
            f"{str(path)!r} is {'empty' if not start else 'in no known format'}: known are .npz, .safetensors, .onnx "
            "and the .pth, .pt and .bin of torch.save"
        )
    return by_name[path.suffix]


def _read_npz(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    arrays, metadata = {}, {}
    with path.open("rb") as raw:  # NumPy leaves a damaged file open if it opens it itself
        file = np.load(raw, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array, and no archive of named ones")
        for name in file.files:
            array = file[name]
            if array.dtype.kind == "U":  # the config that this project's exports hold
                metadata[name.strip("_")] = _parse_json(str(array), name)
            elif array.dtype == np.dtype("V2"):  # NumPy knows no bfloat16 and stores its bytes
                arrays[name] = array.view(jnp.bfloat16)
            else:
                arrays[name] = array
    return arrays, metadata


def _read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with safetensors.safe_open(path, framework="numpy") as file:  # checks that header and file fit each other
        metadata = file.metadata() or {}
    # Its own reader for NumPy knows no bfloat16.
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    arrays = {}
    for name, entry in json.loads(data[8 : 8 + length]).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _SAFETENSORS_DTYPES:
            raise ValueError(f"tensor {name!r} is of unknown dtype {entry['dtype']}")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        array = np.frombuffer(data, np.uint8, end - begin, begin).view(_SAFETENSORS_DTYPES[entry["dtype"]])
        arrays[name] = array.reshape(entry["shape"])
    return arrays, {key: _parse_json(text, key) for key, text in metadata.items() if text.startswith("{")}


def _read_onnx(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    from levattn.models.pretrained.onnx_file import read_onnx  # needs a package that is not always installed

    return read_onnx(path)


def _parse_json(text: str, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where!r} is not valid JSON: {error}") from error
    return parsed if isinstance(parsed, dict) else {}
