"""Tensors out of files of `torch.save`, without PyTorch and without running anything that a file brings along.

Such a file is a zip archive: the numbers as raw bytes, and a pickle that says which bytes make which tensor. A pickle
is a program. This reader hands it nothing to call but what rebuilds tensors, and inert stand-ins for a few types that
training scripts leave beside them; a file that asks for anything else is refused before it gets it. What would make the
interpreter of pickles allocate more than the file holds is looked for before it starts.
"""

import collections
import io
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from levattn.models.pretrained.archive import open_archive

_STORAGES = {
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": jnp.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
}
# Options, learning rates and metrics that training scripts save beside the tensors. They become `_Inert`.
_BESIDE = {
    "argparse.Namespace",
    "collections.Counter",
    "collections.defaultdict",
    "builtins.dict",
    "builtins.set",
    "pathlib.PosixPath",
    "torch.device",
    "torch.jit._pickle.build_intlist",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "_codecs.encode",
}
# Where training scripts keep the weights that they evaluate: averaged ones first.
_WRAPPERS = ("model_ema", "state_dict_ema", "teacher", "target_encoder", "state_dict", "model")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")  # of DataParallel and torch.compile
_PLAIN = (str, int, float)
# No tensor needs these: buffers allocated by a number in the file, and numbers for classes known elsewhere.
_REFUSED_OPCODES = {"BYTEARRAY8", "NEXT_BUFFER", "READONLY_BUFFER", "EXT1", "EXT2", "EXT4"}
_MAX_PICKLE_BYTES = 2**26
# Of the tree of names. Dicts in dicts that share their parts can be a tree far larger than the file.
_MAX_NODES, _MAX_DEPTH, _MAX_NAME = 200_000, 100, 10_000


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of `read_training` alone."""
    return read_training(path)[0]


def read_training(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The tensors of a file of `torch.save` or `torch.jit.save`, under the names of its state dict.

    Where a training script saved more, the weights are looked for under "model_ema", "state_dict", "model" and the
    like.

    Args:
      path: A zip archive.

    Returns:
      Names to arrays, in the dtypes of the file; bfloat16 is that of JAX. And what lies beside them, as far as it is
      text, numbers and such in lists and dicts: the name of the model under "arch", the script's options under "args",
      and the path to the weights under "weights", where there are others.

    Raises:
      ValueError: A damaged file, a pickle that asks for more than tensors need, or no tensors.
    """
    with open_archive(path) as archive:
        pickles = [name for name in archive.namelist() if name.count("/") <= 1 and name.endswith("data.pkl")]
        if len(pickles) != 1:
            raise ValueError("a zip archive without the data.pkl of torch.save")
        try:
            pickled = _read_pickle(archive, pickles[0])
            saved = _Unpickler(pickled, archive, pickles[0].removesuffix("data.pkl")).load()
            arrays = _strip_wrappers(_flatten(_unwrap(saved)))
            told = _told(saved)
        except (ValueError, zipfile.BadZipFile):
            raise
        except Exception as error:  # a pickle can go wrong in any way
            raise ValueError(f"its pickle is damaged: {error!r}") from error
    if not arrays:
        raise ValueError(f"it holds no tensors but a {type(saved).__name__}; save the model's state_dict()")
    return arrays, told


def _read_pickle(archive: zipfile.ZipFile, name: str) -> io.BytesIO:
    """A pickle whose opcodes allocate no more than it has bytes, as far as the interpreter takes the file's word."""
    if archive.getinfo(name).file_size > _MAX_PICKLE_BYTES:
        raise ValueError(f"its pickle is larger than {_MAX_PICKLE_BYTES:,} bytes: save the model's state_dict() alone")
    data = archive.read(name)
    for opcode, argument, position in pickletools.genops(data):  # refuses strings longer than the file
        # The interpreter makes its memo as long as the largest number in it.
        if opcode.name in _REFUSED_OPCODES or (opcode.name.endswith("PUT") and argument > position):
            raise ValueError(f"its pickle has {opcode.name} {argument} at byte {position}, which no tensor needs")
    return io.BytesIO(data)


class _Inert:
    """Stands for an object: takes what it is given and does nothing with it."""

    def __init__(self, *args, **kwargs):
        self.state = {}

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        pass


class _Tensor(_Inert):
    """Holds an array out of reach of the pickle, which could otherwise set an array's state."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __setstate__(self, state):
        pass


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, archive: zipfile.ZipFile, root: str):
        super().__init__(file)
        self._archive, self._root = archive, root
        self._is_big_endian = root + "byteorder" in archive.NameToInfo and archive.read(root + "byteorder") == b"big"
        self._storages: dict[str, np.ndarray] = {}

    def find_class(self, module: str, name: str) -> Any:
        match full := f"{module}.{name}":
            case "torch._utils._rebuild_tensor_v2":
                return self._rebuild_tensor
            case "torch._utils._rebuild_parameter":
                return self._rebuild_parameter
            case "collections.OrderedDict":
                return collections.OrderedDict
            case "torch.Size":
                return tuple
        if full in _BESIDE or module.startswith("__torch__"):  # TorchScript gives each module a class of its own
            return _Inert
        if module == "torch":  # a dtype or a kind of storage, which is only ever looked up by its name
            return full
        raise ValueError(
            f"its pickle asks for {full!r}, which no tensor needs, and pickles can run any code: nothing was run. "
            "Look for the same weights as .safetensors, or save nothing but the model's state_dict()"
        )

    def persistent_load(self, pid: Any) -> np.ndarray:
        kind, storage_type, key, _, numel = pid
        if kind != "storage" or storage_type not in _STORAGES:
            raise ValueError(f"a storage of kind {storage_type!r} is not known here")
        if key not in self._storages:
            dtype = np.dtype(_STORAGES[storage_type])
            dtype = dtype.newbyteorder(">") if self._is_big_endian else dtype
            self._storages[key] = np.frombuffer(self._archive.read(f"{self._root}data/{key}"), dtype)
        if len(self._storages[key]) < numel:
            raise ValueError(f"storage {key} holds {len(self._storages[key])} numbers, not {numel}")
        return self._storages[key]

    def _rebuild_tensor(self, storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None) -> _Tensor:
        if len(size) != len(stride) or min((offset, *size, *stride)) < 0 or np.prod(size, dtype=object) > len(storage):
            raise ValueError(f"a tensor of shape {tuple(size)} and strides {tuple(stride)} does not fit its storage")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if 0 not in size and last >= len(storage):
            raise ValueError(f"a tensor of shape {tuple(size)} reaches past the end of its storage")
        strides = [step * storage.itemsize for step in stride]
        return _Tensor(np.lib.stride_tricks.as_strided(storage[offset:], tuple(size), strides, writeable=False))

    def _rebuild_parameter(self, tensor, requires_grad, hooks) -> _Tensor:
        return tensor


def _unwrap(saved: Any) -> Any:
    """The part of what a training script saved that holds the weights."""
    for name in _WRAPPERS:
        if isinstance(saved, Mapping) and _flatten(saved.get(name)):
            return _unwrap(saved[name])
    return saved


def _told(saved: Any) -> dict[str, Any]:
    """What a training script says of the weights that it saved."""
    if not isinstance(saved, Mapping):
        return {}
    told = {"arch": saved["arch"]} if isinstance(saved.get("arch"), str) else {}
    args = saved.get("args")
    args = args.state if isinstance(args, _Inert) else args
    if isinstance(args, Mapping):
        told["args"] = {name: _plain(value) for name, value in args.items() if isinstance(name, str)}
    inside = {name: saved[name] for name in _WRAPPERS if isinstance(saved.get(name), Mapping)}
    weights = [name for name, tree in inside.items() if any(isinstance(leaf, _Tensor) for leaf in tree.values())]
    return told | ({"weights": weights} if len(weights) > 1 else {})


def _plain(value: Any) -> Any:
    """Text, a number, or a list or dict of such; None in place of anything else."""
    if isinstance(value, Mapping):
        return {name: inner for name, inner in value.items() if isinstance(inner, _PLAIN) and isinstance(name, str)}
    if isinstance(value, list | tuple):
        return [inner for inner in value if isinstance(inner, _PLAIN)]
    return value if isinstance(value, _PLAIN) else None


def _flatten(tree: Any) -> dict[str, np.ndarray]:
    """The tensors in dicts and TorchScript modules, nested or not, under names joined by dots.

    Raises:
      ValueError: For a tree that is endless, or too large to have been meant.
    """
    flat, pending, num_nodes = {}, [("", 0, tree)], 0
    while pending:
        name, depth, node = pending.pop()
        num_nodes += 1
        if num_nodes > _MAX_NODES or depth > _MAX_DEPTH or len(name) > _MAX_NAME:
            raise ValueError("it nests dicts deeper, or in more ways, than any model has parts")
        if isinstance(node, _Tensor):
            flat[name] = node.array
            continue
        items = node.state if isinstance(node, _Inert) else node
        if isinstance(items, Mapping):
            below = [(f"{name}.{key}" if depth else f"{key}", depth + 1, value) for key, value in items.items()]
            pending += reversed(below)
    return flat


def _strip_wrappers(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for prefix in _WRAPPER_PREFIXES:
        if arrays and all(name.startswith(prefix) for name in arrays):
            return _strip_wrappers({name.removeprefix(prefix): array for name, array in arrays.items()})
    return arrays
