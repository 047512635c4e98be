"""Parameters in one file that other tools read: `.safetensors` or `.npz`, float32, with the config that made them.

Names are the path in the parameter tree, joined by `/`. An `.npz` has them behind `params/`, as big_vision writes and
expects them, and the config as JSON text under `__config__`; a `.safetensors` has it in its metadata, under `config`.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict
from jax.experimental import multihost_utils

from levattn.attention import AttentionSpec
from levattn.models.pretrained import check_params, nest, read_content, refuse_nonfinite
from levattn.models.pretrained.archive import read_npz
from levattn.models.pretrained.safetensors_file import read_header
from levattn.training.attentions import with_attention
from levattn.training.config import TrainConfig
from levattn.training.workdir import atomic_path

_CONFIG = "__config__"
_PREFIX = "params/"


def export_params(path: str | os.PathLike, params: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Writes parameters and config, atomically. Every process of a run calls this; process 0 writes.

    Args:
      path: Ends in `.safetensors` or `.npz`; its folder exists.
      params: Nested dicts of arrays, sharded or not. Floating-point ones are written as float32.
      config: JSON serialisable.

    Raises:
      ValueError: Another suffix.
    """
    path = Path(path)
    _check_suffix(path)
    arrays = {name: _to_numpy(leaf) for name, leaf in flatten_dict(params, sep="/").items()}
    if jax.process_index() != 0:
        return
    config_json = json.dumps(config)
    with atomic_path(path) as temporary:
        if path.suffix == ".npz":
            named = {_PREFIX + name: array for name, array in arrays.items()}
            np.savez(temporary, **named, **{_CONFIG: np.array(config_json)})
        else:
            safetensors.numpy.save_file(arrays, temporary, metadata={"config": config_json})


def load_params(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads what `export_params` wrote, or a file of the same naming from elsewhere.

    Where an `.npz` has names under `params/`, only those are read (others are optimizer state).

    Returns:
      Nested dicts of NumPy arrays, and the config ({} if the file has none).

    Raises:
      FileNotFoundError: No such file.
      ValueError: Another suffix, pickled objects (which could run code and are never loaded), a damaged file, NaN or
        infinite numbers.
    """
    path = Path(path)
    _check_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    content = read_content(path)
    names = [name for name in content.arrays if name.startswith(_PREFIX)] or content.arrays
    params = {name.removeprefix(_PREFIX): content.arrays[name] for name in names}
    refuse_nonfinite(params, repr(str(path)))
    return nest(params, repr(str(path))), content.metadata.get("config", {})


def check_own(config: TrainConfig, params: Mapping[str, Any]) -> None:
    """Refuses parameters that are not those of the model of their config, or not finite.

    Raises:
      ValueError: Listing all that does not fit.
    """
    positions = params.get("pos_embedding")
    side = math.isqrt(positions.shape[1]) if getattr(positions, "ndim", 0) == 3 else 1
    model = with_attention(config.model, AttentionSpec("dense"))  # which has no parameters, and might want more tokens
    check_params(model, params, model.dims.patch * max(1, side), "an export of this project")


def read_export_config(path: str | os.PathLike) -> dict[str, Any]:
    """The config in a file that `export_params` wrote, without reading its parameters; {} of any other file."""
    path = Path(path)
    try:
        if path.suffix == ".npz":
            config_json = str(read_npz(path, only=_CONFIG).get(_CONFIG, "{}"))
        else:
            config_json = read_header(path)[2].get("config", "{}")
        config = json.loads(config_json)
    except Exception:  # other formats and damaged files; whoever reads the parameters says what is wrong
        return {}
    return config if isinstance(config, dict) and {"data", "model"} <= config.keys() else {}


def _to_numpy(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    array = np.asarray(leaf)
    return array.astype(np.float32) if jnp.issubdtype(array.dtype, np.floating) else array


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".npz", ".safetensors"):
        raise ValueError(f"{str(path)!r} must end in .safetensors or .npz")
