"""Pictures of what attention looks like: captured mass by layer and by head, scores, and how alike sets of keys are."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from levattn.analysis.attention_study import Study
from levattn.analysis.style import INK, MUTED, method_style, new_figure

_SAME_COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "osD^vX"


def plot_study(study: Study, folder: str | os.PathLike) -> list[Path]:
    """Draws a study as five PNGs.

    captured.png: share of attention on each set, alone and with the window, by layer, one panel a k. heavy.png: share
    of the heavy entries on it, against its size, one panel a threshold. heads.png: the share of attention of the first
    method as heat maps of layer and head. scores.png: leverage scores of each layer. overlap.png: of the first method,
    how alike the sets of heads, views and checkpoints are, by layer.

    Args:
      study: From `study_attention`.
      folder: Where to.

    Returns:
      The files.

    Raises:
      OSError: They cannot be written.
    """
    folder = Path(folder)
    by_set = _by_set(study.sets)
    paths = [folder / name for name in ("captured.png", "heavy.png", "heads.png", "scores.png", "overlap.png")]
    sizes = sorted({key[1] for key in by_set})
    first = next(iter(by_set))[0]
    of_first = {key: rows for key, rows in by_set.items() if key[0] == first}
    with new_figure(paths[0], width=0.8 + 2.9 * len(sizes), height=3.7) as figure:
        _draw_captured(figure, by_set, sizes, study)
    thresholds = [name.removeprefix("heavy_") for name in study.heads[0] if name.startswith("heavy_")]
    with new_figure(paths[1], width=0.8 + 2.9 * len(thresholds), height=3.7) as figure:
        _draw_heavy(figure, study.summary, thresholds)
    with new_figure(paths[2], width=0.9 + 2.9 * len(of_first), height=3.3) as figure:
        _draw_heads(figure, of_first)
    with new_figure(paths[3], width=6.4, height=3.8) as figure:
        _draw_scores(figure, study.heads)
    with new_figure(paths[4], width=0.8 + 2.9 * len(of_first), height=3.7) as figure:
        _draw_overlap(figure, of_first)
    return paths


def by_layer(rows: Sequence[Mapping[str, Any]], column: str) -> list[float]:
    """The mean over heads of a column, from the first layer to the last; NaN where no head has a value."""
    layers: dict[int, list[float]] = {}
    for row in rows:
        layers.setdefault(row["layer"], []).extend([] if row[column] is None else [row[column]])
    return [float(np.mean(values)) if values else float("nan") for _, values in sorted(layers.items())]


def _by_set(rows) -> dict[tuple[str, int], list]:
    """Rows by method with its options, and k: 0 where a threshold, or each head by itself, says how many."""
    groups: dict[tuple[str, int], list] = {}
    for row in rows:
        groups.setdefault((f"{row['attention']} {row['options']}".rstrip(), row["k"] or 0), []).append(row)
    return groups


def _draw_captured(figure, by_set, sizes, study):
    axes = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    window = by_layer(study.heads, "local_mass")
    for ax, size in zip(axes, sizes, strict=True):
        for (name, k), rows in by_set.items():
            if k == size:
                colour, marker = method_style(rows[0]["attention"])
                ax.plot(by_layer(rows, "mass"), label=name, color=colour, marker=marker, ms=4)
                ax.plot(by_layer(rows, "mass_with_local"), ls=":", lw=1.4, color=colour)
        ax.plot(window, color=INK, lw=1.2, ls="--", label="window of the query alone")
        ax.set(title=_size(size), xlabel="layer", ylim=(0, 1))
    axes[0].set_ylabel("share of dense attention")
    axes[0].plot([], [], color=MUTED, ls=":", lw=1.4, label="set and window")
    _legend_below(figure, axes[0])


def _draw_heavy(figure, summary, thresholds):
    axes = figure.subplots(1, len(thresholds), squeeze=False, sharey=True)[0]
    methods = _by_set([row | {"k": None} for row in summary])
    for ax, eps in zip(axes, thresholds, strict=True):
        for (name, _), rows in methods.items():
            colour, marker = method_style(rows[0]["attention"])
            rows = sorted(rows, key=lambda row: row["kept"])
            sizes = [row["kept"] for row in rows]
            for column, style in (
                (f"covered_{eps}", {"marker": marker, "ms": 4, "label": name}),
                (
                    f"covered_{eps}_with_local",
                    {"ls": ":", "lw": 1.4},
                ),
            ):
                ax.plot(sizes, [np.nan if row[column] is None else row[column] for row in rows], color=colour, **style)
        ax.set(title=f"entries of at least {eps}", xlabel="keys in the set", ylim=(0, 1))
    axes[0].set_ylabel("share of them that is covered")
    axes[0].plot([], [], color=MUTED, ls=":", lw=1.4, label="set and window")
    _legend_below(figure, axes[0])


def _draw_heads(figure, of_first):
    axes = figure.subplots(1, len(of_first), squeeze=False, sharey=True)[0]
    for ax, ((name, k), rows) in zip(axes, of_first.items(), strict=True):
        shape = rows[-1]["layer"] + 1, rows[-1]["head"] + 1
        drawn = ax.imshow(
            np.reshape([row["mass"] for row in rows], shape), cmap="viridis", vmin=0, vmax=1, aspect="auto"
        )
        ax.set(title=f"{name.split()[0]}, {_size(k)}", xlabel="head")
        ax.grid(False)
    axes[0].set_ylabel("layer")
    _whole_ticks(axes)
    figure.colorbar(drawn, ax=axes[-1], label="share of attention")


def _draw_scores(figure, heads):
    ax = figure.subplots()
    quantiles = {name: by_layer(heads, name) for name in heads[0] if name.startswith("score_q")}
    layers = np.arange(len(next(iter(quantiles.values()))))
    for low, high, alpha in (("score_q05", "score_q95", 0.18), ("score_q25", "score_q75", 0.35)):
        label = f"{int(low[-2:])} to {high[-2:]} % of the keys"
        ax.fill_between(layers, quantiles[low], quantiles[high], color="#D55E00", alpha=alpha, lw=0, label=label)
    ax.plot(layers, quantiles["score_q50"], color="#D55E00", label="median")
    ax.plot(layers, quantiles["score_q100"], color=INK, lw=1, marker="^", ms=4, label="largest")
    if "prefix_score" in heads[0]:
        ax.plot(layers, by_layer(heads, "prefix_score"), color="#0072B2", lw=1, marker="s", ms=4, label="class token")
    ax.set(yscale="log", xlabel="layer", ylabel="leverage score, mean over heads")
    ticks = [digit * 10.0**power for power in range(-6, 1) for digit in (1, 2, 5)]
    low, high = ax.get_ylim()
    ax.set_yticks([tick for tick in ticks if low <= tick <= min(high, 1)])
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_yticks([], minor=True)
    _legend_below(figure, ax)


def _draw_overlap(figure, of_first):
    axes = figure.subplots(1, len(of_first), squeeze=False, sharey=True)[0]
    for ax, ((name, k), rows) in zip(axes, of_first.items(), strict=True):
        columns = [column for column in rows[0] if column.startswith("same_") and not column.endswith("_std")]
        for number, column in enumerate(columns):
            again, place = divmod(number, len(_MARKERS))
            marker = _MARKERS[(place + again) % len(_MARKERS)]
            style = {"color": _SAME_COLOURS[place], "marker": marker, "ms": 4, "ls": "--" if again else "-"}
            ax.plot(by_layer(rows, column), label=_same_name(column), **style)
        ax.plot(by_layer(rows, "chance"), color=MUTED, lw=1.2, ls=":", label="drawn at random")
        ax.set(title=f"{name.split()[0]}, {_size(k)}", xlabel="layer", ylim=(0, 1))
    axes[0].set_ylabel("Jaccard index of kept patches")
    _legend_below(figure, axes[0])


def _same_name(column: str) -> str:
    name = column.removeprefix("same_")
    named = {"heads": "other heads", "flip": "mirrored image", "colour": "other colours", "crop": "another crop"}
    return named.get(name, f"checkpoint {name}")


def _size(k: int) -> str:
    return f"k = {k}" if k else "k by head or threshold"


def _whole_ticks(axes):
    for ax in axes:
        ax.xaxis.get_major_locator().set_params(integer=True)


def _legend_below(figure, ax):
    _whole_ticks(figure.axes)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9)
