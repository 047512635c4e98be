"""Parameters of a scanned model from those of an unrolled one, and back."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

Params = Mapping[str, Any]


def unrolled_to_scan(params: Params) -> dict[str, Any]:
    """Stacks `encoderblock_0`, `encoderblock_1`, ... into one `encoderblock` with a leading axis of layers.

    Args:
      params: Of a model with `scan=False`.

    Returns:
      Parameters of the same model with `scan=True`; those outside the blocks are shared, not copied.

    Raises:
      ValueError: If the blocks are not numbered from 0 without a gap.
    """
    rest, blocks = _split_blocks(params)
    names = [f"encoderblock_{layer}" for layer in range(len(blocks))]
    if not blocks or set(names) != set(blocks):
        raise ValueError(f"params['Transformer'] must hold encoderblock_0, encoderblock_1, ...; found {sorted(blocks)}")
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(blocks[name] for name in names))
    return {**params, "Transformer": {**rest, "encoderblock": stacked}}


def scan_to_unrolled(params: Params) -> dict[str, Any]:
    """Splits a stacked `encoderblock` into `encoderblock_0`, `encoderblock_1`, ...: undoes `unrolled_to_scan`.

    Args:
      params: Of a model with `scan=True`.

    Returns:
      Parameters of the same model with `scan=False`.

    Raises:
      ValueError: If there is no stacked block.
    """
    rest, blocks = _split_blocks(params)
    if set(blocks) != {"encoderblock"}:
        raise ValueError(f"params['Transformer'] must hold one stacked 'encoderblock'; found {sorted(blocks)}")
    stacked = blocks["encoderblock"]
    depth = len(jax.tree.leaves(stacked)[0])
    layers = {f"encoderblock_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(depth)}
    return {**params, "Transformer": {**rest, **layers}}


def _split_blocks(params: Params) -> tuple[dict[str, Any], dict[str, Any]]:
    rest, blocks = {}, {}
    for name, value in params["Transformer"].items():
        (blocks if name.startswith("encoderblock") else rest)[name] = value
    return rest, blocks
