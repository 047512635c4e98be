"""What a run will cost, printed before anything is compiled."""

import dataclasses
import io
import math

import jax
import jax.numpy as jnp
import optax
from rich.console import Console
from rich.table import Table

from levattn.models import ModelConfig, ViT
from levattn.models.cost import activation_bytes, forward_flops


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Cost of a train step.

    Attributes:
      num_params: Parameters of the model.
      forward_flops: Of one image; a multiply and an add count as two.
      step_flops: Of a step over the whole batch, all devices together, backward pass included.
      params_bytes: Per device, and so are the rest: parameters, with their running average and the teacher's if there
        are any.
      optimizer_bytes: State of the optimiser.
      gradients_bytes: Gradients, and their accumulator if there are microbatches.
      activations_bytes: What the backward pass of a microbatch keeps; within a factor of two.
      device_bytes: Memory of a device, or None where it does not say (CPU).
    """

    num_params: int
    forward_flops: int
    step_flops: int
    params_bytes: int
    optimizer_bytes: int
    gradients_bytes: int
    activations_bytes: int
    device_bytes: int | None

    @property
    def total_bytes(self) -> int:
        """Memory per device."""
        return self.params_bytes + self.optimizer_bytes + self.gradients_bytes + self.activations_bytes

    def show(self, file: io.TextIOBase | None = None) -> None:
        """Prints a table (to stdout by default), and what to change if the memory is unlikely to do."""
        table = Table(title="estimate", title_justify="left", box=None, show_header=False)
        table.add_column()
        table.add_column(justify="right")
        table.add_row("parameters", _with_unit(self.num_params))
        table.add_row("forward pass, an image", _with_unit(self.forward_flops, "FLOP"))
        table.add_row("train step", _with_unit(self.step_flops, "FLOP"))
        for name in ("params", "optimizer", "gradients", "activations", "total"):
            table.add_row(f"memory per device: {name}", _with_unit(getattr(self, f"{name}_bytes"), "B"))
        console = Console(file=file, highlight=False, soft_wrap=True)
        console.print(table)
        if self.device_bytes is not None and self.total_bytes > self.device_bytes:
            console.print(
                f"This is more than the {_with_unit(self.device_bytes, 'B')} of a device. If it runs out, raise "
                "accumulate_steps or mesh.fsdp, or set model.remat='full'."
            )


def estimate(
    model: ModelConfig,
    image_shape: tuple[int, int, int],
    tx: optax.GradientTransformation,
    *,
    batch_size: int,
    num_devices: int = 1,
    num_shards: int = 1,
    accumulate_steps: int = 1,
    ema: bool = False,
    teacher: bool = False,
) -> Estimate:
    """Estimates a train step from shapes alone.

    Args:
      model: The network.
      image_shape: Height, width and channels.
      tx: The optimiser; the shapes of its state are the real ones.
      batch_size: Images a step, over all devices and microbatches.
      num_devices: Over which the batch is split.
      num_shards: Over which parameters and optimiser state are split (`mesh.fsdp`).
      accumulate_steps: Microbatches a step.
      ema: Whether there is a running average of the parameters.
      teacher: Whether a frozen copy of the model runs on every batch beside it.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    params = jax.eval_shape(ViT(model).init, jax.random.key(0), images)
    opt_state = jax.eval_shape(tx.init, params)
    params_bytes = _tree_bytes(params)
    flops = forward_flops(model, image_shape)
    images_in_memory = math.ceil(batch_size / num_devices / accumulate_steps)
    recomputed = model.remat in ("full", "nothing_saveable")
    return Estimate(
        num_params=sum(leaf.size for leaf in jax.tree.leaves(params)),
        forward_flops=flops,
        step_flops=((4 if recomputed else 3) + teacher) * flops * batch_size,
        params_bytes=params_bytes * (1 + ema + teacher) // num_shards,
        optimizer_bytes=_tree_bytes(opt_state) // num_shards,
        gradients_bytes=params_bytes * (2 if accumulate_steps > 1 else 1) // num_shards,
        activations_bytes=images_in_memory * activation_bytes(model, image_shape),
        device_bytes=(jax.local_devices()[0].memory_stats() or {}).get("bytes_limit"),
    )


def _tree_bytes(tree: object) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _with_unit(value: int | float, unit: str = "") -> str:
    """Three digits and a decimal prefix: 22.1 M, 4.61 GFLOP, 345 MB."""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 999.5 or prefix == "P":
            break
        value /= 1000
    digits = f"{value:.0f}" if value >= 99.95 or not prefix else f"{value:.3g}"
    return f"{digits} {prefix}{unit}".rstrip()
