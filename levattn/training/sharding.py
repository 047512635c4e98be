"""Where arrays live: a mesh of devices with one axis for data and one that also splits parameters (FSDP)."""

from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from levattn.training.config import MeshConfig

Tree = TypeVar("Tree")

BATCH_AXES = ("data", "fsdp")


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over all devices of all processes.

    Args:
      config: Sizes of the axes.
      devices: In place of all devices.

    Returns:
      A mesh with axes "data" and "fsdp", both partitioned by the compiler.

    Raises:
      ValueError: The axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    num_devices = len(devices)
    num_data = num_devices // config.fsdp if config.data == -1 else config.data
    if num_data * config.fsdp != num_devices:
        raise ValueError(
            f"mesh.data={config.data} times mesh.fsdp={config.fsdp} must give the {num_devices} devices there are"
        )
    return jax.make_mesh((num_data, config.fsdp), BATCH_AXES, axis_types=(AxisType.Auto,) * 2, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def state_sharding(shapes: Tree, mesh: Mesh, min_size: int) -> Tree:
    """Splits every large array over "fsdp", along its largest axis that the devices divide.

    The rule looks at shapes alone, so a parameter, its gradient, its moments and its average lie side by side.

    Args:
      shapes: A tree of arrays or `jax.ShapeDtypeStruct`s.
      mesh: From `make_mesh`.
      min_size: Arrays with fewer elements are replicated: sending them costs more than keeping them.

    Returns:
      The tree of shardings.
    """
    num_shards = mesh.shape["fsdp"]

    def rule(leaf):
        axes = [axis for axis, size in enumerate(leaf.shape) if size % num_shards == 0]
        if num_shards == 1 or leaf.size < min_size or not axes:
            return replicated(mesh)
        split = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*(None,) * split, "fsdp"))

    return jax.tree.map(rule, shapes)


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Turns the rows that each process has read into global arrays, split over all devices.

    Args:
      batch: This process's rows, as many on every process. `index` stays behind: devices have no use for it.
      mesh: From `make_mesh`.

    Returns:
      Global arrays of `jax.process_count()` times as many rows. The copy to the devices is asynchronous.
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, rows) for name, rows in batch.items() if name != "index"
    }


def check_batch_size(batch_size: int, mesh: Mesh, accumulate_steps: int = 1) -> None:
    """Raises a ValueError that names the nearest sizes if the devices and microbatches do not divide the batch."""
    unit = mesh.size * accumulate_steps
    if batch_size % unit:
        raise ValueError(
            f"{batch_size=} must be divisible by {unit}, the {mesh.size} devices times"
            f" accumulate_steps={accumulate_steps}; try {max(1, batch_size // unit) * unit}"
            f" or {(batch_size // unit + 1) * unit}"
        )
