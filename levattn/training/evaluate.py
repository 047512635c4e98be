"""Evaluating a trained classifier under any attention: every combination in one pass over the data."""

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jaxtyping import PyTree

from levattn.data import Source, open_source, output_shape
from levattn.models import ModelConfig, ViT, patch_grid
from levattn.training.attentions import (
    Attention,
    attention_of,
    describe,
    describe_options,
    mean_kept,
    method_name,
    scanned,
    unrolled,
)
from levattn.training.attentions import expand as expand
from levattn.training.attentions import with_attention as with_attention
from levattn.training.config import MeshConfig, TrainConfig
from levattn.training.passes import timed_passes
from levattn.training.sharding import make_mesh, replicated
from levattn.training.step import make_eval_step
from levattn.training.trained import load_trained as load_trained


def evaluate_attention(
    config: TrainConfig,
    params: PyTree,
    attentions: Sequence[Attention] | None = None,
    *,
    source: Source | None = None,
    batch_size: int | None = None,
) -> list[dict[str, Any]]:
    """Top-1, top-5 and loss under each attention, every example counted exactly once.

    Each batch is read once and run under every attention in turn, so that all see the same images under the same load
    of the machine. Seconds are those of the computation, from batch on device to sums on host, without compilation.

    Args:
      config: Of the run that made the parameters.
      params: The parameters; attention has none of its own, so they fit every method.
      attentions: What to put into the layers. None: what the model was trained with.
      source: What to evaluate on; None: the run's own evaluation split.
      batch_size: None: that of a training microbatch.

    Returns:
      One row an attention: dataset, model, tokens, attention, k, options, trained_with, accuracy, examples, seconds,
      top5, loss, images_per_second. `k` is the number of keys that a query sees, local tokens apart; with `eps` the
      most it can be, and where layers differ their mean. `options` are those of the attention beside k.

    Raises:
      ValueError: Number of classes, channels or image size do not fit the model; k exceeds the tokens; an unknown
        method.
    """
    source = open_source(config.data, config.data.eval_split) if source is None else source
    if source.num_classes != config.model.num_classes:
        raise ValueError(
            f"{source.name} has {source.num_classes} classes, the checkpoint was trained on "
            f"{config.model.num_classes}: evaluate on a data set with the same classes, or see "
            "levattn.training.classes.on_classes_of"
        )
    models, params, rows = prepare(config, params, attentions, source)
    mesh = make_mesh(MeshConfig())  # all devices there are: the run may have had others
    steps = [make_eval_step(dataclasses.replace(config, model=model), ViT(model), mesh) for model in models]
    totals = [collections.Counter() for _ in models]
    seconds = [0.0] * len(models)
    batch_size = batch_size or config.batch_size // config.accumulate_steps
    params = jax.device_put(params, replicated(mesh))
    for results in timed_passes(steps, params, source, config.data, mesh, batch_size):
        for i, (sums, elapsed) in enumerate(results):
            totals[i].update(sums)
            seconds[i] += elapsed
    return [row | _measured(total, elapsed) for row, total, elapsed in zip(rows, totals, seconds, strict=True)]


def prepare(
    config: TrainConfig, params: PyTree, attentions: Sequence[Attention] | None, source: Source
) -> tuple[list[ModelConfig], PyTree, list[dict[str, Any]]]:
    """The model under every attention, parameters that fit them all, and the columns that tell the rows apart.

    Args:
      config: Of the run that made the parameters.
      params: The parameters.
      attentions: What to put into the layers. None: what the model was trained with.
      source: What the models are to run on.

    Raises:
      ValueError: Channels or image size do not fit the model; k exceeds the tokens; an unknown method.
    """
    num_tokens = _fitting_tokens(config, params, source)
    trained_with = attention_of(config.model)
    attentions = [trained_with] if attentions is None else attentions
    model = config.model
    by_layer = any(isinstance(attention, tuple) for attention in attentions)
    # One traced block for all layers compiles many times faster, and there may be dozens of attentions to compile.
    model, params = unrolled(model, params) if by_layer else scanned(model, params)
    models = [with_attention(model, attention) for attention in attentions]
    rows = [
        {
            "dataset": source.name,
            "model": config.model.variant,
            "tokens": num_tokens,
            "attention": method_name(attention),
            "k": mean_kept(attention, num_tokens, model.dims.width // model.dims.num_heads),
            "options": describe_options(attention),
            "trained_with": describe(trained_with),
        }
        for attention in attentions
    ]
    return models, params, rows


def _fitting_tokens(config: TrainConfig, params: PyTree, source: Source) -> int:
    """The tokens of an image, once its channels and size are known to fit the parameters."""
    shape = output_shape(source, config.data)
    rows, columns = patch_grid(config.model, shape)
    channels = params["embedding"]["kernel"].shape[2]
    if shape[2] != channels:
        raise ValueError(f"{source.name} has {shape[2]} channels, the checkpoint was trained on {channels}")
    if config.model.posemb == "learned" and rows * columns != (learned := params["pos_embedding"].shape[1]):
        raise ValueError(
            f"{source.name} at {shape[0]}x{shape[1]} has {rows * columns} patches, the checkpoint has positions for "
            f"{learned}: set data.image_size to the size it was trained on"
        )
    return rows * columns + config.model.num_prefix_tokens


def _measured(total: collections.Counter, seconds: float) -> dict[str, Any]:
    count = int(total["count"])
    return {
        "accuracy": float(total["top1"]) / count,
        "examples": count,
        "seconds": seconds,
        "top5": float(total["top5"]) / count,
        "loss": float(total["loss"]) / count,
        "images_per_second": count / seconds,
    }
