"""Tensors out of files of `torch.save`, without PyTorch and without running anything that a file brings along.

Such a file is a zip archive: the numbers as raw bytes, and a pickle that says which bytes make which tensor. A pickle
is a program. This reader hands it nothing to call but what rebuilds tensors, and inert stand-ins for a few types that
training scripts leave beside them; a file that asks for anything else is refused before it gets it.
"""

import collections
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

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


def read_torch(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a file of `torch.save` or `torch.jit.save`, under the names of its state dict.

    Where a training script saved more, the weights are looked for under "model_ema", "state_dict", "model" and the
    like; everything that is not a tensor is left out.

    Args:
      path: A zip archive.

    Returns:
      Names to arrays, in the dtypes of the file; bfloat16 is that of JAX.

    Raises:
      ValueError: A damaged file, a pickle that asks for more than tensors need, or no tensors.
    """
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.count("/") <= 1 and name.endswith("data.pkl")]
        if len(pickles) != 1:
            raise ValueError("a zip archive without the data.pkl of torch.save")
        try:
            with archive.open(pickles[0]) as file:
                saved = _Unpickler(file, archive, pickles[0].removesuffix("data.pkl")).load()
        except (ValueError, zipfile.BadZipFile):
            raise
        except Exception as error:  # a pickle can go wrong in any way
            raise ValueError(f"its pickle is damaged: {error!r}") from error
    arrays = _strip_wrappers(_flatten(_unwrap(saved)))
    if not arrays:
        raise ValueError(f"it holds no tensors but a {type(saved).__name__}; save the model's state_dict()")
    return arrays


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
            data = self._archive.read(f"{self._root}data/{key}")
            if self._root + "byteorder" in self._archive.namelist():
                big = self._archive.read(self._root + "byteorder") == b"big"
                dtype = dtype.newbyteorder(">") if big else dtype
            self._storages[key] = np.frombuffer(data, dtype)
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


def _flatten(tree: Any, prefix: str = "") -> dict[str, np.ndarray]:
    """The tensors in dicts and TorchScript modules, nested or not, under names joined by dots."""
    if isinstance(tree, _Tensor):
        return {prefix.removesuffix("."): tree.array}
    items = tree.state if isinstance(tree, _Inert) else tree
    if not isinstance(items, Mapping):
        return {}
    flat = {}
    for name, value in items.items():
        flat |= _flatten(value, f"{prefix}{name}.")
    return flat


def _strip_wrappers(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for prefix in _WRAPPER_PREFIXES:
        if arrays and all(name.startswith(prefix) for name in arrays):
            return _strip_wrappers({name.removeprefix(prefix): array for name, array in arrays.items()})
    return arrays
