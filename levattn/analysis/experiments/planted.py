"""Do the scores find the few planted keys among many long ones, and up to which noise?"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from levattn.analysis.experiments.form import Row, distinct
from levattn.analysis.style import method_style
from levattn.core.functions import Power
from levattn.core.sensitivity import sensitivity_bounds
from levattn.universal.planted import planted_keys


def run_planted(
    sizes: Sequence[int] = (256, 1024, 4096),
    noises: Sequence[float] = (0.02, 0.05, 0.08, 0.1, 0.12, 0.14, 0.16, 0.2),
    width: int = 32,
    num_planted: int = 8,
    num_seeds: int = 10,
) -> list[Row]:
    """Which share of the planted keys is among as many keys of highest score, over seeds.

    Args:
      sizes: Numbers of keys, S.
      noises: Standard deviations of the noise, see `levattn.universal.planted.planted_keys`.
      width: D.
      num_planted: Planted keys.
      num_seeds: Draws of each.
    """
    rows = []
    for num_keys in sizes:
        for noise in noises:
            shares = {"leverage": [], "row_norm": [], "random": []}
            for seed in range(num_seeds):
                rng = np.random.default_rng((seed, num_keys))
                case = planted_keys(rng, num_keys, width, num_planted, noise=noise)
                scores = {
                    "leverage": sensitivity_bounds(case.keys, Power(2)),
                    "row_norm": np.linalg.norm(case.keys, axis=1),
                    "random": rng.random(num_keys),
                }
                for name, score in scores.items():
                    best = np.argsort(-score)[:num_planted]
                    shares[name].append(np.isin(best, case.planted).mean())
            row = {"keys": num_keys, "noise": float(noise)} | {name: float(np.mean(x)) for name, x in shares.items()}
            rows.append(row | {"all_by_leverage": float(np.mean(np.equal(shares["leverage"], 1)))})
    return rows


def draw_planted(rows: Sequence[Row], figure: Any) -> None:
    ax = figure.subplots()
    for num_keys, ls in zip(sorted(distinct(rows, "keys")), (":", "--", "-", "-."), strict=False):
        chosen = [row for row in rows if row["keys"] == num_keys]
        for method in ("leverage", "row_norm", "random"):
            colour, marker = method_style(method)
            label = f"{method}, {num_keys} keys" if method == "leverage" else method if ls == ":" else None
            x, y = [row["noise"] for row in chosen], [row[method] for row in chosen]
            ax.plot(x, y, color=colour, marker=marker, ls=ls, ms=5, label=label)
    ax.set(xlabel="noise", ylabel="share of the planted keys found", title="A few planted keys among long ones")
    ax.legend()
