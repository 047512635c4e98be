"""One way to a trained model, whoever trained it."""

import math
import os
from pathlib import Path
from typing import Any

import jax

from levattn.data import open_source, output_shape
from levattn.models.pretrained import (
    AS_PUBLISHED,
    ImageSize,
    LoadOptions,
    Preprocess,
    Pretrained,
    convert,
    nest,
    read_content,
    warn_of_guesses,
    with_image_size,
)
from levattn.training.config import TrainConfig, from_config_dict
from levattn.training.export import check_own
from levattn.training.finetune import CHECKPOINT_FOLDER, EXPORT_FILE, OWN_RESIZE, own_params
from levattn.training.trained import load_trained, split_step
from levattn.training.workdir import VERSIONS_FILE


def load_pretrained(
    path: str | os.PathLike,
    *,
    image_size: ImageSize | None = None,
    allow_zero_head: bool = False,
    arch: str | None = None,
) -> Pretrained:
    """A trained model: its configuration, parameters and the input it expects.

    Args:
      path: The workdir of a run of this project, finished or not, or `WORKDIR/checkpoints/STEP` for one of its
        checkpoints; a file that a run exported; or a checkpoint that others published, as a file, a folder, or the
        `owner/name` of a repository in the download cache of Hugging Face (see
        `levattn.models.pretrained.read_pretrained`). Nothing is downloaded.
      image_size: As those below, see `levattn.models.pretrained.LoadOptions`: of the images to come, if not as trained.
      allow_zero_head: Take a published head that is all zeros.
      arch: Name of the published model that tells what a file without a config and without that name leaves open.

    Returns:
      The model and what belongs to it. A run's keeps the attention it was trained with; a published one's is dense.

    Raises:
      FileNotFoundError: There is nothing to read.
      ValueError: It cannot be read, or does not fit; with the next step.

    Warns:
      UserWarning: Something was guessed, or chosen; `Pretrained.guessed` and `Pretrained.notes`.
    """
    pretrained = read_any(path, LoadOptions(image_size, allow_zero_head, arch))
    warn_of_guesses(pretrained, path)
    return pretrained


def read_any(path: str | os.PathLike, options: LoadOptions = AS_PUBLISHED) -> Pretrained:
    """`load_pretrained` without its warnings."""
    path = Path(path).expanduser()
    workdir, _ = split_step(path)
    if any((workdir / name).exists() for name in (EXPORT_FILE, CHECKPOINT_FOLDER, VERSIONS_FILE)):
        refuse_arch(options.arch, path)
        config, params = load_trained(path)
        return _of_run(config, jax.device_get(params), path.absolute().name, options)
    content = read_content(path)
    params, config = own_params(content)
    if config is None:
        return convert(content, options)
    refuse_arch(options.arch, path)
    config = from_config_dict(TrainConfig, config, name=f"the config in {str(content.path)!r}")
    params = nest(params, repr(str(content.path)))
    check_own(config, params)
    return _of_run(config, params, content.name, options)


def refuse_arch(arch: str | None, path: Path) -> None:
    """Raises a ValueError for the name of a published model beside one of this project."""
    if arch is not None:
        raise ValueError(f"{arch=} tells nothing of {str(path)!r}, a model of this project: its config does")


def _of_run(config: TrainConfig, params: dict[str, Any], name: str, options: LoadOptions) -> Pretrained:
    preprocess = _preprocess(config, params)
    head = "classifier" if config.model.num_classes else None
    pretrained = Pretrained(config.model, params, preprocess, head, "levattn", name)
    return with_image_size(pretrained, options.image_size or preprocess.image_size, OWN_RESIZE)


def _preprocess(config: TrainConfig, params: dict[str, Any]) -> Preprocess:
    data, size = config.data, config.data.image_size
    if size is None and "pos_embedding" in params:
        size = config.model.dims.patch * math.isqrt(params["pos_embedding"].shape[1])
    elif size is None:  # that of the data themselves
        size = output_shape(open_source(data, data.eval_split), data)[0]
    channels = params["embedding"]["kernel"].shape[2]
    mean, std = (values if len(values) == channels else values * channels for values in (data.mean, data.std))
    return Preprocess(size, data.eval_resize or size, data.interpolation, mean, std)
