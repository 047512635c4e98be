"""Softmax needs every key where x^2 needs few: queries and keys that are the same random signs."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from levattn.analysis.experiments.form import COLOURS, Row, mark_values
from levattn.analysis.style import MUTED
from levattn.universal import universal_set
from levattn.universal.planted import random_signs


def run_random_signs(
    sizes: Sequence[int] = (64, 128, 256, 512, 1024, 2048), width: int = 64, eps: float = 0.1, seed: int = 0
) -> list[Row]:
    """How many keys have an entry >= eps when queries and keys are the same random signs: softmax against x^2.

    Args:
      sizes: Numbers of keys, S.
      width: D.
      eps: The threshold.
      seed: Of the signs.
    """
    rows = []
    for num_keys in sizes:
        keys = random_signs(np.random.default_rng(seed), num_keys, width)
        products = keys.astype(np.float64) @ keys.T
        softmax, square = np.exp(products - products.max(axis=1, keepdims=True)), products**2
        heavy = {
            name: _heavy_columns(x / x.sum(1, keepdims=True), eps) for name, x in (("exp", softmax), ("x2", square))
        }
        found = universal_set(keys, eps)
        rows.append(
            {
                "keys": num_keys,
                "softmax_heavy_keys": int(heavy["exp"].sum()),
                "x2_heavy_keys": int(heavy["x2"].sum()),
                "x2_set": len(found),
                "x2_bound": int(min(num_keys, width / eps)),
                "x2_missed": int(heavy["x2"].sum() - heavy["x2"][found.indices].sum()),
            }
        )
    return rows


def _heavy_columns(attention: Float[np.ndarray, "T S"], eps: float) -> np.ndarray:
    return np.any(attention >= eps, axis=0)


def draw_random_signs(rows: Sequence[Row], figure: Any) -> None:
    ax = figure.subplots()
    sizes = [row["keys"] for row in rows]
    for column, label, colour, marker in (
        ("softmax_heavy_keys", "softmax: keys with an entry ≥ eps", COLOURS[1], "o"),
        ("x2_set", "x²: universal set", COLOURS[0], "s"),
        ("x2_bound", "x²: bound D / eps on any universal set", MUTED, None),
    ):
        ls = ":" if marker is None else "-"
        ax.plot(sizes, [row[column] for row in rows], color=colour, marker=marker, ls=ls, label=label)
    ax.set(xscale="log", xlabel="keys", ylabel="keys needed", title="Random signs: softmax needs every key")
    ax.set_yscale("symlog", linthresh=10)
    ax.set_ylim(bottom=-1)
    mark_values(ax, sizes)
    ax.legend()
