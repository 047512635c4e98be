"""The rows of a case as a table for people."""

from collections.abc import Sequence

from rich.table import Table

from levattn.bench.measure import BACKWARD, FORWARD, Row


def case_table(rows: Sequence[Row]) -> Table:
    """A line for each contender that ran, both passes in it; the caption says why others, or a pass, did not run.

    Args:
      rows: Of one case, with their ratios, see `with_dense_ratios`.
    """
    table = Table(title=f"{rows[0].case} (batch x tokens x heads)", title_justify="left", caption_justify="left")
    table.add_column("")
    for heading in ("fwd ms", "/ dense", "/ floor", "fwd+bwd ms", "/ dense", "/ floor", "MiB", "compile s"):
        table.add_column(heading, justify="right")
    for heading in ("error", "grad error", "recall"):
        table.add_column(heading, justify="right")
    for name in dict.fromkeys(row.name for row in rows):
        passes = {row.direction: row for row in rows if row.name == name}
        if all(row.ms is None and row.estimated_ms is None and row.error is None for row in passes.values()):
            continue
        forward, backward = passes[FORWARD], passes[BACKWARD]
        largest = max((row.peak_bytes for row in passes.values() if row.peak_bytes is not None), default=None)
        table.add_row(
            name,
            *_times(forward),
            *_times(backward),
            _text(None if largest is None else largest / 2**20, "{:,.0f}"),
            _text(sum(row.compile_seconds or 0 for row in passes.values()), "{:.1f}"),
            _text(forward.error, "{:.1e}"),
            _text(backward.gradient_error, "{:.1e}"),
            _text(forward.recall, "{:.3f}"),
        )
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.why_not:
            reasons.setdefault((row.name, row.why_not), []).append(row.direction)
    lines = [f"{name} ({', '.join(directions)}): {why_not}" for (name, why_not), directions in reasons.items()]
    table.caption = "\n".join(lines) or None
    return table


def _times(row: Row) -> tuple[str, str, str]:
    about = "~" if row.dense_is_estimated else ""
    ms = _text(row.ms, "{:,.3f}") if row.estimated_ms is None else f"~{row.estimated_ms:,.0f}"
    return ms, _text(row.dense_ratio, about + "{:.3f}"), _text(row.floor_ratio, "{:.1f}")


def _text(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)
