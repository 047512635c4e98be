"""The same table twice: for a terminal and as Markdown."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.console
import rich.table

from levattn.analysis.rows import Row, filled, measure, settings

_HEADINGS = {
    "dataset": "dataset",
    "model": "model",
    "tokens": "tokens",
    "attention": "attention",
    "k": "k",
    "options": "options",
    "trained_with": "trained with",
    "accuracy": "accuracy %",
    "probe": "linear probe %",
    "probe_std": "std",
    "knn": "k-NN %",
    "agreement": "same class %",
    "cosine": "cosine",
    "error": "layer error",
    "top5": "top-5 %",
    "loss": "loss",
    "images_per_second": "images/s",
    "ms_per_image": "ms/image",
    "seconds": "seconds",
    "examples": "examples",
}
_SETTING = ("dataset", "model", "tokens", "examples")
_TEXT = ("dataset", "model", "attention", "options", "trained_with")


def cell(column: str, value: Any) -> str:
    """How a value is shown: fractions in per cent, nothing for None."""
    if value is None:
        return ""
    match column:
        case "accuracy" | "top5" | "probe" | "probe_std" | "knn" | "agreement":
            return f"{100 * value:.2f}"
        case "loss" | "cosine" | "error":
            return f"{value:.3f}"
        case "seconds":
            return f"{value:.2f}"
        case "images_per_second" | "ms_per_image":
            return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
        case _:
            return str(value)


def markdown_table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """A Markdown table that is also readable as text; it ends in a newline. None: every column that has a value."""
    columns = [c for c in _HEADINGS if c in filled(rows)] if columns is None else list(columns)
    lines = [[_HEADINGS[c] for c in columns]]
    lines += [[cell(c, row[c]).replace("|", "\\|") for c in columns] for row in rows]
    widths = [max(3, *map(len, texts)) for texts in zip(*lines, strict=True)]
    rule = [("-" * w if c in _TEXT else "-" * (w - 1) + ":") for c, w in zip(columns, widths, strict=True)]
    lines.insert(1, rule)

    def line(texts: list[str]) -> str:
        padded = (t.ljust(w) if c in _TEXT else t.rjust(w) for c, t, w in zip(columns, texts, widths, strict=True))
        return f"| {' | '.join(padded)} |\n"

    return "".join(map(line, lines))


def split_columns(rows: Sequence[Row]) -> tuple[str, list[str]]:
    """What all rows share, as a phrase, and the columns in which there is something to see."""
    shared = [c for c in _SETTING if len({row[c] for row in rows}) == 1]
    units = {"model": "model {}", "tokens": "{} tokens", "examples": "{} examples"}
    phrase = ", ".join(units.get(c, "{}").format(rows[0][c]) for c in shared)
    return phrase, [c for c in _HEADINGS if c in filled(rows) and c not in shared]


def print_table(rows: Sequence[Row], file: io.TextIOBase | None = None) -> None:
    """Prints the rows, grouped by what the model was trained with; the best of each group is bold.

    Args:
      rows: Of `evaluate_attention`, `evaluate_retrofit` or `read_results`.
      file: Where to. None: stdout; colours and bold only where it is a terminal.

    Raises:
      ValueError: See `levattn.analysis.rows.tidy_rows`.
    """
    console = new_console(file)
    for group in settings(rows).values():
        _print_group(console, group)


def print_by_layer(title: str, columns: Mapping[str, Sequence[float | int]], file: io.TextIOBase | None = None) -> None:
    """Prints a table of one line a layer.

    Args:
      title: Above the table.
      columns: Headings to one number a layer; whole numbers are shown as such, others to three decimals.
      file: As for `print_table`.
    """
    table = rich.table.Table(title=title, title_justify="left", title_style="dim", box=rich.box.SIMPLE_HEAD)
    for heading in ("layer", *columns):
        table.add_column(heading, justify="right", overflow="fold")
    for layer, values in enumerate(zip(*columns.values(), strict=True)):
        table.add_row(str(layer), *(str(x) if isinstance(x, int) else f"{x:.3f}" for x in values))
    new_console(file).print(table)


def new_console(file: io.TextIOBase | None = None) -> rich.console.Console:
    """A console that prints numbers plainly."""
    # Where nothing says how wide a line may be, no cell is cut.
    console = rich.console.Console(file=file, highlight=False)
    return console if console.is_terminal else rich.console.Console(file=file, highlight=False, width=200)


def _print_group(console: rich.console.Console, rows: Sequence[Row]) -> None:
    phrase, columns = split_columns(rows)
    table = rich.table.Table(title=phrase, title_justify="left", title_style="dim", box=rich.box.SIMPLE_HEAD)
    for column in columns:
        table.add_column(_HEADINGS[column], justify="left" if column in _TEXT else "right", overflow="fold")
    for i, row in enumerate(rows):
        best = max(measure(other) for other in rows if other["trained_with"] == row["trained_with"])
        last = i + 1 == len(rows) or rows[i + 1]["trained_with"] != row["trained_with"]
        style = "bold" if measure(row) == best else None
        table.add_row(*(cell(c, row[c]) for c in columns), style=style, end_section=last)
    console.print(table)
