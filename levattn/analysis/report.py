"""A short report on a run for people, every number of which comes from the rows or from what is on record."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from levattn.analysis.rows import Row, is_as_trained, label, settings, tidy_rows
from levattn.analysis.tables import cell, markdown_table, split_columns
from levattn.attention.registry import METHODS
from levattn.training.workdir import VERSIONS_FILE, atomic_path, provenance


def write_report(
    folder: str | os.PathLike,
    rows: Sequence[Row],
    *,
    title: str,
    figures: Mapping[str, str | os.PathLike] | None = None,
    runs: Mapping[str, str | os.PathLike] | None = None,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Writes `report.md`: what the numbers say, the table, the figures, what was run, and how to run it again.

    Args:
      folder: Where; made if it is not there. Figures and runs are named by their path from here.
      rows: Of `evaluate_attention` or `read_results`.
      title: Heading.
      figures: Captions and image files, in order.
      runs: Names and workdirs of the training runs behind the rows; their commands are read from there.
      record: What made the rows. None: the `provenance` of this process.

    Returns:
      Path of the report.

    Raises:
      ValueError: There are no rows, or see `tidy_rows`.
      OSError: The folder cannot be written.
    """
    if not rows:
        raise ValueError("rows must not be empty: there is nothing to report")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record, runs = provenance() if record is None else record, runs or {}
    parts = [f"# {title}"]
    for group in settings(rows).values():
        phrase, columns = split_columns(group)
        parts += [f"## {phrase}", " ".join(findings(group)), markdown_table(group, columns).rstrip()]
    for caption, figure in (figures or {}).items():
        parts += [f"![{caption}]({_link(figure, folder)})", f"*{caption}*"]
    parts += ["## What was run", _describe(record, runs, folder)]
    parts += ["## Run it again", f"```sh\n{_commands(record, runs)}\n```"]
    parts += ["## What to try next", _next_steps(rows, runs)]
    path = folder / "report.md"
    with atomic_path(path) as temporary:
        temporary.write_text("\n\n".join(parts) + "\n")
    return path


def findings(rows: Sequence[Row]) -> list[str]:
    """Sentences that read off what rows of one data set and model say, computed from them and from nothing else."""
    rows = [row for row in tidy_rows(rows) if row["accuracy"] is not None]
    dense = next((row for row in rows if row["attention"] == row["trained_with"] == "dense"), None)
    retrofits = [row for row in rows if row["trained_with"] == "dense" and row["attention"] != "dense"]
    trained = [row for row in rows if is_as_trained(row) and row is not dense]
    return [*_on_dense(dense), *_on_retrofits(retrofits), *_on_trained(trained, retrofits, dense)]


def _on_dense(dense: Row | None) -> Iterator[str]:
    if dense:
        yield (
            f"With dense attention every query sees all {dense['k']} tokens, and the model classifies "
            f"{_percent(dense)} of {dense['examples']} examples correctly."
        )


def _on_retrofits(retrofits: Sequence[Row]) -> Iterator[str]:
    best = []
    for k in sorted({row["k"] for row in retrofits}):
        candidates = [row for row in retrofits if row["k"] == k]
        top = max(row["accuracy"] for row in candidates)
        winners = [row for row in candidates if row["accuracy"] == top]
        others = [f", leverage {_percent(r)}" for r in candidates if r["attention"] == "leverage" and r not in winners]
        names = " and ".join(map(label, winners))
        best.append(f"{names} at k = {k} ({_percent(winners[0])}{''.join(others)})")
    if best:
        several = len(set(map(label, retrofits))) > 1
        yield (
            "When the same parameters attend to k keys only, without training again, "
            f"{'the best method is ' if several else 'the accuracy is that of '}{', '.join(best)}."
        )


def _on_trained(trained: Sequence[Row], retrofits: Sequence[Row], dense: Row | None) -> Iterator[str]:
    for row in trained:
        parts = [f"Trained from scratch with {label(row)} attention, k = {row['k']}, it reaches {_percent(row)}"]
        if dense:
            parts.append(f", {_compare(row, dense)} dense attention")
        same = [r for r in retrofits if (label(r), r["k"]) == (label(row), row["k"])]
        if same:
            parts.append(f"; put into the dense model afterwards, the same attention reaches {_percent(same[0])}")
        yield f"{''.join(parts)}."


def _compare(row: Row, other: Row) -> str:
    """Above, below, or too near to tell: within two standard errors of the difference of two such samples."""
    variance = sum(r["accuracy"] * (1 - r["accuracy"]) / r["examples"] for r in (row, other))
    difference = row["accuracy"] - other["accuracy"]
    if difference**2 <= 4 * variance:
        return f"which {row['examples']} examples cannot tell from"
    return "above" if difference > 0 else "below"


def _percent(row: Row) -> str:
    return f"{cell('accuracy', row['accuracy'])} %"


def _describe(record: Mapping[str, Any], runs: Mapping[str, str | os.PathLike], folder: Path) -> str:
    hardware, versions = record["hardware"], record["versions"]
    devices = f"{hardware['num_devices']} x {hardware['device_kind']}, " if hardware["platform"] != "cpu" else ""
    lines = {
        "Time": record["time"],
        "Commit": f"{record['commit'] or 'not from a git checkout'}{', with changes' if record['dirty'] else ''}",
        "Hardware": f"{devices}{hardware['num_cpus']} CPU cores",
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items() if version),
    }
    lines |= {f"Training run, {name}": f"[{_path(run, folder)}]({_link(run, folder)})" for name, run in runs.items()}
    return "\n".join(f"- {name}: {text}" for name, text in lines.items())


def _commands(record: Mapping[str, Any], runs: Mapping[str, str | os.PathLike]) -> str:
    """The commands that made the runs, where they are on record, and the one that made the report; each once."""
    names: dict[str, list[str]] = {}
    for name, workdir in runs.items():
        file = Path(workdir) / VERSIONS_FILE
        if file.exists():
            names.setdefault(json.loads(file.read_text())["command"], []).append(name)
    names.setdefault(record["command"], []).append("evaluation and report")
    return "\n".join(f"# {', '.join(made)}\n{command}" for command, made in names.items())


def _next_steps(rows: Sequence[Row], runs: Mapping[str, str | os.PathLike]) -> str:
    tried = {row["attention"] for row in rows}
    methods = [method for method in METHODS if method not in tried] or list(METHODS)
    sizes = sorted({row["k"] for row in rows if row["attention"] != "dense"})
    checkpoint = next(iter(runs.values()), "WORKDIR")
    command = f"python eval.py --checkpoint {checkpoint} --attention {','.join(methods)}"
    command += f" --k {','.join(map(str, sizes)) or 'K'}"
    steps = [
        f"Another attention in the same parameters, without training: `{command}`.",
        "Patches around each query beside the kept keys: add `--option local_window=3x3`, and in a model with a class "
        "token `--option keep_prefix=1`.",
        "Your own images, one folder a class: `train.py` with `--config.data.source=folder:PATH "
        "--config.model.num_classes=N --config.data.image_size=PIXELS --config.model.variant=NAME/PATCH`, PIXELS a "
        "multiple of PATCH; where PATH has no train/ and test/ in it, also `--config.data.train_split='train[:90%]' "
        "--config.data.eval_split='train[90%:]'`.",
    ]
    return "\n".join(f"- {step}" for step in steps)


def _path(path: str | os.PathLike, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _link(path: str | os.PathLike, folder: Path) -> str:
    return quote(_path(path, folder))
