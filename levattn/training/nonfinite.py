"""When a loss or a gradient is not finite: which step, which records, which layer first."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh
from jaxtyping import PyTree

from levattn.models import ViT, scan_to_unrolled
from levattn.training.config import TrainConfig
from levattn.training.distill import Teacher
from levattn.training.state import TrainState
from levattn.training.step import Batch, make_gradient_fn
from levattn.training.workdir import write_json

REPORT_FILE = "nonfinite.json"

_OUTPUT = "output of "
_SHOWN = 16


class NonFiniteError(FloatingPointError):
    """A loss or a gradient that is not finite has ended a run; nothing learned from it, and nothing of it was saved."""


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """Where values that are not finite are.

    Attributes:
      first: The first, in the order of computation: a parameter, the output of a module, the loss, the gradient of a
        parameter (the last layer's come first), or the update.
      parameters: All parameters with such values.
      outputs: All modules whose output has such values, in the order of computation.
      gradients: All parameters whose gradient has such values.
    """

    first: str
    parameters: list[str]
    outputs: list[str]
    gradients: list[str]


def diagnose(
    config: TrainConfig, mesh: Mesh, params: PyTree, step: int, batch: Batch, teacher: Teacher | None
) -> Diagnosis:
    """Repeats the forward and backward pass of a step, looking at every module's output and every gradient.

    The same arithmetic, but compiled anew and without rematerialisation or scanned layers: where a scanned model has
    dropout it draws other masks than the step did, and a value that just overflowed may not do so again.

    Args:
      config: The run.
      mesh: Of the run.
      params: As before the step.
      step: Number of steps taken after it.
      batch: Of the step, on the devices.
      teacher: Of the run.

    Returns:
      What was found. Cost: one compilation and about two steps; needs the memory of a step without rematerialisation.
    """
    model = ViT(dataclasses.replace(config.model, remat="none", scan=False))
    order: dict[str, None] = {}  # of completion, so that a layer comes before the block around it

    def apply_fn(*args, **kwargs):
        counts = {}

        def count(next_fn, args, kwargs, context):
            result = next_fn(*args, **kwargs)
            if context.method_name == "__call__":
                name = "/".join(context.module.path)
                order.setdefault(name)
                counts[_OUTPUT + name] = counts.get(_OUTPUT + name, 0) + _num_nonfinite(result)
            return result

        with nn.intercept_methods(count):
            return model.apply(*args, **kwargs), counts

    gradient_fn = make_gradient_fn(config, model, mesh, teacher, apply_fn)

    @jax.jit
    def look(params, batch, teacher_params):
        params = scan_to_unrolled(params) if config.model.scan else params
        grads, metrics = gradient_fn(TrainState(jnp.int32(step - 1), params, None, None), batch, teacher_params)
        counts = {name: value for name, value in metrics.items() if name.startswith(_OUTPUT)}
        return metrics["loss"], counts, *(jax.tree.map(_num_nonfinite, tree) for tree in (params, grads))

    loss, outputs, params, grads = jax.device_get(look(params, batch, teacher.params if teacher else None))
    bad_params, bad_grads = (
        [name for name, count in flatten_dict(tree, sep="/").items() if count] for tree in (params, grads)
    )
    bad_outputs = [name for name in order if outputs[_OUTPUT + name]]
    if bad_params:
        first = f"parameter {bad_params[0]}"
    elif bad_outputs:
        first = f"output of {bad_outputs[0] or 'the model'}"
    elif not np.isfinite(loss):
        first = "loss, from finite outputs of the model"
    elif bad_grads:
        first = f"gradient of {max(bad_grads, key=lambda name: _place(name, list(order)))}"
    else:
        first = "parameters after the update, from finite gradients (or a gradient norm past float32)"
    return Diagnosis(first, bad_params, bad_outputs, bad_grads)


def stop(
    workdir: Path, step: int, metrics: dict[str, Any], records: np.ndarray, source: str, found: Diagnosis, why: str
) -> NonFiniteError:
    """The error that ends a run, once all that is known has been written to `nonfinite.json` in its workdir.

    Args:
      workdir: Of the run.
      step: Whose update was left out.
      metrics: Of the step.
      records: Indices in the source of the batch's examples, those of this process.
      source: Name of the source.
      found: By `diagnose`.
      why: What ended the run, for the message.
    """
    values = {name: float(metrics[name]) for name in ("loss", "grad_norm")}
    report = {"step": step, "source": source, "records": [int(index) for index in records]}
    report |= dataclasses.asdict(found) | {name: str(value) for name, value in values.items()}  # JSON has no NaN
    if jax.process_index() == 0:
        write_json(workdir / REPORT_FILE, report)
    shown = ", ".join(map(str, report["records"][:_SHOWN])) + (", ..." if len(records) > _SHOWN else "")
    return NonFiniteError(
        f"step {step}: loss {values['loss']:.4g}, gradient norm {values['grad_norm']:.4g}. {why}\n"
        f"First value that is not finite: {found.first}.\n"
        f"Records of {source} in the batch: {shown} (all of them, and every layer concerned: "
        f"{str(workdir / REPORT_FILE)!r}).\n"
        "The update was left out, and checkpoints hold nothing of it. Look at these records; lower "
        "optimizer.learning_rate or set optimizer.grad_clip_norm; or leave such steps out with --config.nonfinite=skip."
    )


def _num_nonfinite(tree: PyTree) -> jax.Array:
    leaves = (leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact))
    # A float, to be summed over microbatches beside the loss; of a count only whether it is 0 matters.
    return sum((~jnp.isfinite(leaf)).sum().astype(jnp.float32) for leaf in leaves) + jnp.float32(0)


def _place(parameter: str, order: list[str]) -> int:
    """Where in the forward pass a parameter is used; those of a module around others, as position embeddings, first."""
    module = parameter.rpartition("/")[0]
    is_outer = module == "" or any(name.startswith(f"{module}/") for name in order)
    return -1 if is_outer or module not in order else order.index(module)
