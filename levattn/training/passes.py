"""Several programs over the same batches: all see the same images, under the same load of the machine."""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from jaxtyping import PyTree

from levattn.data import DataConfig, Source, eval_batches
from levattn.training.sharding import put_batch


def timed_passes(
    steps: Sequence[Callable[[PyTree, dict], Any]],
    params: PyTree,
    source: Source,
    data: DataConfig,
    mesh: Mesh,
    batch_size: int,
) -> Iterator[list[tuple[Any, float]]]:
    """Runs every step on every batch of a source; each batch is read once.

    Args:
      steps: Jitted functions from parameters and a batch.
      params: Of the model, on the devices.
      source: What to run on, every example once.
      data: How its images are prepared.
      mesh: Over which batches are split.
      batch_size: The most examples at a time, over all devices. Batches are of one size, which is no larger than fills
        their number, so that little is computed for rows of padding; each device gets the same number of rows.

    Yields:
      For each batch the results of the steps, on the host, and the seconds each took, from batch on device to result
      on host, without compilation.
    """
    num_batches = -(-len(source) // batch_size)
    batch_size = -(-len(source) // num_batches)
    batch_size = -(-batch_size // mesh.size) * mesh.size // jax.process_count()
    shards = {"shard_index": jax.process_index(), "num_shards": jax.process_count()}
    with contextlib.closing(eval_batches(source, data, batch_size=batch_size, **shards)) as batches:
        for number, batch in enumerate(batches):
            batch = put_batch(batch, mesh)
            results = []
            for step in steps:
                if number == 0:
                    jax.block_until_ready(step(params, batch))  # compiles
                start = time.perf_counter()
                result = jax.device_get(step(params, batch))
                results.append((result, time.perf_counter() - start))
            yield results
