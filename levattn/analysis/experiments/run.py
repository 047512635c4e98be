"""The experiments by name, and what running one leaves behind. A new one is a file beside this and a line here."""

import csv
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import rich.box
import rich.table

from levattn.analysis.experiments.form import Row
from levattn.analysis.experiments.online import draw_online, run_online
from levattn.analysis.experiments.planted import draw_planted, run_planted
from levattn.analysis.experiments.random_signs import draw_random_signs, run_random_signs
from levattn.analysis.experiments.row_error import draw_row_error, run_row_error
from levattn.analysis.experiments.set_size import draw_set_size, run_set_size
from levattn.analysis.experiments.text import draw_text, run_text
from levattn.analysis.experiments.traffic import draw_traffic, run_traffic
from levattn.analysis.style import new_figure
from levattn.analysis.tables import new_console
from levattn.training.workdir import atomic_path, prepare_workdir, provenance, write_json


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A question, its measurement and its picture.

    Attributes:
      title: What is asked.
      run_fn: Measures; its keyword arguments, all with defaults, are the options of the command line.
      draw_fn: Draws the rows on a matplotlib figure.
    """

    title: str
    run_fn: Callable[..., list[Row]]
    draw_fn: Callable[[Sequence[Row], Any], None]


EXPERIMENTS = {
    "random_signs": Experiment("Random signs: keys that a universal set needs", run_random_signs, draw_random_signs),
    "planted": Experiment("Planted keys: what scores recover", run_planted, draw_planted),
    "set_size": Experiment("Universal sets for |x|^p: size and recall", run_set_size, draw_set_size),
    "row_error": Experiment("Attention |x|^p over its universal set: error of a row", run_row_error, draw_row_error),
    "online": Experiment("Online scores against offline scores", run_online, draw_online),
    "text": Experiment("Causal attention of a text encoder over few keys", run_text, draw_text),
    "traffic": Experiment("Bytes that a device receives, by formula", run_traffic, draw_traffic),
}


def run_experiment(name: str, folder: str | os.PathLike, **options: Any) -> list[Row]:
    """Runs one of `EXPERIMENTS`, prints its table and writes `NAME.csv`, `NAME.json` (with provenance), `NAME.png`.

    Args:
      name: Of the experiment.
      folder: Where to; made if it is not there.
      **options: Of its `run_fn`.

    Raises:
      ValueError: There is no such experiment, or see its `run_fn`.
      OSError: The folder cannot be written.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"experiment {name!r} must be one of {', '.join(EXPERIMENTS)}")
    experiment, folder = EXPERIMENTS[name], prepare_workdir(folder, flag="out")
    rows = experiment.run_fn(**options)
    print_rows(experiment.title, rows)
    with atomic_path(folder / f"{name}.csv") as path, path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    shown = {
        option: value if isinstance(value, int | float | tuple) else str(value)[:200]
        for option, value in options.items()
    }
    write_json(folder / f"{name}.json", {"provenance": provenance(), "options": shown, "rows": rows})
    with new_figure(folder / f"{name}.png", width=7.0, height=4.2) as figure:
        experiment.draw_fn(rows, figure)
    return rows


def print_rows(title: str, rows: Sequence[Row]) -> None:
    """Prints rows of equal columns as a table."""
    table = rich.table.Table(title=title, title_justify="left", title_style="dim", box=rich.box.SIMPLE_HEAD)
    for column, value in rows[0].items():
        table.add_column(column.replace("_", " "), justify="left" if isinstance(value, str) else "right")
    for row in rows:
        table.add_row(*(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()))
    new_console().print(table)
