"""Accuracy against the number of keys a query attends to."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from levattn.analysis.rows import Row, is_as_trained, label, settings
from levattn.analysis.style import INK, MUTED, method_style, new_figure


def plot_accuracy(rows: Sequence[Row], path: str | os.PathLike, *, num_classes: int | None = None) -> None:
    """Draws accuracy against k, one panel for each data set, model and number of tokens.

    Lines: a model trained with dense attention that attends to k keys at inference, one line a method; dense attention
    itself is the horizontal line. Stars: models that run with the attention they were trained with. Rows of other
    kinds, such as a model trained with leverage attention run densely, or one whose features were probed, are left to
    the table.

    Args:
      rows: Of `evaluate_attention` or `read_results`.
      path: Ends in .png or .svg.
      num_classes: Draws the accuracy of guessing among so many classes.

    Raises:
      ValueError: There are no rows, or see `tidy_rows`; for another suffix.
    """
    panels = settings(row for row in rows if row.get("accuracy") is not None)
    if not panels:
        raise ValueError("rows must not be empty, and have an accuracy: there is nothing to plot")
    with new_figure(path, width=1.2 + 6.0 * len(panels), height=4.4) as figure:
        figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, ((dataset, model, tokens), group) in zip(axes, panels.items(), strict=True):
            ax.set_title(f"{dataset}, model {model}, {tokens} tokens", pad=12, fontweight="bold")
            _draw_panel(ax, group, None if num_classes is None else 100 / num_classes)
        axes[0].set_ylabel("top-1 accuracy (%)")


def _draw_panel(ax: Any, rows: Sequence[Row], guess: float | None) -> None:
    retrofits: dict[str, list[Row]] = {}
    trained: dict[str, list[Row]] = {}
    dense = None
    for row in rows:
        if row["attention"] == row["trained_with"] == "dense":
            dense = 100 * row["accuracy"]
        elif is_as_trained(row):
            trained.setdefault(label(row), []).append(row)
        elif row["trained_with"] == "dense":
            retrofits.setdefault(label(row), []).append(row)

    sizes = sorted({row["k"] for group in (*retrofits.values(), *trained.values()) for row in group})
    sizes = sizes or [rows[0]["tokens"]]
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(k) for k in sizes])
    ax.set_xticks([], minor=True)
    ax.set_xlim(sizes[0] / 1.12, sizes[-1] * 1.12)
    ax.set_xlabel("keys per query, k")
    ax.grid(axis="x", visible=False)

    labels = []
    for method, group in retrofits.items():
        colour, marker = method_style(group[0]["attention"])
        heavy = method == "leverage"
        k, accuracy = _points(group)
        ax.plot(k, accuracy, color=colour, marker=marker, lw=2.6 if heavy else 1.6, ms=6, zorder=4 if heavy else 3)
        if k[-1] == sizes[-1]:
            labels.append((accuracy[-1], method, colour))
        else:
            ax.annotate(method, (k[-1], accuracy[-1]), xytext=(8, -4), textcoords="offset points", color=colour)
    for method, group in trained.items():
        colour, _ = method_style(group[0]["attention"])
        k, accuracy = _points(group)
        legend = f"trained with {method} attention"
        ax.plot(k, accuracy, ls=":", lw=1.2, color=colour, marker="*", ms=15, mec="white", zorder=5, label=legend)
        for point in zip(k, accuracy, strict=True):
            left = point[0] == sizes[-1]  # the names of the lines stand to the right
            style = {"xytext": (-9 if left else 9, -11), "ha": "right" if left else "left", "fontweight": "bold"}
            ax.annotate(f"{point[1]:.1f}", point, textcoords="offset points", color=colour, **style)
    if dense is not None:
        ax.axhline(dense, color=INK, lw=1.2, ls=(0, (5, 3)), zorder=2)
        labels.append((dense, "dense", INK))
    low = min([100 * row["accuracy"] for row in rows] + ([] if guess is None else [guess]))
    high = max(100 * row["accuracy"] for row in rows)
    pad = 0.06 * max(high - low, 1.0)
    ax.set_ylim(max(low - pad, -1), high + pad)
    if guess is not None:
        ax.axhline(guess, color=MUTED, lw=1.0, ls=":", zorder=1)
        labels.append((guess, "guessing", MUTED))
    _label_right(ax, labels)
    if retrofits:
        ax.plot([], [], color=MUTED, marker="o", ms=5, lw=1.6, label="trained densely, k keys at inference")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize=9, handlelength=2.4)


def _points(rows: Sequence[Row]) -> tuple[list[int], list[float]]:
    return [row["k"] for row in rows], [100 * row["accuracy"] for row in rows]


def _label_right(ax: Any, labels: list[tuple[float, str, str]]) -> None:
    """Names the lines at the right edge, in their colours."""
    low, high = ax.get_ylim()
    heights = spread([height for height, _, _ in labels], gap=0.062 * (high - low))
    for (height, text, colour), at in zip(labels, heights, strict=True):
        ax.annotate(
            f"{text} {height:.1f}",
            (1, height),
            xytext=(1.025, (at - low) / (high - low)),
            xycoords=ax.get_yaxis_transform(),
            textcoords="axes fraction",
            va="center",
            color=colour,
            fontweight="bold" if text in ("leverage", "dense") else "normal",
            annotation_clip=False,
        )


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Moves heights apart as little as needed, in order, so that no two are nearer than `gap`.

    The least squares solution: isotonic regression of the heights less their rank times the gap.
    """
    order = np.argsort(heights, kind="stable")
    blocks: list[list[float]] = []  # runs of labels that touch, by their common offset
    for rank, index in enumerate(order):
        blocks.append([heights[index] - gap * rank])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    offsets = [float(np.mean(block)) for block in blocks for _ in block]
    spread_out = [0.0] * len(heights)
    for rank, index in enumerate(order):
        spread_out[index] = offsets[rank] + gap * rank
    return spread_out
