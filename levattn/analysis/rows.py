"""Rows of results: the same columns everywhere, in the same order, with the same digits."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

from levattn.attention.registry import METHODS

# One evaluation: `evaluate_attention` and `evaluate_retrofit` return such rows, `read_results` reads them back.
Row = Mapping[str, Any]

COLUMNS = {
    "dataset": str,
    "model": str,
    "tokens": int,
    "attention": str,
    "k": int,
    "trained_with": str,
    "accuracy": float,
    "examples": int,
    "seconds": float,
    "options": str,
    "top5": float,
    "loss": float,
    "images_per_second": float,
    "probe": float,
    "probe_std": float,
    "knn": float,
    "agreement": float,
    "cosine": float,
    "error": float,
    "ms_per_image": float,
}
_DECIMALS = dict.fromkeys(COLUMNS, 6) | {"loss": 5, "seconds": 4, "images_per_second": 2, "ms_per_image": 4}
_MEASURES = ("accuracy", "probe", "cosine")
_FRACTIONS = ("accuracy", "top5", "probe", "knn", "agreement")
_OPTIONAL = ("options", *_MEASURES, *_FRACTIONS, "loss", "images_per_second", "probe_std", "error", "ms_per_image")


def tidy_rows(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Rows in reading order, with every column and no more digits than mean something.

    By data set, model and number of tokens; then models trained with dense attention first; then dense attention
    first, the methods in the order of the registry, and k upwards. An optional number that is missing or not finite
    (the loss of a run that diverged) is None. Idempotent.

    Args:
      rows: With the columns of `COLUMNS`; `accuracy`, `top5`, `probe`, `knn` and `agreement` are fractions, `k` is the
        number of keys that a query attends to (for dense attention, `tokens`), `options` are those of the attention
        beside k, `trained_with` is "dense", or method and k such as "leverage k=16". One of accuracy, probe and cosine
        at least must be there.

    Raises:
      ValueError: For a missing or unknown column, a fraction outside [0, 1] or k outside [1, tokens].
    """
    return sorted((_tidy(row) for row in rows), key=_reading_order)


def _tidy(row: Row) -> dict[str, Any]:
    missing, unknown = set(COLUMNS) - set(_OPTIONAL) - set(row), set(row) - set(COLUMNS)
    if missing or unknown:
        raise ValueError(f"columns must be {', '.join(COLUMNS)}: missing {sorted(missing)}, unknown {sorted(unknown)}")
    tidy = {}
    for column, kind in COLUMNS.items():
        value = row.get(column)
        if value in (None, "") or (kind is float and not math.isfinite(float(value))):
            if column not in _OPTIONAL:
                raise ValueError(f"{column}={value!r} must be a finite number or a name: every row needs it")
            tidy[column] = None
        else:
            tidy[column] = round(float(value), _DECIMALS[column]) if kind is float else kind(value)
    if measure(tidy) is None:
        raise ValueError(f"accuracy={row.get('accuracy')!r} must be a finite number, or there must be probe or cosine")
    for column in _FRACTIONS:
        if tidy[column] is not None and not 0 <= tidy[column] <= 1:
            raise ValueError(f"{column}={tidy[column]} must be a fraction in [0, 1]")
    if not 1 <= tidy["k"] <= tidy["tokens"]:
        raise ValueError(f"k={tidy['k']} must be in [1, {tidy['tokens']}], the number of tokens")
    return tidy


def measure(row: Row) -> float | None:
    """What rows are ranked by: the accuracy of the model, else of a probe on its features, else their cosine."""
    return next((row[name] for name in _MEASURES if row.get(name) is not None), None)


def filled(rows: Iterable[Row]) -> list[str]:
    """The columns in which any of the rows has a value, in order."""
    rows = list(rows)
    return [column for column in COLUMNS if any(row[column] is not None for row in rows)]


def _reading_order(row: Row) -> tuple:
    names = list(METHODS)
    rank = names.index(row["attention"]) if row["attention"] in names else len(names)
    trained = row["trained_with"]
    group = (row["dataset"], row["model"], row["tokens"], trained != "dense", trained)
    return *group, rank, row["attention"], row["options"] or "", row["k"]


def label(row: Row) -> str:
    """What tells rows of one k apart: the method, and its options where there are any."""
    return f"{row['attention']} {row['options']}" if row.get("options") else row["attention"]


def is_as_trained(row: Row) -> bool:
    """Whether the model runs with the attention it was trained with, rather than with another put in afterwards."""
    method, trained = row["attention"], row["trained_with"]
    # Layers that differ among each other are never put in afterwards.
    return method == "by layer" or trained in (method, f"{method} k={row['k']}") or trained.startswith(f"{method} eps=")


def settings(rows: Iterable[Row]) -> dict[tuple, list[Row]]:
    """Rows that can be compared with each other: by data set, model and number of tokens."""
    grouped: dict[tuple, list[Row]] = {}
    for row in tidy_rows(rows):
        grouped.setdefault((row["dataset"], row["model"], row["tokens"]), []).append(row)
    return grouped
