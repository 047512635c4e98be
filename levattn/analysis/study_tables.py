"""A study of attention as tables for a terminal."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
import rich.table

from levattn.analysis.attention_study import Study
from levattn.analysis.study_plots import by_layer
from levattn.analysis.tables import new_console

_NAMED = ("attention", "k", "options", "kept")
_HEAD_COLUMNS = (
    "local_mass",
    "prefix_mass",
    "effective_keys",
    "rank",
    "effective_rank",
    "condition",
    "scaled_condition",
    "score_q50",
    "score_q95",
    "score_q100",
    "prefix_score",
)


def print_study(study: Study, file: io.TextIOBase | None = None) -> None:
    """Prints what each set of keys captures, and how alike sets are, over all layers and heads, then each layer.

    Args:
      study: From `study_attention`.
      file: Where to; None: stdout.
    """
    errors = "; ± is the standard error over images" if study.num_images > 1 else ""
    mean = f"mean over layers and heads, {study.num_images} images, in %{errors}"
    alike = [name for name in study.summary[0] if name.startswith("same_") and not name.endswith("_error")] + ["chance"]
    shares = [name for name in study.summary[0] if name not in (*_NAMED, *alike) and not name.endswith("_error")]
    _print(f"attention and its heavy entries (>= eps) on each set: {mean}", _shown(study.summary, shares), file)
    _print(f"Jaccard index of kept patches: {mean}", _shown(study.summary, alike), file)
    layers = range(len({row["layer"] for row in study.heads}))
    values = {name: by_layer(study.heads, name) for name in _HEAD_COLUMNS if name in study.heads[0]}
    each = [{"layer": str(i)} | {name.replace("_", " "): f"{x[i]:.3g}" for name, x in values.items()} for i in layers]
    _print("heads of each layer, means", each, file)


def _shown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[dict[str, str]]:
    shown = []
    for row in rows:
        cells = {"attention": f"{row['attention']} {row['options']}".rstrip(), "kept": f"{row['kept']:.3g}"}
        for name in columns:
            text = "" if row[name] is None else f"{100 * row[name]:.1f}"
            error = row.get(f"{name}_error")
            cells[_heading(name)] = text + (f" ± {100 * error:.1f}" if error is not None else "")
        shown.append(cells)
    return shown


def _heading(name: str) -> str:
    """mass, its part in the window and both; entries of at least 0.1 on the set, and on both; sets that are alike."""
    name = {"local_mass": "in window", "mass_with_local": "in both"}.get(name, name)
    return name.replace("covered_", ">= ").replace("_with_local", " in both").replace("same_", "same ")


def _print(title, rows, file):
    table = rich.table.Table(title=title, title_justify="left", title_style="dim", box=rich.box.SIMPLE_HEAD)
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "attention" else "right", overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    new_console(file).print(table)
