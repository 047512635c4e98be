"""Trainings that differ in one thing: accuracy, time of a step, and how the loss falls by step and by second."""

import csv
import dataclasses
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from levattn.analysis.seeds import against, hardware_of, median, read_evaluation, summarise
from levattn.analysis.style import INK, MUTED, new_figure
from levattn.training.run_time import read_curve
from levattn.training.workdir import CONFIG_FILE, atomic_path, write_json

_COLUMNS = (
    "group",
    "ablation",
    "dataset",
    "model",
    "tokens",
    "attention",
    "k",
    "options",
    "seeds",
    "accuracy",
    "std",
    "points_below_dense",
    "points_below_dense_std",
    "loss",
    "step_ms",
    "train_seconds",
    "train_images_per_second",
    "images_per_second",
)
_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", ":")
_SMOOTHING = 9  # logged losses, each of one batch


@dataclasses.dataclass(frozen=True)
class Curve:
    """A training as it went.

    Attributes:
      steps: Taken when the loss was logged.
      seconds: Of training up to there: evaluations, saves, interruptions and compilation do not count.
      loss: Of the batch of that step.
      images_per_second: Median over the intervals.
      batch_size: Images a step.
    """

    steps: Float[np.ndarray, " N"]
    seconds: Float[np.ndarray, " N"]
    loss: Float[np.ndarray, " N"]
    images_per_second: float
    batch_size: int


def training_curve(workdir: str | os.PathLike) -> Curve | None:
    """The training of a run; None where it has not logged two intervals.

    The time of an interval follows from its logged images a second. The first interval of a process includes
    compilation: an interval slower than a fifth of the median counts as one of median speed.
    """
    try:
        batch_size = json.loads((Path(workdir) / CONFIG_FILE).read_text())["batch_size"]
    except (OSError, ValueError, KeyError):
        return None
    lines = [line for line in read_curve(workdir) if line.get("train/images_per_second")]
    if len(lines) < 2:
        return None
    steps = np.array([line["step"] for line in lines], float)
    rates = np.array([line["train/images_per_second"] for line in lines])
    rate = float(np.median(rates[1:]))
    rates = np.where(rates < rate / 5, rate, rates)
    rates[0] = rate
    seconds = np.cumsum(np.diff(steps, prepend=0) * batch_size / rates)
    loss = np.array([np.nan if line["train/loss"] is None else line["train/loss"] for line in lines])
    return Curve(steps, seconds, loss, rate, batch_size)


def ablation_rows(
    groups: Mapping[str, Sequence[str]], folders: Mapping[str, Mapping[int, str | os.PathLike]]
) -> list[dict[str, Any]]:
    """One record an ablation, whether it has results or not.

    Args:
      groups: Names of the ablations by the question that they answer.
      folders: Workdirs by ablation and seed, "dense" among them.

    Returns:
      Records of group and ablation; dataset, model, tokens, attention, k and options as evaluated; seeds (those there
      are), missing, accuracies (by seed), accuracy (mean), std over seeds; points_below_dense (of the same seeds) with
      its std; loss (mean, of evaluation); step_ms and train_images_per_second (medians), train_seconds (of training
      alone), images_per_second (of inference, median).
    """
    rows = []
    found = {
        name: {seed: row[0] for seed, folder in seeds.items() if (row := read_evaluation(folder).get("rows"))}
        for name, seeds in folders.items()
    }
    dense = {seed: row["accuracy"] for seed, row in found["dense"].items()}
    for group, name in [(group, name) for group, names in groups.items() for name in names]:
        of_seeds = found[name]
        first = next(iter(of_seeds.values()), {})
        accuracies = {seed: row["accuracy"] for seed, row in of_seeds.items()}
        accuracy, std = summarise(accuracies.values())
        below, below_std = summarise(against(accuracies, dense)[1])
        curves = [curve for folder in folders[name].values() if (curve := training_curve(folder))]
        rows.append(
            {
                "group": group,
                "ablation": name,
                **{column: first.get(column) for column in ("dataset", "model", "tokens", "attention", "k", "options")},
                "seeds": [*of_seeds],
                "missing": [seed for seed in folders[name] if seed not in of_seeds],
                "accuracies": accuracies,
                "accuracy": accuracy,
                "std": std,
                "points_below_dense": below,
                "points_below_dense_std": below_std,
                "loss": summarise(row["loss"] for row in of_seeds.values() if row["loss"] is not None)[0],
                "step_ms": median(1000 * curve.batch_size / curve.images_per_second for curve in curves),
                "train_seconds": median(float(curve.seconds[-1]) for curve in curves),
                "train_images_per_second": median(curve.images_per_second for curve in curves),
                "images_per_second": median(row["images_per_second"] for row in of_seeds.values()),
            }
        )
    return rows


def write_ablations(
    rows: Sequence[Mapping[str, Any]],
    folders: Mapping[str, Mapping[int, str | os.PathLike]],
    out: str | os.PathLike,
    *,
    command: str,
    references: Sequence[str] = (),
) -> None:
    """Writes `ablations.csv`, `ablations.json` and a picture of each group that has results.

    Args:
      rows: Of `ablation_rows`.
      folders: As there.
      out: Folder; made if it is not there.
      command: That made the runs.
      references: Ablations that each picture shows beside those of its group.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    with atomic_path(out / "ablations.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            numbers = {name: round(value, 6) for name, value in row.items() if isinstance(value, float)}
            writer.writerow({**row, **numbers, "seeds": " ".join(map(str, row["seeds"]))})
    hardware = hardware_of(folder for seeds in folders.values() for folder in seeds.values())
    write_json(out / "ablations.json", {"command": command, "hardware": hardware, "rows": [*rows]})
    shown = [row for row in rows if row["ablation"] in references]
    for group, members in itertools.groupby(rows, key=lambda row: row["group"]):
        of_group = [row for row in members if row not in shown]
        if any(row["accuracy"] is not None for row in of_group):
            plot_ablations([*shown, *of_group], folders, out / f"{_file_name(group)}.png", title=group)


def plot_ablations(
    rows: Sequence[Mapping[str, Any]],
    folders: Mapping[str, Mapping[int, str | os.PathLike]],
    path: str | os.PathLike,
    *,
    title: str,
) -> None:
    """Draws accuracy with its spread over seeds, and the training loss by step and by second.

    Losses are running medians of what was logged, of the first seed that has any.

    Args:
      rows: Of `ablation_rows`; those without results are left out.
      folders: As there.
      path: Ends in .png or .svg.
      title: Of the picture.

    Raises:
      ValueError: No row has results.
    """
    rows = [row for row in rows if row["accuracy"] is not None]
    if not rows:
        raise ValueError("no row has an accuracy: there is nothing to plot")
    with new_figure(path, width=13.5, height=max(3.4, 1.6 + 0.28 * len(rows))) as figure:
        figure.suptitle(title, x=0.01, ha="left", fontweight="bold")
        figure.get_layout_engine().set(wspace=0.08)
        ax, by_step, by_second = figure.subplots(1, 3, width_ratios=(1.2, 1, 1))
        for position, row in enumerate(rows):
            style = _line_style(position, row["ablation"])
            accuracies = [100 * accuracy for accuracy in row["accuracies"].values()]
            ax.plot(accuracies, [position] * len(accuracies), "|", color=MUTED, ms=9)
            ax.plot(100 * row["accuracy"], position, "o", color=style["color"], ms=6)
            ax.annotate(
                f"{100 * row['accuracy']:.2f}",
                (1.02, position),
                xycoords=ax.get_yaxis_transform(),
                va="center",
                color=style["color"],
                annotation_clip=False,
            )
            curves = (training_curve(folder) for folder in folders[row["ablation"]].values())
            curve = next(filter(None, curves), None)
            if curve is not None:
                loss = _running_median(curve.loss)
                by_step.plot(curve.steps, loss, label=row["ablation"], **style)
                by_second.plot(curve.seconds, loss, **style)
        ax.set_yticks(range(len(rows)), [row["ablation"] for row in rows])
        ax.invert_yaxis()
        ax.set_xlabel("top-1 accuracy (%), a stroke for each seed")
        by_step.set_xlabel("step")
        by_second.set_xlabel("seconds of training")
        by_step.set_ylabel("training loss")
        handles, labels = by_step.get_legend_handles_labels()
        if handles:
            by_second.legend(handles, labels, fontsize=8, ncols=1 + (len(rows) > 8))


def _line_style(position: int, name: str) -> dict[str, Any]:
    if name == "dense":
        return {"color": INK, "lw": 1.6}
    if name == "leverage":
        return {"color": MUTED, "lw": 1.6}
    return {"color": _COLOURS[position % len(_COLOURS)], "ls": _DASHES[position // len(_COLOURS) % 3], "lw": 1.3}


def _running_median(values: Float[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    half = _SMOOTHING // 2
    return np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def _file_name(group: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in group).strip("_")
