"""Evaluating a trained model under any attention: every combination in one pass over the data."""

import collections
import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from jaxtyping import PyTree

from levattn.attention import AttentionSpec, get_method
from levattn.attention.select import num_kept
from levattn.data import Source, eval_batches, open_source, output_shape
from levattn.models import ModelConfig, ViT, attention_specs, patch_grid
from levattn.training.checkpoint import Checkpointer
from levattn.training.config import MeshConfig, TrainConfig, from_config_dict
from levattn.training.export import load_params
from levattn.training.finetune import CHECKPOINT_FOLDER, EXPORT_FILE
from levattn.training.sharding import make_mesh, put_batch, replicated
from levattn.training.step import make_eval_step
from levattn.training.workdir import read_config


def load_trained(path: str | os.PathLike) -> tuple[TrainConfig, PyTree]:
    """The config and the parameters of a run.

    Args:
      path: Workdir of a run, finished or not, or a `.safetensors` or `.npz` file that a run exported. Of a run that is
        not finished the best checkpoint is read, else the newest.

    Returns:
      The config and the parameters that the run evaluates (their average, where it keeps one).

    Raises:
      FileNotFoundError: There is no run at `path`.
      ValueError: A file without the config that made it.
    """
    path = Path(path)
    if path.is_dir() and not (path / EXPORT_FILE).exists():
        return _load_checkpoint(path)
    file = path / EXPORT_FILE if path.is_dir() else path
    if not file.exists():
        raise FileNotFoundError(f"checkpoint={str(path)!r} does not exist: name a run's workdir or an exported file")
    params, config = load_params(file)
    if not config:
        raise ValueError(f"checkpoint={str(file)!r} holds no config: it was not exported by a run of train.py")
    return from_config_dict(TrainConfig, config), params


def _load_checkpoint(workdir: Path) -> tuple[TrainConfig, PyTree]:
    config = read_config(workdir)
    if config is None:
        raise FileNotFoundError(f"checkpoint={str(workdir)!r} is not the workdir of a run: it holds no config.json")
    config = from_config_dict(TrainConfig, config)
    name = "params" if config.ema_decay is None else "ema_params"
    source = open_source(config.data, config.data.eval_split)
    template = _params_template(config.model, output_shape(source, config.data))
    rank = {"best_metric": config.checkpoint.metric, "best_mode": config.checkpoint.best_mode}
    with Checkpointer(workdir / CHECKPOINT_FOLDER, **rank, read_only=True) as checkpointer:
        best = checkpointer.best_step()
        step = checkpointer.latest_step() if best is None else best
        if step is None:
            raise FileNotFoundError(f"checkpoint={str(workdir)!r} holds no checkpoint yet: the run saved none so far")
        return config, checkpointer.restore({name: template}, step, partial=True)[name]


def _params_template(model: ModelConfig, image_shape: tuple[int, ...]) -> PyTree:
    images = jax.ShapeDtypeStruct((1, *image_shape), "float32")
    shapes = jax.eval_shape(lambda x: ViT(model).init(jax.random.key(0), x), images)["params"]
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes)


def expand(base: AttentionSpec, methods: Sequence[str], ks: Sequence[int | None]) -> Iterator[AttentionSpec]:
    """The specs of every method with every k; dense attention has no k and comes once.

    Args:
      base: The other options, for all of them.
      methods: Names in the registry.
      ks: Numbers of keys; None: as many as `base.eps` can keep.

    Raises:
      ValueError: For an unknown method.
    """
    for method in methods:
        get_method(method)
        for k in ks if method != "dense" else ks[:1]:
            yield dataclasses.replace(base, method=method, k=k)


def on_source(config: TrainConfig, source: str) -> TrainConfig:
    """The config with other data, at the size of image that the run was trained on.

    Args:
      config: Of the run; where it leaves `data.image_size` open, its own data say what the size is.
      source: As `data.source`.
    """
    size = config.data.image_size
    if size is None:
        size = output_shape(open_source(config.data, config.data.eval_split), config.data)[0]
    return dataclasses.replace(config, data=dataclasses.replace(config.data, source=source, image_size=size))


def describe(spec: AttentionSpec) -> str:
    """A short name, such as "dense", "leverage k=16" or "leverage eps=0.1"."""
    if spec.method == "dense":
        return "dense"
    size = f"k={spec.k}" if spec.eps is None else f"eps={spec.eps}"
    return f"{spec.method} {size}"


def evaluate_attention(
    config: TrainConfig,
    params: PyTree,
    specs: Sequence[AttentionSpec] | None = None,
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
      specs: What to put into all layers. None: what the model was trained with.
      source: What to evaluate on; None: the run's own evaluation split.
      batch_size: None: that of a training microbatch.

    Returns:
      One row a spec: dataset, model, tokens, attention, k, trained_with, accuracy, examples, seconds, top5, loss,
      images_per_second. `k` is the number of keys that a query sees, local tokens apart; with `eps` the most it can be.

    Raises:
      ValueError: Number of classes, channels or image size do not fit the model; k exceeds the tokens; an unknown
        method.
    """
    source = open_source(config.data, config.data.eval_split) if source is None else source
    if source.num_classes != config.model.num_classes:
        raise ValueError(
            f"{source.name} has {source.num_classes} classes, the checkpoint was trained on "
            f"{config.model.num_classes}: evaluate on a data set with the same classes"
        )
    num_tokens = _fitting_tokens(config, params, source)
    head_dim = config.model.dims.width // config.model.dims.num_heads
    models = [config.model] if specs is None else [_with_attention(config.model, spec) for spec in specs]
    for spec in {spec for model in models for spec in attention_specs(model)}:
        if spec.method != "dense":
            num_kept(spec, num_tokens, head_dim)  # refuses a k that is too large

    mesh = make_mesh(MeshConfig())  # all devices there are: the run may have had others
    params = jax.device_put(params, replicated(mesh))
    steps = [make_eval_step(dataclasses.replace(config, model=model), ViT(model), mesh) for model in models]
    totals = [collections.Counter() for _ in models]
    seconds = [0.0] * len(models)
    batch_size = batch_size or config.batch_size // config.accumulate_steps
    # The batch is split over the devices, so each must get the same number of rows; padding rows do not count.
    batch_size = -(-batch_size // mesh.size) * mesh.size // jax.process_count()
    shards = {"shard_index": jax.process_index(), "num_shards": jax.process_count()}
    with contextlib.closing(eval_batches(source, config.data, batch_size=batch_size, **shards)) as batches:
        for number, batch in enumerate(batches):
            batch = put_batch(batch, mesh)
            for i, step in enumerate(steps):
                if number == 0:
                    jax.block_until_ready(step(params, batch))  # compiles
                start = time.perf_counter()
                totals[i].update(jax.device_get(step(params, batch)))
                seconds[i] += time.perf_counter() - start

    return [
        _row(config, source, model, num_tokens, head_dim, total, elapsed)
        for model, total, elapsed in zip(models, totals, seconds, strict=True)
    ]


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


def _with_attention(model: ModelConfig, spec: AttentionSpec) -> ModelConfig:
    return dataclasses.replace(model, attention=spec, attention_by_layer=())


def _row(config, source, model, num_tokens, head_dim, total, seconds) -> dict[str, Any]:
    spec, count = model.attention, int(total["count"])
    mixed = len(set(attention_specs(model))) > 1
    return {
        "dataset": source.name,
        "model": config.model.variant,
        "tokens": num_tokens,
        "attention": "by layer" if mixed else spec.method,
        "k": num_tokens if spec.method == "dense" else num_kept(spec, num_tokens, head_dim),
        "trained_with": describe(config.model.attention) + (" by layer" if config.model.attention_by_layer else ""),
        "accuracy": float(total["top1"]) / count,
        "examples": count,
        "seconds": seconds,
        "top5": float(total["top5"]) / count,
        "loss": float(total["loss"]) / count,
        "images_per_second": count / seconds,
    }
