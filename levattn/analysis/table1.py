"""The paper's table of accuracies, from the runs that are there so far: mean and spread over seeds, and its claims."""

import csv
import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from levattn.analysis import paper
from levattn.analysis.seeds import against, median, plain_table, plus_minus, read_evaluation, summarise
from levattn.training.run_time import read_rate
from levattn.training.workdir import atomic_path, write_json

_COLUMNS = (
    "dataset",
    "model",
    "tokens",
    "attention",
    "k",
    "trained_with",
    "seeds",
    "accuracy",
    "std",
    "of_dense",
    "points_below_dense",
    "loss",
    "train_images_per_second",
    "images_per_second",
)


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of the table.

    Attributes:
      attention: What the model is evaluated with.
      k: Keys kept; None for all of them (dense attention).
      trained_with: "dense", or the name of `attention` where the model was trained with what it is evaluated with.
    """

    attention: str
    k: int | None
    trained_with: str


def table1_cells(
    lines: Sequence[Line], runs: Mapping[tuple[str, str, int | None], Mapping[int, str | os.PathLike]]
) -> list[dict[str, Any]]:
    """One record a line and model.

    Args:
      lines: Of the table, dense attention among them.
      runs: Workdirs by seed, of every (model, method trained with, its k; None for dense). Those without a
        `results.json` count as missing.

    Returns:
      Records with the columns dataset, model, tokens (None until there is a result), attention, k, trained_with; seeds
      (those there are), missing (seeds); accuracy (mean, a fraction), std over seeds (None for one), accuracies by
      seed, of_dense (mean over the seeds that both have of the ratio to the dense model of the same seed) and
      points_below_dense, with their own `_std`; loss; train_images_per_second and images_per_second (medians).
    """
    read = {
        key: {seed: read_evaluation(folder).get("rows", []) for seed, folder in seeds.items()}
        for key, seeds in runs.items()
    }
    rates = {key: [read_rate(folder) for folder in seeds.values()] for key, seeds in runs.items()}
    cells = []
    for model in dict.fromkeys(key[0] for key in runs):
        dense = _of_line(read[model, "dense", None], Line("dense", None, "dense"))
        for line in lines:
            key = (model, line.trained_with, None if line.trained_with == "dense" else line.k)
            if key not in runs:  # more keys than tokens
                continue
            found = _of_line(read[key], line)
            first = next(iter(found.values()), {})
            accuracies = {seed: row["accuracy"] for seed, row in found.items()}
            cell = {
                "dataset": first.get("dataset"),
                "model": model,
                "tokens": first.get("tokens"),
                **dataclasses.asdict(line),
                "seeds": [*found],
                "missing": [seed for seed in runs[key] if seed not in found],
                "accuracies": accuracies,
            }
            cell |= _mean("accuracy", accuracies.values(), std="std")
            ratios, points = against(accuracies, {seed: row["accuracy"] for seed, row in dense.items()})
            cell |= _mean("of_dense", ratios) | _mean("points_below_dense", points)
            cell["loss"] = _mean("loss", [row["loss"] for row in found.values() if row["loss"] is not None])["loss"]
            cell["train_images_per_second"] = median(rates[key]) if line.attention == line.trained_with else None
            cell["images_per_second"] = median(row["images_per_second"] for row in found.values())
            cells.append(cell)
    return cells


def claims(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The paper's claim and two narrower ones, for each model: what was measured, and whether it holds.

    Returns:
      Records of model, claim, measured (text) and holds; None where a number is missing.
    """
    found = []
    for model in dict.fromkeys(cell["model"] for cell in cells):
        trained = {cell["k"]: cell for cell in cells if cell["model"] == model and cell["trained_with"] == "leverage"}
        for k, column, text, holds in (
            (32, "of_dense", "trained with top-32: over 90 % of dense (the paper's)", lambda x: x > 0.9),
            (32, "points_below_dense", "trained with top-32: within 1 point of dense", lambda x: x <= 1),
            (128, "points_below_dense", "trained with top-128: within 0.3 points of dense", lambda x: x <= 0.3),
        ):
            if k not in trained:
                continue
            value, std = trained[k][column], trained[k][f"{column}_std"]
            measured = "not yet measured"
            if value is not None:
                scale, unit = (100, "%") if column == "of_dense" else (1, "points")
                measured = f"{plus_minus(scale * value, None if std is None else scale * std)} {unit}"
            found.append(
                {"model": model, "claim": text, "measured": measured, "holds": None if value is None else holds(value)}
            )
    return found


def write_table1(
    cells: Sequence[Mapping[str, Any]], folder: str | os.PathLike, *, title: str, command: str, hardware: Iterable[str]
) -> None:
    """Writes `table.csv`, `table.json` and `table.md`, each whole or not at all, with what is still missing.

    Args:
      cells: Of `table1_cells`.
      folder: Where; made if it is not there.
      title: Heading of the Markdown.
      command: That made the runs.
      hardware: What the evaluations ran on.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    hardware = [*hardware]
    with atomic_path(folder / "table.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, _COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {**cell, **{name: round(cell[name], 6) for name in _COLUMNS if isinstance(cell[name], float)}}
            | {"seeds": " ".join(map(str, cell["seeds"]))}
            for cell in cells
        )
    facts = {"command": command, "hardware": hardware, "cells": [*cells], "claims": claims(cells)}
    numbers = [number._asdict() for number in paper.NUMBERS]
    write_json(folder / "table.json", facts | {"paper": {"claim": paper.CLAIM, "numbers": numbers}})
    with atomic_path(folder / "table.md") as path:
        path.write_text(_markdown(cells, title, command, hardware))


def _of_line(results: Mapping[int, Sequence[Mapping[str, Any]]], line: Line) -> dict[int, Mapping[str, Any]]:
    """The row of each seed that has it."""
    found = {}
    for seed, rows in results.items():
        for row in rows:
            if row["attention"] == line.attention and (line.k is None or row["k"] == line.k):
                found[seed] = row
    return found


def _mean(name: str, values: Iterable[float], std: str | None = None) -> dict[str, float | None]:
    return dict(zip((name, std or f"{name}_std"), summarise(values), strict=True))


def _markdown(cells: Sequence[Mapping[str, Any]], title: str, command: str, hardware: Sequence[str]) -> str:
    models = {cell["model"]: cell["tokens"] for cell in sorted(cells, key=lambda cell: cell["tokens"] or 0)}
    by_line: dict[Line, dict[str, Mapping[str, Any]]] = {}
    for cell in cells:
        line = Line(cell["attention"], cell["k"], cell["trained_with"])
        by_line.setdefault(line, {})[cell["model"]] = cell
    heads = [f"{model}, {tokens or '?'} tokens" for model, tokens in models.items()]
    rows = [
        [line.attention, "all" if line.k is None else str(line.k), _trained(line)]
        + [text for model in models for text in _texts(of_model.get(model))]
        for line, of_model in by_line.items()
    ]
    headings = ["attention", "k", "trained with", *(text for head in heads for text in (head, "of dense, %"))]
    parts = [
        f"# {title}",
        "Top-1 accuracy in %, mean ± standard deviation over seeds, and the share of dense attention.",
    ]
    parts += [
        plain_table(headings, rows, num_left=3),
        f"`{command}`" + (f" on {' and '.join(hardware)}" if hardware else ""),
    ]
    stated = {True: "holds", False: "does not hold", None: ""}
    parts += [
        plain_table(
            ["model", "claim", "measured", ""],
            [[claim["model"], claim["claim"], claim["measured"], stated[claim["holds"]]] for claim in claims(cells)],
            num_left=4,
        )
    ]
    missing = [
        f"- {cell['model']}, {_name(cell)}, trained with {cell['trained_with']}: "
        f"seed {', '.join(map(str, cell['missing']))}"
        for cell in cells
        if cell["missing"]
    ]
    if missing:
        parts.append("\n".join(["Still missing:", "", *missing]))
    parts += [_paper()]
    return "\n\n".join(parts) + "\n"


def _name(cell: Mapping[str, Any]) -> str:
    return cell["attention"] if cell["k"] is None else f"{cell['attention']} k={cell['k']}"


def _trained(line: Line) -> str:
    return "dense" if line.trained_with == "dense" else f"{line.trained_with} {line.k}"


def _texts(cell: Mapping[str, Any] | None) -> tuple[str, str]:
    if cell is None:
        return "-", "-"
    if cell["accuracy"] is None:
        return "missing", ""
    accuracy = plus_minus(100 * cell["accuracy"], None if cell["std"] is None else 100 * cell["std"])
    seeds = f" ({len(cell['seeds'])} of {len(cell['seeds']) + len(cell['missing'])} seeds)" if cell["missing"] else ""
    share = cell["of_dense"]
    return f"{accuracy}{seeds}", "" if share is None else f"{100 * share:.2f}"


def _paper() -> str:
    """The paper's numbers, each with its standing: other data, other models, another recipe."""
    by_row: dict[tuple, dict[str, str]] = {}
    for number in paper.NUMBERS:
        row = (number.attention, number.k, number.trained_with)
        by_row.setdefault(row, {})[number.model] = f"{number.accuracy:.2f} ({number.standing})"
    rows = [
        [attention, "all" if k is None else str(k), trained, *(of_row.get(model, "-") for model in paper.MODELS)]
        for (attention, k, trained), of_row in by_row.items()
    ]
    lead = (
        f"The paper's, on ImageNet-1k. Printed: {paper.CLAIM}. The numbers below were not compared with the print, or "
        "come from others who cite them; neither recipe nor code was published."
    )
    return f"{lead}\n\n{plain_table(['attention', 'k', 'trained with', *paper.MODELS], rows, 3)}"
