"""Results in files that people and programs read."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from levattn.analysis.rows import Row, filled, tidy_rows
from levattn.analysis.tables import markdown_table
from levattn.training.workdir import atomic_path, provenance, write_json


def write_results(
    rows: Sequence[Row],
    folder: str | os.PathLike,
    record: Mapping[str, Any] | None = None,
    **more: Any,
) -> list[dict[str, Any]]:
    """Writes `results.csv`, `results.json` and `results.md` (a Markdown table), each whole or not at all.

    Args:
      rows: See `tidy_rows`, which orders and rounds them first.
      folder: Where; made if it is not there.
      record: What made the rows, written into the JSON beside them. None: the `provenance` of this process (command,
        time, commit, hardware, versions).
      **more: Further entries of the JSON.

    Returns:
      The rows as written.

    Raises:
      ValueError: See `tidy_rows`.
      OSError: The folder cannot be written.
    """
    rows = tidy_rows(rows)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "results.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, filled(rows), extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_json(folder / "results.json", {"provenance": provenance() if record is None else record, "rows": rows} | more)
    with atomic_path(folder / "results.md") as path:
        path.write_text(markdown_table(rows))
    return rows


def read_results(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Rows of a `results.csv`.

    Raises:
      ValueError: For another table than `write_results` writes; the message names the file.
    """
    with Path(path).open(newline="") as file:
        try:
            return tidy_rows(csv.DictReader(file))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is not a table of results: {error}") from error
