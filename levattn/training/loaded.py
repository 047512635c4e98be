"""Any trained model and the data to run it on: a run of this project, its export, or a checkpoint others published."""

import dataclasses
import os
from pathlib import Path
from typing import Literal

from jaxtyping import PyTree

from levattn.data import DataConfig, open_source, output_shape
from levattn.models.pretrained import AS_PUBLISHED, LoadOptions, Preprocess, find_checkpoint
from levattn.training.config import TrainConfig
from levattn.training.export import read_export_config
from levattn.training.finetune import CHECKPOINT_FOLDER, EXPORT_FILE
from levattn.training.pretrained import read_any, refuse_arch
from levattn.training.trained import load_trained, split_step
from levattn.training.workdir import CONFIG_FILE, VERSIONS_FILE

# What the split for evaluation is called, in order of preference.
_EVAL_SPLITS = ("test", "validation", "train")


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A trained model and what it takes to run it on data.

    Attributes:
      config: Of the run that made it. Of a published checkpoint: its model, and its preprocessing of the data that
        were asked for.
      params: The parameters that are to be evaluated, fitting `config.model`.
      head: What the model's output is: "classifier" (logits), "projection" (an embedding), or None (features).
      name: For tables.
      guessed: As `Pretrained.guessed`.
      notes: As `Pretrained.notes`.
      class_names: As `Pretrained.class_names`.
    """

    config: TrainConfig
    params: PyTree
    head: Literal["classifier", "projection"] | None
    name: str
    guessed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] | None = None

    @property
    def is_classifier(self) -> bool:
        """Whether the output is logits."""
        return self.head == "classifier"


def load_model(
    path: str | os.PathLike,
    source: str | None = None,
    split: str | None = None,
    options: LoadOptions = AS_PUBLISHED,
) -> LoadedModel:
    """Reads a trained model, and says how it sees data.

    Args:
      path: As for `levattn.load_pretrained`. Of a run that is not finished the best checkpoint is read, else the
        newest.
      source: Data in place of the run's own, as `DataConfig.source`, seen at the size and with the normalisation that
        the model was trained with. A published checkpoint needs it.
      split: To evaluate on. None: the run's own; with `source` its test, validation or train split, the first there is.
      options: As for `levattn.load_pretrained`; data are prepared as squares alone.

    Returns:
      The model, with the parameters that the run evaluates (their average, where it keeps one).

    Raises:
      FileNotFoundError: There is no model at `path`, or the data are not on this machine.
      ValueError: A file that cannot be read, a published checkpoint without `source`.
    """
    path, told = find_checkpoint(path), {}
    if _is_of_this_project(path):
        refuse_arch(options.arch, path)
        config, params = load_trained(path)
        head, name = "classifier" if config.model.num_classes else None, config.model.variant
        if source is not None:
            config = on_source(config, source)
        if options.image_size is not None:
            resized = read_any(path, options)
            params, config = resized.params, _seen_by(config, resized.preprocess)
    else:
        published = read_any(path, options)
        told = {name: getattr(published, name) for name in ("guessed", "notes", "class_names")}
        if source is None:
            raise ValueError(
                f"checkpoint={str(path)!r} is a published {published.layout} model and comes without data: name a "
                "source, such as source=stamps, source=folder:PATH or source=tfds:imagenet2012"
            )
        config = TrainConfig(data=DataConfig(source=source), model=published.model, total_epochs=1.0)
        config = _seen_by(config, published.preprocess)
        params, head, name = published.params, published.head, published.name
    if split is None and source is not None:
        split = find_eval_split(config.data)
    if split is not None:
        config = _with_data(config, eval_split=split)
    return LoadedModel(config, params, head, name, **told)


def on_source(config: TrainConfig, source: str) -> TrainConfig:
    """The config with other data, at the size of image that the run was trained on.

    Args:
      config: Of the run; where it leaves `data.image_size` open, its own data say what the size is.
      source: As `data.source`.
    """
    size = config.data.image_size
    if size is None:
        size = output_shape(open_source(config.data, config.data.eval_split), config.data)[0]
    return _with_data(config, source=source, image_size=size)


def find_eval_split(data: DataConfig) -> str:
    """The split of a source to evaluate on where nobody says which: test, validation or train, the first there is.

    Raises:
      FileNotFoundError: The source is not on this machine.
      ValueError: It has none of them.
    """
    for split in _EVAL_SPLITS[:-1]:
        try:
            open_source(data, split)
        except ValueError:  # the next one may be there
            continue
        return split
    open_source(data, _EVAL_SPLITS[-1])
    return _EVAL_SPLITS[-1]


def _is_of_this_project(path: Path) -> bool:
    if path.is_file():
        return bool(read_export_config(path))
    path, _ = split_step(path)
    # `config.json` alone would do for Hugging Face, too.
    is_run = any((path / name).exists() for name in (EXPORT_FILE, CHECKPOINT_FOLDER))
    return is_run or all((path / name).exists() for name in (CONFIG_FILE, VERSIONS_FILE))


def _seen_by(config: TrainConfig, preprocess: Preprocess) -> TrainConfig:
    if not isinstance(preprocess.image_size, int):
        height, width = preprocess.image_size
        raise ValueError(
            f"the checkpoint is of images of {height}x{width} pixels, and data are prepared as squares: give "
            "image_size, a side in pixels; its position embeddings are resized"
        )
    return _with_data(
        config,
        image_size=preprocess.image_size,
        eval_resize=preprocess.resize,
        interpolation=preprocess.interpolation,
        mean=tuple(preprocess.mean),
        std=tuple(preprocess.std),
    )


def _with_data(config: TrainConfig, **changes) -> TrainConfig:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))
