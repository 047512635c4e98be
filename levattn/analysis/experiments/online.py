"""What scores on arrival cost against scores among all keys, in keys that pass the threshold."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from levattn.analysis.experiments.form import COLOURS, Row, distinct, mark_values
from levattn.analysis.style import INK
from levattn.attention import AttentionSpec
from levattn.attention.causal import select_causal
from levattn.core.functions import Power
from levattn.core.online import online_leverage_scores
from levattn.core.sensitivity import sensitivity_bounds
from levattn.universal.sets import passes


def run_online(sizes: Sequence[int] = (128, 512, 2048), width: int = 16, eps: float = 0.1, seed: int = 0) -> list[Row]:
    """How many keys pass eps by their score among all keys, by the score on arrival, and in what a causal layer holds.

    Args:
      sizes: Numbers of keys, S.
      width: D.
      eps: The threshold.
      seed: Of the drawn keys.
    """
    rows = []
    spec = AttentionSpec("leverage", k=None, eps=eps, causal=True)
    for num_keys in sizes:
        rng = np.random.default_rng(seed)
        gaussian = rng.normal(size=(num_keys, width))
        orders = {
            "Gaussian": gaussian,
            "growing": gaussian * np.linspace(0.1, 1, num_keys)[:, None],
            "new directions": gaussian * (np.arange(width) * num_keys // width <= np.arange(num_keys)[:, None]),
        }
        for name, keys in orders.items():
            offline = sensitivity_bounds(keys, Power(2))
            keys = jnp.asarray(keys, jnp.float32)
            online = np.asarray(jax.jit(online_leverage_scores)(keys))
            selection = jax.jit(select_causal, static_argnums=1)(keys[None, :, None], spec)
            held = np.sum(np.asarray(selection.scores)[0, 0] > -np.inf, axis=1)
            rows.append(
                {
                    "keys": name,
                    "num_keys": num_keys,
                    "offline_set": int(passes(offline, eps).sum()),
                    "online_set": int(passes(online, eps).sum()),
                    "most_held": int(held.max()),
                    "bound": int(min(num_keys, width / eps)),
                    "offline_sum": float(offline.sum()),
                    "online_sum": float(online.sum()),
                }
            )
    return rows


def draw_online(rows: Sequence[Row], figure: Any) -> None:
    ax = figure.subplots()
    styles = (
        ("offline_set", "all keys known", ":"),
        ("online_set", "score on arrival", "-"),
        ("most_held", "held", "--"),
    )
    for name, colour in zip(distinct(rows, "keys"), COLOURS, strict=False):
        chosen = [row for row in rows if row["keys"] == name]
        sizes = [row["num_keys"] for row in chosen]
        for column, label, ls in styles:
            ax.plot(sizes, [r[column] for r in chosen], color=colour, ls=ls, marker="o", ms=4, label=f"{name}: {label}")
    ax.plot(sizes, [row["bound"] for row in chosen], color=INK, lw=1, ls=(0, (1, 3)), label="D / eps")
    ax.set(xscale="log", xlabel="keys", ylabel="keys that pass eps", title="Online scores against offline scores")
    mark_values(ax, sizes)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
