"""From what is asked of scripts/analyze.py to tables, files and pictures."""

import contextlib
import csv
import dataclasses
import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from PIL import Image

from levattn.analysis.attention_study import HEAD_COLUMNS, SET_COLUMNS, Model, Study, StudyOptions, study_attention
from levattn.analysis.evaluation import chosen_attentions, describe_model
from levattn.analysis.study_plots import plot_study
from levattn.analysis.study_tables import print_study
from levattn.analysis.views import VIEWS
from levattn.attention import AttentionSpec
from levattn.attention.local import Window
from levattn.data import DataConfig, Source, eval_batches, normalize, open_source
from levattn.data.sources.folder import FolderSource
from levattn.data.splits import parse_split
from levattn.models.pretrained import LoadOptions
from levattn.training.attentions import attention_of
from levattn.training.config import EvalConfig
from levattn.training.loaded import LoadedModel, load_model
from levattn.training.workdir import atomic_path, prepare_workdir, provenance, write_json

DEFAULT_K = (8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class AnalyzeConfig:
    """What to look at. Fields that are not told here are the flags of eval.py of the same name.

    Attributes:
      checkpoint: Models of one shape, the last of which is looked at.
      out: Folder for the results.
      source: Data; None: the run's own.
      split: Of the source.
      images: Image files and folders of them, in place of a source.
      num_images: The most to look at.
      attention: Methods.
      k: Numbers of keys; None: `DEFAULT_K`, unless a threshold or a k for each head says how many.
      option: Fields of `AttentionSpec`.
      window: See `StudyOptions`, as for the next three.
      eps: Thresholds.
      views: Of an image.
      spectra_images: For rank and condition.
      batch_size: Images at a time.
      image_size: In pixels.
      arch: A published model.
    """

    checkpoint: tuple[str, ...]
    out: str
    source: str | None = None
    split: str | None = None
    images: tuple[str, ...] = ()
    num_images: int = 64
    attention: tuple[str, ...] = ("leverage",)
    k: tuple[int, ...] | None = None
    option: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    window: Window | None = (3, 3)
    eps: tuple[float, ...] = (0.01, 0.1, 0.5)
    views: tuple[str, ...] = VIEWS
    spectra_images: int = 8
    batch_size: int = 8
    image_size: int | None = None
    arch: str | None = None

    def __post_init__(self):
        for field in ("num_images", "batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be at least 1")
        if not self.attention or not self.checkpoint:
            raise ValueError("attention and checkpoint must name something to look at")
        if self.images and self.source:
            raise ValueError("images and source must not both be given: either says what to look at")


def run_analysis(config: AnalyzeConfig) -> Study:
    """Looks at a model's attention, prints a summary, and writes tables and pictures.

    Raises:
      OSError: A model or the data are missing, or the folder cannot be written.
      ValueError: Something does not fit something else; the message says what.
    """
    out = prepare_workdir(config.out, flag="out")
    options = StudyOptions(config.window, config.eps, config.views, config.spectra_images)
    loaded = [_load(path, config) for path in config.checkpoint]
    trained = loaded[-1]
    specs = _specs(config, trained)
    data = trained.config.data
    if config.images:
        source = image_files(config.images, num_channels=trained.params["embedding"]["kernel"].shape[2])
    else:
        source = open_source(data, data.eval_split)
    names = _distinct([Path(path).name.partition(".")[0] for path in config.checkpoint])
    models = [Model(name, model.config.model, model.params) for name, model in zip(names, loaded, strict=True)]
    print(describe_model(trained))
    count = min(config.num_images, len(source))
    print(f"{trained.name}: {count} of {len(source)} images of {source.name}", flush=True)
    batches = normalised_batches(source, data, count, config.batch_size)
    study = study_attention(models, specs, batches, data.mean, data.std, options)
    print_study(study)
    facts = {
        "model": trained.name,
        "source": source.name,
        "split": str(source.split),
        "images": study.num_images,
        "config": dataclasses.asdict(config),
    }
    write_study(study, out, facts)
    for path in plot_study(study, out):
        print(f"written to {path}")
    return study


def write_study(study: Study, folder: str | os.PathLike, facts: Mapping[str, Any]) -> None:
    """Writes sets.csv and heads.csv, and all of the study as analysis.json.

    Args:
      study: From `study_attention`.
      folder: Where to; it is there.
      facts: What was looked at, JSON serialisable.
    """
    folder = Path(folder)
    for name, rows in (("sets", study.sets), ("heads", study.heads)):
        with atomic_path(folder / f"{name}.csv") as path, path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    columns = {"columns_of_sets": SET_COLUMNS, "columns_of_heads": HEAD_COLUMNS}
    record = {"provenance": provenance()} | dict(facts) | columns
    rows = {"summary": study.summary, "layers": study.layers, "sets": study.sets, "heads": study.heads}
    write_json(folder / "analysis.json", record | rows)


def image_files(paths: Sequence[str | os.PathLike], num_channels: int = 3) -> FolderSource:
    """Image files, and all those below folders, in order of their names within each folder; without classes.

    Args:
      paths: Of files and folders.
      num_channels: 3, or 1 for grey.

    Raises:
      FileNotFoundError: A path that is not there, or no image in a folder.
    """
    suffixes = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    files: list[str] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"images: {str(path)!r} does not exist")
        below = sorted(p for p in path.rglob("*") if p.suffix.lower() in suffixes) if path.is_dir() else [path]
        if not below:
            raise FileNotFoundError(f"images: no image in the folder {str(path)!r}")
        files += map(str, below)
    labels = np.zeros(len(files), np.int32)
    return FolderSource("images", parse_split("train"), ("",), None, num_channels, "", tuple(files), labels)


def normalised_batches(
    source: Source, data: DataConfig, num_images: int, batch_size: int
) -> Iterator[tuple[Float[Array, "B h w c"], int]]:
    """The images at the start of a source, in batches of one shape, and how many at the start of each count."""
    batch_size = min(batch_size, num_images)
    with contextlib.closing(eval_batches(source, data, batch_size=batch_size)) as stream:
        for batch, start in zip(stream, itertools.count(step=batch_size), strict=False):
            count = min(int(batch["mask"].sum()), num_images - start)
            if count > 0:
                yield jnp.asarray(normalize(batch["image"], data)), count
            if start + batch_size >= num_images:
                break


def _load(path: str, config: AnalyzeConfig) -> LoadedModel:
    options = LoadOptions(config.image_size, allow_zero_head=True, arch=config.arch)
    if config.images:  # the name stands for none that is opened
        return load_model(path, "folder:", "train", options)
    return load_model(path, config.source, config.split, options)


def _specs(config: AnalyzeConfig, trained: LoadedModel) -> list[AttentionSpec]:
    k = config.k
    if k is None:
        own = attention_of(trained.config.model)
        fields = dataclasses.asdict(own[0] if isinstance(own, tuple) else own) | config.option
        k = DEFAULT_K if fields["eps"] is None and fields["k_per_head"] is None else ()
    asked = EvalConfig(checkpoint=config.checkpoint[-1], attention=config.attention, k=k, option=dict(config.option))
    return chosen_attentions(asked, trained)


def _distinct(names: Sequence[str]) -> list[str]:
    taken = [*names, "heads", *VIEWS]
    return [name if taken.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(names, 1)]
