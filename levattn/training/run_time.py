"""How long a training will take, from what others took: the speed that each run writes into its metrics."""

import dataclasses
import functools
import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from levattn.attention import AttentionSpec
from levattn.data import DataConfig, open_source, output_shape
from levattn.models import ModelConfig, attention_specs
from levattn.models.cost import forward_flops
from levattn.training.config import TrainConfig, from_config_dict
from levattn.training.metrics import METRICS_FILE
from levattn.training.workdir import CONFIG_FILE, VERSIONS_FILE

_RATE = "train/images_per_second"


@dataclasses.dataclass(frozen=True)
class MeasuredRun:
    """A run and how fast it went.

    Attributes:
      config: Of the run.
      image_shape: Height, width and channels of what its model saw.
      images_per_second: Median over its intervals, of one device; the first, which includes compilation, left out.
      device: What it ran on.
    """

    config: TrainConfig
    image_shape: tuple[int, int, int]
    images_per_second: float
    device: str


@dataclasses.dataclass(frozen=True)
class RunTime:
    """An estimate.

    Attributes:
      seconds: Of one device, to train, without compilation and evaluations.
      images_per_second: Of one device.
      is_measured: Whether a run of this model and attention was measured; else it is scaled by the number of
        operations from the run that is most like it, and often off by a factor of two.
      device: Of the measured run.
    """

    seconds: float
    images_per_second: float
    is_measured: bool
    device: str


def read_curve(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """The lines of a run's metrics, a torn last line left out; empty where there are none."""
    try:
        lines = (Path(workdir) / METRICS_FILE).read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def read_rate(workdir: str | os.PathLike) -> float | None:
    """Images a second of a run, all devices together; None where it has not logged two intervals."""
    rates = [line[_RATE] for line in read_curve(workdir) if line.get(_RATE)]
    return statistics.median(rates[1:]) if len(rates) > 1 else None


def measured_runs(folders: Iterable[str | os.PathLike]) -> list[MeasuredRun]:
    """Every run below some folders that says how fast it was, those that distil (they run two models) left out.

    Args:
      folders: Searched to any depth. Runs need their `config.json`, `metrics.jsonl` and `versions.json`; what
        cannot be read counts as not measured.
    """
    found = []
    for path in sorted(path for folder in folders for path in Path(folder).rglob(METRICS_FILE)):
        rate = read_rate(path.parent)
        if rate is None:
            continue
        try:
            config = from_config_dict(TrainConfig, json.loads((path.parent / CONFIG_FILE).read_text()))
            hardware = json.loads((path.parent / VERSIONS_FILE).read_text())["hardware"]
            shape = _image_shape(config.data)
            if config.distill is None:
                found.append(MeasuredRun(config, shape, rate / hardware["num_devices"], hardware["device_kind"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def estimate_run_time(
    config: TrainConfig, image_shape: tuple[int, int, int], num_images: int, runs: Sequence[MeasuredRun]
) -> RunTime | None:
    """How long a training takes, from the measured run that is most like it.

    Args:
      config: Of the training.
      image_shape: Height, width and channels of what its model sees.
      num_images: Seen in all of the training.
      runs: What was measured, the most trusted first.

    Returns:
      None without any measured run.
    """
    if not runs:
        return None
    flops = forward_flops(config.model, image_shape)

    def unlikeness(run: MeasuredRun) -> tuple:
        model, other = config.model, run.config.model
        network = [(each.dims, each.dtype, shape) for each, shape in ((model, image_shape), (other, run.image_shape))]
        is_same = network[0] == network[1] and _attention(model) == _attention(other)
        method = 0 if model.attention.method == other.attention.method else 1 if _is_dense(other) else 2
        distance = abs(math.log(flops / forward_flops(other, run.image_shape)))
        batches = abs(math.log(config.batch_size / run.config.batch_size))
        return not is_same, model.dtype != other.dtype, method, distance, model.scan != other.scan, batches

    best = min(runs, key=unlikeness)
    is_measured = not unlikeness(best)[0]
    rate = best.images_per_second
    if not is_measured:
        rate *= forward_flops(best.config.model, best.image_shape) / flops
    return RunTime(num_images / rate, rate, is_measured, best.device)


def _attention(model: ModelConfig) -> str | tuple[AttentionSpec, ...]:
    if _is_dense(model):
        return "dense"
    return attention_specs(model)


def _is_dense(model: ModelConfig) -> bool:
    return all(spec.method == "dense" and spec.power is None for spec in attention_specs(model))


@functools.cache
def _image_shape(data: DataConfig) -> tuple[int, int, int]:
    return tuple(output_shape(open_source(data, data.eval_split), data))
