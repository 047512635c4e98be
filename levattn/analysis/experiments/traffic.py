"""What travels between devices that share one long input: selected keys, or all of them. By formula, not measured."""

from collections.abc import Sequence
from typing import Any

from levattn.analysis.experiments.form import COLOURS, Row, distinct
from levattn.attention import AttentionSpec
from levattn.attention import sequence_parallel as attention
from levattn.universal import sharded


def run_traffic(
    sizes: Sequence[int] = tuple(1 << i for i in range(10, 21, 2)),
    devices: Sequence[int] = (2, 4, 8, 16, 32, 64),
    k: int = 128,
    num_heads: int = 16,
    width: int = 64,
    eps: float = 0.05,
    bytes_per_number: int = 2,
) -> list[Row]:
    """Bytes that each device receives for the attention of one layer, and for the universal sets of its keys.

    Attention: `sequence_parallel_attention`, which moves k keys and values a head, against a gather of all keys and
    values and against ring attention, which moves as much in pieces. Universal sets: `sharded_universal_set` of each
    head, in float32 as it computes by default, against a gather of all keys; the tokens from which it pays grow as
    devices * width / eps, since that is how many slots travel.

    Args:
      sizes: Tokens, S.
      devices: Devices that the tokens are split over; each must divide every size.
      k: Keys kept a head.
      num_heads: H.
      width: D.
      eps: Of the universal sets.
      bytes_per_number: Of keys and values in attention; 2: bfloat16.

    Raises:
      ValueError: k exceeds a number of tokens, or tokens do not divide among devices.
    """
    rows = []
    spec = AttentionSpec("leverage", k=k)
    for num_tokens in sizes:
        for num_devices in devices:
            if num_tokens % num_devices:
                raise ValueError(f"{num_tokens} tokens do not divide among {num_devices} devices: choose other sizes")
            attended = attention.communicated_bytes(
                spec,
                batch=1,
                num_tokens=num_tokens,
                num_heads=num_heads,
                head_dim=width,
                num_devices=num_devices,
                bytes_per_number=bytes_per_number,
            )
            of_set = sharded.communicated_bytes(num_tokens, width, eps, num_devices)
            rows.append(
                {
                    "tokens": num_tokens,
                    "devices": num_devices,
                    "lev_attention": attended.selected,
                    "all_keys_and_values": attended.gathered,
                    "ring_attention": attended.ring,
                    "universal_set": num_heads * of_set["selected"],
                    "all_keys": num_heads * of_set["gathered"],
                }
            )
    return rows


def draw_traffic(rows: Sequence[Row], figure: Any) -> None:
    figure.set_size_inches(9, 4.2)
    axes = figure.subplots(1, 2, sharey=True)
    contents = (
        ("Attention", ("lev_attention", "LevAttention"), ("all_keys_and_values", "all-gather, or ring attention")),
        ("Universal sets", ("universal_set", "sharded_universal_set"), ("all_keys", "gather of all keys")),
    )
    devices = distinct(rows, "devices")
    for ax, (title, *series) in zip(axes, contents, strict=True):
        for (column, label), colour in zip(series, COLOURS, strict=False):
            for num_devices, ls in zip(dict.fromkeys((min(devices), max(devices))), ("--", "-"), strict=False):
                chosen = [row for row in rows if row["devices"] == num_devices]
                x, y = [row["tokens"] for row in chosen], [row[column] for row in chosen]
                ax.plot(x, y, color=colour, ls=ls, marker="o", ms=4, label=f"{label}, {num_devices} devices")
        ax.set_xscale("log", base=2)
        ax.set(yscale="log", xlabel="tokens", title=title)
        ax.legend(fontsize=7)
    axes[0].set_ylabel("bytes that a device receives, a layer")
