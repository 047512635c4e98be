"""Numbers of runs that differ in their seed alone."""

import json
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def summarise(values: Iterable[float]) -> tuple[float | None, float | None]:
    """Mean, and standard deviation of a sample (n - 1); None for the mean of nothing and the deviation of one."""
    values = [*values]
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def median(values: Iterable[float | None]) -> float | None:
    """Median of those that are not None; None where all are."""
    values = [value for value in values if value is not None]
    return statistics.median(values) if values else None


def against(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[list[float], list[float]]:
    """Ratios to, and percentage points below, the accuracy of another run of the same seed.

    Args:
      ours: Accuracies by seed, fractions.
      theirs: Likewise; seeds that one of the two lacks are left out, and ratios to 0.
    """
    pairs = [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
    return [a / b for a, b in pairs if b], [100 * (b - a) for a, b in pairs]


def read_evaluation(folder: str | os.PathLike) -> dict[str, Any]:
    """What `results.json` of a run holds, `rows` and `provenance` among it; empty where there is none yet."""
    try:
        return json.loads((Path(folder) / "results.json").read_text())
    except (OSError, ValueError):
        return {}


def hardware_of(folders: Iterable[str | os.PathLike]) -> list[str]:
    """What the evaluations of some runs were made on, such as "1 x NVIDIA H100", each once."""
    found = (read_evaluation(folder).get("provenance", {}).get("hardware") for folder in folders)
    return sorted({f"{hardware['num_devices']} x {hardware['device_kind']}" for hardware in found if hardware})


def plus_minus(mean: float, std: float | None, digits: int = 2) -> str:
    """ "93.18 ± 0.05", or the mean alone."""
    return f"{mean:.{digits}f}" if std is None else f"{mean:.{digits}f} ± {std:.{digits}f}"


def plain_table(headings: Sequence[str], rows: Sequence[Sequence[str]], num_left: int) -> str:
    """A Markdown table whose columns behind the first `num_left` stand to the right."""
    rule = ["---" if column < num_left else "---:" for column in range(len(headings))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, rule, *rows))
