"""Whatever was measured, found on disk and made ready for a page: tables, and curves of training."""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from levattn.analysis.results import read_results
from levattn.analysis.rows import COLUMNS, filled, label, measure, tidy_rows
from levattn.training.metrics import METRICS_FILE
from levattn.training.workdir import CONFIG_FILE, VERSIONS_FILE

_MOST_POINTS = 400  # Of a curve: more than a screen shows.
_RECORDS = (CONFIG_FILE, VERSIONS_FILE)
_PER_CENT = ("accuracy", "top5", "probe", "probe_std", "knn", "agreement")


def read_measurements(paths: Sequence[str | os.PathLike]) -> dict[str, Any]:
    """Tables, points for charts and curves of all files and folders.

    Read are tables (`.csv`, and `.json` with `rows` that are records of plain values) and `metrics.jsonl`. In a folder
    other files are passed over; a file that is named itself must be one of these.

    Args:
      paths: Files, and folders with everything below them.

    Returns:
      tables: name, provenance (None where it is not on record), columns, rows. Columns have a name, a heading and a
        kind: text, number or percent (of fractions).
      points: One for each evaluation of a model at k keys, see `_point`.
      curves: name, hardware, and for each metric steps, seconds since the first line, and values.

    Raises:
      FileNotFoundError: There is no such path.
      ValueError: A file that is named is none of these, or there is nothing at all.
    """
    tables, curves = [], []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"{str(path)!r} is not there: --results takes files and folders of results")
        root = path if path.is_dir() else path.parent
        found = [(file, _read(file, root)) for file in _files(path)]
        if path.is_file() and found[0][1] is None:
            raise ValueError(f"{str(path)!r} holds no results: it must be metrics.jsonl, or a .csv or .json with rows")
        for file, content in found:
            if content is not None:
                (curves if file.name == METRICS_FILE else tables).append(content)
    if not tables and not curves:
        raise ValueError(
            f"there are no results in {', '.join(map(str, paths))}: no metrics.jsonl, .csv or .json with rows"
        )
    points = [point for table in tables for point in table.pop("points")]
    return {"tables": tables, "points": points, "curves": curves}


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for file in sorted(path.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        twin = file.suffix == ".csv" and file.with_suffix(".json").exists()
        wanted = file.name == METRICS_FILE or (file.suffix in (".csv", ".json") and file.name not in _RECORDS)
        # What is in both is read from the JSON, which knows how it was made.
        if file.is_file() and wanted and not hidden and not twin:
            yield file


def _read(file: Path, root: Path) -> dict[str, Any] | None:
    inside = file.relative_to(root).with_suffix("")
    name = "/".join((root.resolve().name, *(part for part in inside.parts if part not in ("results", "metrics"))))
    if file.name == METRICS_FILE:
        return _curves(file, name)
    record = None
    if file.suffix == ".json":
        content = _json(file)
        rows = content.get("rows") if isinstance(content, Mapping) else None
        record = content.get("provenance") if rows else None
    else:
        with file.open(newline="") as stream:
            rows = [{column: _number(text) for column, text in row.items()} for row in csv.DictReader(stream)]
    if not _is_flat(rows):
        return None
    if "trained_with" in rows[0]:  # of an evaluation
        rows = read_results(file) if file.suffix == ".csv" else tidy_rows(rows)
        columns = [_column(name, rows) for name in COLUMNS if name in filled(rows)]
        points = [_point(row, name, record) for row in rows]
    else:
        columns, points = [_column(name, rows) for name in dict.fromkeys(key for row in rows for key in row)], []
        columns = [column for column in columns if any(row.get(column["name"]) not in (None, "") for row in rows)]
    rows = [[row.get(column["name"]) for column in columns] for row in rows]
    return {"name": name, "provenance": record, "columns": columns, "rows": rows, "points": points}


def _is_flat(rows: Any) -> bool:
    """Whether there are rows, and every value is plain."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, Mapping) for row in rows):
        return False
    plain = (str, int, float, bool, type(None))
    return all(isinstance(key, str) and isinstance(value, plain) for row in rows for key, value in row.items())


def _column(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    texts = any(isinstance(row.get(name), str) and row[name] for row in rows)
    kind = "text" if texts else "percent" if name in _PER_CENT else "number"
    return {"name": name, "kind": kind}


def _point(row: Mapping[str, Any], table: str, record: Mapping[str, Any] | None) -> dict[str, Any]:
    """An evaluation as charts show it: what it is a point of, k, quality and time."""
    quality = next(name for name in ("accuracy", "probe", "cosine") if row[name] is not None)
    ms = row["ms_per_image"]
    if ms is None and row["images_per_second"]:
        ms = 1000 / row["images_per_second"]
    hardware = (record or {}).get("hardware") or {}
    return {
        "setting": f"{row['dataset']}, {row['model']}, {row['tokens']} tokens",
        "device": hardware.get("device_kind", "a device that is not on record"),
        "method": row["attention"],
        "series": label(row) + ("" if row["trained_with"] == "dense" else f", trained with {row['trained_with']}"),
        "as_trained": row["trained_with"] != "dense",
        "k": row["k"],
        "measure": quality,
        "value": measure(row),
        "ms": None if ms is None else round(ms, 6),
        "table": table,
        "folder": table.rpartition("/")[0] if "/" in table else table,
    }


def _curves(file: Path, name: str) -> dict[str, Any]:
    lines = [record for line in file.read_text().splitlines() if (record := _line(line)) is not None]
    start = min((line["time"] for line in lines), default=0.0)
    metrics: dict[str, list[tuple[int, float, float]]] = {}
    for line in lines:
        for key, value in line.items():
            if key not in ("step", "time") and isinstance(value, int | float):
                metrics.setdefault(key, []).append(
                    (line["step"], round(line["time"] - start, 2), float(f"{value:.5g}"))
                )
    versions = file.with_name(VERSIONS_FILE)
    record = _json(versions) if versions.exists() else {}
    thinned = {metric: points[:: -(-len(points) // _MOST_POINTS)] for metric, points in metrics.items()}
    hardware = (record.get("hardware") or {}).get("device_kind")
    return {"name": name, "hardware": hardware, "command": record.get("command"), "metrics": thinned}


def _line(text: str) -> dict[str, Any] | None:
    """A line of metrics; the last one of a run that was killed may be half written."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and {"step", "time"} <= set(line) else None


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{str(file)!r} is not valid JSON ({error}): restore it or leave it out") from error


def _number(text: str | None) -> Any:
    try:
        number = float(text or "")
    except ValueError:
        return text or None
    return (
        int(number) if number.is_integer() and "." not in (text or "") and "e" not in (text or "").lower() else number
    )
