"""What a universal set costs in accuracy: attention with weights |x|^p over the set against the same over all keys."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from levattn.analysis.experiments.form import COLOURS, Row, distinct, mark_values, panels
from levattn.analysis.experiments.heads import attention_matrix, gather_heads, singling_queries
from levattn.analysis.style import MUTED
from levattn.attention import AttentionSpec
from levattn.attention.layer import attend_coreset, choose_coreset
from levattn.attention.select import is_selected

_SLACK = 1e-3  # of the longest value: outputs are float32, some queries all but orthogonal to every key


def run_row_error(
    num_keys: int = 2000,
    width: int = 16,
    powers: Sequence[int | float] = (2, 4),
    thresholds: Sequence[float] = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    seed: int = 0,
    real_keys: Float[np.ndarray, "H S D"] | None = None,
    real_queries: Float[np.ndarray, "H T D"] | None = None,
    real_values: Float[np.ndarray, "H S E"] | None = None,
) -> list[Row]:
    """Error of `AttentionSpec("leverage", eps=eps, power=p)`, whose row totals are over all keys, and what bounds it.

    An output is off by at most (1 - the kept mass of its row) times the longest value: `bound`. Lengths are in units of
    the longest value of the head. Means are over the queries that are there, those given or 500 drawn ones; maxima
    also over the query (K^T K)^+ k of each of 500 keys, which looks at it alone as far as one can. The reference is
    float64. `largest_dropped` is the largest entry of the dense matrix whose key is not kept, and must be below eps;
    `rows_over_bound` counts the rows off by more than the bound and 0.001, and must be 0.

    Args:
      num_keys: Of the drawn keys.
      width: Of the drawn keys.
      powers: p, at least 1.
      thresholds: eps.
      seed: Of what is drawn.
      real_keys: Keys of some heads; the number kept and the means are over these.
      real_queries: Their queries; None: the keys themselves.
      real_values: Their values; None: drawn, as for drawn keys.

    Raises:
      ValueError: Queries or values without keys, or of other shapes.
    """
    heads_by_name = gather_heads(num_keys, width, seed, real_keys, real_queries)
    if real_values is not None and (real_keys is None or real_values.shape[:2] != real_keys.shape[:2]):
        raise ValueError(f"{real_values.shape=} must be (heads, keys, width) with real_keys of as many heads and keys")
    rng = np.random.default_rng((seed, 1))
    rows = []
    for name, (keys, queries) in heads_by_name.items():
        values = real_values if name == "real" and real_values is not None else rng.normal(size=keys.shape)
        values = values / np.linalg.norm(values, axis=-1).max(axis=-1)[:, None, None]
        num_given = queries.shape[1]
        queries = np.concatenate([queries, np.stack([singling_queries(k) for k in keys])], axis=1)
        queries, keys, values = (np.asarray(x, np.float32) for x in (queries, keys, values))
        for power in powers:
            dense = [attention_matrix(q, k, power) for q, k in zip(queries, keys, strict=True)]
            for eps in thresholds:
                measured = _measure(queries, keys, values, dense, power, float(eps), num_given)
                rows.append({"keys": name, "p": float(power), "eps": float(eps), **measured})
    return rows


def _measure(queries, keys, values, dense, power, eps: float, num_given: int) -> Row:
    spec = AttentionSpec("leverage", k=None, eps=eps, power=power, score_method="auto")
    outputs, kept = (np.asarray(x) for x in _attend(queries, keys, values, spec))
    largest, errors, bounds = 0.0, [], []
    for head, matrix in enumerate(dense):
        dropped = np.where(kept[head], 0, matrix)
        largest = max(largest, float(dropped.max()))
        errors.append(np.linalg.norm(outputs[head] - matrix @ values[head], axis=-1))
        bounds.append(dropped.sum(axis=1))
    errors, bounds = np.stack(errors), np.stack(bounds)
    return {
        "num_keys": keys.shape[1],
        "kept": float(kept.sum(axis=1).mean()),
        "largest_dropped": largest,
        "max_row_error": float(errors.max()),
        "mean_row_error": float(errors[:, :num_given].mean()),
        "max_bound": float(bounds.max()),
        "mean_bound": float(bounds[:, :num_given].mean()),
        "rows_over_bound": int(np.sum(errors > bounds + _SLACK)),
    }


@functools.partial(jax.jit, static_argnames="spec")
def _attend(
    queries: Float[Array, "H T D"], keys: Float[Array, "H S D"], values: Float[Array, "H S E"], spec: AttentionSpec
) -> tuple[Float[Array, "H T E"], Bool[Array, "H S"]]:
    """Outputs, and which keys are kept: the two steps of `lev_attention`."""
    # Heads run as elements of a batch, of one head each.
    query, key, value = (x[:, :, None] for x in (queries, keys, values))
    coreset = choose_coreset(query, key, value, spec)
    kept = is_selected(coreset.indices, coreset.valid, key.shape[1])
    return attend_coreset(query, key, value, coreset, spec)[:, :, 0], kept[:, 0]


def draw_row_error(rows: Sequence[Row], figure: Any) -> None:
    names = distinct(rows, "keys")
    axes = panels(figure, len(names))
    for ax, name in zip(axes, names, strict=True):
        for power, colour in zip(distinct(rows, "p"), COLOURS, strict=False):
            chosen = [row for row in rows if row["keys"] == name and row["p"] == power]
            eps = [row["eps"] for row in chosen]
            for column, label, ls, marker in (
                ("largest_dropped", "largest entry left out", "-", "o"),
                ("max_row_error", "largest row error", ":", "s"),
            ):
                # Where every key is kept there is no entry left out, and no point on a logarithmic axis.
                y = [row[column] or float("nan") for row in chosen]
                ax.plot(eps, y, color=colour, ls=ls, marker=marker, ms=4, label=f"p = {power:g}: {label}")
        ax.plot(eps, eps, color=MUTED, lw=1, label="eps")
        ax.set(xscale="log", yscale="log", xlabel="eps", title=f"{name} keys ({chosen[0]['num_keys']})")
        mark_values(ax, eps)
    axes[0].set_ylabel("entry, or error over the longest value")
    axes[0].legend(fontsize=7)
