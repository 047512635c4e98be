"""Time of attention against the number of tokens, from the rows of `scripts/bench_attention.py`."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from levattn.analysis.style import INK, MUTED, method_style, new_figure

_DENSE = "fastest dense"


def plot_times(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Draws nanoseconds a token and head against tokens, both on logarithmic axes, a panel for each direction.

    Of dense attention the fastest implementation of each case is drawn, and of cases of as many tokens that with the
    most heads in all.

    Args:
      rows: With `case` as batch x tokens x heads, `name`, `is_dense`, `direction` and `ms`; those without a time are
        left out.
      path: Ends in .png or .svg.

    Raises:
      ValueError: No row has a time.
    """
    lines: dict[str, dict[str, dict[int, tuple[int, float]]]] = {}
    for row in rows:
        if row["ms"] is None:
            continue
        batch, tokens, heads = map(int, row["case"].split("x"))
        name = _DENSE if row["is_dense"] else row["name"]
        points = lines.setdefault(row["direction"], {}).setdefault(name, {})
        found = batch * heads, 1e6 * row["ms"] / (batch * tokens * heads)
        # More heads fill the device better; of as many the fastest counts.
        points[tokens] = min(points.get(tokens, found), found, key=lambda point: (-point[0], point[1]))
    if not lines:
        raise ValueError("no row has a time: there is nothing to plot")
    with new_figure(path, width=1.0 + 4.6 * len(lines), height=3.9) as figure:
        axes = figure.subplots(1, len(lines), squeeze=False, sharey=True)[0]
        for ax, (direction, by_name) in zip(axes, lines.items(), strict=True):
            _draw(ax, direction, by_name)
        axes[0].set_ylabel("ns a token and head")
        axes[0].legend(loc="upper left")


def _draw(ax: Any, direction: str, by_name: Mapping[str, Mapping[int, tuple[int, float]]]) -> None:
    for name, points in by_name.items():
        colour, marker = method_style("dense" if name == _DENSE else name)
        tokens = sorted(points)
        ax.plot(tokens, [points[n][1] for n in tokens], color=colour, marker=marker, markersize=5, label=name)
    shared = sorted(set.intersection(*map(set, by_name.values())))
    best = (
        min((points[shared[-1]][1] for name, points in by_name.items() if name != _DENSE), default=None)
        if shared
        else None
    )
    if best and _DENSE in by_name:
        dense = by_name[_DENSE][shared[-1]][1]
        ax.annotate(
            f"{dense / best:,.0f} x",
            (shared[-1], (dense * best) ** 0.5),
            color=INK,
            ha="right",
            xytext=(-8, 0),
            textcoords="offset points",
        )
        ax.plot([shared[-1]] * 2, [best, dense], color=MUTED, linewidth=0.8, linestyle=":")
    ax.set_title(direction, fontweight="bold")
    ax.set_xscale("log")
    ax.set_yscale("log")
    every = sorted({n for points in by_name.values() for n in points})
    ax.set_xticks(every, [f"{n:,}" for n in every], rotation=30, ha="right")
    ax.set_xticks([], minor=True)
    ax.set_xlabel("tokens")
