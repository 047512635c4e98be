"""The least time that any attention can take: its inputs read once and its outputs written once."""

import jax
import jax.numpy as jnp

from levattn.bench.cases import Case
from levattn.bench.timing import Budget, JaxProgram


def floor_bytes(case: Case, head_dim: int, itemsize: int, backward: bool) -> int:
    """Bytes that must move through memory.

    Forward: Q, K and V in, O out. With the backward pass: the cotangent of O in as well, and those of Q, K and V out.

    Args:
      case: The shape.
      head_dim: Head width.
      itemsize: Bytes of a number.
      backward: Whether the backward pass is part of it.
    """
    num_arrays = 8 if backward else 4
    return num_arrays * case.batch * case.num_tokens * case.num_heads * head_dim * itemsize


def copy_bandwidth(num_bytes: int, budget: Budget | None = None) -> float:
    """Bytes a second that the device moves when it reads one array and writes another, counting both.

    Args:
      num_bytes: Size of each; it must not fit into a cache.
      budget: Of the measurement.
    """
    array = jnp.ones(num_bytes // 4, jnp.float32)
    ms = JaxProgram(lambda x: (x + 1,), (jax.block_until_ready(array),)).time(budget or Budget(seconds=0.3)).ms
    return 2 * num_bytes / (ms / 1000)
