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
from levattn.training.checkpoint import has_checkpoint
from levattn.training.export import load_params
from levattn.training.state import TrainState

CHECKPOINT_FOLDER = "checkpoints"
EXPORT_FILE = "params.safetensors"


def with_params_of(state: TrainState, path: str | os.PathLike) -> tuple[TrainState, list[str]]:
    """The state with the parameters of a finished run or an exported file in place of its own.

    Args:
      state: Freshly created.
      path: As for `read_fitting`.

    Returns:
      The state with new parameters (the average, if there is one, starts at them), and the names of the leaves that
      keep their initial values.

    Raises:
      FileNotFoundError, ValueError: As `read_fitting` does.
    """
    params, loaded = flatten_dict(state.params, sep="/"), read_fitting(state.params, path)
    kept = sorted(params.keys() - loaded.keys())
    for name, value in loaded.items():
        params[name] = jax.device_put(np.asarray(value, params[name].dtype), params[name].sharding)
    params = unflatten_dict(params, sep="/")
    ema_params = None if state.ema_params is None else jax.tree.map(lambda x: x.copy(), params)
    return state.replace(params=params, ema_params=ema_params), kept


def read_fitting(params: PyTree, path: str | os.PathLike) -> dict[str, Any]:
    """Reads the parameters that a model is to start from.

    A head that is missing or has another number of classes is left out; all else must fit. Scanned and unrolled
    layers are converted into each other.

    Args:
      params: Of the model; only shapes are looked at, so those of a plan will do.
      path: The workdir of a finished run, or a `.safetensors` or `.npz` file.

    Returns:
      Names, the path in the tree joined by "/", to arrays.

    Raises:
      FileNotFoundError: There is nothing to read.
      ValueError: The file cannot be read, or parameters do not fit; lists every one that does not.
    """
    path = Path(path)
    file = path / EXPORT_FILE if path.is_dir() else path
    if has_checkpoint(path / CHECKPOINT_FOLDER) and not file.exists():
        raise FileNotFoundError(
            f"init_from={str(path)!r}: that run has not finished, it has checkpoints but no {EXPORT_FILE!r}; "
            "start it again with its own config, and it goes on to its end"
        )
    if not file.exists():
        raise FileNotFoundError(
            f"init_from={str(path)!r}: there is no {str(file)!r}; name a finished run's workdir or an exported file"
        )
    loaded, _ = load_params(file)
    own, other = (flatten_dict(tree, sep="/") for tree in (params, _in_layout_of(params, loaded)))
    fitting = {name: other[name] for name, leaf in own.items() if name in other and other[name].shape == leaf.shape}
    problems = []
    for name in own | other:
        if name in fitting or name.startswith("head/"):
            continue
        if name not in other:
            problems.append(f"{name} {own[name].shape} is missing there")
        elif name not in own:
            problems.append(f"{name} is not in the model")
        else:
            problems.append(f"{name} is {other[name].shape} there, {own[name].shape} in the model")
    if problems:
        raise ValueError("\n  ".join([f"init_from={str(file)!r} does not fit the model:", *problems]))
    return fitting


def _in_layout_of(params: PyTree, loaded: Mapping[str, Any]) -> Mapping[str, Any]:
    """`loaded` with its layers stacked or numbered as those of `params` are."""
    scanned = ["encoderblock" in tree.get("Transformer", {}) for tree in (params, loaded)]
    if "Transformer" not in loaded or scanned[0] == scanned[1]:
        return loaded
    return unrolled_to_scan(loaded) if scanned[0] else scan_to_unrolled(loaded)
