"""Starting a run from the parameters of another."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from levattn.models import scan_to_unrolled, unrolled_to_scan
from levattn.training.export import load_params
from levattn.training.state import TrainState

CHECKPOINT_FOLDER = "checkpoints"
EXPORT_FILE = "params.safetensors"


def with_params_of(state: TrainState, path: str | os.PathLike) -> TrainState:
    """The state with the parameters of a finished run or an exported file in place of its own.

    A head of another number of classes stays as it was initialised; all else must fit. Scanned and unrolled layers
    are converted into each other.

    Args:
      state: Freshly created.
      path: The workdir of a finished run, or a `.safetensors` or `.npz` file.

    Returns:
      The state with new parameters; the average, if there is one, starts at them.

    Raises:
      FileNotFoundError: There is nothing to read.
      ValueError: The parameters do not fit; lists every one that does not.
    """
    path = Path(path)
    file = path / EXPORT_FILE if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(
            f"init_from={str(path)!r}: there is no {str(file)!r}; name a finished run's workdir or an exported file"
        )
    loaded, _ = load_params(file)
    params = _merge(state.params, _in_layout_of(state.params, loaded), str(file))
    return state.replace(params=params, ema_params=state.ema_params and jax.tree.map(lambda x: x.copy(), params))


def _in_layout_of(params: PyTree, loaded: Mapping[str, Any]) -> Mapping[str, Any]:
    """`loaded` with its layers stacked or numbered as those of `params` are."""
    scanned = ["encoderblock" in tree.get("Transformer", {}) for tree in (params, loaded)]
    if "Transformer" not in loaded or scanned[0] == scanned[1]:
        return loaded
    return unrolled_to_scan(loaded) if scanned[0] else scan_to_unrolled(loaded)


def _merge(params: PyTree, loaded: Mapping[str, Any], source: str) -> PyTree:
    own, other = flatten_dict(params, sep="/"), flatten_dict(loaded, sep="/")
    problems, merged = [], {}
    for name, leaf in own.items():
        fits = name in other and other[name].shape == leaf.shape
        if fits:
            merged[name] = jax.device_put(np.asarray(other[name], leaf.dtype), leaf.sharding)
        elif name.startswith("head/"):
            merged[name] = leaf
        elif name in other:
            problems.append(f"{name} is {other[name].shape} there, {leaf.shape} in the model")
        else:
            problems.append(f"{name} {leaf.shape} is missing there")
    problems += [f"{name} is not in the model" for name in other if name not in own and not name.startswith("head/")]
    if problems:
        raise ValueError("\n  ".join([f"init_from={source!r} does not fit the model:", *problems]))
    return unflatten_dict(merged, sep="/")
