"""How large universal sets are for |x|^p, on drawn keys and on those of a model, and that they lack no heavy key."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from levattn.analysis.experiments.form import COLOURS, Row, distinct, mark_values, panels
from levattn.analysis.experiments.heads import attention_matrix, gather_heads, singling_queries
from levattn.core.functions import Power
from levattn.core.sensitivity import sensitivity_bounds
from levattn.universal.sets import passes


def run_set_size(
    num_keys: int = 2000,
    width: int = 16,
    powers: Sequence[float] = (1.0, 2.0, 4.0),
    thresholds: Sequence[float] = (0.02, 0.05, 0.1, 0.2, 0.5),
    seed: int = 0,
    real_keys: Float[np.ndarray, "H S D"] | None = None,
    real_queries: Float[np.ndarray, "H T D"] | None = None,
) -> list[Row]:
    """Size of universal sets for |x|^p against eps, and the recall of heavy entries, which must be 1.

    Recall is over the entries >= eps of all queries: those given, or 500 of the keys' own distribution, and for each
    of 500 keys the query (K^T K)^+ k that looks at it alone as far as one can.

    Args:
      num_keys: Of the drawn keys.
      width: Of the drawn keys.
      powers: p.
      thresholds: eps.
      seed: Of the drawn keys.
      real_keys: Keys of some heads; sizes are means over these.
      real_queries: Their queries.

    Raises:
      ValueError: Queries without keys, or of other heads or widths.
    """
    rows = []
    for name, (keys, queries) in gather_heads(num_keys, width, seed, real_keys, real_queries).items():
        for power in powers:
            found = [_sets_of_head(k, q, power, thresholds) for k, q in zip(keys, queries, strict=True)]
            for i, eps in enumerate(thresholds):
                sizes, heavy, missed = np.array([head[i] for head in found]).T
                rows.append(
                    {
                        "keys": name,
                        "p": float(power),
                        "eps": float(eps),
                        "num_keys": keys.shape[1],
                        "set": float(np.mean(sizes)),
                        "share": float(np.mean(sizes)) / keys.shape[1],
                        "bound": float(min(keys.shape[1], keys.shape[2] ** max(1, power / 2) / eps)),
                        "heavy_keys": float(np.mean(heavy)),
                        "recall": 1.0 - float(np.sum(missed) / max(1, np.sum(heavy))),
                    }
                )
    return rows


def _sets_of_head(keys, queries, power: float, thresholds: Sequence[float]) -> list[tuple[int, int, int]]:
    """For each threshold: keys in the set, keys that hold a heavy entry, and those of them that are not in the set."""
    keys, queries = np.asarray(keys, np.float64), np.asarray(queries, np.float64)
    sensitivities = sensitivity_bounds(keys, Power(float(power)))
    highest = np.max(attention_matrix(np.concatenate([queries, singling_queries(keys)]), keys, power), axis=0)
    found = []
    for eps in thresholds:
        in_set, heavy = passes(sensitivities, float(eps)), highest >= eps
        found.append((int(in_set.sum()), int(heavy.sum()), int((heavy & ~in_set).sum())))
    return found


def draw_set_size(rows: Sequence[Row], figure: Any) -> None:
    names = distinct(rows, "keys")
    axes = panels(figure, len(names))
    for ax, name in zip(axes, names, strict=True):
        for power, colour in zip(distinct(rows, "p"), COLOURS, strict=False):
            chosen = [row for row in rows if row["keys"] == name and row["p"] == power]
            eps = [row["eps"] for row in chosen]
            ax.plot(eps, [row["share"] for row in chosen], color=colour, marker="o", label=f"p = {power:g}: set")
            heavy = [row["heavy_keys"] / row["num_keys"] for row in chosen]
            ax.plot(eps, heavy, color=colour, marker=".", ls=":", label=f"p = {power:g}: keys with an entry ≥ eps")
        ax.set(xscale="log", xlabel="eps", title=f"{name} keys ({chosen[0]['num_keys']})")
        mark_values(ax, eps)
    axes[0].set_ylabel("share of all keys")
    axes[0].legend(fontsize=7)
