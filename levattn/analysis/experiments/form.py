"""What the experiments have in common: rows of a table, and how their pictures are drawn."""

from collections.abc import Iterable
from typing import Any

Row = dict[str, Any]

# Okabe and Ito's, as in `levattn.analysis.style`, for series that are no attention method.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


def distinct(rows: Iterable[Row], column: str) -> list:
    """The values of a column, each once, in the order they come."""
    return list(dict.fromkeys(row[column] for row in rows))


def mark_values(ax: Any, values: Iterable[int | float]) -> None:
    """Ticks of the x axis, which is logarithmic, at the values that were measured and nowhere else."""
    values = list(values)
    ax.set_xticks(values, [f"{value:g}" if isinstance(value, float) else str(value) for value in values])
    ax.set_xticks([], minor=True)


def panels(figure: Any, number: int) -> list:
    """Axes side by side that share their y axis."""
    figure.set_size_inches(1 + 3.6 * number, 4.2)
    return list(figure.subplots(1, number, squeeze=False, sharey=True)[0])
