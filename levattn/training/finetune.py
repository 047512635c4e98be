"""Starting a run from the parameters of another, or of a model that others published."""

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from levattn.models import ModelConfig, scan_to_unrolled, unrolled_to_scan
from levattn.models.pretrained import (
    Content,
    LoadOptions,
    convert,
    nest,
    read_content,
    refuse_nonfinite,
    warn_of_guesses,
)
from levattn.models.pretrained.posemb import Resize, resize_positions
from levattn.training.checkpoint import has_checkpoint
from levattn.training.config import TrainConfig, from_config_dict
from levattn.training.state import TrainState

CHECKPOINT_FOLDER = "checkpoints"
EXPORT_FILE = "params.safetensors"
OWN_RESIZE: Resize = "bilinear_corners"  # of position embeddings, as in big_vision

_OWN_BLOCK = re.compile(r"Transformer/encoderblock(_\d+)?/MlpBlock_0/")  # big_vision's names are ours, too
# What changes a model's function and no shape of its parameters.
_UNSEEN = ("activation", "layer_norm_eps")


def with_params_of(
    state: TrainState, path: str | os.PathLike, model: ModelConfig | None = None, arch: str | None = None
) -> tuple[TrainState, list[str]]:
    """The state with the parameters of a finished run or another checkpoint in place of its own.

    Args:
      state: Freshly created.
      path: As for `read_fitting`.
      model: As for `read_fitting`.
      arch: As for `read_fitting`.

    Returns:
      The state with new parameters (the average, if there is one, starts at them), and the names of the leaves that
      keep their initial values.

    Raises:
      FileNotFoundError, ValueError: As `read_fitting` does.
    """
    params, loaded = flatten_dict(state.params, sep="/"), read_fitting(state.params, path, model, arch)
    kept = sorted(params.keys() - loaded.keys())
    for name, value in loaded.items():
        params[name] = jax.device_put(np.asarray(value, params[name].dtype), params[name].sharding)
    params = unflatten_dict(params, sep="/")
    ema_params = None if state.ema_params is None else jax.tree.map(lambda x: x.copy(), params)
    return state.replace(params=params, ema_params=ema_params), kept


def read_fitting(
    params: PyTree, path: str | os.PathLike, model: ModelConfig | None = None, arch: str | None = None
) -> dict[str, Any]:
    """Reads the parameters that a model is to start from.

    A head that is missing or has another number of classes is left out; position embeddings are resized to the model's
    grid of patches; all else must fit. Scanned and unrolled layers are converted into each other.

    Args:
      params: Of the model; only shapes are looked at, so those of a plan will do.
      path: The workdir of a finished run, a `.safetensors` or `.npz` file that one exported, or whatever else
        `levattn.load_pretrained` reads.
      model: Of which they are. Its activation and the like must then be those of the checkpoint, where that tells.
      arch: Name of the published model that tells what a checkpoint leaves open, as for `levattn.load_pretrained`.

    Returns:
      Names, the path in the tree joined by "/", to arrays.

    Raises:
      FileNotFoundError: There is nothing to read.
      ValueError: The file cannot be read, or does not fit; lists everything that does not.

    Warns:
      UserWarning: Something was guessed, or chosen, as by `levattn.load_pretrained`.
    """
    path = Path(path).expanduser()
    file = path / EXPORT_FILE if (path / EXPORT_FILE).exists() else path
    if has_checkpoint(path / CHECKPOINT_FOLDER) and file == path:
        raise FileNotFoundError(
            f"init_from={str(path)!r}: that run has not finished, it has checkpoints but no {EXPORT_FILE!r}; "
            "start it again with its own config, and it goes on to its end"
        )
    own = flatten_dict(params, sep="/")
    try:
        other, source = _read(file, own, arch)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"init_from={str(path)!r}: name a finished run's workdir or an exported file, or a published checkpoint: "
            f"{error}"
        ) from error
    other = flatten_dict(_in_layout_of(params, nest(other, repr(str(file)))), sep="/")
    fitting = {name: other[name] for name, leaf in own.items() if name in other and other[name].shape == leaf.shape}
    problems = []
    for name in own | other:
        if name in fitting or name.startswith(("head/", "head_dist/")):
            continue
        if name not in other:
            problems.append(f"{name} {own[name].shape} is missing there")
        elif name not in own:
            problems.append(f"{name} is not in the model")
        else:
            problems.append(f"{name} is {other[name].shape} there, {own[name].shape} in the model")
    for field in _UNSEEN if model and source else ():
        there, here = getattr(source, field), getattr(model, field)
        if there != here:
            problems.append(f"{field} is {there!r} there, {here!r} in the model: set model.{field} to that")
    if problems:
        raise ValueError("\n  ".join([f"init_from={str(file)!r} does not fit the model:", *problems]))
    return fitting


def own_params(content: Content) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """Of a file that names parameters as this project does: those parameters, and the config of the run that made it.

    Returns:
      Names, the path in the tree joined by "/", to arrays; none if the file names them otherwise. None for the config
      if it holds none.

    Raises:
      ValueError: Numbers that are not finite.
    """
    names = [name for name in content.arrays if name.startswith("params/")] or content.arrays
    params = {name.removeprefix("params/"): content.arrays[name] for name in names}  # the rest is optimizer state
    config = content.metadata.get("config", {})
    config = config if {"data", "model", "optimizer"} <= config.keys() else None
    if not (config or any(_OWN_BLOCK.match(name) for name in params)):
        return {}, None
    refuse_nonfinite(params, repr(str(content.path)))
    return params, config


def _read(path: Path, own: Mapping[str, Any], arch: str | None) -> tuple[dict[str, Any], ModelConfig | None]:
    """The parameters in a file, and their model if it is known, with positions on the grid that `own` have."""
    content = read_content(path)
    params, config = own_params(content)
    side = math.isqrt(own["pos_embedding"].shape[1]) if "pos_embedding" in own else None
    if not params:
        image_size = side and side * own["embedding/kernel"].shape[0]
        pretrained = convert(content, LoadOptions(image_size, allow_zero_head=True, arch=arch))
        warn_of_guesses(pretrained, path, arch="init_arch")
        return flatten_dict(pretrained.params, sep="/"), pretrained.model
    if arch is not None:
        raise ValueError(f"init_arch={arch!r} tells nothing of {str(path)!r}, which names tensors as this project does")
    if side and "pos_embedding" in params:
        old_side = math.isqrt(params["pos_embedding"].shape[1])
        grids = (old_side, old_side), (side, side)
        params["pos_embedding"] = resize_positions(params["pos_embedding"], *grids, OWN_RESIZE)
    return params, None if config is None else from_config_dict(TrainConfig, config).model


def _in_layout_of(params: PyTree, loaded: Mapping[str, Any]) -> Mapping[str, Any]:
    """`loaded` with its layers stacked or numbered as those of `params` are."""
    scanned = ["encoderblock" in tree.get("Transformer", {}) for tree in (params, loaded)]
    if "Transformer" not in loaded or scanned[0] == scanned[1]:
        return loaded
    return unrolled_to_scan(loaded) if scanned[0] else scan_to_unrolled(loaded)
