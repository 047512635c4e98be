"""One step of training, and evaluation. The same code runs on one device, on many, and in several processes."""

import collections
import contextlib
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from levattn.data import Source, eval_batches, normalize
from levattn.training.config import DistillConfig, TrainConfig
from levattn.training.distill import Teacher, distill_losses, weighted_sum
from levattn.training.losses import cross_entropy, mixup, smooth_targets
from levattn.training.sharding import BATCH_AXES, batch_sharding, put_batch, replicated
from levattn.training.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


def make_train_step(
    config: TrainConfig,
    model: nn.Module,
    tx: optax.GradientTransformation,
    schedule_fn: optax.Schedule,
    plan: TrainState,
    teacher: Teacher | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Builds the jitted step: normalise, MixUp, forward, loss, gradients, clip, update, average.

    A step whose loss, gradient norm or norm of new parameters is not finite changes neither parameters nor anything
    else that is learned. With `config.nonfinite` "skip" the next step goes on from there; with "stop" the state is
    marked (`step` becomes `~step`, which is negative) and stays as it is, whatever steps are dispatched behind it.

    Args:
      config: The run.
      model: Called as `model.apply({"params": ...}, images, train=True, rngs=...)`.
      tx: From `make_optimizer`.
      schedule_fn: From `make_optimizer`, for the metrics.
      plan: From `plan_state`; the step keeps its shardings.
      teacher: To learn from, if `config.distill` asks for one. It sees the same images, mixed ones included.

    Returns:
      A function from the state, which it consumes, and a batch of `put_batch` to the new state and the metrics:
      loss, accuracy (of a classifier, against the unmixed labels), grad_norm (before clipping), param_norm (after the
      update, left out or not), learning_rate and nonfinite (whether it was left out); with a teacher also each part of
      the loss, as loss_logits and the like.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, plan)
    mesh = plan.step.sharding.mesh
    gradient_fn = make_gradient_fn(config, model, mesh, teacher)

    def train_step(state: TrainState, batch: Batch, teacher_params: PyTree) -> tuple[TrainState, Metrics]:
        grads, metrics = gradient_fn(state, batch, teacher_params)
        # Infinite, too, where squares of finite gradients are past float32: an update by them would be one by zero.
        grad_norm = optax.tree.norm(grads)
        new_state = state.apply_gradients(grads, tx, config.ema_decay)
        param_norm = optax.tree.norm(new_state.params)
        is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm) & jnp.isfinite(param_norm)
        new_state = _guarded(state, new_state, is_finite, config.nonfinite)
        metrics |= {
            "grad_norm": grad_norm,
            "param_norm": param_norm,
            "learning_rate": schedule_fn(state.step),
            "nonfinite": ~is_finite,
        }
        return new_state, metrics

    step_fn = jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh), shardings.params if teacher else None),
        out_shardings=(shardings, replicated(mesh)),
    )
    # An argument, as a constant of the program would be copied to every device and into the compiled code.
    teacher_params = teacher.params if teacher else None
    return lambda state, batch: step_fn(state, batch, teacher_params)


def make_gradient_fn(
    config: TrainConfig, model: nn.Module, mesh: Mesh, teacher: Teacher | None = None, apply_fn: Callable | None = None
) -> Callable[[TrainState, Batch, PyTree], tuple[PyTree, Metrics]]:
    """The part of a step before the update, to be traced: gradients of a batch, and loss and accuracy.

    The batch is global, so a mean over it is already the mean over devices and processes; the compiler adds the
    communication. Gradients are accumulated over `config.accumulate_steps` microbatches of equal size, so their mean
    is that of the whole batch. Rows whose `mask` is 0, where a batch has one, have no part in loss, gradients, accuracy
    and MixUp: means are over the others.

    Args:
      config: The run.
      model: As for `make_train_step`.
      mesh: Over which the batch is split.
      teacher: As for `make_train_step`.
      apply_fn: In place of `model.apply`; returns its outputs and more metrics, which are averaged as the loss is.

    Returns:
      A function from the state, the batch and the parameters of the teacher to the gradients and the metrics.
    """
    num_micro = config.accumulate_steps
    num_classes = config.model.num_classes
    seed = config.seed
    apply_fn = apply_fn or (lambda *args, **kwargs: (model.apply(*args, **kwargs), {}))

    def loss_fn(params, teacher_params, images, targets, labels, weights, key):
        def mean(rows):
            return (rows if weights is None else rows * weights).mean()

        rngs = dict(zip(("dropout", "selection"), jax.random.split(key), strict=True))
        outputs, metrics = apply_fn({"params": params}, images, train=True, rngs=rngs, return_features=True)
        if config.is_classifier:
            metrics |= {"accuracy": mean(outputs[0].argmax(-1) == labels)}
        if config.distill is None:
            loss = mean(cross_entropy(outputs[0], targets, config.loss.kind))
            return loss, {"loss": loss} | metrics
        taught = teacher.model.apply({"params": teacher_params}, images, return_features=True)
        parts = distill_losses(config.distill, outputs, taught)
        if config.distill.weight_labels:
            parts["labels"] = cross_entropy(outputs[0], targets, config.loss.kind)
        parts = {name: mean(part) for name, part in parts.items()}
        loss = weighted_sum(config.distill, parts)
        return loss, {"loss": loss} | metrics | {f"loss_{name}": part for name, part in parts.items()}

    grad_fn = jax.grad(loss_fn, has_aux=True)

    def split(rows):
        # Microbatch i takes rows i, i + n, ...: every device keeps the rows it has.
        micro = rows.reshape(-1, num_micro, *rows.shape[1:]).swapaxes(0, 1)
        return jax.lax.with_sharding_constraint(micro, NamedSharding(mesh, PartitionSpec(None, BATCH_AXES)))

    def accumulate(params, teacher_params, key, *batch):
        if num_micro == 1:
            return grad_fn(params, teacher_params, *batch, key)

        def add(total, micro):
            return jax.tree.map(jnp.add, total, grad_fn(params, teacher_params, *micro)), None

        micro = (*jax.tree.map(split, batch), jax.random.split(key, num_micro))
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad_fn, params, teacher_params, *batch, key)
        )
        total, _ = jax.lax.scan(add, zeros, micro)
        return jax.tree.map(lambda x: x / num_micro, total)

    def gradients(state: TrainState, batch: Batch, teacher_params: PyTree) -> tuple[PyTree, Metrics]:
        mixup_key, model_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), state.step))
        labels = batch["label"]
        images = normalize(batch["image"], config.data)
        if config.is_classifier:
            targets = smooth_targets(labels, num_classes, config.loss.label_smoothing)
        else:  # nothing looks at them
            targets = jnp.zeros((len(labels), 1))
        mixed = mixup(mixup_key, images, targets, config.loss.mixup_alpha)
        mask, weights = batch.get("mask"), None
        if mask is not None:
            alone = jnp.roll(mask, 1) == 0  # the neighbour is no image to mix with
            mixed = [
                jnp.where(jnp.expand_dims(alone, range(1, own.ndim)), own, both)
                for own, both in zip((images, targets), mixed, strict=True)
            ]
            weights = mask / jnp.maximum(mask.mean(), 1 / len(mask))  # a mean of these is one over the rows that count
        return accumulate(state.params, teacher_params, model_key, *mixed, labels, weights)

    return gradients


def _guarded(old: TrainState, new: TrainState, is_finite: jax.Array, mode: str) -> TrainState:
    """`new`, or where it would not be finite `old`: a step further in mode "skip", marked in mode "stop"."""
    if mode == "skip":
        left_out = old.step + 1
    else:
        is_marked = old.step < 0
        left_out = jnp.where(is_marked, old.step, ~old.step)
        is_finite &= ~is_marked
    chosen = jax.tree.map(lambda a, b: jnp.where(is_finite, a, b), new, old)
    return chosen.replace(step=jnp.where(is_finite, new.step, left_out))


def make_eval_step(
    config: TrainConfig, model: nn.Module, mesh: Mesh, teacher: Teacher | None = None
) -> Callable[..., Metrics]:
    """Builds the jitted evaluation of one batch.

    Args:
      config: The run; its loss is taken without label smoothing.
      model: As for `make_train_step`, called with `train=False`.
      mesh: Over which the batches are split.
      teacher: Of a model that has no classes: the loss is then 1 - the cosine similarity of the embeddings.

    Returns:
      A function from parameters and a batch to the sums of loss, top1, top5 and count over the rows whose mask is 1;
      without classes to those of loss and count. Ties among logits go to the lower class, so an untrained head of zeros
      scores chance.
    """
    if not config.is_classifier:
        return _make_embedding_eval_step(config, model, mesh, teacher)
    num_classes = config.model.num_classes

    def eval_step(params, batch: Batch) -> Metrics:
        # Methods that draw at random get a stream: without one every layer would draw the same keys.
        rngs = {"selection": jax.random.key(config.seed)}
        logits = model.apply({"params": params}, normalize(batch["image"], config.data), train=False, rngs=rngs)
        labels, mask = batch["label"], batch["mask"]
        _, ranked = jax.lax.top_k(logits.astype(jnp.float32), min(5, num_classes))
        hits = ranked == labels[:, None]
        loss = cross_entropy(logits, smooth_targets(labels, num_classes), config.loss.kind)
        return _masked_sums({"loss": loss, "top1": hits[:, 0], "top5": hits.any(axis=1)}, mask)

    return jax.jit(eval_step, out_shardings=replicated(mesh))


def _make_embedding_eval_step(config: TrainConfig, model: nn.Module, mesh: Mesh, teacher: Teacher) -> Callable:
    wanted = DistillConfig("embedding", weight_logits=0.0, weight_features=1.0, weight_tokens=0.0)

    def eval_step(params, batch: Batch, teacher_params) -> Metrics:
        images, rngs = normalize(batch["image"], config.data), {"selection": jax.random.key(config.seed)}
        outputs = model.apply({"params": params}, images, rngs=rngs, return_features=True)
        taught = teacher.model.apply({"params": teacher_params}, images, return_features=True)
        return _masked_sums({"loss": distill_losses(wanted, outputs, taught)["features"]}, batch["mask"])

    step_fn = jax.jit(eval_step, out_shardings=replicated(mesh))
    return lambda params, batch: step_fn(params, batch, teacher.params)


def _masked_sums(per_example: dict[str, jax.Array], mask: jax.Array) -> Metrics:
    per_example = per_example | {"count": jnp.ones_like(mask)}
    return {name: jnp.where(mask > 0, value, 0).sum(dtype=jnp.float32) for name, value in per_example.items()}


def evaluate(
    eval_step: Callable[..., Metrics], params: PyTree, source: Source, config: TrainConfig, mesh: Mesh
) -> dict[str, float]:
    """Mean loss, and of classifiers top-1 and top-5, over every example of a source, each counted once.

    Args:
      eval_step: From `make_eval_step`.
      params: Of the model, global arrays.
      source: What to evaluate on.
      config: Of the data and the batch size: that of a microbatch, as its memory is known to suffice.
      mesh: Over which batches are split.

    Returns:
      The means, and `count`, the number of examples: that of the source.
    """
    shards = {"shard_index": jax.process_index(), "num_shards": jax.process_count()}
    batch_size = config.batch_size // config.accumulate_steps // jax.process_count()
    batches = eval_batches(source, config.data, batch_size=batch_size, **shards)
    totals = collections.Counter()
    with contextlib.closing(batches):
        for batch in batches:
            totals.update(jax.device_get(eval_step(params, put_batch(batch, mesh))))
    count = totals.pop("count")
    return {name: float(total / count) for name, total in totals.items()} | {"count": int(count)}
